"""Forward, and forward with gradient, over the bare matrix products that they are made of."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import tattn

from .libraries import Library
from .measure import Measure
from .problem import draw

# Features that are held at once for the bare product, in numbers: more rows take as much longer.
_HELD = 1 << 26


def bare_products(
    measure: Measure, library: Library, rank: int, n: int, value_dim: int, count: int
) -> Callable[[], float]:
    """Seconds of `count` products (rank × n)·(n × (dv + 1)), warmed up; of one, so many times, where calls wait for it."""
    rng = np.random.default_rng(1)
    rows = min(n, 1 << (_HELD // rank).bit_length() - 1)
    features = library.array(rng.standard_normal((rank, rows), dtype=np.float32))
    columns = library.array(rng.standard_normal((rows, value_dim + 1), dtype=np.float32))
    product = library.product(features, columns)
    measure.timed(product)
    if library.device == "cpu":
        return lambda: count * n / rows * measure.timed(product)
    # A device is not waited for between one and the next.
    return lambda: n / rows * measure.timed(lambda: [x for _ in range(count) for x in product()])


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize(("dim", "value_dim"), [(8, 8), (8, 64), (16, 16), (16, 64)])
def test_limit(
    measure: Measure,
    library: Library,
    threads: int,
    quick: bool,
    dim: int,
    value_dim: int,
    degree: int,
    gradient: bool,
) -> None:
    """float32, the bare product (rank × n)·(n × (dv + 1)) before every round: three forward, nine with the gradient."""
    if quick and (not gradient or dim > 8) and (threads > 1 or degree == 2):
        pytest.skip("left out of a quick run")
    if quick and library.name == "jax" and (dim, value_dim, degree) != (8, 8, 4):
        pytest.skip("left out of a quick run, of which compiling would take most")
    # The rank of 16 channels at degree 4 is ten times that of 8.
    n = 1 << ((11 if dim == 16 and degree == 4 else 13) if quick else 16)
    problem = draw(n, dim, value_dim)
    plan = tattn.plan_for(n=n, dim=dim, value_dim=value_dim, bound=1.0, degree=degree, method="polynomial")
    arrays = [library.array(x) for x in problem.arrays]
    run = library.attention(arrays, library.array(problem.grad) if gradient else None, plan=plan)
    bare = bare_products(measure, library, plan.rank, n, value_dim, 9 if gradient else 3)
    measure("limit", "polynomial", problem, run, plan=plan, beside=bare)
