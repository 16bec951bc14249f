"""One case: checked, warmed up, timed and recorded."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import tattn

from .libraries import Array, Library, Run
from .problem import Problem

# Seconds after which threads that a library shares a product among no longer spin, in wait for the next.
_ASLEEP = 0.3
# Of the table, with those that times add to it; a case leaves those empty that say nothing of it.
COLUMNS = (
    "group",
    "library",
    "device",
    "threads",
    "method",
    "gradient",
    "n",
    "views",
    "dim",
    "value_dim",
    "degree",
    "rank",
    "certified",
    "certified_gradient",
    "gradient_error",
    "error",
    "error_of_spread",
    "peak_bytes",
    "bare_seconds",
    "system_share",
)


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
        rounds: int = 2,
        rounding: float = 1e-5,
    ) -> float:
        """Least seconds of a call.

        `checked`: whether the error has a bound that it must keep. `beside`, of seconds, runs before every round: what
        the call is compared with takes turns with it. `rounds`: at least so many. `rounding`: as of `Problem.errors`.
        """
        library = self.library
        result, first = self._timed(run)
        values = [library.numpy(x) for x in result]
        errors = problem.errors(values, plan, checked, rounding)
        outputs = sum(x.nbytes for x in values)
        result, values = [], []
        # The first call of all loads and compiles. Memory is that of a second one, with nothing beside it, or of all rounds
        # where calls are long.
        warm = first < 2 or library.compiles or beside is not None
        library.begin_peak()
        took = self.timed(run) if warm else first
        peak = library.peak()
        rounds = int(np.clip((0.03 if self.quick else 2.0) / took, rounds, 100))
        seen: list[float] = []

        def before() -> None:
            if beside is not None:
                seen.append(beside())
                if self.threads > 1:
                    time.sleep(_ASLEEP)

        def once() -> None:
            library.wait(run())

        self.benchmark.pedantic(once, setup=before, rounds=rounds)
        peak = peak if warm else library.peak()
        polynomial = plan is not None and plan.method == "polynomial"
        self._record(
            group,
            method,
            gradient="gradient_error" in errors,
            n=len(problem.grad),
            views=problem.views,
            dim=problem.arrays[0].shape[1],
            value_dim=problem.grad.shape[1],
            **(_promised(plan) if plan and polynomial else {}),
            **errors,
            # Inputs were there before; one result is held by the caller. 0: what the process had was enough, as it may be
            # where threads have come and gone.
            peak_bytes="" if peak is None or self.threads > 1 else max(0, peak - outputs),
            bare_seconds=min(seen) if seen else "",
        )
        return float(self.benchmark.stats.stats.min)

    def times(
        self,
        group: str,
        method: str,
        run: Run,
        beside: Run | None = None,
        *,
        plan: tattn.Plan | None = None,
        rounds: int = 5,
        **facts: Any,
    ) -> None:
        """Least seconds of calls whose results are checked elsewhere, and of what takes turns with them, both warm.

        `facts`: columns of the table, of those in `COLUMNS`.
        """
        rounds = 2 if self.quick else rounds
        seen: list[float] = []
        for warmed in (run, beside):
            if warmed is not None:
                self.timed(warmed)
        self.benchmark.pedantic(
            lambda: self.library.wait(run()),
            setup=lambda: None if beside is None else seen.append(self.timed(beside)),
            rounds=rounds,
        )
        promised = {} if plan is None else _promised(plan)
        self._record(group, method, **promised, **facts, bare_seconds=min(seen) if seen else "")

    def _record(self, group: str, method: str, **facts: Any) -> None:
        """All columns of a case."""
        library = self.library
        self.benchmark.group = group
        self.benchmark.extra_info.update(
            dict.fromkeys(COLUMNS, "")
            | {
                "group": group,
                "library": library.name if library.device == "cpu" else f"{library.name}-{library.device}",
                "device": library.device_name() or library.device,
                "threads": self.threads,
                "method": method,
            }
            | facts
        )

    def timed(self, run: Run) -> float:
        """Seconds of one call, waited for."""
        return self._timed(run)[1]

    def _timed(self, run: Run) -> tuple[Sequence[Array], float]:
        start = time.perf_counter()
        result = run()
        self.library.wait(result)
        return result, time.perf_counter() - start


def _promised(plan: tattn.Plan) -> dict[str, Any]:
    """What the table says of a polynomial's plan."""
    certified = {"certified": plan.error, "certified_gradient": plan.grad_error} if plan.certified else {}
    return {"degree": plan.degree, "rank": plan.rank, **certified}
