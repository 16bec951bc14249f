"""Products with monomials that are not formed, against products with those that are."""

from __future__ import annotations

from copy import copy
from types import SimpleNamespace

import numpy as np
import pytest

from tattn.backends import backend_of
from tattn.backends.base import block_rows
from tattn.engines import features as lowrank
from tattn.features.basis import CHAIN, FEW_CHAINS, Basis, _total, row_products
from tattn.features.monomials import Expansion, exponents, features, rank
from tattn.operands import Operands, Upstream

CASES = [(1, 2), (2, 2), (3, 4), (5, 3), (8, 4), (20, 2)]


def drawn(dim: int, degree: int, rows: int, columns: int, leading: tuple[int, ...] = ()) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(dim + degree)
    x, z = rng.normal(size=(*leading, dim, rows)), rng.normal(size=(rows, columns))
    return x, z, rng.normal(size=(*leading, rank(dim, degree), columns))


@pytest.mark.grid
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
    held = basis.features(backend)(array)
    assert held.shape[-2] == basis.held
    sums = library.numpy(basis.row_sums(held, library.array(z), backend))
    np.testing.assert_allclose(sums, phi @ z, rtol=1e-12, atol=1e-12 * rows)
    read = library.numpy(basis.read(held, basis.reader(library.array(matrix), backend), backend))
    np.testing.assert_allclose(read, np.swapaxes(matrix, -1, -2) @ phi, rtol=1e-12, atol=1e-11)
    for t in (degree - 1, degree):
        part = slice(rank(dim, t - 1), rank(dim, t))
        sums = library.numpy(basis.row_sums(held, library.array(z), backend, degree=t))
        np.testing.assert_allclose(sums, phi[..., part, :] @ z, rtol=1e-12, atol=1e-12 * rows)
        reader = basis.reader(library.array(matrix[..., part, :]), backend, degree=t)
        read = library.numpy(basis.read(held, reader, backend, degree=t))
        wanted = np.swapaxes(matrix[..., part, :], -1, -2) @ phi[..., part, :]
        np.testing.assert_allclose(read, wanted, rtol=1e-12, atol=1e-11)


