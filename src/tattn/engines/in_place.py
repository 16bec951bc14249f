"""The polynomial method for documents where they stand in the rows: `engines.features` by loops that begin and end with each.

Rows are neither gathered nor padded nor put back, and sums of a document stay in the loops. The array form is that of documents in
groups (`methods.packed`), which computes what loops do not take.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np

from ..arrays import clean, sum_to_leading, unweighed, with_leading
from ..backends import Array
from ..backends.operations import CHAIN, OF_DOCUMENTS, Spans
from ..documents import Block
from ..features.balance import MANY
from ..features.basis import FEW_CHAINS
from ..features.monomials import Expansion, run_table
from ..features.scaling import units_of_each
from ..operands import Attended, Operands, Upstream, View
from .features import divided, log_normaliser, scaled_gradient, weight_table, with_ones

# Rows of a document whose sums need no compensation: the bounds count so many chains.
MOST_ROWS = FEW_CHAINS * CHAIN
# Workspaces that a block fills, and blocks that every thread should have: what is done for each costs some hundred microseconds.
_WORKSPACES, _BLOCKS = 4, 4


class _Ready(NamedTuple):
    """Of a block the rows of query and views, one after another (..., N, d), columns [v, 1] of the views (..., N − n, dv + 1), and
    units (..., documents, m + 1, d).
    """

    spans: Spans
    views: tuple[View, ...]
    x: Array
    z: Array
    units: Array


@dataclass(frozen=True)
class InPlace:
    """The polynomial method for blocks of documents, by compiled loops."""

    operands: Operands
    spans: Spans
    size: Callable[..., Array]
    read: Callable[..., Array]
    pull: Callable[..., Any]

    @classmethod
    def of(cls, operands: Operands, expansion: Expansion, documents: int) -> InPlace | None:
        """For so many documents; None where loops do not take them, nor weights, complex channels, and more than two views."""
        backend, q, views = operands.backend, operands.query, operands.views
        if operands.order.causal or operands.paired or operands.weights or len(views) >= MANY:
            return None
        d, dv = q.shape[-1], views[0].values.shape[-1]
        w, runs = weight_table(expansion.coefficients, d, expansion.grading)[:, 0], run_table(d, *expansion.monomials)
        wanted = tuple(operands.wants(number) for number in range(len(views)))
        usual = np.asarray([operands.lengths]) // documents
        rows = max(operands.lengths) * prod(operands.leading)
        spans = Spans(usual, usual, usual, w, runs, dv + 1, dv, wanted, rows)
        given = spans, q, *operands.keys, *operands.values
        found = [backend.kernel(operation, *given) for operation in OF_DOCUMENTS]
        return None if None in found else cls(operands, spans, *found)  # type: ignore[arg-type]

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

    def forward(self, block: Block) -> tuple[Array, Array, Array]:
        """Output, lse and the normaliser over the number of pairs of its group, of the query's rows of a block (..., n, ·)."""
        ready, backend = self._ready(block), self.operands.backend
        numerators = self.read(ready.spans, ready.x, ready.z, ready.units)
        out, normaliser = divided(numerators, self.operands.leading, backend)
        pairs = np.repeat(np.log(block.padded[:, 1:]).sum(axis=1), block.apart)
        more = backend.uploaded(pairs[:, None], normaliser, normaliser.dtype)
        return out, log_normaliser(normaliser, (), backend) + more, normaliser

    def backward(self, block: Block, attended: Attended, upstream: Upstream) -> list[Array]:
        """Gradients of query, keys and values of a block, in the dtypes of these."""
        ready, operands = self._ready(block), self.operands
        backend, own = operands.backend, block.rows[0]
        of_rows = attended.out, attended.kept[0], *upstream
        o, l, g, g_lse = (backend.cast(x[..., own, :], operands.dtype) for x in of_rows)
        g_hat = scaled_gradient(o, l, g, g_lse, backend)
        dx, dz = self.pull(ready.spans, ready.x, ready.z, g_hat, ready.units)
        begin = start = own.stop - own.start
        grads = [dx[..., :start, :]]
        of_values: list[Array] = []
        for view in ready.views:
            stop = begin + view.keys.shape[-2]
            grads.append(clean(dx[..., begin:stop, :], view.mask, backend))
            of_values += unweighed(dz[..., begin - start : stop - start, :], view.values, view.mask, backend)
            begin = stop
        return [
            backend.cast(sum_to_leading(g, target.shape[:-2], backend), target.dtype)
            for g, target in zip([*grads, *of_values], operands.targets, strict=True)
        ]

    def _ready(self, block: Block) -> _Ready:
        """A block, ready for the loops."""
        operands, spans = (
            self.operands,
            self.spans._replace(begins=block.begins, lengths=block.lengths, counts=block.padded),
        )
        backend, dtype, leading = operands.backend, operands.dtype, operands.leading
        xp, (own, *others) = backend.xp, block.rows
        views = tuple(view.rows(r.start, r.stop) for view, r in zip(operands.views, others, strict=True))
        keys = (clean(backend.cast(view.keys, dtype), view.mask, backend) for view in views)
        rows = [backend.cast(operands.query[..., own, :], dtype), *keys]
        x = xp.concat([with_leading(r, leading, backend) for r in rows], axis=-2)
        columns = (with_ones(view.values, view.mask, dtype, backend) for view in views)
        z = xp.concat([with_leading(c, leading, backend) for c in columns], axis=-2)

        tops = self.size(spans, x)
        units = units_of_each([tops[..., side : side + 1, :] for side in range(len(rows))], operands.scale, backend)
        return _Ready(spans, views, x, z, xp.concat(units, axis=-2))
