"""What a call costs where there is hardly anything to compute."""

from __future__ import annotations

import pytest

import tattn

from .libraries import Library, attention
from .measure import Measure
from .problem import draw


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize(
    "way", ["exact, with a plan", "without a plan", "polynomial, with a plan", "exact, without jit, with a plan"]
)
def test_overhead(measure: Measure, library: Library, threads: int, way: str, gradient: bool) -> None:
    """16 rows of 8 channels; JAX under jit where a plan allows it."""
    if threads > 1:
        pytest.skip("measured on one thread")
    problem = draw(16, 8, 8)
    arrays, grad = [library.array(x) for x in problem.arrays], library.array(problem.grad)
    plan = tattn.plan(arrays[0], arrays[1:3], arrays[3:])
    method = way.partition(",")[0]
    options = {}
    if way != "without a plan":
        degree = 4 if method == "polynomial" else None
        options = {"plan": tattn.plan_for(n=16, dim=8, value_dim=8, bound=1.0, method=method, degree=degree)}
    if library.name != "jax":
        if "without jit" in way:
            pytest.skip("nothing is compiled")
        run = library.attention(arrays, grad if gradient else None, **options)
    elif way.endswith("with a plan") and "without jit" not in way:
        run = library.attention(arrays, grad if gradient else None, **options)
    elif gradient:
        pytest.skip("JAX differentiates under jit, with a plan")
    else:

        def run() -> list[object]:
            return [attention(*arrays, **options)]

    measure("overhead", way, problem, run, plan=options.get("plan", plan))
