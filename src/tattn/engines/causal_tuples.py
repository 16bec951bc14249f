"""The exact method where query row i sees only a prefix of each view, or the last rows of it.

Aligned at the end: of n_μ keys, row i of n queries sees j ≤ i + n_μ − n. Query rows are cut into runs, and a run is attention
to the keys that some row of it sees, of which `tuples` leaves out those that the single row does not:

* Prefixes: a few runs, one after another, each with all keys up to its end.
* Windows: runs of equal length, side by side as one more leading dimension, each with a window's length of keys before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

from ..arrays import are_weights, in_parts
from ..backends import Array, Backend
from ..operands import Gradients, Operands, Upstream, View
from . import tuples
from .spoiled import Columns, backward_apart, forward_apart

# Rows in a run of prefixes, at least, and runs, at most: some 10 % more pairs than are seen. Fewer where loops are unrolled.
_RUN, _RUNS, _UNROLLED_RUNS = 32, 16, 4


def forward(operands: Operands) -> tuple[Array, Array]:
    """Output (..., n, dv) and lse (..., n, 1)."""
    return forward_apart(_forward, operands, _limits(operands))


def _forward(operands: Operands) -> tuple[Array, Array]:
    """`forward` of rows that hold numbers."""
    backend, shifts = operands.backend, _shifts(operands)
    if _windowed(operands):
        folding = _Folding.of(operands)
        folded, _ = folding.folded(operands)

        def attend(arrays: Sequence[Array | None]) -> tuple[Array, ...]:
            return tuples.forward(folded.with_arrays(arrays)[0], folding.limits)

        out, lse = in_parts(attend, tuples.at_a_time(operands), (None,) * 2, backend, folded.flat())
        return folding.rows(out, backend), folding.rows(lse, backend)
    parts = [tuples.forward(*_run(operands, shifts, cut)) for cut in _runs(operands)]
    out, lse = (_joined(list(pieces), backend) for pieces in zip(*parts, strict=True))
    return out, lse


def backward(operands: Operands, out: Array, lse: Array, upstream: Upstream) -> Gradients:
    """Gradients of query, keys and values, each in its own shape, in the dtype of the computation."""
    return backward_apart(_backward, operands, (out, lse, *upstream), -inf, _limits(operands))[0]


def _limits(operands: Operands) -> list[float]:
    """Every finite entry is a number."""
    return [inf] * (1 + len(operands.views))


def _backward(operands: Operands, columns: Columns) -> tuple[Gradients, tuple[()]]:
    """`backward` of rows that hold numbers."""
    backend, shifts = operands.backend, _shifts(operands)
    if _windowed(operands):
        folding = _Folding.of(operands)
        folded, of_query = folding.folded(operands, columns)

        def adjoint(arrays: Sequence[Array | None]) -> tuple[Array, ...]:
            here, (o, lse, *g) = folded.with_arrays(arrays)
            return tuples.backward(here, o, lse, Upstream(*g), folding.limits).flat()

        limit = tuples.at_a_time(operands)
        dq, *grads = in_parts(adjoint, limit, folded.targets, backend, (*folded.flat(), *of_query))
        lengths = operands.lengths[1:]
        m = len(lengths)
        of_rows, of_decays = (grads[: 3 * m], grads[3 * m :]) if operands.decays else (grads, [])
        unfolded = [folding.unfolded(g, i % m, lengths[i % m], backend) for i, g in enumerate(of_rows)]
        return Gradients.of([folding.rows(dq, backend), *unfolded, *(g[..., 0, :, :] for g in of_decays)], m), ()
    dqs: list[Array] = []
    totals: list[Array] = []
    for start, stop in _runs(operands):
        o, l, *g = (c[..., start:stop, :] for c in columns)
        here, limits = _run(operands, shifts, (start, stop))
        dq, *grads = tuples.backward(here, o, l, Upstream(*g), limits).flat()
        dqs.append(dq)
        # What earlier runs gave covers the first rows only.
        totals = [
            g if not totals else _joined([t + g[..., : t.shape[-2], :], g[..., t.shape[-2] :, :]], backend)
            for t, g in zip(totals or grads, grads, strict=True)
        ]
    return Gradients.of([_joined(dqs, backend), *totals], len(operands.views)), ()


def _joined(parts: list[Array], backend: Backend) -> Array:
    """Rows one after another."""
    return parts[0] if len(parts) == 1 else backend.xp.concat(parts, axis=-2)


def _shifts(operands: Operands) -> list[int]:
    """n_μ − n for every view."""
    n, *lengths = operands.lengths
    return [length - n for length in lengths]


def _windowed(operands: Operands) -> bool:
    """Whether a window leaves out any row."""
    window = operands.order.window
    return window is not None and any(w < n for w, n in zip(window, operands.lengths[1:], strict=True))


def _runs(operands: Operands) -> list[tuple[int, int]]:
    """(start, stop) of every run of prefixes."""
    n = operands.query.shape[-2]
    most = _RUNS if operands.backend.parts else _UNROLLED_RUNS
    rows = max(_RUN, -(-n // most))
    return [(start, min(start + rows, n)) for start in range(0, n, rows)]


def _run(operands: Operands, shifts: Sequence[int], cut: tuple[int, int]) -> tuple[Operands, tuples.Limits]:
    """The query rows of a run, and the keys up to its end."""
    start, stop = cut
    views = tuple(v.rows(0, stop + shift) for v, shift in zip(operands.views, shifts, strict=True))
    offsets = tuple(start + shift for shift in shifts)
    return operands._replace(query=operands.query[..., start:stop, :], views=views), tuples.Limits(offsets)


class _Folding(NamedTuple):
    """Runs of `rows` query rows side by side, `runs` of them, each with `before[μ]` runs of keys before its own."""

    n: int
    rows_in_run: int
    runs: int
    before: tuple[int, ...]
    window: tuple[int, ...]

    @classmethod
    def of(cls, operands: Operands) -> _Folding:
        """Those of a call in windows."""
        n, *lengths = operands.lengths
        window = tuple(min(w, length) for w, length in zip(operands.order.window or (), lengths, strict=True))
        rows, before = tuples.runs_in_windows(n, window)
        return cls(n, rows, -(-n // rows), before, window)

    @property
    def limits(self) -> tuples.Limits:
        """What the rows of all runs see."""
        return tuples.Limits(tuple(b * self.rows_in_run for b in self.before), self.window)

    def folded(self, operands: Operands, columns: Sequence[Array] = ()) -> tuple[Operands, list[Array]]:
        """With one more leading dimension, that of the runs: query and columns (..., runs, rows, k), keys more."""
        backend = operands.backend
        xp = backend.xp
        of_query = [self._blocks(operands.query, self.runs, 0.0, backend)]
        for i, column in enumerate(columns):
            # A row that is not there has seen nothing: its lse is −inf.
            of_query.append(self._blocks(column, self.runs, -xp.inf if i == 1 else 0.0, backend))
        views = []
        for before, (k, v, mask) in zip(self.before, operands.views, strict=True):
            present = xp.ones((k.shape[-2], 1), dtype=xp.bool, device=backend.device(k)) if mask is None else mask
            held = []
            for rows in (k, v, present):
                # Rows that are not there are masked, and weigh nothing.
                nothing = 0.0 if are_weights(rows, backend) else False
                blocks = self._blocks(rows, self.runs + before, nothing, backend)
                cuts = [blocks[..., p : p + self.runs, :, :] for p in range(before + 1)]
                held.append(_joined(cuts, backend))
            views.append(View(*held))
        decays = tuple(x[..., None, :, :] for x in operands.decays)
        return operands._replace(query=of_query[0], views=tuple(views), decays=decays), of_query[1:]

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
