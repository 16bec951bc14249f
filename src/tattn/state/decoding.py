"""Causal attention one token at a time, in constant time and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..backends import Array, backend_of
from ..checks import checked_flags, checked_kind
from ..plans import Plan
from .checks import check_same_plan, check_streams, checked_token
from .summary import Summary, summarize


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
        return_lse: bool = False,
    ) -> tuple[Any, DecodingState]:
        """Add one token; return the output of its query, which sees the token itself, and the new state.

        Parameters
        ----------
        query : array (..., 1, d)
        keys : sequence of m arrays (..., 1, d)
        values : sequence of m arrays (..., 1, dv)
        key_masks : sequence of m boolean arrays (..., 1) or None, optional
            False for streams of a batch that have ended, or for padding. Their summaries do not change.
        return_lse : bool
            Also return log Σ exp of the scores, as ``((out, lse), state)``.

        Returns
        -------
        out : array (..., 1, dv), or a tuple of it and lse
        state : DecodingState

        Raises
        ------
        PlanError, TypeError, ValueError
            As from `summarize` and `Summary.attend`; also for more than one row.

        Notes
        -----
        O(m r dv) time and memory, whatever the number of tokens before.
        """
        checked_flags(return_lse=return_lse)
        check_streams(self.plan)
        checked_token(query, keys)
        if self.summary is None:
            summary = summarize(keys, values, self.plan, key_masks=key_masks)
        else:
            checked_kind("summary", self.summary, Summary, "a tattn.Summary or None")
            check_same_plan(self.plan, self.summary.plan)
            summary = self.summary.update(keys, values, key_masks)
        return summary.attend(query, return_lse=return_lse), DecodingState(self.plan, summary)
