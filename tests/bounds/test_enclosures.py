"""What is stated holds, proved case by case: small calls and polynomials enclosed in balls.

Arb computes with balls that hold the true number whatever is rounded, here of 200 bits and from the very floats that the
library gets. A comparison of balls is true only if it is true of all their numbers: so nothing below passes by chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from itertools import product
from operator import attrgetter, mul
from typing import Any, NamedTuple

import numpy as np
import pytest
from cases import KINDS, Call
from flint import acb, arb, arb_series, ctx
from reference import Dense, score_by_score, sizes_of, through_features

import tattn
from tattn.approximation.exponential import crowded, minimax, taylor

TERMS = 6  # of a Taylor series in a cell


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    """200 bits, and as many terms of a series as are used."""
    before, ctx.cap = ctx.cap, TERMS + 1
    with ctx.workprec(200):
        yield
    ctx.cap = before


def horner(coefficients: Sequence[Any], x: Any) -> Any:
    """A polynomial of a series."""
    return reduce(lambda value, c: value * x + c, map(arb, reversed(coefficients)), arb_series([0]))


def check_cells(error: Callable[[Any], Any], bound: float, stated: Any) -> None:
    """|error(x)| <= stated for all |x| <= bound: a Taylor series in each cell, cells as small as it takes.

    The last term is one of all points of the cell, so it holds the rest of the series.
    """
    cells = [(0.0, 1.0)]
    while cells:
        middle, half = cells.pop()  # parts of the bound, without rounding
        center, radius = arb(bound) * middle, arb(bound) * half
        # At center + radius s, in powers of s.
        head, rest = (error(arb_series([x, radius])) for x in (center, arb(center, radius)))
        assert not abs(head[0]) > stated, (bound, stated, center, head[0])
        if not sum((abs(head[k]) for k in range(TERMS)), abs(rest[TERMS])) <= stated:
            assert half > 2**-40, (bound, stated, center, head[0])
            cells += [(middle - half / 2, half / 2), (middle + half / 2, half / 2)]


def derivative(coefficients: Sequence[float]) -> list[Any]:
    """Coefficients of P', without rounding; 0 for a constant."""
    return [t * c for t, c in enumerate(map(arb, coefficients))][1:] or [0]


BOUNDS = pytest.mark.parametrize("bound", [0.0, 0.1, 0.5, 1.0, 2.0, 3.7, 8.0])


@pytest.mark.parametrize("series", [minimax, taylor])
@BOUNDS
def test_no_polynomial_is_further_from_exp_than_it_says(series: Callable[..., Any], bound: float) -> None:
    for degree in (0, 1, 2, 3, 4, 6, 9, 14, 24):
        found = series(degree, bound)
        value, slope = found.coefficients, derivative(found.coefficients)
        check_cells(lambda x, c=value: horner(c, x) * (-x).exp() - 1, found.bound, found.delta)
        check_cells(lambda x, c=slope: horner(c, x) * (-x).exp() - 1, found.bound, found.delta_prime)


@BOUNDS
def test_no_polynomial_of_a_band_is_further_from_exp_than_it_says(bound: float) -> None:
    """(e^x − P)/x^t and (e^x − P′)/x^(t−1) as power series of 90 terms, all others less than is added for them."""
    for degree, moment in ((2, 2), (3, 2), (6, 2), (4, 4), (7, 4)):
        found = crowded(degree, moment, bound)
        rest = 2 * arb(8) ** 90 / arb(90).fac()
        for kept, order, stated in (
            (found.coefficients[moment:], moment, found.kappa),
            (derivative(found.coefficients)[moment - 1 :], moment - 1, found.kappa_prime),
        ):
            own = [arb(c) for c in kept] + [arb(0)] * (90 - len(kept))
            terms = [1 / arb(j + order).fac() - c for j, c in enumerate(own)]
            check_cells(lambda x, c=terms: horner(c, x), found.bound, arb(stated) - rest)


def balls(x: Any) -> np.ndarray:
    """The numbers themselves, as balls without a radius."""
    x = np.asarray(x)
    return np.array([arb(float(one)) for one in x.flat] + [None], object)[:-1].reshape(x.shape)


def complex_balls(x: np.ndarray, channels: str) -> np.ndarray:
    """Rows of query or keys (n, h); real channels have no imaginary part."""
    re, im = np.split(balls(x), 2, axis=-1) if channels == "complex" else (balls(x), balls(0 * x))
    return np.frompyfunc(acb, 2, 1)(re, im)


def sees(plan: tattn.Plan, call: Call, i: int, tuple_: tuple[int, ...]) -> bool:
    """Whether query row i attends to a tuple of key rows."""
    for view, j in enumerate(tuple_):
        behind = i + len(call.keys[view]) - len(call.query) - j
        masked = call.masks is not None and call.masks[view] is not None and not call.masks[view][j]
        if masked or (plan.causal and behind < 0) or (plan.window and behind >= plan.window[view]):
            return False
    return True


