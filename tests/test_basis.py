"""Products with monomials that are not formed, against products with those that are."""

from __future__ import annotations

import numpy as np
import pytest

from tattn.backends import backend_of
from tattn.basis import Basis
from tattn.monomials import features, rank

CASES = [(1, 2), (2, 2), (3, 4), (5, 3), (8, 4), (20, 2)]


def drawn(dim: int, degree: int, rows: int, columns: int, leading: tuple[int, ...] = ()) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(dim + degree)
    x, z = rng.normal(size=(*leading, dim, rows)), rng.normal(size=(columns, rows))
    return x, z, rng.normal(size=(*leading, rank(dim, degree), columns))


@pytest.mark.parametrize(
    ("dim", "degree", "rows", "leading"),
    [*((*case, 300, ()) for case in CASES), (2, 2, 1, ()), (3, 4, 5, (2, 3)), (3, 4, 300, (2, 3))],
)
def test_lean_products_are_products_with_all_monomials(library, dim, degree, rows, leading):
    x, z, matrix = drawn(dim, degree, rows, 4, leading)
    phi = features(x, degree, backend_of(x))
    array = library.array(x)
    backend = backend_of(array)
    basis = Basis.of(dim, degree, 4)
    assert basis.lean and basis.held == rank(dim, degree - 1) < basis.size
    held = basis.features(array, backend)
    assert held.shape[-2] == basis.held
    sums = library.numpy(basis.row_sums(held, library.array(z), backend))
    np.testing.assert_allclose(sums, phi @ z.T, rtol=1e-12, atol=1e-12 * rows)
    read = library.numpy(basis.read(held, basis.reader(library.array(matrix), backend), backend))
    np.testing.assert_allclose(read, np.swapaxes(matrix, -1, -2) @ phi, rtol=1e-12, atol=1e-11)
    for t in (degree - 1, degree):
        part = slice(rank(dim, t - 1), rank(dim, t))
        sums = library.numpy(basis.row_sums(held, library.array(z), backend, degree=t))
        np.testing.assert_allclose(sums, phi[..., part, :] @ z.T, rtol=1e-12, atol=1e-12 * rows)
        reader = basis.reader(library.array(matrix[..., part, :]), backend, degree=t)
        read = library.numpy(basis.read(held, reader, backend, degree=t))
        wanted = np.swapaxes(matrix[..., part, :], -1, -2) @ phi[..., part, :]
        np.testing.assert_allclose(read, wanted, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize(("dim", "degree"), CASES)
def test_lean_adjoint_is_that_of_all_monomials(library, dim, degree):
    x, z, matrix = drawn(dim, degree, 40, 4)
    array, columns, weights = map(library.array, (x, z, matrix))
    backend = backend_of(array)
    results = []
    for basis in (Basis.of(dim, degree, 4), Basis(dim, degree, lean=False)):
        held = basis.features(array, backend)
        reader = basis.value_reader(weights, 3, backend)
        both = basis.pull_back_and_read(held, reader, columns, backend)
        alone = basis.pull_back(held, basis.derivative(weights, backend), columns, backend)
        results.append([library.numpy(y) for y in (*both, alone)])
    for lean, full in zip(*results, strict=True):
        np.testing.assert_allclose(lean, full, rtol=1e-11, atol=1e-10)
    _, values, _ = results[0]
    np.testing.assert_allclose(values, (matrix[:, :3].T @ features(x, degree, backend_of(x))).T, rtol=1e-11, atol=1e-10)
