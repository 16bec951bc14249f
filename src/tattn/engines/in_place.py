"""The polynomial method for documents where they stand in the rows: by loops that begin and end with each.

Rows are neither gathered nor padded nor put back, and sums of a document stay in the loops. The array form is that of documents in
groups (`methods.packed`), which computes what loops do not take. Of causal documents that is also what holds no numbers, or rows
beyond what was promised: these spoil some rows of their document, and not others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any, NamedTuple

import numpy as np

from ..arrays import alike, clean, prod_of, sum_to_leading, unweighed, with_leading
from ..backends import Array
from ..backends.operations import CHAIN, OF_DOCUMENTS, Documents, Prefix, Spans, of_channels
from ..documents import Block, Layout
from ..features.balance import MANY
from ..features.basis import FEW_CHAINS
from ..features.complex_channels import Turn, conjugating
from ..features.monomials import Expansion, run_table
from ..features.pairs import Pairs, pair_weights
from ..features.scaling import MOST_SCORE, units_of_each
from ..operands import Attended, Operands, Upstream, View
from . import causal_features
from .features import divided, log_normaliser, scaled_gradient, weight_table, with_ones

# Rows of a document whose sums need no compensation: the bounds count so many chains.
MOST_ROWS = FEW_CHAINS * CHAIN
# Workspaces that a block fills, and blocks that every thread should have: what is done for each costs some hundred microseconds.
_WORKSPACES, _BLOCKS = 4, 4


class Found(NamedTuple):
    """Rows of a block, and the groups of those documents in it that have to be computed in groups."""

    rows: Sequence[Array]
    lost: Sequence[int] = ()


class _Ready(NamedTuple):
    """Of a block the views, and rows, columns and units as loops take them."""

    views: tuple[View, ...]
    given: Any


@dataclass(frozen=True)
class InPlace:
    """The polynomial method for blocks of documents, by compiled loops over all rows of each."""

    operands: Operands
    expansion: Expansion
    spans: Spans
    size: Callable[..., Array]
    read: Callable[..., Array]
    pull: Callable[..., Any]

    @classmethod
    def of(cls, operands: Operands, expansion: Expansion, layout: Layout) -> InPlace | None:
        """For the documents of a layout; None where loops do not take them, nor weights, and more than two views."""
        backend, q, views, causal = operands.backend, operands.query, operands.views, operands.order.causal
        if operands.weights or len(views) >= MANY:
            return None
        if (operands.order.window or len(set(layout.sides)) > 1) if causal else operands.paired:
            return None
        d, columns = q.shape[-1], views[0].values.shape[-1] + 1
        w, runs = weight_table(expansion.coefficients, d, expansion.grading)[:, 0], run_table(d, *expansion.monomials)
        wanted = tuple(operands.wants(number) for number in range(len(views)))
        usual = np.asarray([operands.lengths]) // sum(group.documents for group in layout.groups)
        rows = max(operands.lengths) * prod(operands.leading)
        spans = Spans(usual, usual, usual, w, runs, columns, columns - 1, wanted, rows)
        given = spans, q, *operands.keys, *operands.values
        size, *passes = (backend.kernel(operation, *given) for operation in OF_DOCUMENTS)
        if causal:
            operations = (
                of_channels(f"prefix_{name}_documents", operands.paired, len(views)) for name in ("read", "pull")
            )
            passes = [backend.kernel(operation, *given[1:]) for operation in operations]
        if size is None or None in passes:
            return None
        return (Causal if causal else cls)(operands, expansion, spans, size, *passes)  # type: ignore[arg-type]

    @property
    def most(self) -> int:
        """Rows that a document may have."""
        return MOST_ROWS

    @property
    def rows(self) -> int:
        """Rows of a block."""
        operands, sides = self.operands, 1 + len(self.operands.views)
        backend, problems = operands.backend, prod(operands.leading)
        row = 2 * sides * (operands.query.shape[-1] + self.spans.columns) * backend.itemsize(operands.query.dtype)
        fitting = _WORKSPACES * backend.workspace // (row * problems)
        threads = backend.threads()
        of_thread = max(operands.lengths) // (_BLOCKS * threads) if threads > 1 else fitting
        return int(max(1, min(fitting, max(of_thread, MOST_ROWS // problems))))

    def forward(self, block: Block) -> Found:
        """Output, lse and the normaliser over the number of pairs of its group, of the query's rows of a block (..., n, ·)."""
        ready, backend = self._ready(block), self.operands.backend
        out, normaliser = divided(self._read(ready), self.operands.leading, backend)
        pairs = np.repeat(np.log(block.padded[:, 1:]).sum(axis=1), block.apart)
        more = backend.uploaded(pairs[:, None], normaliser, normaliser.dtype)
        lse = log_normaliser(normaliser, (), backend) + more
        return Found((out, lse, normaliser), self._lost(block, [out]))

    def backward(self, block: Block, attended: Attended, upstream: Upstream) -> Found:
        """Gradients of query, keys and values of a block, in the dtypes of these."""
        ready, operands = self._ready(block), self.operands
        backend, own = operands.backend, block.rows[0]
        of_rows = attended.out, attended.kept[0], *upstream
        o, l, g, g_lse = (backend.cast(x[..., own, :], operands.dtype) for x in of_rows)
        dq, d_keys, d_columns = self._pull(ready, scaled_gradient(o, l, g, g_lse, backend))
        grads, of_values = [dq], list[Array]()
        for view, dk, dz in zip(ready.views, d_keys, d_columns, strict=True):
            grads.append(clean(dk, view.mask, backend))
            of_values += unweighed(dz, view.values, view.mask, backend)
        found = [
            sum_to_leading(g, target.shape[:-2], backend)
            for g, target in zip([*grads, *of_values], operands.targets, strict=True)
        ]
        lost = self._lost(block, found)
        return Found([backend.cast(g, x.dtype) for g, x in zip(found, operands.targets, strict=True)], lost)

    def _sides(self, block: Block) -> tuple[tuple[View, ...], list[Array], list[Array]]:
        """Of a block the views, the rows of query and views, (..., n, d), and columns [v, 1] of the views, (..., n, dv + 1)."""
        operands, (own, *others) = self.operands, block.rows
        backend, dtype = operands.backend, operands.dtype
        views = tuple(view.rows(r.start, r.stop) for view, r in zip(operands.views, others, strict=True))
        keys = (clean(backend.cast(view.keys, dtype), view.mask, backend) for view in views)
        rows = [backend.cast(operands.query[..., own, :], dtype), *keys]
        return views, rows, [with_ones(view.values, view.mask, dtype, backend) for view in views]

    def _ready(self, block: Block) -> _Ready:
        """A block, ready for the loops: spans; all rows (..., N, d) and columns (..., N − n, dv + 1), one side after another; and
        units (..., documents, m + 1, d).
        """
        backend, leading = self.operands.backend, self.operands.leading
        spans = self.spans._replace(begins=block.begins, lengths=block.lengths, counts=block.padded)
        views, rows, columns = self._sides(block)
        x, z = (
            backend.xp.concat([with_leading(a, leading, backend) for a in each], axis=-2) for each in (rows, columns)
        )
        tops = self.size(spans, x)
        units = units_of_each([tops[..., i : i + 1, :] for i in range(len(rows))], self.operands.scale, backend)
        return _Ready(views, (spans, x, z, backend.xp.concat(units, axis=-2)))

    def _read(self, ready: _Ready) -> Array:
        """Numerators (..., n, dv + 1)."""
        return self.read(*ready.given)

    def _pull(self, ready: _Ready, g_hat: Array) -> tuple[Array, list[Array], list[Array]]:
        """Gradients of the query's rows, of keys, and of the values beside the ones, from those of the numerators."""
        spans, x, z, units = ready.given
        dx, dz = self.pull(spans, x, z, g_hat, units)
        first = g_hat.shape[-2]
        keys, columns, stop = [], [], first
        for view in ready.views:
            begin, stop = stop, stop + view.keys.shape[-2]
            keys.append(dx[..., begin:stop, :])
            columns.append(dz[..., begin - first : stop - first, :])
        return dx[..., :first, :], keys, columns

    def _lost(self, block: Block, found: Sequence[Array]) -> Sequence[int]:
        """The groups of the documents of which numbers are missing: none, since what spoils one row spoils all."""
        return ()