def enclosed(call: Call, plan: tattn.Plan) -> Dense:
    """Softmax attention and all its gradients by their definition, tuple by tuple."""
    query, *keys = (complex_balls(x, plan.channels) for x in (call.query, *call.keys))
    values, scale = [balls(v) for v in call.values], arb(plan.scale)
    grad_out, grad_lse = balls(call.grad_out), balls(call.grad_lse)
    out, lse = np.empty_like(grad_out), np.empty_like(grad_lse)
    dquery, *dkeys = (np.full_like(x, acb(0)) for x in (query, *keys))
    dvalues = [np.full_like(v, arb(0)) for v in values]

    def times(factors: Sequence[np.ndarray], rows: Sequence[int], but: int | None = None) -> Any:
        """The product of one row of each factor, without one factor."""
        return reduce(mul, (x[j] for k, (x, j) in enumerate(zip(factors, rows, strict=True)) if k != but), arb(1))

    conjugate, real = np.frompyfunc(acb.conjugate, 1, 1), [query, *keys]
    for i in range(len(query)):
        tuples = [t for t in product(*(range(len(k)) for k in keys)) if sees(plan, call, i, t)]
        weights = [(scale * times(real, (i, *t)).sum().real).exp() for t in tuples]
        total = sum(weights)
        out[i] = sum(w * times(values, t) for w, t in zip(weights, tuples, strict=True)) / total
        lse[i] = total.log()
        shift = (grad_out[i] * out[i]).sum() - grad_lse[i]
        for weight, t in zip(weights, tuples, strict=True):
            f = weight / total
            p = scale * f * ((grad_out[i] * times(values, t)).sum() - shift)
            # Of complex numbers ∂/∂re + i ∂/∂im.
            for view, (gradient, j) in enumerate(zip((dquery, *dkeys), (i, *t), strict=True)):
                gradient[j] += p * conjugate(times(real, (i, *t), view))
            for view, j in enumerate(t):
                dvalues[view][j] += f * grad_out[i] * times(values, t, view)

    def parts(x: np.ndarray) -> np.ndarray:
        """Real parts, and imaginary parts behind them if channels are complex."""
        names = ("real", "imag") if plan.channels == "complex" else ("real",)
        return np.concatenate([np.frompyfunc(attrgetter(name), 1, 1)(x) for name in names], axis=-1)

    return Dense(out, lse, parts(dquery), [*map(parts, dkeys)], dvalues)


def check_within(what: str, got: np.ndarray, truth: np.ndarray, allowed: Any) -> np.ndarray:
    """All that is computed lies within what is allowed, and surely so; for how many numbers anything was promised."""
    off, allowed = abs(balls(got) - truth), np.broadcast_to(allowed, truth.shape)
    for place, (error, most) in enumerate(zip(off.flat, allowed.flat, strict=True)):
        assert error <= most, (what, place, error, most)
    return np.array([sum(most.is_finite() for most in allowed.flat), allowed.size])


def tops(x: np.ndarray, mask: np.ndarray | None, channels: str = "real") -> np.ndarray:
    """Largest sizes by channel, (1, k): of complex channels moduli, for both of their parts."""
    kept = x if mask is None else x[mask]
    if channels == "real":
        return balls(np.abs(kept).max(0, keepdims=True))
    size = abs(complex_balls(kept, channels)).max(0, keepdims=True)
    return np.concatenate([size, size], axis=-1)


def check_call(call: Call, plan: tattn.Plan) -> np.ndarray:
    """All that is said of the errors of one call, with the answer, with the gradients and by the plan; how much is promised."""
    given: Any = {"plan": plan, "key_masks": call.masks, "causal": plan.causal, "window": plan.window}
    arrays = (call.query, call.keys, call.values)
    (out, lse, error), pullback = tattn.tensor_attention_vjp(*arrays, return_lse=True, return_error=True, **given)
    gradients, bounds = pullback(call.grad_out, call.grad_lse, return_error=True)
    truth = enclosed(call, plan)

    banded, masks = plan.series == "banded", call.masks or [None] * len(call.keys)
    sizes = [tops(v, mask) for v, mask in zip(call.values, masks, strict=True)]
    promised = check_within("out", out, truth.out, balls(error)[:, None] * reduce(mul, sizes))
    # In bands the bound of an output of ones is twice that of the normaliser.
    of_lse = [-(1 - e).log() if e < 1 else arb.pos_inf() for e in balls(error) / (2 if banded else 1)]
    last_places = 4 * float(np.finfo(lse.dtype).eps) * (abs(truth.lse) + 1)
    check_within("lse", lse, truth.lse, of_lse + last_places)
    found, allowed = ([x[0], *x[1], *x[2]] for x in (gradients, bounds))
    exact = [truth.dquery, *truth.dkeys, *truth.dvalues]
    for place, (got, bound, known) in enumerate(zip(found, allowed, exact, strict=True)):
        promised += check_within(f"gradient {place}, with its bound", got, known, balls(bound))
    if not banded:
        check_within("out, by the plan", out, truth.out, arb(plan.error) * reduce(mul, sizes))
        for place, (got, bound, known) in enumerate(zip(found, planned(call, plan, masks, sizes), exact, strict=True)):
            check_within(f"gradient {place}, by the plan", got, known, bound)
    return promised


