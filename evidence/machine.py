"""What ran: processor, cores, threads and versions, and nothing that tells one machine of a kind from another."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import numpy as np

from tattn import __version__

from .tables import Row


def description(*packages: str) -> Row:
    """Processor, cores and versions, of some packages as well."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return {
        "cpu": _processor(),
        "cores": os.cpu_count() or 0,
        "threads": 1,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "tattn": __version__,
        "numpy": np.__version__,
        "blas": f"{blas.get('name', '')} {blas.get('version', '')}".strip(),
        **{package: _version(package) for package in packages},
    }


def _processor() -> str:
    """The model that the processor says it is."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
