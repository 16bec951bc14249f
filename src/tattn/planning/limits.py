"""What a call will take, before it starts: a warning where that is long on this machine, a refusal beyond `max_flops`."""

from __future__ import annotations

from functools import partial
from time import perf_counter
from typing import Any

from ..backends import Array, Backend
from ..checks import Inputs, PlanError, positive, warn_caller
from ..plans import Plan, duration, si
from .selection import Wish
from .settings import settings

# Seconds that a clock tells well, and the scores that are timed: few enough for a processor's cache, more where that takes no time.
_MEASURED, _ROWS, _KEYS, _CHANNELS, _TRIALS = 2e-4, 64, 1024, 8, 5
_MOST_ROWS = 1 << 18
# Operations a second of libraries, devices and dtypes that were measured.
_speeds: dict[Any, float] = {}


def checked_most(max_flops: Any) -> float | None:
    """`max_flops` as a caller gave it, if it is a number above 0 or None."""
    return None if max_flops is None else positive("max_flops", max_flops)


def flops_of(plan: Plan) -> float:
    """Operations of a forward call by the method of the plan."""
    return plan.flops_exact if plan.method == "exact" else plan.flops_polynomial


def check_cost(inputs: Inputs, plan: Plan, wish: Wish, flops: float | None = None) -> None:
    """PlanError if a call takes more operations than it may; a warning if a method that was chosen takes long.

    `flops`: what is left to do, all of the plan's if not given.
    """
    check_flops(plan, wish.max_flops, flops)
    if wish.method == "auto" and wish.degree is None:
        _warn_of_time(inputs, plan, flops_of(plan) if flops is None else flops)


def check_flops(plan: Plan, max_flops: float | None, flops: float | None = None) -> None:
    """PlanError if a call takes more operations than it may: the plan's, or so many."""
    flops = flops_of(plan) if flops is None else flops
    if max_flops is not None and flops > max_flops:
        raise PlanError(
            f"the call takes {si(flops)}flop by the {plan.method} method, more than max_flops={max_flops:.3g}: {plan.reason}. "
            f"What helps: {_ways_out(plan)}, or a larger max_flops"
        )


def _warn_of_time(inputs: Inputs, plan: Plan, flops: float) -> None:
    """Warn if a call whose method was chosen takes longer on this machine than anybody expects."""
    if flops < settings().short or inputs.traced:
        return
    seconds = flops / speed(inputs.backend, inputs.arrays[0])
    if seconds > settings().long:
        warn_caller(
            f"this takes about {duration(seconds)} here, {si(flops)}flop by the {plan.method} method, and about three times as "
            f"long with the gradient: {plan.reason}. What helps: {_ways_out(plan)}. max_flops=... refuses such calls"
        )


def _ways_out(plan: Plan) -> str:
    """What makes a call cheaper, in words."""
    larger = "a larger tol (tattn.best_tol says what a rank can meet)"
    if plan.method == "polynomial" and plan.series != "banded":
        return f"{larger}, or a lower degree=..."
    if plan.causal:
        return f"{larger}, or a smaller scale"
    return f"{larger}, or a plan with series='banded' and return_error=True, which bounds every row as it comes"


def speed(backend: Backend, like: Array | None) -> float:
    """Operations a second of exact attention where the array `like` is; measured once, which takes some milliseconds."""
    assert like is not None
    known = settings().speed
    if known is not None:
        return known * backend.threads()
    dtype = backend.compute_dtype(like.dtype)
    key = backend.name, str(backend.device(like)), backend.dtype_name(dtype)
    if key not in _speeds:
        # Of one thread: those of a product wait for each other where a machine is busy.
        (_speeds[key],) = backend.share([partial(backend.run, _measured, dtype, (like,))])
    return _speeds[key] * backend.threads()


def _measured(dtype: Any, backend: Backend, arrays: tuple[Array, ...]) -> float:
    """`speed` in a dtype, of the device of an array."""
    xp, device = backend.xp, backend.device(arrays[0])
    k = xp.full((_CHANNELS, _KEYS), 1e-2, dtype=dtype, device=device)
    rows = _ROWS
    while True:
        q = xp.full((rows, _CHANNELS), 1e-2, dtype=dtype, device=device)
        seconds = min(_seconds(q, k, backend) for _ in range(_TRIALS))
        if seconds > _MEASURED or rows >= _MOST_ROWS:
            # As `engines.tuples` counts: an exponential is 16.
            return rows * _KEYS * (4.0 * _CHANNELS + 16) / seconds
        rows *= 8


def _seconds(q: Array, k: Array, backend: Backend) -> float:
    """Seconds until weights of all q on all k, and their sums, have been computed and read."""
    xp, start = backend.xp, perf_counter()
    float(xp.sum(xp.exp(q @ k) @ xp.matrix_transpose(k)))
    return perf_counter() - start
