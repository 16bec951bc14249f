"""Causal attention as tokens come, one or some at a time, in memory that does not grow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..backends import Array, Backend, backend_of
from ..backends.operations import CHAIN, Token
from ..bounds.rounding import computed_in
from ..checks import checked_flags, checked_kind
from ..decay import factors_of, passed
from ..features.pairs import Pairs
from ..plans import Plan
from .checks import check_same_plan, check_streams, checked_rows
from .summary import Summary, attend_next, call_of, summarize, summary_of
from .sums import token_of


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

        Each query sees its own token and those before it, so that n tokens in one call are n calls of one token each.

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
        O(n m r dv) time and O(m r dv) memory beyond the output, whatever the number of tokens before. Single tokens like the one
        before are computed by compiled code where there is some, for two views at most. Where a call takes many tokens, each
        takes a fraction of the time. A row of such a call is NaN if what it sees weighs too little beside all that the call has, as
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
    """What is known of a stream by a token that was checked: what its arrays are like, and what a kernel computes the next with."""

    token: Token
    chain: int
    kind: tuple[Any, ...]
    pairs: Pairs | None

    @classmethod
    def of(
        cls, plan: Plan, summary: Summary, query: Array, keys: Sequence[Array], values: Sequence[Array]
    ) -> _Known | None:
        """None where no kernel serves such tokens."""
        backend, call, dtype = backend_of(query), call_of(plan), computed_in(plan.dtype)
        if backend is None or not backend.reads or plan.dtype != dtype or call.views > 2:
            return None
        leading = tuple(query.shape[:-2])
        if any(tuple(x.shape[:-2]) != leading for x in (*keys, *values, *summary.sums, *summary.rests)):
            return None
        token = token_of(call, plan.dim, values[0].shape[-1] + 1, dtype)
        turn = call.turn(plan.dim)
        return cls(token, call.chain, _kind(query, keys, values), None if turn is None else Pairs(turn))

    def step(
        self, state: DecodingState, query: Array, keys: Sequence[Array], values: Sequence[Array], decay: Any
    ) -> tuple[Array, Array, DecodingState] | None:
        """Output, lse and the state after a token like the one before; None for another."""
        summary = state.summary
        if summary is None or not isinstance(keys, (list, tuple)) or not isinstance(values, (list, tuple)):
            return None
        backend = backend_of(query)
        if backend is None or _kind(query, keys, values) != self.kind:
            return None
        backend = backend.for_arrays((query, *keys, *values, *summary.sums)).within(self.chain)
        kernel = backend.kernel("step" if self.pairs is None else "complex_step", query, *keys, *values)
        if kernel is None:
            return None
        before = summary
        if decay is not None:
            leading = tuple(query.shape[:-2])
            factors = factors_of(decay, len(keys), query, leading, backend)
            if any(np.broadcast_shapes(x.shape[:-2], leading) != leading for x in factors):
                return None
            pairs = zip(summary.sums, summary.rests, factors, strict=True)
            before = summary_of(state.plan, [passed(1, both, factor, backend) for *both, factor in pairs])
            # Complex monomials are made anew: their own sums would lose a unit with each token.
            state = DecodingState(state.plan, before)
        turned, age = self._turned(state, backend)
        out, lse, sums, rests, *new = kernel(self.token, query, keys, values, before.sums, before.rests, *turned)
        after = DecodingState(state.plan, Summary(summary.plan, tuple(sums), tuple(rests)))
        object.__setattr__(after, "_known", self)
        object.__setattr__(after, "_turned", (new, age + 1))
        return out, lse, after

    def _turned(self, state: DecodingState, backend: Backend) -> tuple[Sequence[Any], int]:
        """The sums of complex monomials, if channels are complex, and how many tokens were added since they were made."""
        if self.pairs is None:
            return (), 0
        kept: tuple[Sequence[Any], int] | None = vars(state).get("_turned")
        # One more is not added to them than a chain of additions has; then they are made anew of the real ones.
        if kept is not None and kept[1] < CHAIN:
            return kept
        sums = state.summary.sums  # type: ignore[union-attr]
        return [[backend.xp.matrix_transpose(self.pairs.turned(x, backend)) for x in sums]], 0


def _kind(query: Array, keys: Sequence[Array], values: Sequence[Array]) -> tuple[Any, ...]:
    """What arrays of a token have to have in common with those of another to be as good as those."""
    return len(keys), *(
        (type(x), getattr(x, "dtype", None), getattr(x, "shape", None)) for x in (query, *keys, *values)
    )
