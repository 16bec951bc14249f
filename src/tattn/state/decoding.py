"""Causal attention as tokens come, one or some at a time, in memory that does not grow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from ..backends import Array, Backend, backend_of
from ..backends.operations import CHAIN, Token
from ..bounds.rounding import computed_in
from ..checks import checked_flags, checked_kind
from ..decay import is_number
from ..features.pairs import Pairs
from ..plans import Plan
from .checks import check_same_plan, check_streams, checked_rows
from .summary import Summary, attend_next, call_of, summarize
from .sums import token_of

# Numbers that sums after each of some tokens have: with more of them, loops that share work among rows are faster.
_MOST_NUMBERS = 1 << 20


@dataclass(frozen=True, eq=False)
class DecodingState:
    """What causal attention keeps of the tokens so far. Query i sees the pairs (triples, …) of keys j ≤ i, k ≤ i, ….

    Outputs are the rows of ``tensor_attention(..., causal=True)``.

    Every prefix grows by one row with every token, and sums over the pairs of two prefixes factorise. So the state
    needs only a summary of each prefix: r (dv + 1) numbers for each view, however long the stream. Immutable: a step
    returns a new state, and one state may be continued in several ways.

    Parameters
    ----------
    plan : Plan
        As in `summarize`, with a promised bound or made with ``causal=True``. Its error holds for every output if its
        bound holds.
    summary : Summary, optional
        Summary of rows that all queries see, such as a prompt. ``jax.lax.scan`` needs a state of one shape from the
        start: give it the summary of arrays without rows, ``summarize([keys[..., :0, :], …], …)``.

    Examples
    --------
    >>> import numpy as np, tattn
    >>> plan = tattn.plan_for(n=100, dim=4, bound=1.0, degree=5, causal=True, dtype="float64")
    >>> query, *keys = np.random.default_rng(0).uniform(-1, 1, (3, 100, 4))
    >>> state = tattn.DecodingState(plan)
    >>> for i in range(100):
    ...     token = slice(i, i + 1)
    ...     out, state = state.step(query[token], [k[token] for k in keys], [k[token] for k in keys])
    >>> np.allclose(out, tattn.tensor_attention(query, keys, keys, plan=plan, causal=True)[-1:])
    True
    """

    plan: Plan
    summary: Summary | None = None

    def __post_init__(self) -> None:
        if isinstance(self.summary, Summary):
            backend = backend_of(self.summary.sums[0]) if self.summary.sums else None
            if backend is not None:
                backend.as_container(DecodingState, ("summary",), ("plan",))

    def step(
        self,
        query: Array,
        keys: Sequence[Array],
        values: Sequence[Array],
        *,
        key_masks: Sequence[Array | None] | None = None,
        key_weights: Sequence[Array | None] | None = None,
        decay: Sequence[Array | float | None] | None = None,
        return_lse: bool = False,
    ) -> tuple[Any, DecodingState]:
        """Add tokens, one or more; return the outputs of their queries, and the new state.

        Each query sees its own token and those before it, so that n tokens in one call are n calls of one token each,
        but for rounding, and for rows that see too little (Notes).

        Parameters
        ----------
        query : array (..., n, d)
            Of n ≥ 1 tokens.
        keys : sequence of m arrays (..., n, d)
        values : sequence of m arrays (..., n, dv)
        key_masks : boolean array (..., n), or sequence of m of them or None, optional
            False for streams of a batch that have ended, or for padding. Their summaries do not change.
        key_weights : array (..., n), or sequence of m of them or None, optional
            As in `summarize`.
        decay : sequence of m arrays (...), numbers or None, optional
            As in `tensor_attention`, the same for all tokens, those of `summary` as well. Masked tokens count as rows.
        return_lse : bool
            Also return log Σ exp of the scores, as ``((out, lse), state)``.

        Returns
        -------
        out : array (..., n, dv), or a tuple of it and lse
        state : DecodingState

        Raises
        ------
        PlanError, TypeError, ValueError
            As from `summarize` and `Summary.attend`; also for keys of another number of rows than the query's.

        Notes
        -----
        O(n m r dv) time and O(m r dv) memory beyond the output, whatever the number of tokens before. Tokens like those before
        are computed by compiled code where there is some, for two views at most. Where a call takes many tokens, each takes a
        fraction of the time. A row of such a call is NaN if what it sees weighs too little beside all that the call has, as
        in `tensor_attention` with weights or decay.
        """
        checked_flags(return_lse=return_lse)
        known: _Known | None = vars(self).get("_known")
        if known is not None and key_masks is None and key_weights is None:
            stepped = known.step(self, query, keys, values, decay)
            if stepped is not None:
                out, lse, state = stepped
                return ((out, lse) if return_lse else out), state
        check_streams(self.plan)
        n, before = checked_rows(query, keys), self.summary
        if before is not None:
            checked_kind("summary", before, Summary, "a tattn.Summary or None")
            check_same_plan(self.plan, before.plan)
        found: Any
        if n > 1:
            out, lse, summary = attend_next(self.plan, before, query, (keys, values, key_masks, key_weights), decay)
            found = (out, lse) if return_lse else out
        else:
            weighing: Any = {"key_masks": key_masks, "key_weights": key_weights, "decay": decay}
            summary = (
                summarize(keys, values, self.plan, **weighing)
                if before is None
                else before.update(keys, values, **weighing)
            )
            found = summary.attend(query, return_lse=return_lse)
        state = DecodingState(self.plan, summary)
        one, *of_keys = (x[..., :1, :] for x in (query, *keys))
        known = _Known.of(self.plan, summary, one, of_keys, [v[..., :1, :] for v in values])
        if known is not None:
            # Not a field: nothing of it is part of the state.
            object.__setattr__(state, "_known", known)
        return found, state


class _Known(NamedTuple):
    """What is known of a stream by a token that was checked: what its arrays are like, and what a kernel computes the next with.

    `most`: how many of these at once.
    """

    token: Token
    chain: int
    kind: tuple[Any, ...]
    pairs: Pairs | None
    most: int

    @classmethod
    def of(
        cls, plan: Plan, summary: Summary, query: Array, keys: Sequence[Array], values: Sequence[Array]
    ) -> _Known | None:
        """None where no kernel serves such tokens."""
        backend, call, dtype = backend_of(query), call_of(plan), computed_in(plan.dtype)
        if backend is None or not backend.reads or plan.dtype != dtype or call.views > 2:
            return None
        if backend.is_traced((query, *keys, *values)):
            return None
        leading = tuple(query.shape[:-2])
        if any(tuple(x.shape[:-2]) != leading for x in (*keys, *values, *summary.sums, *summary.rests)):
            return None
        columns = values[0].shape[-1] + 1
        token = token_of(call, plan.dim, columns, dtype)
        turn = call.turn(plan.dim)
        pairs = None if turn is None else Pairs(turn)
        # Sums of complex monomials take no more additions and products together than a chain has. A single token is computed so
        # in any case.
        longest = CHAIN if pairs is None else CHAIN // 2
        most = max(1, min(_MOST_NUMBERS // (prod(leading) * plan.rank * columns), longest))
        return cls(token, call.chain, _kind(query, keys, values), pairs, most)

    def step(
        self, state: DecodingState, query: Array, keys: Sequence[Array], values: Sequence[Array], decay: Any
    ) -> tuple[Array, Array, DecodingState] | None:
        """Output, lse and the state after tokens like the one before; None for others, and for many."""
        summary = state.summary
        if summary is None or not isinstance(keys, (list, tuple)) or not isinstance(values, (list, tuple)):
            return None
        backend = backend_of(query)
        if backend is None or len(query.shape) < 2:
            return None
        n, kind = query.shape[-2], self.kind
        if n != 1:
            kind = kind[0], *((cls, dtype, (*shape[:-2], n, shape[-1])) for cls, dtype, shape in kind[1:])
        if not 0 < n <= self.most or _kind(query, keys, values) != kind:
            return None
        factors = () if decay is None else self._factors(decay, query, backend)
        if factors is None:
            return None
        arrays = [x for x in factors if not isinstance(x, float)]
        backend = backend.for_arrays((query, *keys, *values, *arrays, *summary.sums)).within(self.chain)
        operation = "step" if self.pairs is None else "complex_step"
        kernel = backend.kernel(operation, query, *keys, *values, *arrays)
        if kernel is None:
            return None
        # A product is rounded as a sum is.
        added = n if decay is None else 2 * n
        turned, age = self._turned(state, backend, added)
        out, lse, sums, rests, *new = kernel(
            self.token, query, keys, values, summary.sums, summary.rests, factors, *turned
        )
        # What constructors do besides was done for those before: some microseconds for each.
        following, after = object.__new__(Summary), object.__new__(DecodingState)
        vars(following).update(plan=summary.plan, sums=tuple(sums), rests=tuple(rests))
        vars(after).update(plan=state.plan, summary=following, _known=self, _turned=(new, age + added))
        return out, lse, after

    def _factors(self, decay: Any, query: Array, backend: Backend) -> list[Any] | None:
        """What keys decay by as kernels take it, numbers or arrays like the query that broadcast; None if that is not so."""
        if not isinstance(decay, (list, tuple)) or len(decay) != self.kind[0]:
            return None
        found: list[Any] = []
        for x in decay:
            if is_number(x):
                found.append(1.0 if x is None else float(x))
                fits = 0 <= found[-1] <= 1
            else:
                found.append(x)
                fits = (
                    type(x) is type(query)
                    and x.dtype == query.dtype
                    and backend.device(x) == backend.device(query)
                    and _broadcasts(x.shape, query.shape[:-2])
                )
            if not fits:
                return None
        return found

    def _turned(self, state: DecodingState, backend: Backend, added: int) -> tuple[Sequence[Any], int]:
        """The sums of complex monomials, if channels are complex, and how much was added to them since they were made."""
        if self.pairs is None:
            return (), 0
        kept: tuple[Sequence[Any], int] | None = vars(state).get("_turned")
        # No more is added to them than a chain of additions has; then they are made anew of the real ones.
        if kept is not None and kept[1] + added <= CHAIN:
            return kept
        sums = state.summary.sums  # type: ignore[union-attr]
        return [[backend.xp.matrix_transpose(self.pairs.turned(x, backend)) for x in sums]], 0


def _broadcasts(shape: Sequence[int], leading: Sequence[int]) -> bool:
    """Whether an array of this shape has these leading dimensions together with another."""
    aligned = zip(reversed(shape), reversed(leading), strict=False)
    return len(shape) <= len(leading) and all(size in (1, whole) for size, whole in aligned)


def _kind(query: Array, keys: Sequence[Array], values: Sequence[Array]) -> tuple[Any, ...]:
    """What arrays of a token have to have in common with those of another to be as good as those."""
    return len(keys), *(
        (type(x), getattr(x, "dtype", None), getattr(x, "shape", None)) for x in (query, *keys, *values)
    )
