"""Plans that were written down, read again: from files, which anyone may have made, and from exported programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from math import inf, isfinite
from typing import Any

from .approximation.exponential import MAX_DEGREE
from .approximation.pruning import MOST_CHANNELS, graded_rank, weights_of
from .checks import LARGEST, MAX_ORDER
from .features.monomials import rank as rank_of
from .plans import Plan

_WORDS: dict[str, tuple[str | None, ...]] = {
    "method": ("polynomial", "exact"),
    "series": ("minimax", "taylor", "fitted", "banded", None),
    "source": ("data", "promise", "estimate", "answer"),
    "dtype": ("float64", "float32", "float16", "bfloat16"),
}
# Weights of a pruned basis and W, far above what is ever chosen: it takes time to count its monomials.
_MOST_WEIGHT, _MOST_WEIGHTED = 1 << 6, 1 << 8


def plan_of_fields(given: Any) -> Plan:
    """A plan from its fields as JSON has them, lists for tuples; ValueError unless they are of one plan.

    Nobody can see whether a bound is true: it is that of who wrote it down.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"a plan should be fields by name, got {type(given).__name__}")
    names = [field.name for field in fields(Plan)]
    for name in sorted({*names} ^ {*given}):
        raise ValueError(f"a plan {'lacks' if name in names else 'has no'} {name[:40]!r}")
    made: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    for field in fields(Plan):
        if not _KINDS[str(field.type)](made[field.name]):
            raise ValueError(f"{field.name} of a plan should be {field.type}, got {_short(made[field.name])}")
    plan = Plan(**made)
    for name, agrees in _agreements(plan):
        if not agrees:
            raise ValueError(f"{name} of a plan does not go with the rest of it, got {_short(getattr(plan, name))}")
    return plan


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


# By the annotations of `Plan`.
_KINDS: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "str | None": lambda value: value is None or isinstance(value, str),
    "bool": lambda value: isinstance(value, bool),
    "int": _whole,
    "float": _number,
    "tuple[float, ...]": _all(_number),
    "tuple[int, ...]": _all(_whole),
    "tuple[int, ...] | None": lambda value: value is None or _all(_whole)(value),
    "Grading": _all(_whole),
}


def _agreements(plan: Plan) -> Iterator[tuple[str, bool]]:
    """Names of fields, and whether they go with those before; each may rest on what was asked before it."""
    for name, words in _WORDS.items():
        yield name, getattr(plan, name) in words
    polynomial, banded = plan.method == "polynomial", plan.series == "banded"
    yield "series", (plan.series is not None) == polynomial
    yield "source", (plan.source == "answer") == banded
    yield "certified", not (plan.certified and plan.source == "estimate")
    yield "order", 2 <= plan.order <= MAX_ORDER
    yield "dim", plan.dim >= 1
    yield "degree", 1 <= plan.degree <= MAX_DEGREE if polynomial else plan.degree == 0
    grading = plan.grading
    yield "grading", not grading or (polynomial and not banded and len(grading) == plan.dim <= MOST_CHANNELS)
    yield "grading", not grading or min(grading) >= 1
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
    for name in ("bytes_sent", "seconds", "seconds_gradient"):
        yield name, getattr(plan, name) >= 0
    yield "sizes", all(size >= 0 for size in plan.sizes)
    yield "recomputed", 0 <= plan.recomputed <= 1
    yield "lengths", len(plan.lengths) == plan.order
    for name in ("value_dim", "leading", "workers"):
        yield name, getattr(plan, name) >= 1
    yield "bands", (plan.bands >= 1) == banded
    yield "moment", plan.moment % 2 == 0 and (2 <= plan.moment <= plan.degree if banded else plan.moment == 0)
    yield "causal", not (plan.causal and banded)
    yield "window", plan.window is None or (plan.causal and not polynomial and len(plan.window) == plan.order - 1)
