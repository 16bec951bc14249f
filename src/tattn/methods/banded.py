"""The polynomial method in norm bands, with a bound of its error for every query row.

The rows of each view are sorted by norm and cut into bands, and every tuple of bands (I, J, K) has its own polynomial
(`bands`). Features are computed once, summaries are kept for each band, and a query band I reads out
C_I = Σ_JK w c_IJK ∘ A_J ∘ B_K, which costs nothing that grows with the rows. A few more columns, of degree t alone, give the
moments from which every row's error is bounded (`certificate`). Bands, ranges and coefficients are constants of the
adjoint. Nothing depends on values read by the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from ..arrays import broadcast_leading, return_rows, rows_together, sum_to_leading, unpack
from ..backends import Array, Backend
from ..engines.features import key_adjoint, log_normaliser, query_adjoint, read_out, summary
from ..features.monomials import rank
from ..features.scaling import channel_tops
from . import certificate
from .bands import BandedCall, Series, View, edges, views_of


def forward(call: BandedCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    """Output (..., n, dv), lse (..., n, 1), and the normaliser over pairs and the columns of the certificate, (..., n, ·).

    And for the adjoint, which takes them if it is given them: summaries (..., bands · r, dv + 1), and how rows are sorted.
    """
    q, keys, values, masks, _ = unpack(call.views, arrays)
    xp = backend.xp
    query, *views = views_of(call, q, keys, values, masks, backend)
    series = Series.of(call, [query, *views], q, backend)
    leading = broadcast_leading(q, *keys, *values, *masks)
    if call.certify:
        summaries, sizes = zip(*(certificate.summaries(call, v, backend) for v in views), strict=True)
        ones = [s[..., -1:] for s in sizes]
        shares = [certificate.shares(call, v, backend) for v in views]
        tops = [channel_tops(v, mask, backend) for v, mask in zip(values, masks, strict=True)]
    else:
        summaries = tuple(_summaries(call, v, backend) for v in views)

    def bands() -> Iterator[tuple[Array, Array]]:
        for band, cut in enumerate(edges(q.shape[-2], call.bands)):
            rows = query.in_band(query.rows, *cut, backend)
            combined = series.contract(call, 0, band, summaries, backend)
            if not call.certify:
                yield read_out(rows, query.by.unit, combined, leading, call.degree, backend)
                continue
            moments = certificate.moment_columns(call, series, 0, band, [(0, sizes), (1, ones), (2, ones)], backend)
            rounding = certificate.roundings(call, series, 0, band, shares, values[0].shape[-1], backend)
            yield certificate.read_out(call, rows, query.by.unit, combined, moments, rounding, tops, leading, backend)

    out, rest = return_rows(bands(), query.by.order, backend)
    kept = [xp.reshape(s, (*s.shape[:-3], -1, s.shape[-1])) for s in summaries]
    return out, log_normaliser(rest[..., :1], keys, backend), rest, *kept, *query.by, *chain(*(v.by for v in views))


def backward(call: BandedCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    """Gradients of query, keys and values: the exact derivative of `forward` for fixed bands."""
    q, keys, values, masks, (out, rest, *kept, grad_out, grad_lse) = unpack(call.views, arrays)
    xp = backend.xp
    query, *views = views_of(call, q, keys, values, masks, backend, kept[call.views :])
    series = Series.of(call, [query, *views], q, backend)
    summaries = [xp.reshape(s, (*s.shape[:-2], call.bands, -1, s.shape[-1])) for s in kept[: call.views]]
    summaries = summaries or [_summaries(call, v, backend) for v in views]
    leading = broadcast_leading(q, *keys, *values, *masks)
    of_query = [query.rows, *(rows_together(x, backend) for x in (out, rest[..., :1], grad_out, grad_lse))]
    upstreams = []

    def bands_of_query() -> Iterator[tuple[Array]]:
        for band, cut in enumerate(edges(q.shape[-2], call.bands)):
            combined = series.contract(call, 0, band, summaries, backend)
            rows, *columns = (query.in_band(x, *cut, backend) for x in of_query)
            upstream, dq = query_adjoint(rows, query.by.unit, combined, columns, leading, call.degree, backend)
            upstreams.append(upstream)
            yield (dq,)

    (dq,) = return_rows(bands_of_query(), query.by.order, backend)
    stacked = xp.stack(upstreams, axis=-3)

    def bands_of_keys(number: int) -> Iterator[tuple[Array, Array]]:
        view, n = views[number], keys[number].shape[-2]
        tensors = [stacked, *summaries[:number], *summaries[number + 1 :]]
        for band, cut in enumerate(edges(n, call.bands)):
            own = series.contract(call, number + 1, band, tensors, backend) * (1 / n)
            yield key_adjoint(*view.band(*cut, backend), view.by.unit, own, call.degree, backend)

    d_keys, d_values = [], []
    for number, view in enumerate(views):
        dk, dv = return_rows(bands_of_keys(number), view.by.order, backend)
        d_keys.append(sum_to_leading(dk, keys[number].shape[:-2], backend))
        d_values.append(sum_to_leading(dv, values[number].shape[:-2], backend))
    return dq, *d_keys, *d_values


def leading_limit(call: BandedCall, backend: Backend, arrays: Sequence[Array | None]) -> int:
    """How many problems to compute side by side, so that their summaries fit in the workspace."""
    dim, columns = arrays[0].shape[-1], arrays[1 + call.views].shape[-1] + 1  # type: ignore[union-attr]
    numbers = rank(dim, call.degree) * columns * call.bands * (call.views + 3)
    return max(1, int(backend.workspace // numbers))


def _summaries(call: BandedCall, view: View, backend: Backend) -> Array:
    """Φ(k)ᵀ [v, 1] / n of every band, (..., B, r, dv + 1)."""
    n = view.rows.shape[-2]
    parts = [summary(*view.band(*cut, backend), view.by.unit, call.degree, backend) for cut in edges(n, call.bands)]
    return backend.xp.stack(parts, axis=-3) * (1 / n)
