"""The bounds are never exceeded (mpmath, 90 digits), the fits are best, and the choice is the smallest."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from watching import calls_of

from tattn.approximation import exponential
from tattn.approximation.exponential import (
    DEFAULT_GRID,
    CrowdedPolynomial,
    Polynomial,
    crowded,
    crowded_table,
    errors,
    least_error,
    minimax,
    smallest,
    taylor,
)

BOUNDS = [1e-6, 0.05, 0.5, 1.0, 2.0, 3.7, 6.0, 9.0]
RELATIVE = [(degree, bound) for bound in BOUNDS for degree in (0, 1, 2, 3, 5, 8, 13)]
CROWDED = [(degree, moment, bound) for bound in BOUNDS for degree, moment in [(2, 2), (3, 2), (6, 2), (4, 4), (7, 4)]]


@pytest.fixture(autouse=True)
def _digits():
    with mpmath.workdps(90):
        yield


def dense(bound, count=121):
    """Points of [-bound, bound], crowded at the ends and at 0, with neither the ends nor 0 left out."""
    angles = np.linspace(-math.pi / 2, math.pi / 2, count)
    ends = bound * np.sin(angles)
    near_zero = bound * np.array([s * 10.0**-k for k in range(1, 7) for s in (-1, 1)])
    return [mpmath.mpf(float(x)) for x in [*ends, *near_zero, *(ends / 3)]]


def value(coefficients, x):
    total = mpmath.mpf(0)
    for c in reversed(coefficients):
        total = total * x + (mpmath.mpf(c.numerator) / c.denominator if isinstance(c, Fraction) else mpmath.mpf(c))
    return total


def slope(coefficients):
    return [Fraction(c) * t for t, c in enumerate(coefficients)][1:] or [0.0]


def relative_error(coefficients, bound):
    return max(abs(value(coefficients, x) * mpmath.exp(-x) - 1) for x in dense(bound))


def crowded_errors(polynomial):
    """Sup |e^x - P|/x^t and sup |e^x - P'|/|x|^(t-1) on dense points, Taylor coefficients exact."""
    t = polynomial.moment
    exact = [Fraction(1, math.factorial(i)) for i in range(t)] + list(polynomial.coefficients[t:])
    points = [x for x in dense(polynomial.bound) if abs(x) > 1e-8 * polynomial.bound]
    return (
        max(abs(mpmath.exp(x) - value(exact, x)) / x**t for x in points),
        max(abs(mpmath.exp(x) - value(slope(exact), x)) / abs(x) ** (t - 1) for x in points),
    )


def rounding(polynomial):
    """What `errors` may add for rounding."""
    size = max(abs(c) * polynomial.bound**t for t, c in enumerate(polynomial.coefficients))
    return 1e-15 * (polynomial.degree + 6) ** 2 * size * math.exp(polynomial.bound)


class TestErrors:
    @pytest.mark.parametrize(("degree", "bound"), RELATIVE)
    @pytest.mark.parametrize("series", [minimax, taylor])
    def test_are_never_exceeded_and_close(self, series, degree, bound):
        polynomial = series(degree, bound)
        true = relative_error(polynomial.coefficients, bound)
        true_prime = relative_error(slope(polynomial.coefficients), bound)
        assert true <= polynomial.delta <= 1.03 * true + rounding(polynomial)
        assert true_prime <= polynomial.delta_prime <= 1.03 * true_prime + rounding(polynomial)

    @settings(deadline=None, max_examples=40)
    @given(
        st.lists(st.floats(-10, 10), min_size=1, max_size=9),
        st.floats(1e-3, 12),
    )
    def test_hold_for_any_polynomial(self, coefficients, bound):
        delta, delta_prime = errors(coefficients, bound)
        assert relative_error(coefficients, bound) <= delta
        assert relative_error(slope(coefficients), bound) <= delta_prime

    def test_hold_between_the_points_of_the_grid(self):
        few = np.linspace(-2.0, 2.0, 12)
        delta, delta_prime = exponential._errors_between(np.array(minimax(5, 2.0).coefficients), few)
        assert relative_error(minimax(5, 2.0).coefficients, 2.0) <= delta
        assert relative_error(slope(minimax(5, 2.0).coefficients), 2.0) <= delta_prime

    def test_recursion_takes_every_term_of_the_second_derivative(self):
        values, points = np.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]), np.array([0.0, 1.0])
        assert exponential._suprema(values, points, 1) == pytest.approx(((1 + (3 + 2 * 2) / 8) / (1 - 1 / 8), 2))
        assert exponential._suprema(values, points, 0) == pytest.approx((1 + 3 / 8, 2))

    def test_of_a_constant(self):
        delta, delta_prime = errors([1.0], 1.0)
        assert delta == pytest.approx(math.e - 1, rel=1e-2)
        assert delta_prime == 1

    @pytest.mark.parametrize(
        ("coefficients", "bound"),
        [([1.0, 1.0], 1e9), ([1.0, 1e308, 1e308], 200.0), ([math.nan], 1.0), ([1.0, math.inf], 1.0)],
    )
    def test_are_infinite_where_float64_ends(self, coefficients, bound):
        assert errors(coefficients, bound) == (math.inf, math.inf)

    def test_raises(self):
        with pytest.raises(ValueError, match="coefficients"):
            errors([], 1.0)
        with pytest.raises(ValueError, match="bound"):
            errors([1.0], -1.0)


