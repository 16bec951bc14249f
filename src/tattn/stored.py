"""Plans that were written down, read again: from files, which anyone may have made, and from exported programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator, Mapping
from functools import lru_cache
from math import inf, isfinite
from types import SimpleNamespace
from typing import Any

from .approximation.exponential import MAX_DEGREE
from .approximation.pruning import MOST_CHANNELS, graded_rank, weights_of
from .checks import LARGEST, MAX_ORDER
from .features.monomials import rank as rank_of
from .methods import METHODS, Banded, Method, Polynomial, Recomputed
from .operands import CHANNELS, COMPLEX, Order
from .plans import FACTS, Plan, Spread
from .problem import Cost, Guarantee, Problem, ScoreRange

_WORDS: dict[str, Container[str | None]] = {
    "method": METHODS,
    "series": ("minimax", "taylor", "fitted", "banded", None),
    "source": ("data", "promise", "estimate", "answer"),
    "dtype": ("float64", "float32", "float16", "bfloat16"),
    "channels": CHANNELS,
}
# Weights of a pruned basis and W, far above what is ever chosen: it takes time to count its monomials.
_MOST_WEIGHT, _MOST_WEIGHTED = 1 << 6, 1 << 8


def plan_of_facts(given: Any) -> Plan:
    """A plan from its facts as JSON has them, lists for tuples; ValueError unless they are of one plan.

    Nobody can see whether a bound is true: it is that of who wrote it down.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"a plan should be facts by name, got {type(given).__name__}")
    given = dict(given)
    options = _options(given.pop("options", {}))
    for name in sorted({*FACTS} ^ {*given}):
        raise ValueError(f"a plan {'lacks' if name in FACTS else 'has no'} {name[:40]!r}")
    facts: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    for kind, names in _KINDS.items():
        for name in names.split():
            if not _HAS_KIND[kind](facts[name]):
                raise ValueError(f"plan's {name} should be {kind}, got {_short(facts[name])}")
    told = SimpleNamespace(**facts)
    for name, agrees in _agreements(told):
        if not agrees:
            raise ValueError(f"plan's {name} should be one that goes with the rest of it, got {_short(facts[name])}")
    return _plan(told, options)


def _options(given: Any) -> dict[str, Any]:
    """The fields of a method, by name; ValueError for what JSON has and a field has not."""
    if not isinstance(given, Mapping):
        raise ValueError(f"a plan's options should be by name, got {_short(given)}")
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    for name, value in options.items():
        if not any(is_one(value) for is_one in _HAS_KIND.values()):
            raise ValueError(
                f"a plan's options should be text, numbers or tuples of them, got {_short(value)} for {name[:40]!r}"
            )
    return options


@lru_cache(maxsize=256)
def plan_of_text(text: str) -> Plan:
    """What `plans.plan_text` wrote."""
    return plan_of_facts(json.loads(text))


def _plan(told: Any, options: Mapping[str, Any]) -> Plan:
    """The plan that facts which agree tell of."""
    order = Order(told.causal, told.window)
    shapes = told.order - 1, told.dim, told.value_dim, told.dtype, told.lengths, told.leading
    return Plan(
        problem=Problem(*shapes, told.scale, order, told.chain, told.channels),
        algorithm=_algorithm(told, options),
        scores=ScoreRange(told.bound, told.lowest_mean, told.source),
        guarantee=Guarantee(told.error, told.grad_error, told.certified),
        exact=Cost(told.flops_exact, told.bytes_exact),
        polynomial=Cost(told.flops_polynomial, told.bytes_polynomial),
        reason=told.reason,
        sizes=told.sizes,
        spread=Spread(told.workers, told.bytes_sent, told.seconds, told.seconds_gradient),
    )


def _algorithm(told: Any, options: Mapping[str, Any]) -> Method:
    """The method that facts which agree tell of."""
    if told.series is None:
        try:
            return METHODS[told.method](**options)
        except TypeError as cannot:
            raise ValueError(f"a plan's options should be those of method {told.method!r}: {cannot}") from None
    if options:
        raise ValueError(f"a plan of method {told.method!r} has no options, got {_short(options)}")
    if told.series == "banded":
        inner = Banded(told.degree, told.bands, told.moment)
        # What the exact rows round is known to the call that chose them.
        return Recomputed(inner, (inf, inf), told.recomputed) if told.recomputed else inner
    return Polynomial(told.series, told.coefficients, told.bound, told.delta, told.delta_prime, told.grading)


