"""Options and fixtures.

One process measures one library with one number of threads: `python -m benchmarks` starts them with the variables that BLAS
libraries read when they are loaded.
"""

from __future__ import annotations

import gc
import os
from typing import Any

import pytest

from evidence.machine import description

from .libraries import NAMES, Library, make_library
from .measure import Measure

# The variable that says what is measured; of the process that starts the others.
COMMIT = "TATTN_MEASURED_COMMIT"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--library", choices=NAMES, default="numpy")
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu")
    parser.addoption("--threads", type=int, default=1, help="what the variables of the environment say")
    parser.addoption("--quick", action="store_true", help="smaller sizes, less repetition: not to be quoted")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What tells kinds of machines apart, in place of what tells machines apart."""
    machine_info.clear()
    rivals = ("simplicial-attention", "performer-pytorch")
    machine_info.update(description("torch", "jax", "cupy-cuda13x", *rivals, "pytest-benchmark"))
    del machine_info["threads"]
    machine_info["commit"] = os.environ.get(COMMIT, "unknown")
    machine_info["quick"] = config.getoption("quick")


@pytest.fixture(scope="session")
def quick(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("quick"))


@pytest.fixture(scope="session")
def threads(pytestconfig: pytest.Config) -> int:
    return int(pytestconfig.getoption("threads"))


@pytest.fixture(scope="session")
def library(pytestconfig: pytest.Config, threads: int) -> Library:
    found = make_library(pytestconfig.getoption("library"), pytestconfig.getoption("device"), threads)
    # What libraries load stays: collecting garbage need not look at it before every case.
    gc.collect()
    gc.freeze()
    return found


@pytest.fixture
def measure(benchmark: Any, library: Library, threads: int, quick: bool) -> Measure:
    return Measure(benchmark, library, threads, quick)