class TestMinimax:
    # min max(delta, delta_prime), then the least delta of the same P' over c_0: scipy.optimize.linprog (HiGHS),
    # the joint linear program on 4,000 Chebyshev points in the Chebyshev basis
    @pytest.mark.parametrize(
        ("bound", "degree", "joint", "delta"),
        [
            (0.5, 2, 6.157279e-02, 1.356e-02),
            (1.0, 2, 2.328846e-01, 8.699e-02),
            (1.0, 4, 5.003882e-03, 1.129e-03),
            (2.0, 1, 9.640276e-01, 8.228e-01),
            (2.0, 4, 7.086757e-02, 3.363e-02),
            (2.0, 6, 2.456443e-03, 8.034e-04),
            (3.0, 7, 5.290545e-03, 2.230e-03),
            (4.0, 3, 8.893620e-01, 7.237e-01),
            (4.0, 8, 8.511242e-03, 4.183e-03),
            (6.0, 10, 1.521043e-02, 8.887e-03),
            (8.0, 6, 9.398579e-01, 8.642e-01),
            (8.0, 16, 1.661957e-04, 8.184e-05),
            (10.0, 18, 3.310478e-04, 1.813e-04),
        ],
    )
    def test_is_the_joint_optimum(self, bound, degree, joint, delta):
        polynomial = minimax(degree, bound)
        assert max(polynomial.delta, polynomial.delta_prime) == pytest.approx(joint, rel=2e-2)
        assert polynomial.delta == pytest.approx(delta, rel=2e-2)

    # a Remez exchange for exp alone: the joint optimum of one degree more
    @pytest.mark.parametrize(
        ("bound", "degree", "alone"),
        [
            (0.5, 6, 2.4e-8),
            (1.0, 7, 1.9e-7),
            (1.5, 8, 3.9e-7),
            (2.0, 2, 2.7e-1),
            (2.0, 10, 4.6e-8),
            (3.0, 10, 3.6e-6),
            (4.0, 7, 8.5e-3),
            (4.0, 10, 7.5e-5),
        ],
    )
    def test_derivative_is_the_best_fit_alone(self, bound, degree, alone):
        assert minimax(degree + 1, bound).delta_prime == pytest.approx(alone, rel=4e-2)

    @pytest.mark.parametrize(("degree", "bound"), [(1, 0.1), (2, 1e-3), (4, 0.25), (5, 1.3), (9, 5.0), (12, 2.5)])
    def test_derivative_equioscillates(self, degree, bound):
        x = bound * np.sin(np.linspace(-math.pi / 2, math.pi / 2, 400))
        prime = slope(minimax(degree, bound).coefficients)
        error = np.array([float(value(prime, mpmath.mpf(t)) * mpmath.exp(-t) - 1) for t in x.tolist()])
        runs = np.split(error, np.flatnonzero(np.diff(np.signbit(error))) + 1)
        assert len(runs) == degree + 1
        # no polynomial does better than the least of the alternating peaks (de la Vallee Poussin)
        assert minimax(degree, bound).delta_prime <= 1.03 * min(np.abs(run).max() for run in runs) + 1e-14

    def test_degree_zero(self):
        polynomial = minimax(0, 1.0)
        assert polynomial.coefficients == (1 / math.cosh(1),)
        assert polynomial.delta == pytest.approx(math.tanh(1), rel=1e-2)
        assert polynomial.delta_prime == 1

    @pytest.mark.parametrize("bound", [0.0, 1e-300, 1e-6, 1e-3, 1.0, 5.0, 12.0, 17.0, 22.0, 30.0, 299.0, 1e6])
    @pytest.mark.parametrize("degree", [0, 1, 2, 7, 16, 24])
    def test_every_range_gives_a_valid_polynomial(self, degree, bound):
        polynomial = minimax(degree, bound)
        assert polynomial.degree == degree
        assert polynomial.bound >= bound
        assert all(map(math.isfinite, polynomial.coefficients))
        assert max(map(abs, polynomial.coefficients)) < 2
        assert max(polynomial.delta, polynomial.delta_prime) <= 1

    def test_tiny_range_is_exact_to_rounding(self):
        assert max(minimax(24, 1e-6).delta, minimax(24, 1e-6).delta_prime) < 1e-14
        assert minimax(2, 0.0) == minimax(2, 1e-9)

    @pytest.mark.parametrize("bound", [0.1, 1.0, 2.0, 4.0])
    def test_error_falls_with_degree(self, bound):
        joint = [max(minimax(degree, bound).delta, minimax(degree, bound).delta_prime) for degree in range(14)]
        assert all(b < a for a, b in pairwise(joint) if b > 1e-12)

    @pytest.mark.parametrize("degree", [1, 3, 6, 10])
    def test_error_rises_with_bound(self, degree):
        joint = [max(minimax(degree, bound).delta, minimax(degree, bound).delta_prime) for bound in DEFAULT_GRID[::4]]
        assert all(b > a or b == 1 for a, b in pairwise(joint) if a > 1e-12)

    @pytest.mark.parametrize(("degree", "bound"), [(3, 4.0), (5, 5.0), (4, 1.0), (8, 7.0)])
    def test_is_positive_where_delta_is_below_one(self, degree, bound):
        polynomial = minimax(degree, bound)
        assert polynomial.delta < 1
        assert min(value(polynomial.coefficients, x) for x in dense(bound)) > 0

    def test_same_arguments_same_object(self):
        assert minimax(4, 1.0) is minimax(4, 1.0)

    @pytest.mark.parametrize("series", [minimax, taylor])
    def test_raises(self, series):
        with pytest.raises(ValueError, match="degree"):
            series(-1, 1.0)
        for bound in (-1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match="bound"):
                series(2, bound)


