"""Blocks of rows in windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...operations import Prefix
from ..loading import loaded
from .problems import TO_READ, Problems, padded, put_back, writable


def window_read(block: Prefix, starts: Sequence[np.ndarray], spread: Callable[..., list[Any]]) -> Any:
    """The operation `window_read` for NumPy arrays."""
    loops = loaded()[0]
    problems = Problems(block, starts)
    total = problems.sums(starts, len(block.keys) // 2)
    out = np.empty((*problems.q.shape[:-1], problems.z.shape[-1]), problems.q.dtype)
    w = padded(block, loops.causal)

    def read_windows(p: slice, e: slice) -> None:
        cut = out[p, ..., e]
        own, z, of_all = (writable(x) for x in (cut, problems.z[p, ..., e], total[p, :, e]))
        loops.windows.read(problems.q[p], problems.k[p], z, w, block.runs, of_all, own)
        put_back([own], [cut])

    spread(read_windows, problems.work(total, TO_READ))
    return problems.whole(out)


def window_pull(
    block: Prefix, starts: Sequence[np.ndarray], upstream: np.ndarray, spread: Callable[..., list[Any]]
) -> Any:
    """The operation `window_pull` for NumPy arrays."""
    loops = loaded()[0]
    problems = Problems(block, starts, upstream)
    total, g = problems.sums(starts, len(block.keys) // 2), problems.together(upstream)
    q, k, z = problems.q, problems.k, problems.z
    w, m = padded(block, loops.causal), total.shape[1]
    dq, dk, dz, of_total = (np.empty_like(x) for x in (q, k, z, total))

    def pull_windows(p: slice, _: slice) -> None:
        rows = w, block.runs, total[p]
        of_others = np.empty_like(k[p, m:]), np.empty_like(z[p, m:])
        loops.windows.pull(q[p], k[p], z[p], g[p], *rows, dq[p], *of_others, of_total[p])
        dk[p, m:], dz[p, m:] = of_others
        # Their own rows are the others of rows in reverse order.
        turned = (np.flip(x, axis=-2) for x in (q[p], *(np.roll(x[p], m, axis=1) for x in (k, z)), g[p]))
        loops.windows.pull(*map(np.ascontiguousarray, turned), *rows, dq[:0], *of_others, total[:0])
        dk[p, :m], dz[p, :m] = (np.flip(x, axis=-2) for x in of_others)

    spread(pull_windows, problems.work(total, dz.shape[-1] + 1))
    views = (problems.whole_views(x) for x in (dk, dz, of_total if starts else total[:, :0]))
    return problems.whole(dq), *views
