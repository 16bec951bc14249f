"""Plans in norm bands: those that are worth a trial, and those that were asked for."""

from __future__ import annotations

from math import inf, isqrt
from typing import Any

from ..approximation.exponential import MAX_DEGREE
from ..checks import checked_series, described, shown, whole
from ..features.monomials import rank as rank_of
from ..methods import Banded
from ..plans import Plan
from ..problem import Problem, ScoreRange
from .selection import Wish, check_rank, plan_with
from .settings import settings

# The largest rank that is tried in bands before it is known whether that will do.
_BANDED_RANK = 1 << 13
# Tuples of norm bands, each with a polynomial of its own.
_MAX_TUPLES = 1 << 26
# Views of a banded call, each a dimension of one array beside those of the call.
_MAX_BANDED_ORDER = 32


def banded_candidates(problem: Problem) -> list[Plan]:
    """Banded plans to try, the cheapest first."""
    shortest = min(problem.lengths)
    bands = settings().bands or (8 if shortest < 1 << 14 else 12)
    if problem.order.causal or shortest < 2 * bands or not bands_fit(bands, problem.views + 1):
        return []
    tried = [(g, t) for g, t in settings().banded if rank_of(problem.dim, g) <= _BANDED_RANK]
    return [banded_plan(problem, Banded(g, bands, t)) for g, t in tried]


def is_banded(series: Any, bands: Any, moment: Any) -> bool:
    """Whether the series is "banded"; ValueError for what belongs to it and to no other."""
    if checked_series(series) == "banded":
        return True
    for name, value in (("bands", bands), ("moment", moment)):
        if value is not None:
            raise ValueError(f"{name} should come with series 'banded', got it with series {series!r}")
    return False


def asked_banded(problem: Problem, wish: Wish, bound: Any, bands: int | None, moment: int | None) -> Plan:
    """A banded plan, with what it does not go together with refused."""
    if bound is not None:
        raise ValueError(
            f"bound cannot be combined with series 'banded', which finds its own ranges; got {described(bound)}"
        )
    if wish.fixed:
        raise ValueError(f"series 'banded' belongs to the polynomial method, got it with method {wish.fixed.name!r}")
    degree, bands, moment = (
        usual if given is None else given for given, usual in ((wish.degree, 2), (bands, 8), (moment, 2))
    )
    return banded_plan(problem, Banded(degree, bands, moment))


def bands_fit(bands: int, order: int) -> bool:
    """Whether a plan accepts so many norm bands of every view."""
    return order <= _MAX_BANDED_ORDER and bands**order <= _MAX_TUPLES


def banded_plan(problem: Problem, method: Banded) -> Plan:
    """A plan whose error comes with the answer."""
    if problem.order.causal:
        raise ValueError(
            "series 'banded' sorts rows by norm and has no use where their order counts, got it with causal=True"
        )
    order = problem.views + 1
    if order > _MAX_BANDED_ORDER:
        raise ValueError(f"order should be at most {_MAX_BANDED_ORDER} with series 'banded', got {order}")
    degree = whole("degree", method.degree, 1, MAX_DEGREE)
    bands, moment = whole("bands", method.bands, 1), whole("moment", method.moment, 2)
    if not bands_fit(bands, order):
        most = max(b for b in range(1, isqrt(_MAX_TUPLES) + 1) if bands_fit(b, order))
        raise ValueError(
            f"bands should be at most {most:,} for order {order}, got {shown(bands)}: each tuple of bands has a polynomial "
            "of its own"
        )
    if bands > min(problem.lengths):
        raise ValueError(f"bands should be at most the rows of every view, {min(problem.lengths)}, got {bands}")
    if moment % 2:
        raise ValueError(f"moment should be even, got {moment}")
    if moment > degree:
        raise ValueError(f"moment should be at most the degree {degree}, got {moment}: moments are sums of monomials")
    check_rank(problem, degree)
    scores = ScoreRange(inf, -inf, "answer")
    return plan_with(Banded(degree, bands, moment), problem, scores, "banded was asked for")
