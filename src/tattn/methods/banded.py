"""The polynomial method in norm bands, with a bound of its error for every query row.

The rows of each view are sorted by norm and cut into bands, and every tuple of bands (I, J, K) has its own polynomial
(`bands`). Features are computed once, summaries are kept for each band, and a query band I reads out
C_I = Σ_JK w c_IJK ∘ A_J ∘ B_K, which costs nothing that grows with the rows. A few more columns, of degree t alone, give the
moments from which every row's error is bounded (`certificate`). Bands, ranges and coefficients are constants of the
adjoint. Nothing depends on values read by the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from math import inf
from typing import ClassVar

from ..arrays import return_rows, rows_together, sum_to_leading
from ..backends import Array, Backend
from ..engines import features
from ..engines.features import key_adjoint, log_normaliser, query_adjoint, read_out, summary
from ..features.balance import balanced_values, with_powers
from ..features.monomials import Monomials, rank
from ..features.scaling import channel_tops
from ..operands import Attended, Gradients, Operands, Upstream
from ..problem import Cost, Guarantee, Problem, ScoreRange
from . import certificate
from .bands import Banding, Series, Sorted, edges, sorted_views
from .gradient_bounds import banded_bounds


@dataclass(frozen=True)
class Banded:
    """A polynomial for each tuple of norm bands; the certified bound of every query row comes with the answer.

    Parameters
    ----------
    degree : int
        Degree of the polynomials.
    bands : int
        Norm bands of every view, at most its rows.
    moment : int
        Even order t of the moments that bound the error, at most `degree`.
    """

    degree: int = 2
    bands: int = 8
    moment: int = 2

    name: ClassVar[str] = "polynomial"
    extra: ClassVar[int] = 0

    def forward(self, operands: Operands, certify: bool = False) -> Attended:
        """Output, lse, and kept: the normaliser over pairs with the columns of the certificate (..., n, ·), the summaries
        (..., bands · r, dv + 1), and how rows are sorted.
        """
        backend, q = operands.backend, operands.query
        xp = backend.xp
        call, monomials = self._banding(operands), Monomials(self.degree)
        query, *views = sorted_views(call, operands)
        series = Series.of(call, [query, *views], q, backend)
        if certify:
            summaries, sizes = zip(*(certificate.summaries(call, v, backend) for v in views), strict=True)
            ones = [s[..., -1:] for s in sizes]
            shares = [certificate.shares(call, v, backend) for v in views]
            tops = [channel_tops(v, mask, backend) for _, v, mask in operands.views]
        else:
            summaries = tuple(_summaries(call, v, backend) for v in views)
        factors = series.turned(summaries, backend)

        def bands() -> Iterator[tuple[Array, Array]]:
            value_dim = operands.values[0].shape[-1]
            for band, cut in enumerate(edges(q.shape[-2], call.bands)):
                rows = query.in_band(query.rows, *cut, backend)
                combined = series.contract(0, band, factors, backend)
                if not certify:
                    yield read_out(rows, query.by.unit, combined, monomials, backend)
                    continue
                moments = certificate.moment_columns(series, 0, band, [(0, sizes), (1, ones), (2, ones)], backend)
                rounding = certificate.roundings(series, 0, band, shares, value_dim, backend)
                reading = certificate.Reading(combined, moments, rounding)
                yield certificate.read_out(call, rows, query.by.unit, reading, tops, backend)

        out, columns = return_rows(bands(), query.by.order, backend)
        kept = [xp.reshape(s, (*s.shape[:-3], -1, s.shape[-1])) for s in summaries]
        sortings = chain(query.by, *(v.by for v in views))
        lse = log_normaliser(columns[..., :1], operands.keys, backend)
        return Attended(out, lse, (columns, *kept, *sortings))

    def backward(self, operands: Operands, attended: Attended, upstream: Upstream) -> Gradients:
        """The exact derivative of `forward` for fixed bands, in the dtype of the computation."""
        backend, q = operands.backend, operands.query
        xp = backend.xp
        call, m, monomials = self._banding(operands), len(operands.views), Monomials(self.degree)
        columns, *known = attended.kept
        operands, sums, powers = balanced_values(operands, known[:m])
        query, *views = sorted_views(call, operands, known[m:])
        series = Series.of(call, [query, *views], q, backend)
        summaries = [xp.reshape(s, (*s.shape[:-2], call.bands, -1, s.shape[-1])) for s in sums]
        summaries = summaries or [_summaries(call, v, backend) for v in views]
        of_rows = (attended.out, columns[..., :1], *upstream)
        of_query = [query.rows, *(rows_together(x, backend) for x in of_rows)]
        upstreams = []
        factors = series.turned(summaries, backend)

        def bands_of_query() -> Iterator[tuple[Array]]:
            for band, cut in enumerate(edges(q.shape[-2], call.bands)):
                combined = series.contract(0, band, factors, backend)
                rows, *own = (query.in_band(x, *cut, backend) for x in of_query)
                found, dq = query_adjoint(rows, query.by.unit, combined, own, monomials, backend)
                upstreams.append(found)
                yield (dq,)

        (dq,) = return_rows(bands_of_query(), query.by.order, backend)
        (stacked,) = series.turned([xp.stack(upstreams, axis=-3)], backend)

        def bands_of_keys(number: int) -> Iterator[tuple[Array, ...]]:
            view, n = views[number], operands.keys[number].shape[-2]
            tensors = [stacked, *factors[:number], *factors[number + 1 :]]
            for band, cut in enumerate(edges(n, call.bands)):
                own = series.contract(number + 1, band, tensors, backend) * (1 / n)
                yield key_adjoint(view.band(*cut, backend), view.by.unit, own, monomials, backend)

        of_views = []
        for number, view in enumerate(operands.views):
            own = return_rows(bands_of_keys(number), views[number].by.order, backend)
            of_views.append([sum_to_leading(g, x.shape[:-2], backend) for g, x in zip(own, view, strict=False)])
        grads = Gradients.of_views(dq, of_views)
        return grads._replace(values=with_powers(grads.values, powers, backend))

    def gradient_bounds(
        self, operands: Operands, attended: Attended, upstream: Upstream, stated: tuple[float, float]
    ) -> Gradients:
        """From the certificate of every row; `attended` has to carry it."""
        return banded_bounds(self._banding(operands), operands, attended, upstream)

    def row_errors(self, kept: Array) -> Array:
        """The bound of the error of every row (..., n), from the first of what is kept of a certified call."""
        return kept[..., certificate.ERROR]

    def guarantee(self, problem: Problem, scores: ScoreRange) -> Guarantee:
        """Certified, by bounds that come with the answer."""
        return Guarantee(inf, inf, True)

    def cost(self, problem: Problem) -> Cost:
        """That of one polynomial, combined summaries, columns of moments, and sorted rows."""
        r, columns = rank(problem.dim, self.degree), problem.value_dim + 1
        flops, memory = features.cost(problem, r)
        combined = 2.0 * float(self.bands ** (problem.views + 1)) * r * columns * problem.batch
        moments = 2.0 * rank(problem.dim, self.moment) * (columns + 2)
        return Cost(flops + combined + problem.rows * (moments + 32 * (problem.dim + problem.value_dim)), memory)

    def at_a_time(self, operands: Operands) -> int:
        """How many problems to compute at a time, so that their summaries fit in the workspace."""
        dim, columns = operands.query.shape[-1], operands.values[0].shape[-1] + 1
        numbers = rank(dim, self.degree) * columns * self.bands * (len(operands.views) + 3)
        return max(1, int(operands.backend.workspace // numbers))

    def _banding(self, operands: Operands) -> Banding:
        return Banding(self.degree, self.moment, self.bands, operands.scale, len(operands.views), operands.paired)


def _summaries(call: Banding, view: Sorted, backend: Backend) -> Array:
    """Φ(k)ᵀ [v, 1] / n of every band, (..., B, r, dv + 1)."""
    n = view.rows.shape[-2]
    cuts, monomials = edges(n, call.bands), Monomials(call.degree)
    parts = [summary(view.band(*cut, backend), view.by.unit, monomials, backend) for cut in cuts]
    return backend.xp.stack(parts, axis=-3) * (1 / n)
