"""A layer of tensor attention without its weights: sizes, bound, and the plans that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import lru_cache
from math import isfinite, prod
from typing import Any

import numpy as np

from ..checks import (
    MAX_ORDER,
    PlanError,
    checked_dtype,
    checked_lengths,
    checked_method,
    described,
    positive,
    true_or_false,
    whole,
)
from ..decay import check_factor
from ..operands import COMPLEX, REAL
from ..planning import plan_for
from ..planning.banded import bands_fit
from ..planning.settings import MAX_RANK
from ..plans import Plan

# Degree of a layer that is given neither a degree nor a tolerance, and the most channels of query and keys in a head unless asked
# for others: as fast as ordinary attention at some thousand rows, forward and backward (docs/layers.md).
USUAL_DEGREE, USUAL_HEAD_DIM = 4, 8
_USUAL_TOL = 1e-3
POSITIONS = (None, "rotary")
# Rows of every view that the costs of a plan are counted for unless asked for others.
USUAL_ROWS = 16_384
# Norm bands of every view where rows are not normalised and a degree is given.
_BANDS = 8
# What is tried for the advice in an error.
_HEAD_DIMS = (64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)
_BOUNDS = (3.0, 2.5, 2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25, 0.1)


@dataclass(frozen=True)
class AttentionConfig:
    r"""Sizes and bound of a layer of tensor attention; checked, hashable, without arrays.

    A head with query row q and, for order 3, key rows a and b has the score

    .. math::

        x = t \cdot \mathrm{bound} \cdot \sum_c \hat q_c \hat a_c \hat b_c, \qquad
        \hat z = z \,/\, \big(\sum_c |z_c|^p + \mathrm{eps}^p\big)^{1/p}, \quad p = \mathrm{order},

    with t = 1, or learned in [0, 1]. By Hölder's inequality the absolute values of the terms add up to at most `bound`,
    whatever the weights, so the polynomial and its error are fixed when the layer is built.

    Parameters
    ----------
    embed_dim : int
        Channels of the input and the output.
    num_heads : int
        Query heads.
    order : int
        Number of views plus one: 3 attends to pairs, 2 is ordinary attention.
    head_dim : int, optional
        Channels d of query and keys in a head; embed_dim / num_heads if not given, and 8 where that is more. The rank,
        which time and memory are proportional to, is C(d + degree, degree).
    value_dim : int, optional
        Channels of the values in a head; embed_dim / num_heads if not given, and `head_dim` where that is no whole number.
    num_key_heads : int, optional
        Heads of keys and values, each shared by num_heads / num_key_heads query heads; `num_heads` if not given.
    context_dims : sequence of order − 1 ints, optional
        Channels of the contexts that are attended to; `embed_dim` each if not given.
    bound : float or None
        Largest |score|; no pair has more than e^(2 · bound) times the weight of another. None does not normalise rows;
        scores are Σ_c q_c a_c b_c / d, and their range depends on the data. With a `degree`, calls then use norm bands
        of this degree, which need no range and return an error for each row. Without a `degree`, every call makes a
        plan from the data; it waits for the device and cannot be traced.
    learn_bound : bool
        Learn a factor t of `bound` for each head: the logistic function of a parameter, so it is never above 1.
    tol : float, optional
        Largest distance of a head's output from attention with exp, in channel e relative to the product over the views
        of their largest |value| in channel e. It chooses the least degree that meets it. Not used if `degree` is given.
        1e-3 where neither is given and no degree is fixed: with another method than "polynomial", or without a bound.
    degree : int, optional
        Degree of the polynomial that takes the place of exp, whatever its distance to exp. If neither `degree` nor
        `tol` is given, 4.
    method : {"polynomial", "exact", "auto"}
        "auto" takes the exact method if it needs fewer operations for the lengths of the call; both are within `tol`.
        The others are the same function at every length.
    max_rank : int
        Largest rank to accept, at most 262,144. A head's summary of one view holds rank · (value_dim + 1) numbers.
    eps : float
        Rows much shorter than this stay short. Gradients of the normalisation stay below 1/eps.
    bias : bool
        Whether projections have a bias.
    causal : bool
        Row i sees the rows of the contexts up to its own, aligned at the end. Contexts need at least as many rows as
        the input. Not with norm bands.
    window : int or sequence of order − 1 ints, optional
        Row i sees only the last so many of these rows, of every view or of each. Implies `causal`. The time
        of the polynomial method does not depend on windows; that of method="exact" is proportional to their product.
    positions : {None, "rotary"}
        "rotary": scores depend on how far the rows of a pair stand from the query row. Channels are complex, half as many of
        them as `head_dim`, and turn with the position (`tattn.rotary`), at the same rank and bound. In causal calls
        positions are aligned at the end, as rows are.
    base : float
        Frequencies go from 1 down to about 1 / `base` radians a row, in equal ratios over channels, heads of keys and views.
    learn_frequencies : bool
        Learn them from there, (order − 1, num_key_heads, head_dim / 2).
    decay : {None, "alibi"}, number, or sequence of order − 1 numbers or sequences of num_key_heads numbers
        Rows count less, the further before a row they stand: one t rows before the last that a row sees has the weight λ^t besides,
        for a factor λ from 0 to 1 of each view and head of keys (`tattn.tensor_attention`). "alibi": λ = exp(−2^(−8 h / K)) for
        heads h = 1 … K of keys, alike in all views. Needs `causal` or `window`. Rank, bound and errors stay as they are.
    learn_decay : bool
        Learn the factors from there, (order − 1, num_key_heads): the logistic function of a parameter, so λ is never above 1.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit, by name.
    """

    embed_dim: int
    num_heads: int
    _: KW_ONLY
    order: int = 3
    # None stands for what __post_init__ puts in its place.
    head_dim: int = None  # type: ignore[assignment]
    value_dim: int = None  # type: ignore[assignment]
    num_key_heads: int = None  # type: ignore[assignment]
    context_dims: Sequence[int] = None  # type: ignore[assignment]
    bound: float | None = 2.0
    learn_bound: bool = False
    tol: float = None  # type: ignore[assignment]
    degree: int | None = None
    method: str = "polynomial"
    max_rank: int = 1 << 15
    eps: float = 1e-3
    bias: bool = True
    causal: bool = False
    window: Sequence[int] | None = None
    positions: str | None = None
    base: float = 10_000.0
    learn_frequencies: bool = False
    decay: str | float | Sequence[float | Sequence[float]] | None = None
    learn_decay: bool = False

    def __post_init__(self) -> None:
        embed_dim, num_heads = whole("embed_dim", self.embed_dim, 1), whole("num_heads", self.num_heads, 1)
        order = whole("order", self.order, 2, MAX_ORDER)
        share, remainder = divmod(embed_dim, num_heads)
        if self.head_dim is None and remainder:
            raise ValueError(
                f"embed_dim should be a multiple of num_heads {num_heads} if head_dim is not given, got {embed_dim}"
            )
        head_dim = min(share, USUAL_HEAD_DIM) if self.head_dim is None else whole("head_dim", self.head_dim, 1)
        usual = head_dim if remainder else share
        value_dim = usual if self.value_dim is None else whole("value_dim", self.value_dim, 1)
        key_heads = num_heads if self.num_key_heads is None else whole("num_key_heads", self.num_key_heads, 1)
        if num_heads % key_heads:
            raise ValueError(f"num_key_heads should divide num_heads {num_heads}, got {key_heads}")
        fixed = self.degree is None and self.tol is None and self.method == "polynomial" and self.bound is not None
        resolved = {
            "embed_dim": embed_dim,
            "num_heads": num_heads,
            "order": order,
            "head_dim": head_dim,
            "value_dim": value_dim,
            "num_key_heads": key_heads,
            "context_dims": _context_dims(self.context_dims, embed_dim, order - 1),
            "bound": None if self.bound is None else positive("bound", self.bound),
            "learn_bound": true_or_false("learn_bound", self.learn_bound),
            "tol": _USUAL_TOL if self.tol is None else positive("tol", self.tol),
            "degree": USUAL_DEGREE if fixed else None if self.degree is None else whole("degree", self.degree, 1),
            "method": checked_method(self.method),
            "max_rank": whole("max_rank", self.max_rank, 1),
            "eps": positive("eps", self.eps),
            "bias": true_or_false("bias", self.bias),
            "causal": true_or_false("causal", self.causal) or self.window is not None,
            "window": _window(self.window, order - 1),
            "base": positive("base", self.base),
            "learn_frequencies": true_or_false("learn_frequencies", self.learn_frequencies),
            "decay": _decay(self.decay, order - 1, key_heads),
            "learn_decay": true_or_false("learn_decay", self.learn_decay),
        }
        for name, value in resolved.items():
            object.__setattr__(self, name, value)
        if self.positions not in POSITIONS:
            raise ValueError(f"positions should be None or 'rotary', got {described(self.positions)}")
        if self.positions and head_dim % 2:
            raise ValueError(
                f"head_dim should be even with positions='rotary', whose channels are pairs, got {head_dim}"
            )
        if self.learn_frequencies and not self.positions:
            raise ValueError("learn_frequencies needs positions='rotary', got positions=None")
        if self.decay is not None and not self.causal:
            raise ValueError("decay needs causal=True, since it counts the rows before a row, got causal=False")
        if self.learn_decay and (self.decay is None or not np.all((self.factors() > 0) & (self.factors() < 1))):
            raise ValueError(
                f"learn_decay needs decay to begin with factors between 0 and 1, got decay={described(self.decay)}"
            )
        if self.max_rank > MAX_RANK:
            raise ValueError(f"max_rank should be at most {MAX_RANK:,}, got {self.max_rank:,}")
        if self.learn_bound and self.bound is None:
            raise ValueError("learn_bound needs a bound to stay within, got bound=None")
        if self.degree is not None and self.method != "polynomial":
            raise ValueError(f"degree belongs to method 'polynomial', got it with method {self.method!r}")
        if self.causal and self.degree is not None and self.bound is None:
            raise ValueError("causal needs a bound, or no degree: norm bands sort rows, got bound=None and a degree")
        if self.degree is not None and self.bound is None and self.degree < 2:
            raise ValueError(f"degree should be at least 2 with bound=None, got {self.degree}")

    @property
    def views(self) -> int:
        """How many keys a score joins with a query."""
        return self.order - 1

    @property
    def scale(self) -> float:
        """The factor of the scores: bound, or 1/d without one."""
        return 1 / self.head_dim if self.bound is None else self.bound

    @property
    def channels(self) -> str:
        """What the channels of a head are: "real", or "complex" where positions turn them."""
        return COMPLEX if self.positions else REAL

    def frequencies(self) -> np.ndarray:
        """Radians a row by which channels turn, (views, num_key_heads, head_dim / 2), before anything is learned.

        From 1 down to about 1 / `base`, in equal ratios over channels, heads and views, so that no two are alike.
        """
        channels, heads, views = np.ogrid[: self.head_dim // 2, : self.num_key_heads, : self.views]
        place = (channels + (heads + views / self.views) / self.num_key_heads) / (self.head_dim // 2)
        return np.transpose(self.base**-place)

    def factors(self) -> np.ndarray:
        """Factors λ by which rows count less from row to row, (views, num_key_heads), before anything is learned."""
        shape = self.views, self.num_key_heads
        if self.decay == "alibi":
            heads = np.arange(1, self.num_key_heads + 1)
            return np.broadcast_to(np.exp(-(2.0 ** (-8 * heads / self.num_key_heads))), shape)
        of_views = self.decay if isinstance(self.decay, tuple) else (self.decay,) * self.views
        return np.stack([np.broadcast_to(np.asarray(x, float), shape[1:]) for x in of_views])

    @property
    def promise(self) -> float:
        """What scale · Σ_c |q_c a_c b_c| never exceeds, normalised rows being as long as rounding makes them."""
        if self.bound is None:
            raise ValueError("promise needs a bound, got bound=None")
        # In units in the last place of float32, a row is too long by d / p + 2 (powers and their sum), 16 (the root of
        # a fast library) and 2 (the quotients), and p rows meet; twice that. Moduli are off by 4 units more, and each of the
        # turns of a row, of keys one and of the query one for each view, by 6.
        of_positions = 20 * self.order if self.positions else 0
        return self.bound * (1 + 2.0**-23 * (self.head_dim + 20 * self.order + of_positions))

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters by name; weights are (out, in)."""
        keys, values = (self.num_key_heads * width for width in (self.head_dim, self.value_dim))
        weights = {"q_proj": (self.num_heads * self.head_dim, self.embed_dim)}
        for name, rows in (("k_projs", keys), ("v_projs", values)):
            weights |= {f"{name}.{i}": (rows, width) for i, width in enumerate(self.context_dims)}
        weights["out_proj"] = (self.embed_dim, self.num_heads * self.value_dim)
        shapes: dict[str, tuple[int, ...]] = {"bound_logit": (self.num_heads,)} if self.learn_bound else {}
        if self.learn_frequencies:
            shapes["frequencies"] = (self.views, self.num_key_heads, self.head_dim // 2)
        if self.learn_decay:
            shapes["decay_logit"] = (self.views, self.num_key_heads)
        for name, shape in weights.items():
            shapes[f"{name}.weight"] = shape
            if self.bias:
                shapes[f"{name}.bias"] = shape[:1]
        return shapes

    def plan(self, n: int | Sequence[int] = USUAL_ROWS, dtype: str = "float32") -> Plan | None:
        """The plan of a head, with costs for one head and `n` rows, or (n, n_1, …); None if it depends on data.

        Parameters
        ----------
        n : int or sequence of int
        dtype : {"float32", "float64"}
            Dtype of the attention: float64 if the weights are float64.

        Raises
        ------
        TypeError, ValueError
            If `n` is not a length, or not `order` lengths.
        PlanError
            If `tol` cannot be met at this bound and head dimension, or takes more than `max_rank`.
        """
        n, dtype = checked_lengths(n, self.order), checked_dtype(dtype)
        if self.bound is None:
            return self._unbounded_plan(n, dtype, self._bands()) if self.degree is not None else None
        method = "exact" if self.method == "exact" else "polynomial"
        try:
            made = self._bounded_plan(n, dtype, method)
        except ValueError as cannot:
            # Without the advice for a single call.
            reason = str(cannot).partition(". Use ")[0]
            raise PlanError(f"{self._named(dtype)} cannot be built: {reason}. {self._advice(dtype)}") from None
        if made.method == "polynomial" and not isfinite(made.error):
            raise PlanError(
                f"{self._named(dtype)} cannot be built: at degree {made.degree} the polynomial may lose its sign within "
                f"the bound, and a softmax its normaliser. {self._advice(dtype)}"
            )
        if made.rank > self.max_rank:
            raise PlanError(
                f"{self._named(dtype)} cannot be built: degree {made.degree} has rank {made.rank:,}, above "
                f"max_rank={self.max_rank:,}; a head would take {made.bytes_polynomial / 2**20:,.0f} MiB. "
                f"{self._advice(dtype)}"
            )
        rows = self.ordinary_rows(made)
        if rows is None:
            return made
        return replace(
            made, reason=f"{made.reason}; a row takes as many operations as in ordinary attention to {rows:,} rows"
        )

    def ordinary_rows(self, plan: Plan) -> int | None:
        """How many keys a row of ordinary attention sees in as many operations as a row takes with this plan of a head, about.

        Ordinary attention with as many heads, of `value_dim` channels: beyond so many rows tensor attention takes less.
        None if the plan's operations are not proportional to the rows.
        """
        if plan.method != "polynomial":
            return None
        return round(plan.flops_polynomial / plan.lengths[0] / (4.0 * self.value_dim))

    def _bounded_plan(self, n: int | Sequence[int], dtype: str, method: str) -> Plan:
        return plan_for(
            n=n, dim=self.head_dim, bound=self.promise, order=self.order, tol=self.tol, dtype=dtype, scale=self.scale,
            value_dim=self.value_dim, method=method, degree=self.degree, causal=self.causal,
            window=self.window, channels=self.channels,
        )  # fmt: skip

    def _bands(self) -> int:
        """Norm bands of every view of a call with rows enough."""
        return max((bands for bands in range(1, _BANDS + 1) if bands_fit(bands, self.order)), default=1)

    def _unbounded_plan(self, n: int | Sequence[int], dtype: str, bands: int) -> Plan:
        return plan_for(
            n=n, dim=self.head_dim, order=self.order, dtype=dtype, scale=self.scale, value_dim=self.value_dim,
            degree=self.degree, series="banded", bands=bands, channels=self.channels,
        )  # fmt: skip

    def _named(self, dtype: str) -> str:
        asked = f"tol={self.tol:g}" if self.degree is None else f"degree={self.degree}"
        return f"tensor attention with order={self.order}, head_dim={self.head_dim}, bound={self.bound:g} and {asked} in {dtype}"

    def _advice(self, dtype: str) -> str:
        """What could be changed, one thing at a time, and what that gives."""
        tried = {
            "head_dim": [replace(self, head_dim=d) for d in _HEAD_DIMS if d < self.head_dim],
            "bound": [replace(self, bound=b) for b in _BOUNDS if self.bound is not None and b < self.bound],
            "degree": [replace(self, degree=g, method="polynomial") for g in range(12, 1, -1) if g != self.degree],
        }
        found = []
        for name, others in tried.items():
            for other in others:
                made = other._serves(dtype)
                if made is not None:
                    error = f", error {made.error:.2g}" if name == "degree" else ""
                    how = " with method='polynomial'" if other.method != self.method else ""
                    found.append(
                        f"{name}={getattr(other, name):g}{how} (degree {made.degree}, rank {made.rank:,}{error})"
                    )
                    break
        if dtype == "float32" and self._serves("float64"):
            found.append("dtype float64")
        found += ["a larger tol"] if self.degree is None else []
        return f"Alternatives: {', '.join(found)} or method='exact'"

    def _serves(self, dtype: str) -> Plan | None:
        """The polynomial plan if there is one that may be used."""
        try:
            made = self._bounded_plan(USUAL_ROWS, dtype, "polynomial")
        except ValueError:
            return None
        return made if made.rank <= self.max_rank and isfinite(made.error) else None


@lru_cache(maxsize=256)
def plans_of(config: AttentionConfig, dtype: str) -> tuple[Plan, ...]:
    """What `plan_of_call` chooses from: the methods allowed, or numbers of bands; nothing if data decide."""
    if config.bound is None:
        if config.degree is None:
            return ()
        return tuple(config._unbounded_plan(USUAL_ROWS, dtype, bands) for bands in range(1, config._bands() + 1))
    made = config.plan(dtype=dtype)
    assert made is not None
    return (made, config._bounded_plan(USUAL_ROWS, dtype, "exact")) if config.method == "auto" else (made,)


def plan_of_call(plans: Sequence[Plan], lengths: Sequence[int]) -> int:
    """Which of the plans a call with these lengths (n, n_1, …) takes, by nothing but shapes."""
    if len(plans) == 1:
        return 0
    if plans[0].series == "banded":
        return min(len(plans), *lengths) - 1
    polynomial, exact = plans
    usual = polynomial.lengths
    pairs = [rows[0] * prod(map(min, rows[1:], exact.window or rows[1:])) for rows in (lengths, usual)]
    flops_exact = exact.flops_exact / pairs[1] * pairs[0]
    return int(flops_exact <= polynomial.flops_polynomial / sum(usual) * sum(lengths))


def of_step(config: AttentionConfig, plans: Sequence[Plan]) -> dict[str, Any]:
    """By which method a row attends to rows that are kept as they are: that of the layer."""
    return {"scale": config.scale, "method": "exact"} if config.method == "exact" else {"plan": plans[0]}


def _window(given: int | Sequence[int] | None, views: int) -> tuple[int, ...] | None:
    """One length for each view, out of one for all or as many."""
    if given is None or isinstance(given, (list, tuple)):
        if given is not None and len(given) != views:
            raise ValueError(f"window should have {views} entries for order {views + 1}, got {len(given)}")
        return None if given is None else tuple(whole(f"window[{i}]", w, 1) for i, w in enumerate(given))
    return (whole("window", given, 1),) * views


def _decay(given: Any, views: int, heads: int) -> str | float | tuple[Any, ...] | None:
    """The name "alibi", a number, or for each view a number or one for each head of keys."""
    if given is None or (isinstance(given, str) and given == "alibi"):
        return given
    if isinstance(given, str):
        raise ValueError(f"decay should be 'alibi', or numbers from 0 to 1, got {given!r}")
    if not isinstance(given, (list, tuple)):
        return _factor("decay", given)
    if len(given) != views:
        raise ValueError(f"decay should have {views} entries for order {views + 1}, got {len(given)}")
    found: list[Any] = []
    for i, x in enumerate(given):
        several = isinstance(x, (list, tuple))
        if several and len(x) != heads:
            raise ValueError(f"decay[{i}] should have one factor for each of the {heads} heads of keys, got {len(x)}")
        found.append(
            tuple(_factor(f"decay[{i}][{h}]", y) for h, y in enumerate(x)) if several else _factor(f"decay[{i}]", x)
        )
    return tuple(found)


def _factor(name: str, given: Any) -> float:
    """A number from 0 to 1."""
    if isinstance(given, (bool, np.bool_)) or not isinstance(given, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} should be a number from 0 to 1, got {described(given)}")
    check_factor(name, float(given))
    return float(given)


def _context_dims(given: Sequence[int] | None, embed_dim: int, views: int) -> tuple[int, ...]:
    if given is None:
        return (embed_dim,) * views
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"context_dims should be a list or tuple of whole numbers, got {type(given).__name__}")
    if len(given) != views:
        raise ValueError(f"context_dims should have {views} entries for order {views + 1}, got {len(given)}")
    return tuple(whole(f"context_dims[{i}]", width, 1) for i, width in enumerate(given))
