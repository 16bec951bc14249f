"""What a plan says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import inf, isfinite
from typing import Any, NamedTuple

from .checks import checked_kind, whole
from .features.monomials import Grading
from .features.monomials import rank as rank_of
from .methods import Banded, Method, Polynomial, Recomputed
from .operands import CHANNELS
from .problem import Cost, Guarantee, Problem, ScoreRange

# More than any plan has, so that a number that is damaged is not computed with.
_MOST_DEGREE, _MOST_WEIGHT = 4096, 256
# The attributes of a plan, in the order in which they are written and compared.
FACTS = (
    "method", "series", "channels", "degree", "rank", "bound", "source", "certified", "error", "grad_error", "scale", "dim",
    "order", "dtype", "coefficients", "delta", "delta_prime", "lowest_mean", "lengths", "value_dim", "leading", "flops_exact",
    "flops_polynomial", "bytes_exact", "bytes_polynomial", "reason", "bands", "moment", "recomputed", "causal", "window",
    "grading", "sizes", "workers", "bytes_sent", "seconds", "seconds_gradient", "chain",
)  # fmt: skip


class Spread(NamedTuple):
    """A plan's rows over workers: how many, what each sends, and seconds for a call and for one with its gradient."""

    workers: int = 1
    bytes_sent: float = 0.0
    seconds: float = inf
    seconds_gradient: float = inf


_ALONE = Spread()


