"""Blocks of rows of causal attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...operations import Prefix
from ..loading import loaded
from .problems import TO_PULL, TO_READ, Problems, alone, padded, put_back, writable


def prefix_read(block: Prefix, sums: Sequence[Sequence[np.ndarray]], spread: Callable[..., list[Any]]) -> Any:
    """The operation `prefix_read` for NumPy arrays."""
    loops = loaded()[0].causal
    problems = Problems(block, [total for total, _ in sums])
    total, lost = (problems.sums([pair[i] for pair in sums], len(block.keys)) for i in (0, 1))
    # Rows of no document are 0.
    out = np.zeros((*problems.q.shape[:-1], problems.z.shape[-1]), problems.q.dtype)
    w = padded(block, loops)

    def read(p: slice, e: slice) -> None:
        cut = [total[p, :, e], lost[p, :, e], out[p, ..., e]]
        own = [writable(x) for x in cut]
        z = writable(problems.z[p, ..., e])
        which = *problems.fading(p), *problems.documents(p)
        loops.read(problems.q[p], problems.k[p], z, w, block.runs, block.half, *which, *own)
        put_back(own, cut)

    (alone if block.documents else spread)(read, problems.work(total, TO_READ))
    return problems.of_views(total, lost, [s for s, _ in sums]), problems.whole(out)


def prefix_pull(
    block: Prefix,
    starts: Sequence[np.ndarray],
    behind: Sequence[Sequence[np.ndarray]],
    upstream: np.ndarray,
    spread: Callable[..., list[Any]],
) -> Any:
    """The operation `prefix_pull` for NumPy arrays."""
    loops = loaded()[0].causal
    problems = Problems(block, starts, upstream)
    total = problems.sums(starts, len(block.keys))
    after, missed = (problems.sums([pair[i] for pair in behind], len(block.keys)) for i in (0, 1))
    q, k, z, g = problems.q, problems.k, problems.z, problems.together(upstream)
    # Rows of no document are 0.
    dz = np.zeros_like(z)
    w = padded(block, loops)

    def pull(p: slice, e: slice) -> tuple[slice, np.ndarray, np.ndarray, np.ndarray]:
        given = [writable(x) for x in (z[p, ..., e], g[p, ..., e])]
        cut = [after[p, :, e], missed[p, :, e], dz[p, ..., e]]
        s, rest, found = own = [writable(x) for x in cut]
        of_q, of_k = np.zeros_like(q[p]), np.zeros_like(k[p])
        of_total = writable(total[p, :, e])
        of_decays = np.zeros((len(of_q), len(block.decays)))
        loops.pull(
            q[p],
            k[p],
            *given,
            w,
            block.runs,
            block.half,
            *problems.fading(p),
            *problems.documents(p),
            of_total,
            s,
            rest,
            of_q,
            of_k,
            found,
            of_decays,
        )
        put_back(own, cut)
        return p, of_q, of_k, of_decays

    parts = (alone if block.documents else spread)(pull, problems.work(total, TO_PULL))
    _, dq, dk, d_logs = parts[0]
    if len(parts) > 1:
        # What columns add to the gradients of queries and keys is added up in their order.
        dq, dk, d_logs = np.zeros_like(q), np.zeros_like(k), np.zeros((len(q), len(block.decays)))
        for p, of_q, of_k, of_logs in parts:
            dq[p] += of_q
            dk[p] += of_k
            d_logs[p] += of_logs
    of_decays = (d_logs / problems.decays[:, : d_logs.shape[1]]).astype(q.dtype)[..., None, None]
    gradients = problems.whole(dq), *map(problems.whole_views, (dk, dz, of_decays))
    return problems.of_views(after, missed, [s for s, _ in behind]), gradients
