"""Options, and the fixture that checks, warms up, times and records a case.

One process measures one library with one number of threads: `python -m benchmarks` starts them with the variables that BLAS
libraries read when they are loaded.
"""

from __future__ import annotations

import gc
import importlib.metadata
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

import tattn
from tattn.evidence.machine import description

from .libraries import NAMES, Array, Library, Run, make_library
from .problem import Problem


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--library", choices=NAMES, default="numpy")
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu")
    parser.addoption("--threads", type=int, default=1, help="what the variables of the environment say")
    parser.addoption("--quick", action="store_true", help="smaller sizes, less repetition: not to be quoted")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What tells kinds of machines apart, in place of what tells machines apart."""
    machine_info.clear()
    machine_info.update(description())
    del machine_info["threads"], machine_info["matplotlib"]
    for package in ("jax", "cupy-cuda13x", "simplicial-attention", "performer-pytorch", "pytest-benchmark"):
        try:
            machine_info[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            machine_info[package] = "not installed"
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


class Measure:
    """Checks a case against the definition, times it, and records all that the report says of it."""

    def __init__(self, benchmark: Any, library: Library, threads: int, quick: bool) -> None:
        self.benchmark, self.library, self.threads, self.quick = benchmark, library, threads, quick

    def __call__(
        self,
        group: str,
        method: str,
        problem: Problem,
        run: Run,
        *,
        plan: tattn.Plan | None = None,
        checked: bool = True,
        beside: Callable[[], float] | None = None,
        **more: Any,
    ) -> float:
        """Least seconds of a call.

        `checked`: whether the error has a bound that it must keep. `beside`, of seconds, runs before every round: what
        the call is compared with takes turns with it. `more` is recorded.
        """
        library = self.library
        result, first = self._timed(run)
        values = [library.numpy(x) for x in result]
        errors = problem.errors(values, plan, checked)
        outputs = sum(x.nbytes for x in values)
        result, values = [], []
        # The first call of all loads and compiles.
        took = self._timed(run)[1] if first < 2 else first
        rounds = int(np.clip((0.05 if self.quick else 2.0) / took, 2, 100))
        seen: list[float] = []

        def before() -> None:
            if beside is not None:
                seen.append(beside())

        def once() -> None:
            library.wait(run())

        library.begin_peak()
        self.benchmark.pedantic(once, setup=before, rounds=rounds)
        peak = library.peak()
        polynomial = plan is not None and plan.method == "polynomial"
        self.benchmark.group = group
        self.benchmark.extra_info.update(
            {
                "group": group,
                "library": library.name,
                "device": library.device_name() or library.device,
                "threads": self.threads,
                "method": method,
                "gradient": "gradient_error" in errors,
                "n": len(problem.grad),
                "views": problem.views,
                "dim": problem.arrays[0].shape[1],
                "value_dim": problem.grad.shape[1],
                "degree": plan.degree if plan and polynomial else "",
                "rank": plan.rank if plan and polynomial else "",
                "certified": plan.error if plan and polynomial and plan.certified else "",
                "gradient_error": "",
                **errors,
                # Inputs were there before; one result is held by the caller.
                "peak_bytes": "" if peak is None else max(0, peak - outputs),
                "bare_seconds": min(seen) if seen else "",
                **more,
            }
        )
        return float(self.benchmark.stats.stats.min)

    def timed(self, run: Run) -> float:
        """Seconds of one call, waited for."""
        return self._timed(run)[1]

    def _timed(self, run: Run) -> tuple[Sequence[Array], float]:
        start = time.perf_counter()
        result = run()
        self.library.wait(result)
        return result, time.perf_counter() - start


@pytest.fixture
def measure(benchmark: Any, library: Library, threads: int, quick: bool) -> Measure:
    return Measure(benchmark, library, threads, quick)