@dataclass(frozen=True)
class Plan:
    r"""How a call is computed, and what is promised about its output. Hashable; holds no arrays.

    Made by `plan` and `plan_for`. If fields contradict each other, for example after `dataclasses.replace`, a
    ValueError names the field.

    Attributes
    ----------
    problem : Problem
        The call that it was made for: shapes, dtype, scale, and whether it is causal.
    algorithm : Exact, Polynomial, Banded, Recomputed or another method
        The method as a value. `method`, `series`, `degree`, `coefficients` and others are read from it.
    scores : ScoreRange
        What is known about the scores: `bound`, `lowest_mean`, `source`.
    guarantee : Guarantee
        What is promised: `error`, `grad_error`, `certified`.
    exact, polynomial : Cost
        Operations and bytes of the exact method, and of the polynomial, or another method, that is used or was compared
        with it.
    method : str
        "polynomial", "exact", or the name of another method.
    series : {"minimax", "taylor", "fitted", "banded"} or None
        Where the polynomial's coefficients come from. "banded": one polynomial for each tuple of norm bands, chosen on the
        device; the error is not known beforehand but comes with the answer, certified, for each query row.
    degree, rank : int
        Degree g of the polynomial and number of monomials, C(d + g, g) or those that `grading` leaves; 0 for the exact method.
    bound : float
        R: scale · Σ_c |q_ic a_jc b_kc| ≤ R for all rows, so the scores lie in [−R, R]. The bound of rounding uses this
        sum of absolute values.
    source : {"data", "promise", "estimate", "answer"}
        Whether R was bounded on data (and is checked again on other data that can be read), promised by the caller (and
        never checked), estimated from samples, or is found with the answer (banded).
    certified : bool
        Whether `error` and `grad_error` are bounds, given R. False for estimates.
    error : float
        |out − exact| ≤ error · Π_μ max_j |values_μ[j, e]|, from the polynomial and from rounding (whose model
        docs/errors.md states). For float16 and bfloat16 the result is rounded once more, to half a unit in its last place.
        Gradients of value view μ: ≤ error · Π_{ν≠μ} max |values_ν[:, e]| · Σ_i |g[i, e]|.
    grad_error : float
        With W_i = Σ_e |g[i, e]| Π_μ max |values_μ[:, e]|, the query's gradient is within
        grad_error · scale · Π_μ max |keys_μ[:, c]| · W_i, that of key view μ within
        grad_error · scale · max |query[:, c]| · Π_{ν≠μ} max |keys_ν[:, c]| · Σ_i W_i.
    scale : float
    dim : int
        Channels d of query and keys.
    order : int
        Number of views plus one; 3 in the paper.
    dtype : str
    coefficients : tuple of float
        c_0 … c_g of the polynomial.
    lowest_mean : float
        The mean score of no query row is below this.
    lengths, value_dim, leading
        Shapes that the costs were counted for: (n, n_1, …, n_m), dv, and the size of the batch.
    flops_exact, flops_polynomial : float
        Operations of a forward call by either method; a call with its gradient takes three times as many. Those of the
        polynomial are counted for products with all monomials. For values of few channels there are up to dg/(d + g −
        1) times as many, which take less time. Where there are fewer scores than features it takes about `flops_exact`
        (`by_scores`). In windows those of the exact method count scores that are computed beside the ones that are seen,
        and twice, since they take longer.
    bytes_exact, bytes_polynomial : float
        Approximate memory of a forward call on a processor, beyond inputs and outputs: summaries, the normaliser of
        every row, and a block of rows. A gradient takes up to twice as much, each further thread has its own block, and
        blocks of an accelerator take 256 MiB.
    reason : str
        Why this method.
    bands, moment : int
        Norm bands of every view, and the even order t of the moments that bound the error; 0 unless banded.
    recomputed : float
        Share of the query rows that were computed exactly because the banded polynomial bounds them too loosely.
    causal : bool
        For calls in which a query row sees only keys up to its own row.
    window : tuple of int or None
        If given, a query row sees only the last ``window[μ]`` of these keys in each view.
    workers : int
        Workers that the rows are spread over. Costs are those of all workers together.
    bytes_sent : float
        Bytes that each worker sends for a forward call, and again for its gradient, if summaries are summed round a
        ring, or scanned in a causal call. No worker can send less.
    grading : tuple of int
        For a pruned basis ω_1 … ω_d. It keeps the monomials x^α with Σ_c ω_c α_c ≤ g min_c ω_c, so channels that add
        little to the scores have fewer of them. () for all monomials of degree at most g.
    sizes : tuple of float
        Of a pruned basis with source "data": for each ω in ascending order the largest Σ_c scale · max|q_c| · Π_μ max|keys_μ,c|,
        over the channels with ω_c = ω, that the plan serves; other data is checked against them.
    chain : int
        Terms in the longest chain of additions that `error` and `grad_error` count with. Kernels with longer chains are
        not used.
    channels : {"real", "complex"}
        For calls whose query and keys have such channels. With complex ones, `dim` counts their real and imaginary parts, and c in
        the bounds above counts pairs: |q_c| is a modulus, and so is what is said of a gradient.
    seconds, seconds_gradient : float
        Estimates for a forward call, and for one with its gradient: the time of the operations plus the time of the
        bytes, at the rates that were given, without latency. Infinite if a rate was not given.
    """

    problem: Problem
    algorithm: Method
    scores: ScoreRange
    guarantee: Guarantee
    exact: Cost
    polynomial: Cost
    reason: str
    sizes: tuple[float, ...] = ()
    spread: Spread = _ALONE

    def __post_init__(self) -> None:
        contradiction = _contradiction(self)
        if contradiction:
            raise ValueError(f"plan's {contradiction}")

    @property
    def method(self) -> str:
        return self.algorithm.name

    @property
    def chain(self) -> int:
        return self.problem.chain

    @property
    def channels(self) -> str:
        return self.problem.channels

    @property
    def _banded(self) -> Banded | None:
        """The method in norm bands, if it is one."""
        inner = self.algorithm.inner if isinstance(self.algorithm, Recomputed) else self.algorithm
        return inner if isinstance(inner, Banded) else None

    @property
    def _polynomial(self) -> Polynomial | None:
        return self.algorithm if isinstance(self.algorithm, Polynomial) else None

    @property
    def series(self) -> str | None:
        return "banded" if self._banded else self._polynomial.series if self._polynomial else None

    @property
    def degree(self) -> int:
        found = self._banded or self._polynomial
        return found.degree if found else 0

    @property
    def rank(self) -> int:
        if self._polynomial:
            return self._polynomial.rank(self.dim)
        return rank_of(self.dim, self._banded.degree) if self._banded else 0

    @property
    def bound(self) -> float:
        return self.scores.bound

    @property
    def source(self) -> str:
        return self.scores.source

    @property
    def lowest_mean(self) -> float:
        return self.scores.lowest_mean

    @property
    def certified(self) -> bool:
        return self.guarantee.certified

    @property
    def error(self) -> float:
        return self.guarantee.error

    @property
    def grad_error(self) -> float:
        return self.guarantee.grad_error

    @property
    def scale(self) -> float:
        return self.problem.scale

    @property
    def dim(self) -> int:
        return self.problem.dim

    @property
    def order(self) -> int:
        return self.problem.views + 1

    @property
    def dtype(self) -> str:
        return self.problem.dtype

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.problem.lengths

    @property
    def value_dim(self) -> int:
        return self.problem.value_dim

    @property
    def leading(self) -> int:
        return self.problem.batch

    @property
    def causal(self) -> bool:
        return self.problem.order.causal

    @property
    def window(self) -> tuple[int, ...] | None:
        return self.problem.order.window

    @property
    def coefficients(self) -> tuple[float, ...]:
        return self._polynomial.coefficients if self._polynomial else ()

    @property
    def delta(self) -> float:
        return self._polynomial.delta if self._polynomial else inf

    @property
    def delta_prime(self) -> float:
        return self._polynomial.delta_prime if self._polynomial else inf

    @property
    def grading(self) -> Grading:
        return self._polynomial.grading if self._polynomial else ()

    @property
    def bands(self) -> int:
        return self._banded.bands if self._banded else 0

    @property
    def moment(self) -> int:
        return self._banded.moment if self._banded else 0

    @property
    def recomputed(self) -> float:
        return self.algorithm.share if isinstance(self.algorithm, Recomputed) else 0.0

    @property
    def flops_exact(self) -> float:
        return self.exact.flops

    @property
    def flops_polynomial(self) -> float:
        return self.polynomial.flops

    @property
    def bytes_exact(self) -> float:
        return self.exact.bytes

    @property
    def bytes_polynomial(self) -> float:
        return self.polynomial.bytes

    @property
    def workers(self) -> int:
        return self.spread.workers

    @property
    def bytes_sent(self) -> float:
        return self.spread.bytes_sent

    @property
    def seconds(self) -> float:
        return self.spread.seconds

    @property
    def seconds_gradient(self) -> float:
        return self.spread.seconds_gradient

    def by_scores(self, lengths: Sequence[int], value_dim: int) -> bool:
        """Whether a call computes the polynomial of each score instead of features.

        It does if this takes fewer operations and rounds no more than `error` and `grad_error` allow. The shapes alone
        decide. Both ways give the same output up to that rounding. Causal calls always compute features, and so does a
        pruned basis, because its polynomial is not a function of the score.

        Parameters
        ----------
        lengths : sequence of int
            Rows of the query and of every view of the call, (n, n_1, …, n_m).
        value_dim : int
            Channels of the values.

        Raises
        ------
        TypeError, ValueError
            For invalid numbers of rows or channels, by name, and if the number of lengths is not `order`.

        Examples
        --------
        >>> import tattn
        >>> plan = tattn.plan_for(n=12, dim=16, bound=3.0, degree=4)
        >>> plan.by_scores((12, 12, 12), 16), plan.by_scores((1000, 1000, 1000), 16)
        (True, False)
        """
        checked_kind("lengths", lengths, Sequence, "a sequence of whole numbers")
        if len(lengths) != self.order:
            raise ValueError(f"lengths should be {self.order} numbers of rows, (n, n_1, …), got {tuple(lengths)}")
        lengths = [whole(f"lengths[{i}]", n, 1) for i, n in enumerate(lengths)]
        value_dim = whole("value_dim", value_dim, 1)
        method = self.algorithm
        return isinstance(method, Polynomial) and not self.causal and method.by_scores(lengths, self.dim, value_dim)

    def facts(self) -> dict[str, Any]:
        """All attributes that are numbers, strings or tuples of these, by name: files and messages hold them.

        `options`, if there are any, are the fields of a method that is none of those of this package.
        """
        method: Any = self.algorithm
        options = {} if self.series else {field.name: getattr(method, field.name) for field in fields(method)}
        return {name: getattr(self, name) for name in FACTS} | ({"options": options} if options else {})

    def __str__(self) -> str:
        banded = self.series == "banded"
        kind = {"data": "bounded on the data", "promise": "promised by the caller"}.get(self.source, "estimated")
        rows = [("method", self.method if self.series is None else f"{self.method} ({self.series})")]
        if self.method == "polynomial":
            of_all = f" of {rank_of(self.dim, self.degree):,}" if self.grading else ""
            rows.append(("degree, rank", f"{self.degree}, {self.rank:,}{of_all}"))
        if banded:
            rows.append(("bands, moment", f"{self.bands}, {self.moment}"))
        if self.recomputed:
            rows.append(("rows exact", f"{self.recomputed:.2%}"))
        if self.causal:
            rows.append(("sees", "up to its own row" if self.window is None else f"windows of {self.window}"))
        word = "certified" if self.certified else "estimated"
        unknown = "with the answer, certified, for each row" if banded else "no bound: the range is unknown"
        size = "x".join(f"{n:,}" for n in self.lengths)
        compared = "polynomial" if self.method == "exact" else self.method
        rows += [
            (
                "score bound R",
                f"{self.bound:.4g}, {kind}" if isfinite(self.bound) else "for each band" if banded else "unknown",
            ),
            ("error", f"{at_most(self.error)}, {word}" if isfinite(self.error) else unknown),
            ("gradient error", f"{at_most(self.grad_error)}, {word}" if isfinite(self.grad_error) else unknown),
            ("scale", f"{self.scale:.6g}"),
            ("dim, order, dtype", f"{self.dim}, {self.order}, {self.dtype}"),
            *([("channels", f"complex, {self.dim // 2}")] if self.channels != "real" else []),
            ("rows", size + (f", batch of {self.leading}" if self.leading > 1 else "")),
            ("exact", f"{si(self.flops_exact)}flop, {si(self.bytes_exact)}B"),
            *(
                [(compared, f"{si(self.flops_polynomial)}flop, {si(self.bytes_polynomial)}B")]
                if isfinite(self.flops_polynomial)
                else []
            ),
            *(
                [("computed", "score by score, with fewer operations")]
                if len(self.lengths) == self.order and self.by_scores(self.lengths, self.value_dim)
                else []
            ),
        ]
        if self.workers > 1:
            rows.append(
                ("workers", f"{self.workers:,}, each sends {si(self.bytes_sent)}B forward and as much backward")
            )
        if isfinite(self.seconds):
            rows.append(("estimated time", f"{self.seconds:.3g} s, {self.seconds_gradient:.3g} s with the gradient"))
        rows.append(("reason", self.reason))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def at_most(bound: float) -> str:
    """A bound in three digits, rounded up."""
    text = f"{bound:.2e}"
    unit = float(f"1e{int(text.partition('e')[2]) - 2}")
    return text if float(text) >= bound else f"{float(text) + unit:.2e}"


