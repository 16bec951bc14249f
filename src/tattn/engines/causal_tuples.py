"""The exact method where query row i sees only a prefix of each view, or the last rows of it.

Aligned at the end: of n_μ keys, row i of n queries sees j ≤ i + n_μ − n. Query rows are cut into runs, and a run is attention
to the keys that some row of it sees, of which `exact` leaves out those that the single row does not:

* Prefixes: a few runs, one after another, each with all keys up to its end.
* Windows: runs of equal length, side by side as one more leading dimension, each with a window's length of keys before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import inf
from typing import NamedTuple

from ..arrays import in_parts, unpack
from ..backends import Array, Backend
from . import tuples as exact
from .spoiled import Sight, backward_apart, forward_apart

# Rows in a run of prefixes, at least, and runs, at most: some 10 % more pairs than are seen. Fewer where loops are unrolled.
_RUN, _RUNS, _UNROLLED_RUNS = 32, 16, 4


class CausalCall(NamedTuple):
    """What the computation depends on besides arrays; hashable. No window is all rows up to the query's."""

    scale: float
    views: int
    window: tuple[int, ...] | None = None


def forward(call: CausalCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, Array, Array]:
    """Output (..., n, dv), lse (..., n, 1), and lse again as what the adjoint needs."""
    out, lse = forward_apart(partial(_forward, call, backend), _sight(call), backend, arrays)
    return out, lse, lse