class TestSmallest:
    @pytest.mark.parametrize("series", ["minimax", "taylor"])
    @pytest.mark.parametrize("tolerance", [0.5, 1e-2, 1e-4, 1e-8])
    @pytest.mark.parametrize("bound", [0.0, 0.1, 1.0, 3.0, 5.0])
    def test_is_the_first_accepted(self, series, tolerance, bound):
        def accept(polynomial):
            return max(polynomial.delta, polynomial.delta_prime) <= tolerance

        found = smallest(bound, accept, series=series)
        family = {"minimax": minimax, "taylor": taylor}[series]
        assert found == next(filter(accept, (family(degree, bound) for degree in range(25))), None)

    @pytest.mark.parametrize(("bound", "delta", "degree"), [(1.0, 5e-4, 6), (2.0, 1.4e-2, 8), (3.0, 1e-3, 13)])
    def test_degree_that_taylor_needs(self, bound, delta, degree):
        found = smallest(bound, lambda polynomial: polynomial.delta <= delta, series="taylor")
        assert found.degree == degree
        assert smallest(bound, lambda polynomial: polynomial.delta <= delta).degree < degree

    @pytest.mark.parametrize(
        ("bound", "degree"), [(0.5, 6), (2.0, 9), (6.0, 16), (10.0, 21), (14.0, None), (30.0, None)]
    )
    def test_fits_one_degree_at_most(self, bound, degree):
        minimax.cache_clear()
        with calls_of(minimax) as fitted:
            found = smallest(bound, lambda p: max(p.delta, p.delta_prime) <= 1e-5, max_degree=40)
        assert (found and found.degree) == degree
        assert len(fitted) == (found is not None)

    @pytest.mark.parametrize("bound", [1e-6, 1e-3, 0.5, 2.0, 8.0, 13.0, 20.0])
    def test_no_fit_beats_the_error_it_skips_by(self, bound):
        for degree in range(25):
            assert exponential._least_error(degree, bound) <= minimax(degree, bound).delta
            assert exponential._least_error(degree - 1, bound) <= minimax(degree, bound).delta_prime
            assert exponential._least_error(degree, bound) <= taylor(degree, bound).delta

    @pytest.mark.parametrize(
        ("degree", "bound"), [(1, 0.5), (2, 1.0), (4, 2.0), (6, 0.5), (8, 4.0), (10, 3.0), (14, 8.0)]
    )
    def test_the_least_error_is_that_of_the_best_fit_nearly(self, degree, bound):
        x = bound * np.cos(np.linspace(math.pi, 0, 2000))
        weight = np.exp(-x)
        fit = exponential._uniform_fit(x, np.exp(x), weight, degree + 1)
        best = np.abs(np.polynomial.polynomial.polyval(x, fit) * weight - 1).max()
        assert 0.9 * best <= least_error(degree, bound) <= 1.001 * best

    @pytest.mark.parametrize("degree", range(1, 13))
    def test_no_fit_is_closer_than_about_a_half_where_the_range_exceeds_the_degree(self, degree):
        x = (degree + 1) * np.cos(np.linspace(math.pi, 0, 4000))
        weight = np.exp(-x)
        fit = exponential._uniform_fit(x, np.exp(x), weight, degree + 1)
        best = np.abs(np.polynomial.polynomial.polyval(x, fit) * weight - 1).max()
        assert 0.5 < best < 0.75

    def test_the_least_error_refuses_what_minimax_refuses(self):
        for degree, bound in ((-1, 1.0), (2, -1.0), (2, math.inf)):
            with pytest.raises(ValueError):
                least_error(degree, bound)

    def test_degrees_that_take_minutes_are_refused(self):
        for function in (minimax, taylor, lambda degree, bound: crowded(degree, 2, bound)):
            with pytest.raises(ValueError, match=r"^degree should be at most 100, got 101$"):
                function(101, 1.0)
        with pytest.raises(ValueError, match=r"^degree should be at most 2048, got 2049$"):
            least_error(2049, 1.0)
        with pytest.raises(ValueError, match=r"^max_degree should be at most 100, got 101$"):
            smallest(1.0, lambda _: False, max_degree=101)
        with pytest.raises(ValueError, match=r"at most 101, got 102$"):
            exponential.errors([1.0] * 102, 1.0)

    def test_none_up_to_the_last_degree(self):
        last = smallest(3.0, lambda polynomial: polynomial.delta < 1e-3).degree
        assert smallest(3.0, lambda polynomial: polynomial.delta < 1e-3, max_degree=last).degree == last
        assert smallest(3.0, lambda polynomial: polynomial.delta < 1e-3, max_degree=last - 1) is None
        assert smallest(30.0, lambda polynomial: polynomial.delta < 0.5) is None

    def test_raises(self):
        with pytest.raises(ValueError, match="bound"):
            smallest(math.nan, lambda polynomial: True)
        with pytest.raises(ValueError, match="max_degree"):
            smallest(1.0, lambda polynomial: True, max_degree=-1)
        with pytest.raises(ValueError, match="series"):
            smallest(1.0, lambda polynomial: True, series="fourier")


