"""Rows moved and reduced, on every library."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tattn.arrays import gather_rows, inverse_order, over_rows, return_rows
from tattn.backends import backend_of


@pytest.mark.parametrize(("dtype", "least", "most"), [("float32", -149, 127), ("float64", -1074, 1023)])
def test_powers_of_two_are_exact(library: Any, dtype: str, least: int, most: int) -> None:
    """Every one that the dtype holds, denormals among them."""
    powers = np.asarray([*range(least - 2, most + 3), np.nan], dtype)[None]
    moved = library.array(powers)
    with np.errstate(all="ignore"):
        found = library.numpy(backend_of(moved).power_of_two(moved))
        expected = np.ldexp(np.ones((), dtype), np.arange(least - 2, most + 3))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found[0, :-1], expected)
    assert np.isnan(found[0, -1])


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_dtypes_have_names(library: Any, name: str) -> None:
    """Those of arrays, and those of the library."""
    array = library.array(np.ones(2, name))
    backend = backend_of(array)
    assert backend.dtype_name(array.dtype) == backend.dtype_name(getattr(backend.xp, name)) == name


def test_tables_are_kept(library: Any) -> None:
    """As they are, of the dtype that is asked for, where the arrays are."""
    like = library.array(np.ones((2, 3)))
    backend = backend_of(like)
    for dtype in (None, like.dtype):
        first, second = (backend.table(_table, 5, like=like, dtype=dtype) for _ in range(2))
        np.testing.assert_array_equal(library.numpy(first), _table(5))
        assert library.device(first) == library.device(like)
        assert first.dtype == dtype or dtype is None
        assert (first is second) is backend.keeps_tables(like)
    if library.name == "numpy":
        assert not first.flags.writeable


def _table(n: int) -> np.ndarray:
    return np.arange(n)[::-1] * 2


@pytest.mark.parametrize("n", [1, 5, 127, 128, 129, 1000])
@pytest.mark.parametrize("leading", [(), (2, 3)])
def test_reductions_over_rows(library: Any, n: int, leading: tuple[int, ...]) -> None:
    x = np.random.default_rng(n).normal(size=(*leading, n, 3))
    moved = library.array(x)
    backend = backend_of(moved)
    total, top = (library.numpy(over_rows(f, moved, backend)) for f in (backend.xp.sum, backend.xp.max))
    np.testing.assert_allclose(total, x.sum(-2, keepdims=True), rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(top, x.max(-2, keepdims=True))


@pytest.mark.parametrize(
    ("rows", "index"), [((), ()), ((2, 3), (2, 3)), ((3,), (2, 3)), ((2, 1), (1, 3)), ((), (2,)), ((2,), ())]
)
def test_rows_by_number(library: Any, rows: tuple[int, ...], index: tuple[int, ...]) -> None:
    """Leading dimensions of rows and numbers broadcast."""
    rng = np.random.default_rng(0)
    x, numbers = rng.normal(size=(*rows, 7, 2)), rng.integers(0, 7, (*index, 5, 1))
    moved = library.array(x)
    backend = backend_of(moved)
    found = library.numpy(gather_rows(moved, backend.indices(numbers, moved), backend))
    leading = np.broadcast_shapes(rows, index)
    expected = np.take_along_axis(
        np.broadcast_to(x, (*leading, 7, 2)), np.broadcast_to(numbers, (*leading, 5, 2)), axis=-2
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("leading", [(), (2, 3)])
def test_an_order_and_its_inverse(library: Any, leading: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).normal(size=(*leading, 9, 1))
    order = np.argsort(x, axis=-2)
    moved = library.array(x)
    backend = backend_of(moved)
    inverse = inverse_order(backend.indices(order, moved), backend)
    there = gather_rows(moved, backend.indices(order, moved), backend)
    np.testing.assert_array_equal(library.numpy(there), np.sort(x, axis=-2))
    np.testing.assert_array_equal(library.numpy(gather_rows(there, inverse, backend)), x)


@pytest.mark.parametrize(("rows", "index"), [((), ()), ((2, 3), (2, 3)), ((2, 3), (3,)), ((2, 3), (1, 1)), ((2,), ())])
def test_rows_go_back_piece_by_piece(library: Any, rows: tuple[int, ...], index: tuple[int, ...]) -> None:
    """Pieces may have leading dimensions that their order lacks."""
    rng = np.random.default_rng(0)
    x, order = rng.normal(size=(*rows, 9, 3)), np.argsort(rng.normal(size=(*index, 9, 1)), axis=-2)
    moved = library.array(x)
    backend = backend_of(moved)
    there = backend.indices(order, moved)
    sorted_rows = gather_rows(moved, there, backend)
    pieces = [(sorted_rows[..., a:b, :], sorted_rows[..., a:b, 1:2]) for a, b in ((0, 1), (1, 4), (4, 9))]
    whole, column = return_rows(iter(pieces), there, backend)
    np.testing.assert_array_equal(library.numpy(whole), x)
    np.testing.assert_array_equal(library.numpy(column), x[..., 1:2])
