"""Which array libraries are installed here, which of them work, and what they see."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

from . import Backend, _by_module

# As Python imports them; others plug in.
LIBRARIES = ("numpy", "torch", "jax", "cupy", "dask", "array_api_strict")


@dataclass(frozen=True)
class Seen:
    """What is seen of one array library.

    Attributes
    ----------
    module : str
        What Python imports it as.
    installed : bool
    version : str
        Empty if the library does not say.
    problem : str
        Why it cannot be used; empty if it can, or if it is not installed.
    devices : tuple of str
        The devices that it sees.
    threads : int or None
        Among how many threads a call shares its rows; None where the library goes its own way.
    """

    module: str
    installed: bool = True
    version: str = ""
    problem: str = ""
    devices: tuple[str, ...] = ()
    threads: int | None = None

    def __str__(self) -> str:
        name = f"{self.module} {self.version}".rstrip()
        if not self.installed:
            return f"{name}: not installed"
        if self.problem:
            return f"{name}: cannot be used: {self.problem}"
        shared = "" if self.threads is None else f"; {self.threads} thread{'s' * (self.threads != 1)}"
        return f"{name}: {', '.join(self.devices)}{shared}"


def libraries() -> Iterator[Seen]:
    """Every library that has a backend, one after the other. Each that is installed is imported for this."""
    plugged = {entry.name for entry in metadata.entry_points(group="tattn.backends")}
    for module in (*LIBRARIES, *sorted(plugged.difference(LIBRARIES))):
        yield library(module)


def library(module: str) -> Seen:
    """What is seen of the library of this name: whatever it raises is a reason not to use it."""
    try:
        if find_spec(module) is None:
            return Seen(module, installed=False)
        backend = _by_module(module)
        if backend is None:
            raise ImportError("no backend is plugged in")
        devices = tuple(backend.devices())
        _try(backend)
        threads = backend.threads() if backend.writable else None
    except Exception as error:
        reason = " ".join(str(error).split())
        return Seen(module, version=_version(module), problem=f"{type(error).__name__}: {reason}")
    return Seen(module, version=_version(module), devices=devices, threads=threads)


def _try(backend: Backend) -> None:
    """Raise where the library cannot multiply two matrices on the device it takes by itself."""
    if backend.xp is None:
        return
    ones = backend.xp.ones((2, 2))
    if not (backend.to_numpy(ones @ ones) == 2).all():
        raise ArithmeticError("the product of two matrices of ones is wrong")


def _version(module: str) -> str:
    """What the library says, or what its package does where the library could not be imported."""
    told = getattr(sys.modules.get(module), "__version__", None)
    names = [] if told else metadata.packages_distributions().get(module, [])
    return str(told) if told else metadata.version(names[0]) if names else ""