class TestCrowded:
    @pytest.mark.parametrize(("degree", "moment", "bound"), CROWDED)
    def test_kappas_are_never_exceeded_and_close(self, degree, moment, bound):
        polynomial = crowded(degree, moment, bound)
        kappa, kappa_prime = crowded_errors(polynomial)
        assert kappa <= polynomial.kappa <= 1.03 * kappa + 1e-13 * math.exp(bound)
        assert kappa_prime <= polynomial.kappa_prime <= 1.03 * kappa_prime + 1e-13 * math.exp(bound)

    def test_kappas_hold_between_the_points_of_the_grid(self):
        few = np.linspace(-2.0, 2.0, 12)
        polynomial = crowded(5, 2, 2.0)
        free = np.array(polynomial.coefficients[2:])
        assert crowded_errors(polynomial)[0] <= exponential._distance(2, free, few)
        assert crowded_errors(polynomial)[1] <= exponential._distance(1, free * np.arange(2, 6), few)

    @pytest.mark.parametrize("bound", [0.1, 1.0, 2.0, 4.0])
    def test_best_constant_is_halfway(self, bound):
        low, high = ((mpmath.exp(x) - 1 - x) / x**2 for x in (-mpmath.mpf(bound), mpmath.mpf(bound)))
        assert crowded(2, 2, bound).coefficients[2] == pytest.approx(float((low + high) / 2), rel=1e-3)
        assert crowded(2, 2, bound).kappa == pytest.approx(float((high - low) / 2), rel=1e-2)

    @pytest.mark.parametrize(("degree", "moment", "bound"), [(3, 2, 1.0), (5, 2, 4.0), (8, 4, 3.0), (2, 2, 16.0)])
    def test_error_equioscillates(self, degree, moment, bound):
        polynomial = crowded(degree, moment, bound)
        x = bound * np.sin(np.linspace(-math.pi / 2, math.pi / 2, 400))
        exact = [Fraction(1, math.factorial(i)) for i in range(moment)] + list(polynomial.coefficients[moment:])
        error = np.array([float((mpmath.exp(t) - value(exact, mpmath.mpf(t))) / mpmath.mpf(t) ** moment) for t in x])
        runs = np.split(error, np.flatnonzero(np.diff(np.signbit(error))) + 1)
        assert len(runs) == degree - moment + 2
        assert polynomial.kappa <= 1.03 * min(np.abs(run).max() for run in runs)

    def test_begins_as_taylor(self):
        assert crowded(6, 4, 2.0).coefficients[:4] == taylor(3, 2.0).coefficients

    def test_small_range_approaches_taylor(self):
        assert crowded(4, 2, 1e-3).coefficients == pytest.approx(taylor(4, 1.0).coefficients, rel=1e-3)
        assert crowded(80, 2, 1e-6).coefficients == taylor(80, 1.0).coefficients
        assert crowded(80, 2, 1e-6).kappa < 1e-13

    def test_is_infinite_where_float64_ends(self):
        assert crowded(3, 2, 1e9).kappa == crowded(3, 2, 1e9).kappa_prime == math.inf

    def test_raises(self):
        for moment in (-2, 0, 1, 3):
            with pytest.raises(ValueError, match="moment"):
                crowded(4, moment, 1.0)
        with pytest.raises(ValueError, match="degree"):
            crowded(3, 4, 1.0)
        for bound in (-1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match="bound"):
                crowded(4, 2, bound)


