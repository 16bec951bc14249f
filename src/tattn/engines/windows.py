"""The polynomial method where query row i sees the last w_μ rows of each view: sums of a few pieces each, without a difference.

Symbols as in `causal_features`. With w = h b + ρ, a row in chunk c sees

* some rows of its own chunk and of the chunks c − h and c − h − 1, which `chunks` takes for the rows of the chunk,
* all of the chunks from c − h + 1 to c − 1.

The sum over these is put together from pieces that were added up afresh, from short ones and long ones. A block is M chunks and a
segment is G blocks of R rows in all, none longer than a window of more than M chunks. Then all these chunks are

* in its own block: those before c, and, of the same block of the rows h chunks earlier, those behind c − h;
* the blocks before it in its own segment, and the blocks behind it in the segment of the rows h chunks earlier;
* between the two segments: whole segments, and the last σ chunks of the one before these. h = H G M + σ.

A window of at most M chunks is in the first line. Sums of H − 1 segments one after another are those of 1, 2, 4, … of them. So no
sum has a row that is not seen, and each is one of about 2 log₂ H + G + M parts.

Adjoint: what a row begins with is linear in the sums of chunks, blocks and segments, and so their gradients are the same sums from
the other side: a chunk is seen by those from c + 1 to c + h − 1. Compiled loops take blocks as `window_blocks` has them, in which
nothing is paired: h is then w, and a chunk one row.

Where keys decay, a sum is what the last of its rows sees, and what stands t rows behind it takes λ^t of it. So t ≥ 0, and no
power is larger than 1. λ gets t λ^(t − 1) ⟨gradient, sum⟩ from every such power.

O((n + Σ n_μ) r dv) time, whatever the windows, with a factor
of 2 m b for the rows of a chunk; memory for copies of the inputs, and for long windows r (dv + 1) numbers for every segment and for
every block of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from ..arrays import clean, sum_of, sum_to_leading, unweighed
from ..backends import Array, Backend
from ..features.basis import read
from ..features.monomials import features
from ..operands import Gradients, Operands
from .chunks import (
    Chunks,
    Setting,
    Window,
    flattened,
    in_chunks,
    last_slopes,
    numerator,
    of_channels,
    of_query,
    of_view,
    rows_slope,
    tile_of,
    times_last,
    to_view,
)
from .fading import numbers, of_factor, powers, seen, seen_slopes, slopes
from .features import Sum, add, divided, scaled_gradient, zero_sum
from .pieces import in_pieces, padded
from .spoiled import Columns
from .window_blocks import adjoint_by, cut_of, numerators_by, together
from .window_sums import (
    Between,
    Cut,
    Line,
    Rows,
    Streams,
    as_one,
    long_views,
    middles_of,
    pieces_before,
    placed,
    pulled_middles,
    pulled_starts,
    starts_of,
)


def read_rows(setting: Setting, block: int, operands: Operands) -> tuple[Array, Array]:
    """Output (..., n, dv) and the normaliser times all shares (..., n, 1)."""
    backend, n = setting.backend, operands.query.shape[-2]
    cut, q, lines, between = _prepared(setting, block, operands)

    def of_segment(_: None, *given: Array) -> tuple[None, tuple[Array, ...]]:
        count = given[-1].shape[-2]
        q, streams, middles = _taken(setting, cut, given, count * cut.segment)[:3]
        starts = [x.starts for x in starts_of(setting, cut, streams, middles)]

        def of_block(_: None, *given: Array) -> tuple[None, tuple[Array, ...]]:
            q, streams, starts = _taken(setting, cut, given, cut.block)[:3]
            chunks = _chunks(setting, cut, q, streams, starts)
            found = divided(backend.xp.matrix_transpose(numerator(setting, chunks)), setting.leading, backend)
            return None, tuple(as_one(x, backend) for x in found)

        if setting.kernel is not None:
            found = divided(numerators_by(setting, cut, q, streams, starts), setting.leading, backend)
        else:
            found = backend.scan_rows(of_block, None, _given(cut.blocks, q, streams, starts, backend), 1)[1]
        return None, tuple(in_pieces(x, count, backend) for x in found)

    given = _given(cut.segments, q, _streams(setting, cut, lines), [x.total for x in between], backend)
    found = backend.scan_rows(of_segment, None, given, together(setting, cut, lines))[1]
    out, normaliser = (backend.xp.reshape(x, (*x.shape[:-2], cut.rows, -1))[..., :n, :] for x in found)
    return out, normaliser


def backward(setting: Setting, block: int, operands: Operands, columns: Columns) -> tuple[Gradients, tuple[()]]:
    """Gradients of query, keys, values, weights and decays, from the columns (o, l, g, g_lse)."""
    backend, n, windows = setting.backend, operands.query.shape[-2], setting.windows
    cut, q, lines, between = _prepared(setting, block, operands)

    def of_segment(carry: tuple[Sum, ...], *given: Array) -> tuple[tuple[Sum, ...], tuple[Array, ...]]:
        count = given[-1].shape[-2]
        q, streams, middles, columns = _taken(setting, cut, given, count * cut.segment)
        begun = starts_of(setting, cut, streams, middles)
        starts = [x.starts for x in begun]

        def of_block(carry: tuple[Sum, ...], *given: Array) -> tuple[tuple[Sum, ...], tuple[Array, ...]]:
            carry, dq, grads, of_starts = _adjoint(setting, cut, carry, _taken(setting, cut, given, cut.block))
            return carry, tuple(_given(1, dq, grads, [as_one(g, backend) for g in of_starts], backend))

        if setting.kernel is not None:
            dq, grads, of_starts, slopes = adjoint_by(setting, cut, q, streams, starts, columns)
            carry = tuple(add(total, slope) for total, slope in zip(carry, slopes, strict=True))
        else:
            rows = _given(cut.blocks, q, streams, starts, backend, columns)
            carry, found = backend.scan_rows(of_block, carry, rows, 1)
            dq, grads, of_starts = _taken(setting, cut, found, cut.segment)[:3]
        grads, of_middles, slopes = pulled_starts(setting, cut, streams, grads, begun, of_starts)
        carry = tuple(add(total, slope) for total, slope in zip(carry, slopes, strict=True))
        return carry, tuple(_given(count, dq, grads, of_middles, backend))

    columns = tuple(padded(backend.cast(c, setting.w.dtype), cut.rows, backend) for c in columns)
    given = _given(cut.segments, q, _streams(setting, cut, lines), [x.total for x in between], backend, columns)
    carry = tuple(zero_sum(tuple(x.shape), setting.w.dtype, q, backend) for x in setting.decays)
    carry, found = backend.scan_rows(of_segment, carry, given, together(setting, cut, lines))
    of_decays = [total for total, _ in carry]
    dq, grads, of_middles = _taken(setting, cut, found, cut.rows)[:3]
    flat = [[sum_to_leading(dq[..., :n, :] * setting.units[0], operands.query.shape[:-2], backend)]]
    following = iter(zip(between, of_middles, strict=True))
    for number, (line, window, (k, v, mask)) in enumerate(zip(lines, windows, operands.views, strict=True)):
        parts = [(line.front - s * cut.chunk, g) for s, g in zip(window.shifts, grads[number], strict=True)]
        if cut.is_long(window):
            more, slopes = pulled_middles(setting, cut, line, window, *next(following))
            parts += more
            if slopes:
                of_decays[number] = sum_of([of_decays[number], *slopes])
        rows = line.front + cut.rows
        dx, dz = (sum(placed(g[i], start, rows, backend) for start, g in parts) for i in range(2))
        dx, dz = (placed(g, line.given - line.front, k.shape[-2], backend) for g in (dx, dz))
        dk = clean(dx * setting.units[number + 1], mask, backend)
        of_rows = dk, *unweighed(dz * setting.shares[number], v, mask, backend)
        flat.append([sum_to_leading(g, a.shape[:-2], backend) for g, a in zip(of_rows, (k, v, mask), strict=False)])
    return Gradients.of_views(flat[0][0], flat[1:])._replace(decays=tuple(of_decays)), ()


def _prepared(setting: Setting, block: int, operands: Operands) -> tuple[Cut, Array, list[Line], list[Between]]:
    """How rows are cut, the query in units (..., rows, d), all views, and for long windows what is between segments."""
    backend, q = setting.backend, operands.query
    cut = Cut.of(q.shape[-2], block, setting) if setting.kernel is None else cut_of(setting, block, operands)
    x = padded(backend.cast(q, setting.w.dtype) * setting.units[0], cut.rows, backend)
    lines = [Line.of(setting, cut, operands, number) for number in range(len(operands.views))]
    between = [
        middles_of(setting, cut, line, window)
        for line, window in zip(lines, setting.windows, strict=True)
        if cut.is_long(window)
    ]
    return cut, x, lines, between


def _streams(setting: Setting, cut: Cut, lines: Sequence[Line]) -> Streams:
    """All rows of every view as the query rows need them."""
    return [
        [line.before(shift * cut.chunk, cut.rows) for shift in window.shifts]
        for line, window in zip(lines, setting.windows, strict=True)
    ]


def _given(
    count: int, q: Array, streams: Streams, starts: Sequence[Array], backend: Backend, columns: Sequence[Array] = ()
) -> list[Array]:
    """What a loop over so many pieces takes; `starts` are in pieces already, (..., count, (dv + 1) r)."""
    rows = [q, *chain.from_iterable(chain.from_iterable(streams)), *columns]
    return [*starts, *(in_pieces(x, count, backend) for x in rows)]


def _taken(
    setting: Setting, cut: Cut, given: Sequence[Array], rows: int
) -> tuple[Array, Streams, list[Array], list[Array]]:
    """What `_given` put together, for so many rows: q, streams, starts (..., pieces, (dv + 1) r) and columns."""
    long = len(long_views(setting, cut))
    starts, *of_rows = given[:long], *given[long:]
    q, *rest = (setting.backend.xp.reshape(x, (*x.shape[:-2], rows, -1)) for x in of_rows)
    streams: Streams = []
    for window in setting.windows:
        count = 2 * len(window.shifts)
        streams.append([Rows(*rest[i : i + 2]) for i in range(0, count, 2)])
        rest = rest[count:]
    return q, streams, list(starts), rest


def _chunks(setting: Setting, cut: Cut, q: Array, streams: Streams, starts: Sequence[Array]) -> Chunks:
    """A block, from its rows and what those of it see before and behind the block, for long windows."""
    backend = setting.backend
    xp = backend.xp
    following = iter(starts)
    flat = []
    for x in (q, *(rows.x for view in streams for rows in view)):
        channels = xp.matrix_transpose(x)
        flat.append((channels, features(channels, setting.degree, backend, setting.grading)))
    phi_q, *turned = (in_chunks(xp.matrix_transpose(setting.turned(phi)), setting) for _, phi in flat)
    phis, zs, befores = [], [], []
    for number, (window, view) in enumerate(zip(setting.windows, streams, strict=True)):
        count, decay = len(view), setting.decay(number)
        (phi, turned), z = (turned[:count], turned[count:]), [in_chunks(rows.z, setting) for rows in view]
        columns, r = z[0].shape[-1], setting.w.shape[0]
        before = xp.zeros((*view[0].leading, cut.chunks, columns * r), dtype=setting.w.dtype, device=backend.device(q))
        for stream in _in_block(cut, window):
            table = seen(_other_chunks(setting, cut, window, stream, q), decay, backend)
            before = before + table @ _chunk_sums(setting, number, z[stream], phi[stream])
        if cut.is_long(window):
            start = next(following)
            before = before + (start if decay is None else start * powers(decay, _chunk_rows(cut, q, backend), backend))
        befores.append(xp.reshape(before, (*before.shape[:-1], columns, r)))
        phis.append(xp.concat(phi, axis=-2))
        zs.append(xp.concat(z, axis=-2))
    return Chunks(phi_q, phis, zs, befores, [], flat)


def _in_block(cut: Cut, window: Window) -> range:
    """The streams of which rows see whole chunks of the block: their own, and that of h chunks before."""
    return range(2) if cut.chunks > 1 and window.whole > 1 else range(0)


def _chunk_rows(cut: Cut, like: Array, backend: Backend) -> Array:
    """Rows from the start of a block to those of its chunks, (M, 1)."""
    return numbers(cut.chunks, like, backend)[:, None] * cut.chunk


def _chunk_sums(setting: Setting, view: int, z: Array, phi: Array) -> Array:
    """Sums of chunks as the last row of each sees them, (..., M, (dv + 1) r), from z and Φ of their rows."""
    at_ends = times_last(setting, view, setting.backend.xp.matrix_transpose(z))
    return flattened(at_ends @ phi, setting.backend)


def _other_chunks(setting: Setting, cut: Cut, window: Window, stream: int, like: Array) -> Array:
    """The table `pieces_before` of the chunks of a block."""
    span = window.whole * cut.chunk if stream else 0
    dtype = setting.w.dtype
    return setting.backend.table(pieces_before, cut.chunks, cut.chunk, span, window.whole, like=like, dtype=dtype)


def _adjoint(
    setting: Setting, cut: Cut, carry: tuple[Sum, ...], block: tuple[Array, Streams, list[Array], list[Array]]
) -> tuple[tuple[Sum, ...], Array, Streams, list[Array]]:
    """Gradients of λ with those of a block as `_taken` has it, and of its q, all streams, and starts (..., dv + 1, r)."""
    q, streams, starts, columns = block
    backend, m, b = setting.backend, len(streams), cut.chunk
    xp = backend.xp
    chunks = _chunks(setting, cut, q, streams, starts)
    g_hat = xp.matrix_transpose(in_chunks(scaled_gradient(*columns, backend), setting))  # type: ignore[call-arg]
    width = g_hat.shape[-2]

    def body(carry: tuple[Sum, ...], *given: Array) -> tuple[tuple[Sum, ...], tuple[Array, ...]]:
        tile = tile_of(given, setting, m, width)
        y_q, xs = of_query(setting, tile)
        found, of_decays = [y_q], []
        for view, (x, phi, z, before) in enumerate(zip(xs, *tile[1:4], strict=True)):
            pulled = of_view(setting, view, (x, phi, z, tile[4]))
            found += [to_view(g, streams[view][0].leading, backend) for g in pulled[:3]]
            if setting.decays:
                slope = rows_slope(setting, view, (z, before), (tile[4], x, pulled.scores))
                of_decays.append(add(carry[view], slope))
        return tuple(of_decays), tuple(flattened(x, backend) for x in found)

    rows = [*chunks.together(backend), flattened(g_hat, backend)]
    carry, (y_q, *rest) = backend.scan_rows(body, carry, rows, setting.tile)

    def apart(x: Array, count: int) -> Array:
        return xp.reshape(x, (*x.shape[:-1], count, x.shape[-1] // count))

    def of_rows(y: Array, place: int) -> Array:
        return of_channels(setting, xp.reshape(y, (*y.shape[:-3], -1, y.shape[-1])), *chunks.flat[place])

    grads, of_starts, place, following = [], [], 1, iter(starts)
    of_decays: list[list[Array]] = [[] for _ in setting.decays]
    for view, window in enumerate(setting.windows):
        decay = setting.decay(view)
        d_before, y, dz = rest[3 * view : 3 * view + 3]
        y, dz = apart(y, chunks.phis[view].shape[-2]), xp.matrix_transpose(apart(dz, width))
        of_streams: list[Rows] = []
        for stream in range(len(window.shifts)):
            at = slice(stream * b, (stream + 1) * b)
            own_y, own_z = y[..., at, :], dz[..., at, :]
            if stream in _in_block(cut, window):
                table = _other_chunks(setting, cut, window, stream, q)
                behind = apart(xp.matrix_transpose(seen(table, decay, backend)) @ d_before, width)
                phi, z = (x[view][..., at, :] for x in (chunks.phis, chunks.zs))
                at_ends = times_last(setting, view, xp.matrix_transpose(z))
                of_ends = read(xp.matrix_transpose(phi), behind, backend)
                own_y = own_y + xp.matrix_transpose(at_ends) @ behind
                own_z = own_z + xp.matrix_transpose(times_last(setting, view, of_ends))
                if decay is not None:
                    to_end = last_slopes(setting, view) * (xp.matrix_transpose(z) * of_ends)
                    sums = _chunk_sums(setting, view, z, phi)
                    between = (d_before @ xp.matrix_transpose(sums)) * seen_slopes(table, decay, backend)
                    of_decays[view] += [of_factor(to_end, decay, backend, 3), of_factor(between, decay, backend)]
            own_z = xp.reshape(own_z, (*own_z.shape[:-3], -1, width))
            own_z = sum_to_leading(own_z, streams[view][stream].z.shape[:-2], backend)
            of_streams.append(Rows(of_rows(own_y, place), own_z))
            place += 1
        grads.append(of_streams)
        if cut.is_long(window):
            start = next(following)
            if decay is not None:
                rows_of = _chunk_rows(cut, q, backend)
                through = d_before * start * slopes(decay, rows_of, backend)
                of_decays[view].append(of_factor(through, decay, backend))
                d_before = d_before * powers(decay, rows_of, backend)
            of_starts.append(apart(xp.sum(d_before, axis=-2), width))
    carry = tuple(add(total, sum_of(parts)) if parts else total for total, parts in zip(carry, of_decays, strict=True))
    return carry, of_rows(apart(y_q, b), 0), grads, of_starts
