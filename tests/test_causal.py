"""Causal attention and windows: against the dense definition with its full mask, on every library, by both methods."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.polynomial.polynomial import polyder, polyval
from reference import Dense, dense

import tattn

Arrays = tuple[np.ndarray, list[np.ndarray], list[np.ndarray], list[np.ndarray | None] | None, np.ndarray, np.ndarray]


def draw(
    n: int, views: int, *, more: tuple[int, ...] = (0, 3, 5), masked: bool = False, broadcast: bool = False
) -> Arrays:
    """Query, keys, values, masks and gradients of output and lse; view μ has `more[μ]` rows more than the query."""
    rng = np.random.default_rng(0)
    of_query, of_keys, of_values, of_masks = ((2, 3), (2, 1), (3,), (2, 1)) if broadcast else ((),) * 4
    query = rng.uniform(-1, 1, (*of_query, n, 3))
    keys = [rng.uniform(-1, 1, (*of_keys, n + extra, 3)) for extra in more[:views]]
    values = [rng.normal(size=(*of_values, n + extra, 2)) for extra in more[:views]]
    masks: list[np.ndarray | None] | None = None
    if masked:
        # The first rows see nothing at all.
        masks = [rng.random((*of_masks, k.shape[-2])) < 0.6 for k in keys]
        masks[0][..., : max(1, n // 3)] = False
        if views > 1:
            masks[1] = None
    return query, keys, values, masks, rng.normal(size=(*of_query, n, 2)), rng.normal(size=(*of_query, n))


def run(library: Any, call: Arrays, **options: Any) -> Dense:
    """Output, lse and all gradients, in NumPy."""
    query, keys, values, masks, grad_out, grad_lse = library.arrays(*call)
    (out, lse), pullback = tattn.tensor_attention_vjp(query, keys, values, key_masks=masks, return_lse=True, **options)
    dquery, dkeys, dvalues = pullback(grad_out, grad_lse)
    for got, given in zip((out, lse, dquery, *dkeys, *dvalues), (query, query, query, *keys, *values), strict=True):
        assert library.is_array(got)
        assert got.dtype == given.dtype
        assert library.device(got) == library.device(given)
    read = library.numpy
    return Dense(read(out), read(lse), read(dquery), [*map(read, dkeys)], [*map(read, dvalues)])


def expected(call: Arrays, **options: Any) -> Dense:
    query, keys, values, masks, grad_out, grad_lse = call
    return dense(query, keys, values, masks=masks, grad_out=grad_out, grad_lse=grad_lse, causal=True, **options)


def assert_close(got: Dense, truth: Dense, tolerance: float) -> None:
    for name, a, b in zip(Dense._fields, got, truth, strict=True):
        for x, y in zip(a if isinstance(a, list) else [a], b if isinstance(b, list) else [b], strict=True):
            assert x.shape == y.shape
            np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance, err_msg=name)


CASES = [
    pytest.param(
        n, views, masked, broadcast, id=f"{n} rows {views} views{' masked' * masked}{' broadcast' * broadcast}"
    )
    for n, views, masked, broadcast in (
        (1, 2, False, False),
        (5, 1, True, True),
        (9, 2, True, False),
        (9, 3, True, True),
        (33, 1, False, False),
        (33, 2, True, True),
    )
]


@pytest.mark.parametrize(("n", "views", "masked", "broadcast"), CASES)
def test_exact_is_the_definition(library: Any, n: int, views: int, masked: bool, broadcast: bool) -> None:
    call = draw(n, views, masked=masked, broadcast=broadcast)
    assert_close(run(library, call, method="exact", causal=True), expected(call), 1e-12)


def polynomial_of(plan: tattn.Plan) -> dict[str, Any]:
    """What stands for exp, and its derivative."""
    p = plan.coefficients
    return {"function": lambda x: polyval(x, p), "derivative": lambda x: polyval(x, polyder(p))}


@pytest.mark.parametrize(("n", "views", "masked", "broadcast"), CASES)
def test_polynomial_is_the_definition_with_its_polynomial(
    library: Any, n: int, views: int, masked: bool, broadcast: bool
) -> None:
    call = draw(n, views, masked=masked, broadcast=broadcast)
    lengths = [n, *(k.shape[-2] for k in call[1])]
    plan = tattn.plan_for(n=lengths, dim=3, order=views + 1, bound=1.0, degree=4, dtype="float64", causal=True)
    assert_close(run(library, call, plan=plan, causal=True), expected(call, **polynomial_of(plan)), 1e-12)


@pytest.mark.parametrize(("n", "views", "masked", "broadcast"), CASES)
def test_windows_are_the_definition(library: Any, n: int, views: int, masked: bool, broadcast: bool) -> None:
    call = draw(n, views, masked=masked, broadcast=broadcast)
    window = (3, 7, 2)[:views]
    assert_close(run(library, call, window=window), expected(call, window=window), 1e-12)


@pytest.mark.parametrize("window", [None, (40, 25), (1000, 1)])
def test_exact_in_several_runs(library: Any, window: tuple[int, ...] | None) -> None:
    """More rows than a run has, and keys before the first row."""
    call = draw(150, 2, more=(0, 21), masked=True)
    assert_close(run(library, call, method="exact", causal=True, window=window), expected(call, window=window), 1e-12)


def test_polynomial_in_several_blocks(library: Any) -> None:
    """Of so many monomials that blocks are short, and segments of several blocks."""
    rng = np.random.default_rng(1)
    query, *keys = (rng.uniform(-1, 1, (n, 8)) for n in (150, 150, 171))
    values = [rng.normal(size=(len(k), 2)) for k in keys]
    call = (query, keys, values, None, rng.normal(size=(150, 2)), rng.normal(size=150))
    plan = tattn.plan_for(n=(150, 150, 171), dim=8, bound=1.0, degree=5, dtype="float64", causal=True)
    assert_close(run(library, call, plan=plan, causal=True), expected(call, **polynomial_of(plan)), 1e-11)
