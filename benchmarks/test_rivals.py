"""Attention of order three against what else computes it, each from 64 rows to as many as it can."""

from __future__ import annotations

import numpy as np
import pytest

import tattn
from evidence.apart import stored

from .goals import FUSED, LONGEST, LONGEST_JUDGED, SPEEDUPS
from .libraries import Function, Library, Run
from .measure import Measure
from .problem import Problem, draw
from .rivals import ORDER_THREE

_MEMORY = 4 << 30
# Degrees whose rank 8, 16 and 32 channels can pay.
_DEGREES = {8: (2, 4, 7), 16: (2, 3, 4, 5), 32: (2, 3, 4), 64: ()}
_METHODS = (
    "dense einsum",
    "einsum by default",
    "scores stored, gradient by hand",
    FUSED,
    "naive_two_simplicial_attend",
    "nth_order_attend",
    "exact",
    *(f"polynomial, degree {g}" for g in (2, 3, 4, 5, 7)),
)
# (method, channels, gradient) → rows and seconds of the longest call so far.
_took: dict[tuple[str, int, bool], tuple[int, float]] = {}


@pytest.mark.parametrize("n", [1 << i for i in range(6, 16)])
@pytest.mark.parametrize("method", _METHODS)
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("dim", [8, 16, 32, 64])
def test_rivals(
    measure: Measure, library: Library, threads: int, quick: bool, dim: int, gradient: bool, method: str, n: int
) -> None:
    """Values of d channels, until the next call would take `LONGEST`, or `LONGEST_JUDGED` where a goal is about it, or 4 GiB.

    At 64 channels exact methods up to 1,024 rows.
    """
    if threads > 1 or library.name == "jax":
        pytest.skip("measured on one thread, and not in JAX, which compiles for each length")
    if quick and (n.bit_length() % 2 == 0 or n > 1 << 12 or (dim == 64 and "attend" in method)):
        pytest.skip("left out of a quick run")
    if dim == 64 and not 128 <= n <= 1024:
        pytest.skip("a comparison of exact methods alone")
    key = method, dim, gradient
    asked = {rival: dims for rival, _, dims in SPEEDUPS["torch"]}[FUSED]
    judged = library.name == "torch" and not quick and dim in asked and 128 <= n <= 1024 and method in ("exact", FUSED)
    longest = (0.05 if method.startswith("polynomial") else 0.6) if quick else LONGEST
    _skip_if_long(key, n, LONGEST_JUDGED if judged else longest)
    problem = draw(n, dim, dim)
    plan = None
    if method.startswith("polynomial"):
        degree = int(method[-1])
        if degree not in _DEGREES[dim]:
            pytest.skip("rank beyond reach")
        plan = tattn.plan_for(n=n, dim=dim, value_dim=dim, bound=1.0, degree=degree, method="polynomial")
    run = _run(library, method, problem, gradient, plan)
    if judged and method == "exact":
        # These two are close: they take turns.
        fused = _run(library, FUSED, problem, gradient, None)
        measure.timed(fused)
        took = measure("rivals", method, problem, run, beside=lambda: measure.timed(fused), rounds=4)
    else:
        # Gradients of fused attention over a million pairs are off by a few 1e-4 on some processors.
        ours = plan is not None or method == "exact"
        took = measure("rivals", method, problem, run, plan=plan, rounding=1e-5 if ours else 1e-4)
    _took[key] = n, took


def _run(library: Library, method: str, problem: Problem, gradient: bool, plan: tattn.Plan | None) -> Run:
    """The call; skips where the library has none of this name, and where it needs too much memory."""
    arrays = [library.array(x) for x in problem.arrays]
    grad = library.array(problem.grad)
    if plan is not None or method == "exact":
        options = {"method": "exact"} if plan is None else {"plan": plan}
        return library.attention(arrays, grad if gradient else None, **options)
    n, dim = problem.arrays[0].shape
    if method.startswith("scores stored"):
        if not gradient or library.name != "numpy":
            pytest.skip("stands in for the gradient that NumPy lacks")
        _skip_if_large(n, dim, (4, 4), gradient, (4, 4))
        query, a, b, u, v = arrays
        return lambda: [x.astype(np.float32, copy=False) for x in stored(query, a, b, u, v, grad)]
    known = ORDER_THREE.get(library.name, {})
    if method not in known:
        pytest.skip(f"not for {library.name}")
    if gradient and library.name in ("numpy", "cupy"):
        pytest.skip(f"{library.name} does not differentiate")
    if "simplicial" in method or method == "nth_order_attend":
        pytest.importorskip("simplicial_attention")
    function: Function
    function, scores, pairs = known[method]
    _skip_if_large(n, dim, scores, gradient, pairs)
    return library.gradient(function, arrays, grad) if gradient else library.forward(function, arrays)


def _skip_if_large(n: int, dim: int, scores: tuple[float, float], gradient: bool, pairs: tuple[float, float]) -> None:
    """Skip where scores and pair keys would take more memory than is allowed."""
    held = 4 * (scores[gradient] * n**3 + pairs[gradient] * n**2 * dim)
    if held > _MEMORY:
        pytest.skip(f"would hold {held / 2**30:.1f} GiB")


def _skip_if_long(key: tuple[str, int, bool], n: int, limit: float) -> None:
    """Skip where the last call, grown as its method grows, would take too long."""
    if key not in _took:
        return
    last, seconds = _took[key]
    expected = seconds * (n / last) ** (1 if key[0].startswith("polynomial") else 3)
    if expected > limit:
        pytest.skip(f"would take {expected:.0f} s")
