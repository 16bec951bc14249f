"""The exact method block by block: however tuples are cut, and whether or not a maximum is subtracted, it is the definition."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import pytest
import test_causal
from cases import LENGTHS, Call, assert_close, draw, run
from conftest import make_library
from reference import dense
from watching import calls_of

import tattn
from tattn.backends import backend_of
from tattn.bounds.rounding import EXACT_CHAIN
from tattn.bounds.score_range import ranges
from tattn.engines.tuples import backward, forward, small
from tattn.operands import Operands, Upstream


def in_cache(library: Any, scores: int) -> Any:
    """Blocks of so many scores in float64: of 16, four query rows, four tuples and two to four rows of a view."""
    return library.backend.using(cache=8 * scores)


@pytest.mark.grid
@pytest.mark.parametrize("size", [1.0, 5.0], ids=["small scores", "large scores"])
@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize(("masked", "broadcast"), [(False, False), (True, True)], ids=["plain", "masked broadcast"])
def test_many_blocks_are_the_definition(library: Any, size: float, views: int, masked: bool, broadcast: bool) -> None:
    call = draw(views, masked=masked, broadcast=broadcast, size=size)
    # JAX would compile six problems one after another, six times as much: half of their scores side by side.
    side_by_side = broadcast and library.name == "jax"
    with in_cache(library, 3 * prod(LENGTHS[: views + 1]) if side_by_side else 16):
        got, _ = run(library, call, method="exact", scale=0.37)
    truth = dense(
        call.query, call.keys, call.values, masks=call.masks, grad_out=call.grad_out, grad_lse=call.grad_lse, scale=0.37
    )
    assert_close(got, truth, 1e-11)


@pytest.mark.parametrize("size", [1.0, 4.0], ids=["small scores", "large scores"])
@pytest.mark.parametrize("window", [None, (2, 3)])
@pytest.mark.grid
def test_many_blocks_of_a_causal_call(library: Any, window: tuple[int, ...] | None, size: float) -> None:
    query, *rest = test_causal.draw(11, 2, masked=True)
    call = (query * size**3, *rest)
    options: dict[str, Any] = {"window": window, "scale": 0.38}
    with in_cache(library, 16):
        got = test_causal.run(library, call, method="exact", causal=True, **options)
    test_causal.assert_close(got, test_causal.expected(call, **options), 1e-11)


def test_sums_of_more_tuples_than_a_chain() -> None:
    rng = np.random.default_rng(0)
    query, grad_out = rng.uniform(-1, 1, (2, 5, 3))
    keys, values = rng.uniform(-1, 1, (2, 2, 40, 3))
    call = Call(query, list(keys), list(values), None, grad_out, grad_out[:, 0])
    assert EXACT_CHAIN < 40 * 40
    truth = dense(query, keys, values, grad_out=grad_out, grad_lse=call.grad_lse)
    assert_close(run(make_library("numpy"), call, method="exact")[0], truth, 1e-12)


def arrays_of(call: Call) -> tuple[Any, ...]:
    masks = call.masks or [None] * len(call.keys)
    return (call.query, *call.keys, *call.values, *(None if m is None else m[..., None] for m in masks))


def is_small(arrays: Sequence[Any], views: int, scale: float = 1.0) -> bool:
    return small(Operands.of(backend_of(arrays[0]), arrays, views, scale)[0])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("views", [1, 2, 3])
def test_with_and_without_a_maximum(views: int, masked: bool) -> None:
    call = draw(views, masked=masked)
    arrays = arrays_of(call)
    backend = backend_of(call.query)
    assert is_small(arrays, views)
    results = []
    for bounded in (True, False):
        with backend.using(reads=bounded):
            operands, _ = Operands.of(backend, arrays, views, 1.0)
            out, lse = forward(operands)
            grads = backward(operands, out, lse, Upstream(call.grad_out, call.grad_lse[..., None]))
        results.append((out, lse, *grads.flat()))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_what_counts_as_small() -> None:
    call = draw(2)
    arrays = arrays_of(call)
    assert is_small(arrays, 2)
    # Twenty times the largest score allowed.
    assert not is_small(arrays, 2, 320.0)
    for i, factor in ((0, np.inf), (1, np.nan), (2, 1e30), (3, 1e30), (4, 1e-30), (0, 0.0)):
        assert not is_small([*arrays[:i], arrays[i] * factor, *arrays[i + 1 :]], 2), (i, factor)
    # Large in one row, and so by entries; no row of another view makes a score of it.
    query = np.concatenate([call.query, [[7.0, 0, 0]]])
    assert is_small((query, *arrays[1:]), 2)
    assert not is_small((query * 9, *arrays[1:]), 2)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e16])
@pytest.mark.parametrize("scores", [1.0, 12.0, 200.0])
def test_float32_keeps_its_digits(size: float, scores: float) -> None:
    """Values from far below one to far above, scores near and beyond what counts as small: within the error of the plan."""
    rng = np.random.default_rng(0)
    query, *keys = rng.choice((-1.0, 1.0), (3, 40, 4)).astype(np.float32)
    values = list((rng.uniform(0.5, 1, (2, 40, 3)) * size).astype(np.float32))
    got = tattn.tensor_attention(query, keys, values, scale=scores / 4, method="exact")
    truth = dense(
        *(x.astype(float) for x in (query,)),
        [k.astype(float) for k in keys],
        [v.astype(float) for v in values],
        scale=scores / 4,
    )
    plan = tattn.plan(query, keys, values, scale=scores / 4, method="exact")
    assert np.isfinite(got).all()
    assert (np.abs(got - truth.out) <= plan.error * size**2).all()


def test_a_call_that_says_nothing_of_its_error_needs_no_survey() -> None:
    call = draw(2)
    arguments = (call.query, call.keys, call.values)
    plan = tattn.plan(*arguments, method="exact")
    out, pullback = tattn.tensor_attention_vjp(*arguments, method="exact")
    bounds = pullback(call.grad_out, return_error=True)[1]
    _, planned = tattn.tensor_attention_vjp(*arguments, plan=plan)
    for found, stated in zip(bounds[1], planned(call.grad_out, return_error=True)[1][1], strict=True):
        np.testing.assert_array_equal(found, stated)
    assert tattn.tensor_attention(*arguments, method="exact", return_plan=True)[1] == plan
    assert (tattn.tensor_attention(*arguments, method="exact", return_error=True)[1] == plan.error).all()
    with calls_of(ranges) as surveys:
        np.testing.assert_array_equal(tattn.tensor_attention(*arguments, method="exact"), out)
        call.keys[1][2, 0] = np.nan
        with pytest.raises(ValueError, match=r"keys\[1\] should hold finite numbers, got NaN"):
            tattn.tensor_attention(*arguments, method="exact")
    assert not surveys
