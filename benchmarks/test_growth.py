"""Time and memory against the length of the sequence."""

from __future__ import annotations

import pytest

import tattn

from .libraries import Library
from .measure import Measure
from .problem import draw
from .test_limit import bare_products


@pytest.mark.parametrize("power", range(10, 21))
@pytest.mark.parametrize("dim", [8, 16])
def test_growth(measure: Measure, library: Library, threads: int, quick: bool, dim: int, power: int) -> None:
    """Forward and gradient at degree 4, on one thread; 16 channels on a GPU alone."""
    if threads > 1:
        pytest.skip("measured on one thread")
    if dim > 8 and library.device == "cpu":
        pytest.skip("minutes a call on a CPU")
    if quick and power not in (10, 12, 14):
        pytest.skip("left out of a quick run")
    n = 1 << power
    problem = draw(n, dim, dim)
    plan = tattn.plan_for(n=n, dim=dim, value_dim=dim, bound=1.0, degree=4, method="polynomial")
    run = library.attention([library.array(x) for x in problem.arrays], library.array(problem.grad), plan=plan)
    # On a device a million rows are the case to look at.
    large = library.device != "cpu" and power == 20
    bare = bare_products(measure, library, plan.rank, n, dim, 9) if large else None
    measure("growth", "polynomial", problem, run, plan=plan, beside=bare)
