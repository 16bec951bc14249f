"""Polynomials for exp on [-R, R] and rigorous bounds of their errors: floats in, floats out.

`minimax` and `taylor` bound relative errors, of P and of P', before the scores are known: softmax sees ratios, and its
gradient sees P'. `crowded` bounds |e^x - P| by kappa x^t, for scores that crowd around zero and a certificate made
afterwards from the moment sum of x^t.

All bounds hold between grid points: in a cell of length h, |f| exceeds its values at the ends by at most
h^2/8 sup |f''|, and enough derivatives of a polynomial leave something known. The rest of a Taylor series is
x^m phi_m(x) with phi_m(x) = sum_j x^j/(j + m)!, so nothing cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DEFAULT_GRID: tuple[float, ...] = tuple(2.0 ** (i / 8) for i in range(-48, 41))
"""Bounds from 1/64 to 32, each 9 % above the last: a range is rounded up to the next one."""

_EPS = float(np.finfo(np.float64).eps)
_LEAST = 2.0**-20  # smaller bounds are raised to it: degree 2 is exact to rounding here
MAX_DEGREE = 100
"""Of fits, whose time grows with its cube: where float64 keeps a digit of P(-R), none gains from more."""
_MOST_NODES = 2048  # of `least_error`, in memory that grows with its square
_MOST = 300.0  # beyond, e^(2 R) overflows, long after float64 has lost every digit of P(-R) near R = 18


@dataclass(frozen=True, slots=True)
class Polynomial:
    """P = sum of coefficients[t] x^t; |P/e^x - 1| <= delta and |P'/e^x - 1| <= delta_prime for |x| <= bound.

    P is positive there if delta < 1.
    """

    coefficients: tuple[float, ...]
    bound: float
    delta: float
    delta_prime: float

    @property
    def degree(self) -> int:
        """The number of coefficients less one, whether or not the last is zero."""
        return len(self.coefficients) - 1


@dataclass(frozen=True, slots=True)
class CrowdedPolynomial:
    """P with |e^x - P| <= kappa x^t and |e^x - P'| <= kappa_prime |x|^(t-1) for |x| <= bound; t = moment.

    Its first t coefficients stand for 1/0!, 1/1!, ...; that 1/3! and later ones are rounded (t >= 4 only) counts as
    rounding in the evaluation of P.
    """

    coefficients: tuple[float, ...]
    bound: float
    moment: int
    kappa: float
    kappa_prime: float


@lru_cache(maxsize=1024)
def minimax(degree: int, bound: float) -> Polynomial:
    """Return the P that minimises max(|P/e^x - 1|, |P'/e^x - 1|) over |x| <= bound.

    P' alone decides, since its integral that is exact at -R has the smaller error: so P' is the best fit of exp of its
    degree, and then c_0 makes delta least. Within 2 % of the least possible, until rounding of P(-R), about
    e^(2 R) eps, takes over; P = 0 with both errors 1 where that is no worse. It serves where the paper's Lemma F.1
    takes any polynomial. By Remez exchange on a grid in time O((g + R) g^2): 1 to 2 ms at degree 10; cached.

    Parameters
    ----------
    degree : int
        Degree of P, at least 0; at 0, delta_prime is 1.
    bound : float
        R, finite and not negative; below 2^-20 it is raised to that.

    Raises
    ------
    ValueError
        If `degree` is negative or above `MAX_DEGREE`, or `bound` is negative or not finite.

    Examples
    --------
    >>> minimax(4, 1.0).delta < minimax(4, 1.0).delta_prime < 5.1e-3
    True
    """
    bound = _checked("degree", degree, bound, most=MAX_DEGREE)
    if _least_error(degree, bound) < 0.98:  # otherwise 0 is as good, as always beyond R = 20
        coefficients = _relative_fit(degree, bound)
        delta, delta_prime = errors(coefficients, bound)
        if max(delta, delta_prime) <= 1:
            return Polynomial(coefficients, bound, delta, delta_prime)
    return Polynomial((0.0,) * (degree + 1), bound, 1.0, 1.0)


@lru_cache(maxsize=1024)
def taylor(degree: int, bound: float) -> Polynomial:
    """Return the sum of x^t/t!, t <= degree; arguments, ValueErrors and cost are those of `minimax`.

    Examples
    --------
    >>> taylor(2, 1.0).coefficients
    (1.0, 1.0, 0.5)
    """
    bound = _checked("degree", degree, bound, most=MAX_DEGREE)
    coefficients = tuple(_taylor(degree).tolist())
    return Polynomial(coefficients, bound, *errors(coefficients, bound))


def errors(coefficients: Sequence[float], bound: float) -> tuple[float, float]:
    """Return upper bounds of max |P/e^x - 1| and max |P'/e^x - 1| over |x| <= bound, `math.inf` without one.

    About 1 % above the maxima, or (g + 6) eps max sum |c_t x^t| e^-x where that, their rounding, is more.
    e_k = P^(k)/e^x - 1 has e_k'' = e_(k+2) - 2 e_(k+1) + e_k, and e_k = -1 for k > g. Time O((g + R) g^2).

    Parameters
    ----------
    coefficients : sequence of float
        c_0 ... c_g of the monomials in x, at least one.
    bound : float
        R, finite and not negative; below 2^-20 it is raised to that.

    Raises
    ------
    ValueError
        If `coefficients` is empty or more than `MAX_DEGREE` + 1, or `bound` is negative or not finite.

    Examples
    --------
    >>> errors([1.0], 1.0)[1]
    1.0
    """
    bound = _checked("len(coefficients)", len(coefficients), bound, least=1, most=MAX_DEGREE + 1)
    if bound > _MOST:
        return math.inf, math.inf
    return _errors_between(np.asarray(coefficients, dtype=np.float64), _grid(len(coefficients), bound))


def _errors_between(coefficients: Floats, points: Floats) -> tuple[float, float]:
    """`errors` from the first to the last of the points, by what is seen at them."""
    with np.errstate(all="ignore"):
        value, rounding = _derivatives(coefficients, points)
        weight = np.exp(-points)
        error = np.abs(value * weight - 1) + rounding * weight
        return _suprema(np.vstack([error, np.ones((2, len(points)))]), points, twist=1)


def least_error(degree: int, bound: float) -> float:
    """Return a lower bound of max |P/e^x - 1| over |x| <= bound for every P of this degree, in exact arithmetic.

    Weights that annihilate all P of the degree see e^x - P as they see e^x; the nodes level cos(n t - r sin t) =
    e^-x Re(z^n e^(r/z)), x = r cos t, z = e^(i t), which is nearly such an error: the bound is close for R < 0.9 (g + 1)
    and does not grow beyond, where the true error is larger, about a half at R = g + 1. It rounds by some
    16 (g + 2) (1 + R) eps. Time O(g^2).

    Parameters
    ----------
    degree : int
        Degree of P, at least 0.
    bound : float
        R, finite and not negative; below 2^-20 it is raised to that.

    Raises
    ------
    ValueError
        If `degree` is negative or above 2048, or `bound` is negative or not finite.

    Examples
    --------
    >>> 0.4 * minimax(4, 1.0).delta < least_error(4, 1.0) < minimax(4, 1.0).delta
    True
    """
    bound, n = _checked("degree", degree, bound, most=_MOST_NODES), degree + 1
    r = min(bound, 0.9 * n)
    angle = turn = np.linspace(0, math.pi, n + 1)
    for _ in range(8):
        angle = turn + r / n * np.sin(angle)
    gaps = np.abs(np.subtract.outer(np.cos(angle), np.cos(angle))) + np.eye(n + 1)
    sizes = r * np.cos(angle) - np.log(gaps).sum(axis=1)
    weights = np.exp(sizes - sizes.max())
    return abs(float(weights[::2].sum() - weights[1::2].sum())) / float(weights.sum())


def smallest(
    bound: float,
    accept: Callable[[Polynomial], bool],
    *,
    series: Literal["minimax", "taylor"] = "minimax",
    max_degree: int = 24,
) -> Polynomial | None:
    """Return the `minimax` or `taylor` polynomial of smallest degree that `accept` accepts, or None.

    As a rule one polynomial is fitted, whatever its degree.

    Parameters
    ----------
    bound : float
        R, finite and not negative; below 2^-20 it is raised to that.
    accept : callable
        Decides on a `Polynomial`, and rejects no smaller delta, delta_prime or sizes of coefficients where it accepts
        larger ones: it is first shown errors that no polynomial of the degree beats, with coefficients 0, and a degree
        that it then rejects is skipped.
    series : {"minimax", "taylor"}
        Where the polynomials come from.
    max_degree : int
        The last degree to try, at least 0.

    Raises
    ------
    ValueError
        If `bound` is negative or not finite, `max_degree` is negative or above `MAX_DEGREE`, or `series` is neither.

    Examples
    --------
    >>> smallest(1.0, lambda polynomial: polynomial.delta_prime < 1e-3).degree
    5
    """
    bound = _checked("max_degree", max_degree, bound, most=MAX_DEGREE)
    if series not in ("minimax", "taylor"):
        raise ValueError(f"series should be 'minimax' or 'taylor', got {series!r}")
    for degree in range(max_degree + 1):
        least = _least_error(degree, bound), _least_error(degree - 1, bound)
        if accept(Polynomial((0.0,) * (degree + 1), bound, *least)):
            polynomial = minimax(degree, bound) if series == "minimax" else taylor(degree, bound)
            if accept(polynomial):
                return polynomial
    return None


@lru_cache(maxsize=4096)
def crowded(degree: int, moment: int, bound: float) -> CrowdedPolynomial:
    """Return P = (Taylor below x^t) + x^t Q(x), t = moment, with the least kappa = sup |e^x - P|/x^t.

    By Remez exchange on a grid: kappa is within 2 % of the least. 1 ms; cached.

    Parameters
    ----------
    degree : int
        Degree of P, at least `moment`.
    moment : int
        t, even and at least 2.
    bound : float
        R, finite and not negative; below 2^-20 it is raised to that. Beyond 300 both kappas are `math.inf`.

    Raises
    ------
    ValueError
        If `moment` is odd or below 2, `degree` is below `moment` or above `MAX_DEGREE`, or `bound` is negative or not finite.

    Examples
    --------
    >>> crowded(2, 2, 1.0).coefficients[:2], round(crowded(2, 2, 1.0).kappa, 3)
    ((1.0, 1.0), 0.175)
    """
    if moment < 2 or moment % 2:
        raise ValueError(f"moment should be even and at least 2, got {moment}")
    bound = _checked("degree", degree, bound, least=moment, most=MAX_DEGREE)
    coefficients = _taylor(degree)
    kappa = kappa_prime = math.inf
    if bound <= _MOST:
        free = coefficients[moment:]
        x = _points(10 * len(free) + 64 + int(6 * bound), bound)
        rest = x ** len(free) * _phi(degree + 1, x)[0][0]
        if np.abs(rest).max() > _EPS * free[0]:  # otherwise Taylor's Q is exact to rounding
            free += _uniform_fit(x, rest, np.ones_like(x), len(free))
        points = _grid(len(free), bound)
        kappa = _distance(moment, free, points)
        # e^x - P' = x^(t-1) (phi_(t-1) - t Q - x Q')
        kappa_prime = _distance(moment - 1, free * np.arange(moment, degree + 1), points)
    return CrowdedPolynomial(tuple(coefficients.tolist()), bound, moment, kappa, kappa_prime)


@lru_cache(maxsize=64)
def crowded_table(degree: int, moment: int, grid: tuple[float, ...] = DEFAULT_GRID) -> tuple[tuple[float, ...], ...]:
    """Return a row (c_0, ..., c_g, kappa, kappa_prime) of `crowded` for each bound in `grid`.

    The row of a bound R' serves all |x| <= R'. ValueErrors are those of `crowded`. 1 ms a row; cached.

    Examples
    --------
    >>> len(crowded_table(2, 2)), len(crowded_table(2, 2)[0])
    (89, 5)
    """
    fits = (crowded(degree, moment, bound) for bound in grid)
    return tuple((*fit.coefficients, fit.kappa, fit.kappa_prime) for fit in fits)


def _checked(name: str, count: int, bound: float, *, least: int = 0, most: int) -> float:
    """Return the bound in use; ValueError names what is out of range."""
    if count < least:
        raise ValueError(f"{name} should be at least {least}, got {count}")
    if count > most:
        raise ValueError(f"{name} should be at most {most}, got {count}")
    if not 0 <= bound < math.inf:
        raise ValueError(f"bound should be finite and not negative, got {bound}")
    return max(float(bound), _LEAST)


def _taylor(degree: int) -> Floats:
    """Return 1/t!, t <= degree: (g+1,)."""
    return np.array([1 / math.factorial(t) for t in range(degree + 1)])


def _points(count: int, bound: float) -> Floats:
    """Chebyshev extrema from -bound to bound, ascending, both ends exact: (count,)."""
    return bound * np.sin(np.linspace(-math.pi / 2, math.pi / 2, count))


def _grid(count: int, bound: float) -> Floats:
    """The points at which errors of so many coefficients are looked at."""
    return _points(16 * count + 80 + int(32 * bound), bound)


def _relative_fit(degree: int, bound: float) -> tuple[float, ...]:
    """Coefficients (g+1,) of `minimax`, as a correction to Taylor's: accurate however small the error is."""
    if degree == 0:
        return (1 / math.cosh(bound),)
    coefficients, change = _taylor(degree), np.zeros(degree + 1)
    x = _points(10 * degree + 64 + int(6 * bound), bound)
    weight = np.exp(-x)
    slope = x**degree * _phi(degree, x)[0][0]
    if (np.abs(slope) * weight).max() > _EPS:
        change[1:] = _uniform_fit(x, slope, weight, degree) / np.arange(1, degree + 1)
        value = x ** (degree + 1) * _phi(degree + 1, x)[0][0]
        rest = value - np.vander(x, degree + 1, increasing=True) @ change
        change[0] = _uniform_fit(x, rest, weight, 1)[0]
    return tuple((coefficients + change).tolist())


def _uniform_fit(x: Floats, target: Floats, weight: Floats, terms: int) -> Floats:
    """Coefficients (g+1,) that minimise max weight |target - polynomial| on ascending x (n,), g+1 = terms.

    Remez exchange: each round levels the error on one reference of g+2 points, then moves them to its peaks.
    """
    powers = np.vander(x / x[-1], terms, increasing=True)
    target = target * weight
    # QR serves rows of all sizes where they come large to small, as e^-x does (Cox and Higham, 1998)
    basis, triangle = np.linalg.qr(powers * weight[:, None])
    signs = (-1.0) ** np.arange(terms + 1)
    peaks = np.linspace(0, len(x) - 1, terms + 1).round().astype(int).tolist()
    best, least = np.zeros(terms), math.inf
    for _ in range(30):
        *fit, level = np.linalg.solve(np.column_stack([basis[peaks], signs]), target[peaks])
        error = target - basis @ fit
        size = np.abs(error)
        if size.max() < least:
            best, least = np.array(fit), float(size.max())
        edges = [0, *(np.flatnonzero(np.diff(np.signbit(error))) + 1).tolist(), len(x)]
        peaks = [start + int(size[start:stop].argmax()) for start, stop in pairwise(edges)]
        while len(peaks) > terms + 1:
            peaks.pop(0 if size[peaks[0]] < size[peaks[-1]] else -1)
        # no polynomial goes below the level (de la Vallee Poussin); fewer peaks are only rounding
        if least <= 1.001 * abs(level) or len(peaks) <= terms:
            break
    coefficients: Floats = np.linalg.solve(triangle, best) / x[-1] ** np.arange(terms)
    return coefficients


def _phi(order: int, x: Floats, derivatives: int = 0) -> tuple[Floats, float]:
    """Derivatives 0 ... k of phi_m, m = order > 0, at x (n,): (k+1, n), and a bound of their relative error.

    phi_m(x) is the integral over s in [0, 1] of e^((1-s) x) s^(m-1)/(m-1)!; with e^x taken out for x < 0, it expands
    into positive terms on both sides.
    """
    terms = int(3 * np.abs(x).max()) + 40 + derivatives
    j, k = np.arange(terms), np.arange(1, derivatives + 1)[:, None]
    powers = np.cumprod(np.vstack([np.ones_like(x), np.abs(x) / j[1:, None]]), axis=0)
    head = np.cumprod(np.append(1 / math.factorial(order), j[1:] / (j[1:] + order)))
    right = np.cumprod(np.vstack([head, (j + k) / (j + k + order)]), axis=0)
    left = np.cumprod(np.vstack([1 / math.factorial(order - 1) / (order + j), k / (order + j + k)]), axis=0)
    return np.where(x < 0, (left @ powers) * np.exp(np.minimum(x, 0)), right @ powers), 4 * terms * _EPS


def _derivatives(coefficients: Floats, x: Floats) -> tuple[Floats, Floats]:
    """P^(k), k <= g, at x (n,): (g+1, n), and bounds of the rounding in them and in a product with e^-x."""
    terms = len(coefficients)
    table = np.zeros((terms, terms))
    table[0] = coefficients
    for k in range(1, terms):
        table[k, :-1] = table[k - 1, 1:] * np.arange(1, terms)
    value = size = np.zeros((terms, len(x)))
    for column in table.T[::-1, :, None]:
        value, size = value * x + column, size * np.abs(x) + np.abs(column)
    # Horner and the table: at most 2 g + 1 roundings of eps/2 in a term; 6 more in the product
    return value, (terms + 5) * _EPS * size


def _distance(order: int, coefficients: Floats, points: Floats) -> float:
    """Upper bound of sup |phi_m - Q|, m = order, from the first to the last of the points for the coefficients of Q."""
    phi, relative = _phi(order, points, len(coefficients) + 1)
    value, rounding = _derivatives(coefficients, points)
    error = phi * (1 + relative)  # beyond the degree of Q only phi is left, and it increases
    error[:-2] = np.abs(phi[:-2] - value) + rounding + relative * phi[:-2]
    return _suprema(error, points, twist=0)[0]


def _suprema(values: Floats, points: Floats, twist: int) -> tuple[float, float]:
    """Bounds of sup |f_0| and sup |f_1| from |f_k| (K+1, n) at points (n,).

    f_k'' = f_(k+2) + twist (f_k - 2 f_(k+1)); the last two rows must bound a cell by its ends.
    """
    cells = np.maximum(values[:, :-1], values[:, 1:])
    bend = np.diff(points) ** 2 / 8
    for k in range(len(cells) - 3, -1, -1):
        cells[k] += bend * (cells[k + 2] + 2 * twist * cells[k + 1])
        cells[k] *= (1 + 16 * _EPS) / (1 - twist * bend)
    first, second = cells[:2].max(axis=1).tolist()
    return (first, second) if math.isfinite(first + second) else (math.inf, math.inf)


def _least_error(degree: int, bound: float) -> float:
    """Lower bound of what `errors` returns for every P of this degree. Rounding at -R sees P(R) e^R."""
    if degree < 0:
        return 1.0
    level = least_error(degree, bound) - 16 * (degree + 2) * (1 + min(bound, 0.9 * (degree + 1))) * _EPS
    rounding = (degree + 1) * _EPS * math.exp(2 * min(bound, _MOST))
    return max(level, rounding / (1 + rounding))