def planned(call: Call, plan: tattn.Plan, masks: Sequence[Any], sizes: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What the plan allows for the gradients of query, keys and values, from the largest entries."""
    grad, of_lse = abs(balls(call.grad_out)), abs(balls(call.grad_lse))[:, None]
    weight = (grad * reduce(mul, sizes)).sum(-1, keepdims=True) + of_lse
    rows = zip((call.query, *call.keys), (None, *masks), strict=True)
    largest = [tops(x, mask, plan.channels) for x, mask in rows]

    def others(factors: Sequence[np.ndarray], but: int) -> Any:
        return reduce(mul, (x for k, x in enumerate(factors) if k != but), arb(1))

    steep = arb(plan.grad_error) * arb(plan.scale)
    of_scores = [steep * others(largest, k) * (weight.sum() if k else weight) for k in range(len(largest))]
    return of_scores + [arb(plan.error) * others(sizes, k) * grad.sum(0) for k in range(len(sizes))]


class Way(NamedTuple):
    """A method under trial: what is asked of `tattn.plan`, how the plan is changed, degrees, and what scores reach."""

    asked: dict[str, Any]
    change: Callable[[Any], Any] = lambda plan: plan
    degrees: tuple[int, ...] = ()
    bounds: tuple[float, ...] = (0.3, 1.0, 2.0)


DEGREES = (1, 2, 3, 5, 8)
WAYS = {
    "exact": Way({"method": "exact"}),
    "exact, causal": Way({"method": "exact", "causal": True}),
    "exact, in windows": Way({"method": "exact", "window": (2, 3, 2)}),
    "polynomial": Way({}, through_features, DEGREES),
    "polynomial, causal": Way({"causal": True}, through_features, DEGREES),
    "polynomial, score by score": Way({}, score_by_score, DEGREES),
    # Where scores are large, bands promise nothing for gradients.
    "banded": Way({"series": "banded", "bands": 2}, degrees=(2, 3, 4), bounds=(0.1, 0.3, 0.6)),
}


def small(kind: str, seed: int, views: int, bound: float, dtype: str, channels: str) -> tuple[Call, float]:
    """A draw of few rows whose scores reach about `bound`, and the scale; channel 0 of the values is of ones."""
    rng = np.random.default_rng([seed, views, len(kind)])
    dim = int(rng.choice([2, 4]))
    lengths = [int(rng.integers(2, 4)), *(int(n) for n in rng.integers(3, 8 - views, views))]
    query, *keys = (KINDS[kind](rng, (n, dim), i).astype(dtype) for i, n in enumerate(lengths))
    sizes = [sizes_of(x.astype(float), channels).max(0) for x in (query, *keys)]
    reach = reduce(mul, sizes).sum() / (2 if channels == "complex" else 1)
    values = [np.float64(rng.choice([-1.0, 1.0, rng.random()], (n, 2))) for n in lengths[1:]]
    for v in values:
        v[:, 0] = 1
    masks = [np.arange(n) != 1 for n in lengths[1:]] if seed % 3 == 2 else None
    upstream = rng.normal(size=(lengths[0], 2)).astype(dtype), rng.normal(size=lengths[0]).astype(dtype)
    return Call(query, keys, [v.astype(dtype) for v in values], masks, *upstream), float(bound / reach)


@pytest.mark.parametrize("channels", ["real", "complex"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("way", list(WAYS))
def test_no_small_call_is_off_by_more_than_stated(
    way: str, views: int, dtype: str, channels: str, draws: Callable[[int], range]
) -> None:
    asked, change, degrees, bounds = WAYS[way]
    promised = np.zeros(2)
    for seed in draws(15):
        rng = np.random.default_rng([seed, views, len(way)])
        kind, bound = str(rng.choice(list(KINDS))), float(rng.choice(bounds))
        call, scale = small(kind, seed, views, bound, dtype, channels)
        given = {"scale": scale, "key_masks": call.masks, "channels": channels, **asked}
        if degrees:
            given["degree"] = int(rng.choice(degrees))
        if "window" in asked:
            given["window"] = asked["window"][:views]
        plan = change(tattn.plan(call.query, call.keys, call.values, **given))
        promised += check_call(call, plan)
    # Bands promise nothing of the gradients of float32 that has channels of sizes 1000 and 0.001.
    assert promised[0] > 0.5 * promised[1]