class TestCrowdedTable:
    def test_grid(self):
        assert DEFAULT_GRID[0] == 2**-6
        assert DEFAULT_GRID[-1] == 32
        assert np.diff(np.log2(DEFAULT_GRID)) == pytest.approx(1 / 8)

    @pytest.mark.parametrize(("degree", "moment"), [(2, 2), (3, 2), (4, 4)])
    def test_rows_hold_below_their_bound(self, degree, moment):
        table = crowded_table(degree, moment)
        assert len(table) == len(DEFAULT_GRID)
        for bound, row in list(zip(DEFAULT_GRID, table, strict=True))[::8]:
            *coefficients, kappa, kappa_prime = row
            smaller = CrowdedPolynomial(tuple(coefficients), bound / 1.04, moment, kappa, kappa_prime)
            true, true_prime = crowded_errors(smaller)
            assert true <= kappa
            assert true_prime <= kappa_prime

    @pytest.mark.parametrize(("degree", "moment"), [(2, 2), (3, 2), (4, 2), (4, 4)])
    def test_kappas_rise_with_the_bound(self, degree, moment):
        for column in (-2, -1):
            kappas = [row[column] for row in crowded_table(degree, moment)]
            assert kappas == sorted(kappas)

    def test_own_grid(self):
        one = crowded(3, 2, 1.5)
        assert crowded_table(3, 2, (1.5,)) == ((*one.coefficients, one.kappa, one.kappa_prime),)


def test_polynomials_are_values():
    polynomial = Polynomial((1.0, 1.0), 0.5, 0.1, 0.2)
    assert polynomial == Polynomial((1.0, 1.0), 0.5, 0.1, 0.2)
    assert hash(polynomial) == hash(Polynomial((1.0, 1.0), 0.5, 0.1, 0.2))
    with pytest.raises(AttributeError):
        polynomial.bound = 1.0
