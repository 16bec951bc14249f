"""Ordinary attention by the same library, as context: its polynomial beside a fused kernel and beside random features."""

from __future__ import annotations

import pytest

import tattn

from .libraries import Library
from .measure import Measure
from .problem import draw
from .rivals import fused, random_features


@pytest.mark.parametrize("n", [1 << i for i in range(8, 17, 2)])
@pytest.mark.parametrize(
    "method",
    ["SDPA", "exact", "polynomial, degree 2", "polynomial, degree 4", "FastAttention, 64", "FastAttention, 512"],
)
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("dim", [8, 16])
def test_order_one(
    measure: Measure, library: Library, threads: int, quick: bool, dim: int, gradient: bool, method: str, n: int
) -> None:
    """One view, dv = d, scores within ±1; torch alone. FastAttention, m: m random features, with no bound on the error."""
    if threads > 1 or library.name != "torch":
        pytest.skip("measured in torch, on one thread")
    if quick and (dim > 8 or n == 1 << 10):
        pytest.skip("left out of a quick run")
    if n > (1 << 12 if quick else 1 << 16 if method.startswith(("poly", "Fast")) else 1 << 14):
        pytest.skip("left out: a quick run, or quadratic time")
    problem = draw(n, dim, dim, views=1)
    arrays, grad = [library.array(x) for x in problem.arrays], library.array(problem.grad)
    plan = None
    if method.startswith("polynomial"):
        degree = int(method[-1])
        plan = tattn.plan_for(n=n, dim=dim, value_dim=dim, order=2, bound=1.0, degree=degree, method="polynomial")
    if plan is not None or method == "exact":
        options = {"method": "exact"} if plan is None else {"plan": plan}
        run = library.attention(arrays, grad if gradient else None, **options)
    else:
        if method.startswith("Fast"):
            pytest.importorskip("performer_pytorch", exc_type=ImportError)
            function = random_features(dim, int(method.split()[-1]), library.device)
        else:
            function = fused
        run = library.gradient(function, arrays, grad) if gradient else library.forward(function, arrays)
    measure("order one", method, problem, run, plan=plan, checked=not method.startswith("Fast"))