def backward(call: CausalCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    """Gradients of query, keys and values, each in its own shape, in the dtype of the computation."""
    return backward_apart(partial(_backward, call, backend), _sight(call), -inf, backend, arrays)


def _sight(call: CausalCall) -> Sight:
    """What query rows see; every finite entry is a number."""
    return Sight(call.views, call.window, [inf] * (1 + call.views))


def _forward(call: CausalCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, Array]:
    """Output and lse of rows that hold numbers."""
    n, shifts = _aligned(call, arrays)
    if _windowed(call, n, shifts):
        folding = _Folding.of(call, n, arrays)
        whole = folding.call(call)
        limit = exact.leading_limit(whole, backend, arrays)
        out, lse, _ = in_parts(exact.forward, limit, (None,) * 3, whole, backend, folding.folded(call, arrays, backend))
        return folding.rows(out, backend), folding.rows(lse, backend)
    parts = [exact.forward(*_run(call, shifts, cut, backend, arrays))[:2] for cut in _runs(n, backend)]
    out, lse = (_joined(list(pieces), backend) for pieces in zip(*parts, strict=True))
    return out, lse


def _backward(call: CausalCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    """`backward` of rows that hold numbers."""
    n, shifts = _aligned(call, arrays)
    m = call.views
    if _windowed(call, n, shifts):
        folding = _Folding.of(call, n, arrays)
        whole = folding.call(call)
        folded = folding.folded(call, arrays, backend)
        limit = exact.leading_limit(whole, backend, arrays)
        dq, *grads = in_parts(exact.backward, limit, folded[: 1 + 2 * m], whole, backend, folded)
        return folding.rows(dq, backend), *(
            folding.unfolded(g, i % m, arrays[1 + i].shape[-2], backend)  # type: ignore[union-attr]
            for i, g in enumerate(grads)
        )
    dqs: list[Array] = []
    totals: list[Array] = []
    for cut in _runs(n, backend):
        dq, *grads = exact.backward(*_run(call, shifts, cut, backend, arrays))
        dqs.append(dq)
        # What earlier runs gave covers the first rows only.
        totals = [
            g if not totals else _joined([t + g[..., : t.shape[-2], :], g[..., t.shape[-2] :, :]], backend)
            for t, g in zip(totals or grads, grads, strict=True)
        ]
    return _joined(dqs, backend), *totals


def leading_limit(call: CausalCall, backend: Backend, arrays: Sequence[Array | None]) -> int:
    """How many problems to compute side by side."""
    return exact.leading_limit(exact.ExactCall(call.scale, call.views), backend, arrays)


def _joined(parts: list[Array], backend: Backend) -> Array:
    """Rows one after another."""
    return parts[0] if len(parts) == 1 else backend.xp.concat(parts, axis=-2)


def _aligned(call: CausalCall, arrays: Sequence[Array | None]) -> tuple[int, list[int]]:
    """n, and n_μ − n for every view."""
    q, keys, *_ = unpack(call.views, arrays)
    return q.shape[-2], [k.shape[-2] - q.shape[-2] for k in keys]


def _windowed(call: CausalCall, n: int, shifts: Sequence[int]) -> bool:
    """Whether a window leaves out any row."""
    return call.window is not None and any(w < n + shift for w, shift in zip(call.window, shifts, strict=True))


def _runs(n: int, backend: Backend) -> list[tuple[int, int]]:
    """(start, stop) of every run of prefixes."""
    most = _RUNS if backend.parts else _UNROLLED_RUNS
    rows = max(_RUN, -(-n // most))
    return [(start, min(start + rows, n)) for start in range(0, n, rows)]


def _run(
    call: CausalCall, shifts: Sequence[int], cut: tuple[int, int], backend: Backend, arrays: Sequence[Array | None]
) -> tuple[exact.ExactCall, Backend, list[Array | None]]:
    """What `exact` computes for the query rows of a run: the keys up to its end."""
    start, stop = cut
    m = call.views
    parts = [None if a is None else a[..., : stop + shifts[i % m], :] for i, a in enumerate(arrays[1 : 1 + 3 * m])]
    columns = [a[..., start:stop, :] for a in (arrays[0], *arrays[1 + 3 * m :])]  # type: ignore[index]
    inner = exact.ExactCall(call.scale, m, tuple(start + shift for shift in shifts))
    return inner, backend, [columns[0], *parts, *columns[1:]]


class _Folding(NamedTuple):
    """Runs of `rows` query rows side by side, `runs` of them, each with `before[μ]` runs of keys before its own."""

    n: int
    rows_in_run: int
    runs: int
    before: tuple[int, ...]
    window: tuple[int, ...]

    @classmethod
    def of(cls, call: CausalCall, n: int, arrays: Sequence[Array | None]) -> _Folding:
        """Runs short beside the windows, but not so short that a long window is held many times."""
        lengths = [a.shape[-2] for a in arrays[1 : 1 + call.views]]  # type: ignore[union-attr]
        window = tuple(min(w, length) for w, length in zip(call.window or (), lengths, strict=True))
        rows = min(n, max(16, -(-min(window) // 4), -(-max(window) // 16)))
        return cls(n, rows, -(-n // rows), tuple(-(-(w - 1) // rows) for w in window), window)

    def call(self, call: CausalCall) -> exact.ExactCall:
        """The call for all runs."""
        return exact.ExactCall(call.scale, call.views, tuple(b * self.rows_in_run for b in self.before), self.window)

    def folded(self, call: CausalCall, arrays: Sequence[Array | None], backend: Backend) -> list[Array | None]:
        """Arrays of a call with one more leading dimension, that of the runs: query and columns (..., runs, rows, k), keys more."""
        xp = backend.xp
        q, keys, values, masks, columns = unpack(call.views, arrays)
        of_query = [self._blocks(q, self.runs, 0.0, backend)]
        for i, column in enumerate(columns):
            # A row that is not there has seen nothing: its lse is −inf.
            of_query.append(self._blocks(column, self.runs, -xp.inf if i == 1 else 0.0, backend))
        views: list[list[Array]] = [[], [], []]
        for before, k, v, mask in zip(self.before, keys, values, masks, strict=True):
            present = xp.ones((k.shape[-2], 1), dtype=xp.bool, device=backend.device(k)) if mask is None else mask
            for held, rows, fill in zip(views, (k, v, present), (0.0, 0.0, False), strict=True):
                blocks = self._blocks(rows, self.runs + before, fill, backend)
                cuts = [blocks[..., p : p + self.runs, :, :] for p in range(before + 1)]
                held.append(_joined(cuts, backend))
        return [of_query[0], *views[0], *views[1], *views[2], *of_query[1:]]

    def _blocks(self, rows: Array, count: int, fill: float, backend: Backend) -> Array:
        """The last rows of an array in so many runs, (..., count, rows, k), with rows of `fill` before if they are too few."""
        xp = backend.xp
        length = count * self.rows_in_run
        *leading, n, k = rows.shape
        if n > length:
            rows = rows[..., n - length :, :]
        elif n < length:
            pad = xp.full((*leading, length - n, k), fill, dtype=rows.dtype, device=backend.device(rows))
            rows = xp.concat([pad, rows], axis=-2)
        return xp.reshape(rows, (*leading, count, self.rows_in_run, k))

    def rows(self, folded: Array, backend: Backend) -> Array:
        """Rows of the query, (..., runs, rows, k) → (..., n, k)."""
        *leading, runs, rows, k = folded.shape
        return backend.xp.reshape(folded, (*leading, runs * rows, k))[..., runs * rows - self.n :, :]

    def unfolded(self, folded: Array, view: int, length: int, backend: Backend) -> Array:
        """Sum over the runs that hold a row: (..., runs, (before + 1) · rows, k) → (..., length, k)."""
        xp = backend.xp
        before = self.before[view]
        *leading, runs, _, k = folded.shape
        total: Array = 0.0
        for p in range(before + 1):
            part = folded[..., p * self.rows_in_run : (p + 1) * self.rows_in_run, :]
            ends = [
                xp.zeros((*leading, rows, self.rows_in_run, k), dtype=folded.dtype, device=backend.device(folded))
                for rows in (p, before - p)
            ]
            total = total + xp.concat([ends[0], part, ends[1]], axis=-3)
        total = xp.reshape(total, (*leading, (runs + before) * self.rows_in_run, k))
        here = total.shape[-2]
        if here >= length:
            return total[..., here - length :, :]
        missing = xp.zeros((*leading, length - here, k), dtype=folded.dtype, device=backend.device(folded))
        return xp.concat([missing, total], axis=-2)