def _short(value: Any) -> str:
    """What a value looks like, or begins like."""
    try:
        return f"{value!r:.60}"
    except ValueError:
        return "a number of thousands of digits"


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


def _number(value: Any) -> bool:
    """A float that is a number or infinite, or a whole number that a float holds."""
    if isinstance(value, float):
        return value == value
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= 1 << 1000


def _all(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, tuple) and all(map(kind, value))


_HAS_KIND: dict[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    "text or nothing": lambda value: value is None or isinstance(value, str),
    "true or false": lambda value: isinstance(value, bool),
    "a whole number": _whole,
    "a number": _number,
    "a tuple of numbers": _all(_number),
    "a tuple of whole numbers": _all(_whole),
    "a tuple of whole numbers or nothing": lambda value: value is None or _all(_whole)(value),
}
_KINDS = {
    "text": "method source dtype reason channels",
    "text or nothing": "series",
    "true or false": "certified causal",
    "a whole number": "degree rank dim order value_dim leading bands moment workers chain",
    "a number": "bound error grad_error scale delta delta_prime lowest_mean flops_exact flops_polynomial bytes_exact "
    "bytes_polynomial recomputed bytes_sent seconds seconds_gradient",
    "a tuple of numbers": "coefficients sizes",
    "a tuple of whole numbers": "lengths grading",
    "a tuple of whole numbers or nothing": "window",
}


def _agreements(plan: Any) -> Iterator[tuple[str, bool]]:
    """Names of facts, and whether they go with those before; each may rest on what was asked before it."""
    for name, words in _WORDS.items():
        yield name, getattr(plan, name) in words
    polynomial, banded = plan.method == "polynomial", plan.series == "banded"
    yield "series", (plan.series is not None) == polynomial
    yield "source", (plan.source == "answer") == banded
    yield "certified", not (plan.certified and plan.source == "estimate")
    yield "order", 2 <= plan.order <= MAX_ORDER
    yield "dim", plan.dim >= 1 and not (plan.channels == COMPLEX and plan.dim % 2)
    yield "degree", 1 <= plan.degree <= MAX_DEGREE if polynomial else plan.degree == 0
    grading = plan.grading
    yield "grading", not grading or (polynomial and not banded and len(grading) == plan.dim <= MOST_CHANNELS)
    yield "grading", not grading or min(grading) >= 1
    half = len(grading) // 2
    yield "grading", plan.channels != COMPLEX or grading[:half] == grading[half:]
    yield "grading", not grading or (max(grading) <= _MOST_WEIGHT and plan.degree * min(grading) <= _MOST_WEIGHTED)
    rank = graded_rank(grading, plan.degree) if grading else rank_of(plan.dim, plan.degree) if polynomial else 0
    yield "rank", plan.rank == rank
    yield "sizes", len(plan.sizes) in (0, len(weights_of(grading)))
    yield "coefficients", len(plan.coefficients) == (plan.degree + 1 if polynomial and not banded else 0)
    yield "coefficients", all(map(isfinite, plan.coefficients))
    yield "scale", 0 < plan.scale < inf
    yield "bound", plan.bound > 0
    for name in ("error", "grad_error", "flops_exact", "flops_polynomial", "bytes_exact", "bytes_polynomial"):
        yield name, getattr(plan, name) >= 0
    for name in ("bytes_sent", "seconds", "seconds_gradient", "delta", "delta_prime"):
        yield name, getattr(plan, name) >= 0
    yield "sizes", all(size >= 0 for size in plan.sizes)
    yield "recomputed", 0 <= plan.recomputed <= 1 and (banded or plan.recomputed == 0)
    for name in ("delta", "delta_prime"):
        yield name, (polynomial and not banded) or getattr(plan, name) == inf
    yield "lengths", len(plan.lengths) == plan.order and min(plan.lengths) >= 1
    for name in ("value_dim", "leading", "workers", "chain"):
        yield name, getattr(plan, name) >= 1
    yield "bands", (plan.bands >= 1) == banded
    yield "moment", plan.moment % 2 == 0 and (2 <= plan.moment <= plan.degree if banded else plan.moment == 0)
    yield "causal", not (plan.causal and banded)
    yield "window", plan.window is None or (plan.causal and len(plan.window) == plan.order - 1)