def spread(plan: Plan, workers: int, bandwidth: float | None, flops: float | None) -> Plan:
    """The plan with what it sends and how long it takes on so many workers; rates are bytes and operations a second of each."""
    # Sums with their rests as float64: docs/scaling.md.
    buffer = 8.0 * (plan.order - 1) * plan.rank * (plan.value_dim + 1) * plan.leading
    sent = 2 * (workers - 1) / workers * buffer
    operations = plan.flops_polynomial
    if plan.causal and workers > 1:
        # Summaries of each worker's rows come before its prefixes.
        operations += sum(plan.lengths[1:]) * plan.leading * plan.rank * (2.0 * (plan.value_dim + 1) + 1)
    computing = inf if flops is None else operations / workers / flops
    sending = 0.0 if workers == 1 else inf if bandwidth is None else sent / bandwidth
    shared = Spread(workers, sent, computing + sending, 3 * computing + 2 * sending)
    return replace(plan, polynomial=plan.polynomial._replace(flops=operations), spread=shared)


def _contradiction(plan: Plan) -> str:
    """Which field of a plan contradicts the others or itself, what it should be and what it is; nothing if none does."""
    polynomial, banded = plan.method == "polynomial", plan.series == "banded"
    named = polynomial and not banded
    for name, allowed in (
        ("series", ("minimax", "taylor", "fitted", "banded") if polynomial else (None,)),
        ("source", ("answer",) if banded else ("data", "promise", "estimate")),
        ("dtype", ("float64", "float32", "float16", "bfloat16")),
        ("channels", CHANNELS),
    ):
        found = getattr(plan, name)
        if not isinstance(found, (str, type(None))) or found not in allowed:
            return f"{name} should be {' or '.join(map(repr, allowed))}, got {found!r}"
    for name, least, used in (
        ("order", 2, True), ("dim", 1, True), ("degree", 1, polynomial), ("rank", 1, polynomial), ("bands", 1, banded),
        ("moment", 2, banded),
    ):  # fmt: skip
        found = getattr(plan, name)
        # Under a compiler it may be a symbol of a number.
        if not hasattr(found, "__index__") or isinstance(found, bool) or (found < least if used else found != 0):
            wanted = f"a whole number of at least {least}" if used else "0"
            return f"{name} should be {wanted} for method {plan.method!r} and series {plan.series!r}, got {found!r}"
    if plan.problem.paired and plan.dim % 2:
        return f"dim should be even for complex channels, a real and an imaginary part each, got {plan.dim}"
    for name, lowest in (("scale", 0.0), ("bound", 0.0), ("error", 0.0), ("grad_error", 0.0), ("lowest_mean", -inf)):
        found = getattr(plan, name)
        if not isinstance(found, (int, float)) or not found >= lowest:
            return f"{name} should be a number{'' if lowest else ' of at least 0'}, got {found!r}"
    if not 0 < plan.scale < inf:
        return f"scale should be finite and above 0, got {plan.scale!r}"
    sure = plan.source != "estimate" and (banded or isfinite(plan.error))
    for name, values in (
        ("certified", (True, False) if sure else (False,)),
        ("causal", (False,) if banded else (True, False)),
    ):
        found = getattr(plan, name)
        if not isinstance(found, bool) or found not in values:
            return f"{name} should be {' or '.join(map(str, values))} for source {plan.source!r}, got {found!r}"
    terms, weights, windows = (
        plan.degree + 1 if named else 0,
        plan.dim if named and plan.grading else 0,
        plan.window or (),
    )
    sums = len(set(plan.grading)) if plan.source == "data" and isinstance(plan.grading, tuple) else 0
    views = plan.order - 1 if plan.window is not None and plan.causal and not banded else 0
    for name, given, count in (
        ("coefficients", plan.coefficients, terms), ("grading", plan.grading, weights), ("sizes", plan.sizes, sums),
        ("window", windows, views),
    ):  # fmt: skip
        if not isinstance(given, tuple) or len(given) != count or not all(isinstance(x, (int, float)) for x in given):
            return f"{name} should be a tuple of {count} numbers for the other fields of the plan, got {given!r}"
    if not all(map(isfinite, plan.coefficients)):
        return f"coefficients should be finite, got {plan.coefficients}"
    if any(not 1 <= w <= _MOST_WEIGHT or w != int(w) for w in plan.grading):
        return f"grading should be of whole numbers from 1 to {_MOST_WEIGHT}, got {plan.grading}"
    if plan.problem.paired and plan.grading[: plan.dim // 2] != plan.grading[plan.dim // 2 :] and plan.grading:
        return f"grading should be the same for real and imaginary parts, got {plan.grading}"
    if banded and (plan.moment % 2 or plan.moment > plan.degree):
        return f"moment should be even and at most the degree {plan.degree}, got {plan.moment}"
    if polynomial and (plan.degree > _MOST_DEGREE or plan.rank != rank_of(plan.dim, plan.degree, plan.grading)):
        return f"rank should be the number of monomials for dim {plan.dim} and degree {plan.degree}, got {plan.rank}"
    return ""


def plan_text(plan: Plan) -> str:
    """A plan in JSON, as Python reads it: with infinities."""
    return json.dumps(plan.facts())


def strict_json(value: Any) -> str:
    """JSON as its standard has it, with null for numbers that are not finite."""

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: finite(of_name) for name, of_name in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(one) for one in value]
        return None if isinstance(value, float) and not isfinite(value) else value

    return json.dumps(finite(value), allow_nan=False)


def duration(seconds: float) -> str:
    """A time as people say it: '40 s', '12 min', '3 d'."""
    for unit, size in (("y", 365.25 * 86400), ("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.2g} s"


def si(number: float) -> str:
    """A number with three digits and a prefix: '1.2 G'."""
    if not isfinite(number):
        return "unknown "
    for power, prefix in ((24, "Y"), (21, "Z"), (18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(number) >= 10.0**power:
            return f"{number / 10.0**power:.3g} {prefix}"
    return f"{number:.3g} "