@pytest.mark.grid
@pytest.mark.parametrize("size", [20, 150])
@pytest.mark.parametrize("chains", [FEW_CHAINS, FEW_CHAINS + 1, 47, 48, 200, FEW_CHAINS**2 // 4])
def test_sums_over_many_chains(library, chains, size):
    rng = np.random.default_rng(chains)
    phi, z = rng.normal(size=(size, chains * CHAIN + 5)), rng.normal(size=(chains * CHAIN + 5, 3))
    array = library.array(phi)
    found = library.numpy(row_products(array, library.array(z), backend_of(array)))
    np.testing.assert_allclose(found, phi @ z, rtol=1e-11, atol=1e-11 * len(z) ** 0.5)


def test_no_number_takes_part_in_more_additions_than_the_bounds_count():
    """One fewer than parts are added in each step, and one more for those that are left over."""

    class Counting:
        xp = SimpleNamespace(reshape=np.reshape, sum=lambda x, axis: Counted(x, axis))

    class Counted:
        def __init__(self, x, axis):
            before = x.additions if isinstance(x, Counted) else 0
            self.shape = tuple(n for i, n in enumerate(x.shape) if i != len(x.shape) + axis)
            self.additions = before + x.shape[axis] - 1

        def __add__(self, other):
            self.additions = max(self.additions, other.additions) + 1
            return self

    for chains in range(1, FEW_CHAINS**2 // 4 + 1):
        found = _total(np.zeros((chains, 2, 3)), Counting())
        assert found.shape == (2, 3)
        assert found.additions < FEW_CHAINS


@pytest.mark.thorough("jax", "torch")
@pytest.mark.parametrize("value_dim", [2, 16])
@pytest.mark.grid
def test_blocks_as_large_as_those_of_an_accelerator_compute_the_same(library, value_dim):
    rng = np.random.default_rng(0)
    rows, dim = 20_000, 6
    arrays = [library.array(rng.uniform(-1, 1, (rows, width))) for width in [dim] * 3 + [value_dim] * 3]
    *inputs, grad = arrays
    usual = backend_of(grad).for_arrays(arrays)
    large = copy(usual)
    large.workspace, large.most_rows = 256 << 20, 1 << 15
    expansion = Expansion((1.0, 1.0, 0.5, 0.17, 0.04))
    blocks = [lowrank.block_of(Basis.of(dim, 4, 9), 9, grad.dtype, (), backend) for backend in (usual, large)]
    assert blocks[0] < FEW_CHAINS * CHAIN < rows < blocks[1]
    found = []
    for backend in (usual, large):
        operands, _ = Operands.of(backend, (*inputs, None, None), 2, 1 / dim)
        attended = lowrank.forward(operands, expansion)
        upstream = Upstream(grad, backend.xp.zeros_like(attended.kept[0]))
        gradients = lowrank.backward(operands, expansion, attended, upstream)
        found.append([library.numpy(x) for x in (attended.out, *attended.kept, *gradients.flat())])
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12 * np.abs(b).max())


@pytest.mark.grid
@pytest.mark.parametrize(("dim", "degree"), CASES)
@pytest.mark.parametrize("lean", [True, False])
def test_adjoint_is_that_of_all_monomials(library, dim, degree, lean):
    check_adjoint(library, dim, degree, lean, 4)


def test_adjoint_with_many_columns(library):
    """Monomials of lower degree fill more than one chain."""
    assert rank(8, 3) > CHAIN
    check_adjoint(library, 8, 4, False, 14)


def check_adjoint(library, dim, degree, lean, columns):
    x, z, matrix = drawn(dim, degree, 300, columns)
    # A channel of 0, a row of 0 and entries of all sizes: derivatives there are as anywhere.
    x[:, ::7] *= 1e-30
    x[0, ::5] = 0.0
    x[:, 3] = 0.0
    wanted = np.stack([derivative(x, matrix, c, degree) for c in range(dim)])
    wanted = np.einsum("cke,ke->kc", wanted, z)
    array, of_rows, weights = map(library.array, (x, z, matrix))
    backend = backend_of(array)
    basis = Basis(dim, degree, lean)
    features = basis.features(backend)
    # Blocks may share memory; what was computed from one must not change with the next.
    blocks = [array[:, :200], array[:, 200:]]
    of_blocks = [of_rows[:200, :], of_rows[200:, :]]
    both = basis.puller_and_reader(weights, columns - 1, backend)
    alone = basis.puller(weights, backend)
    found = []
    for block, c in zip(blocks, of_blocks, strict=True):
        phi = features(block)
        found.append((*both(phi, c), alone(phi, c)))
    pulled, values, again = (np.concatenate([library.numpy(f) for f in parts]) for parts in zip(*found, strict=True))
    size = np.abs(wanted).max()
    np.testing.assert_allclose(pulled, wanted, rtol=1e-11, atol=1e-13 * size)
    np.testing.assert_allclose(again, wanted, rtol=1e-11, atol=1e-13 * size)
    expected = (matrix[:, :-1].T @ features_of(x, degree)).T
    np.testing.assert_allclose(values, expected, rtol=1e-11, atol=1e-13 * np.abs(expected).max())


def features_of(x: np.ndarray, degree: int) -> np.ndarray:
    """(d, rows) → (r, rows), from the exponents."""
    return np.prod(x[None] ** exponents(len(x), degree)[:, :, None], axis=1)


def derivative(x: np.ndarray, matrix: np.ndarray, channel: int, degree: int) -> np.ndarray:
    """∂(Mᵀ Φ)/∂x_c, (rows, k), from the exponents."""
    alpha = exponents(len(x), degree).astype(int)
    lowered = alpha.copy()
    lowered[:, channel] = np.maximum(lowered[:, channel] - 1, 0)
    return (np.prod(x[None] ** lowered[:, :, None], axis=1) * alpha[:, channel, None]).T @ matrix


def test_blocks_are_not_a_power_of_two_apart():
    for row in (128, 512, 700, 1000, 2048, 4000, 5000, 8192, 9000, 1 << 20):
        rows = block_rows(row, 2 << 20, 4096)
        assert 16 <= rows <= 4096 and (rows == 16 or rows * row <= 2 << 20)
        assert rows <= 256 or rows % 256 == 128
