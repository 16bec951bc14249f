"""The order of the monomials, their tables and their derivative."""

from __future__ import annotations

from itertools import combinations_with_replacement
from math import factorial, prod
from typing import Any

import numpy as np
import pytest

from tattn.backends import backend_of
from tattn.features.monomials import degrees, exponents, features, multinomials, raised, raised_factors, rank

SIZES = [(1, 1), (1, 6), (2, 3), (3, 4), (5, 2), (4, 5), (32, 2)]


@pytest.mark.parametrize(("dim", "degree"), SIZES)
def test_order_and_tables(dim: int, degree: int) -> None:
    expected = [
        [chosen.count(c) for c in range(dim)]
        for t in range(degree + 1)
        for chosen in combinations_with_replacement(range(dim), t)
    ]
    alpha = exponents(dim, degree)
    assert np.array_equal(alpha, expected)
    assert len(alpha) == rank(dim, degree)
    assert np.array_equal(degrees(dim, degree), alpha.sum(1))
    weights = [factorial(sum(a)) / prod(factorial(x) for x in a) for a in expected]
    np.testing.assert_allclose(multinomials(dim, degree), weights, rtol=1e-14)


@pytest.mark.parametrize(("dim", "degree"), SIZES)
def test_features_are_the_monomials(library: Any, dim: int, degree: int) -> None:
    x = np.random.default_rng(0).uniform(-2, 2, (2, dim, 7))
    array = library.array(x)
    got = features(array, degree, backend_of(array))
    expected = np.prod(x[:, None] ** exponents(dim, degree)[None, :, :, None].astype(float), axis=2)
    np.testing.assert_allclose(library.numpy(got), expected, rtol=1e-13)


@pytest.mark.parametrize(("dim", "degree"), SIZES)
def test_raised_indices_carry_the_derivative(dim: int, degree: int) -> None:
    """Coefficients of ∂/∂x_c Σ_α M_α x^α, against differences of the polynomial's values."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (dim, 1))
    weights = rng.normal(size=rank(dim, degree))
    lower = rank(dim, degree - 1)
    coefficients = (weights[raised(dim, degree)] * raised_factors(dim, degree)).reshape(dim, lower)
    backend = backend_of(x)
    got = coefficients @ features(x, degree, backend)[:lower, 0]
    for c in range(dim):
        step = np.zeros((dim, 1))
        step[c] = 1e-6
        ahead, behind = (weights @ features(x + s * step, degree, backend)[:, 0] for s in (1, -1))
        np.testing.assert_allclose((ahead - behind) / 2e-6, got[c], rtol=1e-6, atol=1e-6)