@dataclass(frozen=True)
class Causal(InPlace):
    """The same where a row sees those of its document up to its own."""

    @property
    def most(self) -> int:
        """Rows that a document may have: sums before every 64 of them are kept."""
        operands, numbers = self.operands, len(self.spans.w) * self.spans.columns * len(self.operands.views)
        return causal_features.rows_to_pull(MOST_ROWS, numbers, operands.dtype, operands.backend)

    def _ready(self, block: Block) -> _Ready:
        """A block, ready for the loops: a `Prefix`."""
        operands, d = self.operands, self.operands.query.shape[-1]
        backend, leading, paired = operands.backend, operands.leading, operands.paired
        views, rows, columns = self._sides(block)
        xp = backend.xp
        stand = self.spans._replace(begins=block.begins[:, :1], lengths=block.lengths[:, :1])
        documents = *leading, len(block.begins)
        tops = [with_leading(self.size(stand, x), documents, backend) for x in rows]
        if paired:
            tops = [alike(top, backend) for top in tops]
        usual = xp.all(prod_of(tops) * operands.scale <= 2.0**MOST_SCORE, axis=-1, keepdims=True)
        units = units_of_each([xp.where(usual, top, 1.0) for top in tops], operands.scale, backend)
        # What is lost is computed once more.
        units[0] = xp.where(usual, units[0], xp.nan)
        coefficients, grading = self.expansion.coefficients, self.expansion.grading
        w, runs, half = self.spans.w, self.spans.runs, None
        if paired and len(views) == 1:
            units[0] = units[0] * backend.table(conjugating, d, like=units[0], dtype=units[0].dtype)
        elif paired:
            pairs = Pairs(Turn(d, self.expansion.degree, grading))
            w, runs, half = pair_weights(coefficients, d, grading)[:, 0], pairs.runs, pairs.half
        w = backend.uploaded(w, rows[0], operands.dtype)
        of_documents = Documents(
            block.begins[:, 0], block.lengths[:, 0], block.padded[:, 1:], xp.concat(units, axis=-2)
        )
        return _Ready(views, Prefix(w, runs, rows[0], rows[1:], columns, half, documents=of_documents))

    def _read(self, ready: _Ready) -> Array:
        return self.read(ready.given, ())[1]

    def _pull(self, ready: _Ready, g_hat: Array) -> tuple[Array, list[Array], list[Array]]:
        dq, d_keys, d_columns, _ = self.pull(ready.given, (), (), g_hat)[1]
        return dq, d_keys, d_columns

    def _lost(self, block: Block, found: Sequence[Array]) -> Sequence[int]:
        backend = self.operands.backend
        xp = backend.xp
        if all(isfinite(float(xp.sum(x))) for x in found):
            return ()
        lost = False
        for x in found:
            of_rows = np.isfinite(backend.to_numpy(xp.sum(x, axis=-1)))
            lost = lost | ~of_rows.reshape(-1, of_rows.shape[-1]).all(axis=0)
        which = np.searchsorted(block.begins[:, 0], np.flatnonzero(lost), "right") - 1
        groups: list[int] = np.unique(block.groups[which]).tolist()
        return groups
