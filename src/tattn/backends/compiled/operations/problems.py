"""What the operations share: leading dimensions as one, that of the problems, and parts of these for threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import numpy as np

from ...operations import ROWS, Prefix, rows_together
from ...threads import MOST_THREADS, even_parts

# Runs a task for parts of the problems and columns of a `Work`, in threads or here.
Spread = Callable[..., list[Any]]
# Multiplications that are worth a thread.
_FEWEST = 1 << 20
# Columns of the values that are worth a thread, which makes the monomials of all rows: to read, and to pull gradients back.
TO_READ, TO_PULL = 4, 24


def writable(x: np.ndarray) -> np.ndarray:
    """The array, contiguous and such that it may be written to, which it is not."""
    return x if x.flags.c_contiguous and x.flags.writeable else x.copy()


def put_back(own: Sequence[np.ndarray], places: Sequence[np.ndarray]) -> None:
    """What `writable` made copies of, to where it came from."""
    for x, place in zip(own, places, strict=True):
        if x is not place:
            place[...] = x


class Work(NamedTuple):
    """What threads may share: problems, columns of the values and how many parts of these; and multiplications of a problem."""

    problems: int
    columns: int
    parts: int
    each: float


class Problems:
    """The rows of a block with one leading dimension, that of the problems, copied where arrays broadcast."""

    def __init__(self, block: Prefix, sums: Sequence[np.ndarray], *others: np.ndarray) -> None:
        every = (block.q, *block.keys, *block.shares, *block.decays, *sums, *others)
        self.leading = np.broadcast_shapes(*(x.shape[:-2] for x in every))
        self.q = self.together(block.q)
        self.k, self.z = self.views(block.keys), self.views(block.shares)
        self.decays, self.steps = np.ones(self.k.shape[:2]), np.full(len(self.k), ROWS)
        if block.decays:
            self.decays = self.views(block.decays)[..., 0, 0].astype(np.float64)
            self.steps = rows_together(np.prod(self.decays, axis=1), str(self.q.dtype))
        self._documents, self._rank = block.documents, len(block.w)

    def fading(self, some: slice) -> tuple[np.ndarray, np.ndarray]:
        """Factors (P, m) by which keys decay, and rows of a chunk (P,)."""
        return self.decays[some], self.steps[some]

    def documents(self, some: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Where documents begin, their rows, parts (D, m) and units (P, D, m + 1, d); all rows are one if there are none."""
        (count, n, dim), views, dtype = self.q.shape, self.k.shape[1], self.q.dtype
        if self._documents is None:
            units = np.ones((count, 1, 1 + views, dim), dtype)
            return np.zeros(1, np.int64), np.full(1, n), np.ones((1, views), dtype), units[some]
        begins, lengths, counts, units = self._documents
        units = np.broadcast_to(units, (*self.leading, *units.shape[-3:])).reshape(count, *units.shape[-3:])
        parts = (1 / counts).astype(dtype)
        return np.ascontiguousarray(begins), np.ascontiguousarray(lengths), parts, writable(units[some])

    def together(self, x: np.ndarray) -> np.ndarray:
        """(..., n, k) → (P, n, k)."""
        return together(x, self.leading)

    def views(self, xs: Sequence[np.ndarray]) -> np.ndarray:
        """(..., n, k) for every view → (P, m, n, k), a copy."""
        return np.stack([self.together(x) for x in xs], axis=1)

    def sums(self, given: Sequence[np.ndarray], views: int) -> np.ndarray:
        """Those of every problem and view (P, m, dv + 1, r), or (0, …) if there are none."""
        return self.views(given) if given else np.zeros((0, views, self.z.shape[-1], self._rank), self.q.dtype)

    def whole(self, x: np.ndarray) -> np.ndarray:
        """The reverse of `together`."""
        return x.reshape(*self.leading, *x.shape[1:])

    def whole_views(self, x: np.ndarray) -> list[np.ndarray]:
        """The reverse of `views`."""
        return [self.whole(x[:, view]) for view in range(x.shape[1])]

    def of_views(self, total: np.ndarray, lost: np.ndarray, like: Sequence[np.ndarray]) -> list[Any]:
        """Compensated sums of every view, in the leading dimensions of those in `like`: the problems that share a view agree."""
        if not like:
            return []
        cuts = [tuple(slice(0, size) for size in s.shape[:-2]) for s in like]
        both = zip(self.whole_views(total), self.whole_views(lost), strict=True)
        return [tuple(_last(x, len(cut))[cut] for x in pair) for pair, cut in zip(both, cuts, strict=True)]

    def work(self, sums: np.ndarray, fewest: int) -> Work:
        """What there is to do, where so many columns are worth a thread."""
        columns = sums.shape[2]
        return Work(len(self.q), columns, columns // fewest, float(self.q.shape[1]) * prod(sums.shape[1:]))


def together(x: np.ndarray, leading: tuple[int, ...]) -> np.ndarray:
    """(..., n, k) → (P, n, k), for so many problems."""
    if x.shape[:-2] != leading:
        x = np.broadcast_to(x, (*leading, *x.shape[-2:]))
    return writable(x.reshape(prod(leading), *x.shape[-2:]))


def _last(x: np.ndarray, leading: int) -> np.ndarray:
    """The first problem along all but the last so many leading dimensions."""
    for _ in range(x.ndim - 2 - leading):
        x = x[0]
    return x


def padded(block: Prefix, loops: Any) -> np.ndarray:
    """Weights in whole blocks of monomials, with zeros where these have none."""
    blocks = -(-len(block.w) // loops.WIDTH) if block.half is None else -(-block.half // loops.HALF)
    w = np.zeros(blocks * loops.WIDTH, block.w.dtype)
    loops.spread_out(writable(block.w), block.half, w)
    return w


def alone(task: Callable[[slice, slice], Any], work: Work) -> list[Any]:
    """What the task returns for all problems and columns, done here."""
    return [task(slice(0, work.problems), slice(0, work.columns))]


def in_parts(backend: Any, task: Callable[[slice, slice], Any], work: Work) -> list[Any]:
    """What the task returns for some problems, or some columns of all, in each thread where that is worth it, in their order.

    Columns have sums of their own, so that no pass has to wait for another; the monomials of the rows are made by each thread.
    """
    count = max(1, min(backend.threads(), MOST_THREADS, int(work.problems * work.each / _FEWEST)))
    by_problems, by_columns = min(count, work.problems), 1
    if by_problems < count <= work.parts:
        by_problems, by_columns = 1, count
    tasks = [
        partial(task, slice(*of_problems), slice(*of_columns))
        for of_problems in even_parts(work.problems, by_problems)
        for of_columns in even_parts(work.columns, by_columns)
    ]
    return [tasks[0]()] if len(tasks) == 1 else backend.share(tasks)
