"""Sums of monomials over the blocks and segments that all rows of a block see of a long window, and their adjoints.

Symbols and the cut of rows are those of `windows`. Nothing is subtracted: a sum over H − 1 segments is put together from sums over
1, 2, 4, … segments. Where keys decay, a sum is what the last of its rows sees, and what stands t rows behind that takes λ^t of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import isqrt
from typing import Any, NamedTuple

import numpy as np

from ..arrays import broadcast_leading, clean, sum_to_leading
from ..backends import Array, Backend
from ..backends.operations import CHAIN
from ..backends.tables import memoized
from ..features.basis import FEW_CHAINS, FEW_COLUMNS, Basis
from ..operands import Operands
from .chunks import Setting, Window
from .fading import later, later_slope, numbers, of_factor, powers, seen, seen_slopes, slopes
from .features import Sum, add, added, block_of, rows_of, with_ones, zero_sum
from .pieces import in_pieces

# Chunks of a block and blocks of a segment, at most: together fewer additions than there are in a chain.
MOST_CHUNKS, MOST_BLOCKS = 64, 32


class Rows(NamedTuple):
    """Rows of a view: channels in units (..., rows, d), and z = [v, 1] (..., rows, dv + 1); or their gradients."""

    x: Array
    z: Array

    @property
    def leading(self) -> tuple[int, ...]:
        """The leading dimensions that both have together."""
        return broadcast_leading(*self)

    def cut(self, start: int, stop: int) -> Rows:
        """Some of the rows."""
        return Rows(self.x[..., start:stop, :], self.z[..., start:stop, :])


# The streams of every view: its rows as they are, and as they were some chunks before.
Streams = list[list[Rows]]


class Cut(NamedTuple):
    """How rows are cut: into segments of blocks of chunks of `chunk` rows."""

    segments: int
    blocks: int
    chunks: int
    chunk: int

    @classmethod
    def of(cls, n: int, block: int, setting: Setting) -> Cut:
        """For n query rows, in blocks of at most so many rows."""
        count = -(-n // block)
        chunks = -(-n // (count * setting.chunk))
        count = -(-n // (chunks * setting.chunk))
        most = min((w.whole // chunks for w in setting.windows if w.whole > chunks), default=1)
        blocks = max(1, min(most, MOST_BLOCKS, isqrt(count - 1) + 1))
        segments = -(-count // blocks)
        return cls(segments, -(-count // segments), chunks, setting.chunk)

    @classmethod
    def of_rows(cls, n: int, block: int, setting: Setting, most_blocks: int = MOST_BLOCKS) -> Cut:
        """For chunks of one row and blocks no longer than any window, which compiled loops take."""
        rows = min(block, *(w.whole for w in setting.windows))
        count = -(-n // rows)
        if count * rows - n > n // 8:
            # Too many rows would stand behind the last.
            rows = -(-n // count)
            count = -(-n // rows)
        # Sums over a few segments are few numbers, and then no rows are summed up twice.
        most = (
            min((w.whole // rows for w in setting.windows if w.whole > rows), default=1) if count > MOST_CHUNKS else 1
        )
        blocks = max(1, min(most, most_blocks, isqrt(count - 1) + 1))
        segments = -(-count // blocks)
        return cls(segments, -(-count // segments), rows, 1)

    @property
    def block(self) -> int:
        """Rows of a block."""
        return self.chunks * self.chunk

    @property
    def segment(self) -> int:
        """Rows of a segment."""
        return self.blocks * self.block

    @property
    def rows(self) -> int:
        """All rows, with those that stand behind the last."""
        return self.segments * self.segment

    def is_long(self, window: Window) -> bool:
        """Whether rows see more than chunks of their own block and of the one that the first of these rows is in."""
        return window.whole > self.chunks

    def between(self, window: Window) -> tuple[int, int]:
        """H and σ of a long window."""
        return divmod(window.whole, self.blocks * self.chunks)


class Line(NamedTuple):
    """All rows of a view: some in `front` of the first query row, and those of all segments; zeros where there are none.

    `given`: rows that the view has before the first query row; `old`: segments in front that hold some of them; `decay`: λ
    (..., 1, 1), if its keys decay.
    """

    rows: Rows
    front: int
    given: int
    old: int
    decay: Array | None

    @classmethod
    def of(cls, setting: Setting, cut: Cut, operands: Operands, number: int) -> Line:
        """That of one view."""
        backend, dtype, window = setting.backend, setting.w.dtype, setting.windows[number]
        k, v, mask = operands.views[number]
        given = k.shape[-2] - operands.query.shape[-2]
        front, old = max(window.shifts) * cut.chunk, 0
        if cut.is_long(window):
            old = min(cut.between(window)[0], -(-min(given, front) // cut.segment))
            front = max(front, old * cut.segment)
        x = backend.cast(clean(k, mask, backend), dtype) * setting.units[number + 1]
        z = with_ones(v, mask, dtype, backend) * setting.shares[number]
        rows = front + cut.rows
        of_rows = Rows(*(placed(a, front - given, rows, backend) for a in (x, z)))
        return cls(of_rows, front, given, old, setting.decay(number))

    def before(self, shift: int, count: int) -> Rows:
        """`count` rows, the first of which stands so many rows before the first query row."""
        return self.rows.cut(self.front - shift, self.front - shift + count)


class Between(NamedTuple):
    """Sums (..., segments, (dv + 1) r) over what is between the segments of a row and of the first row that it sees.

    If keys decay: what it is put together from, sums of each segment, one segment later, and of the last chunks of some, if it is.
    """

    total: Array
    segments: Array | None = None
    tails: Array | None = None


class Begun(NamedTuple):
    """What the blocks of a segment begin with, (..., G, (dv + 1) r).

    Put together from what the segment begins with (..., 1, (dv + 1) r), and sums of the blocks of both streams, if it has several.
    """

    starts: Array
    middle: Array
    blocks: Sequence[Array] = ()


def starts_of(setting: Setting, cut: Cut, streams: Streams, middles: Sequence[Array]) -> list[Begun]:
    """What the blocks of a segment begin with, for every long window."""
    if cut.blocks == 1:
        return [Begun(middle, middle) for middle in middles]
    backend, found = setting.backend, []
    for view, middle in zip(long_views(setting, cut), middles, strict=True):
        decay = setting.decay(view)
        blocks = [_sums(setting, rows, cut.blocks, decay) for rows in streams[view][:2]]
        starts = middle if decay is None else middle * powers(decay, _block_rows(cut, decay, backend), backend)
        for stream, of_blocks in enumerate(blocks):
            starts = starts + seen(_other_blocks(setting, cut, view, stream, middle), decay, backend) @ of_blocks
        found.append(Begun(starts, middle, blocks))
    return found


def pulled_starts(
    setting: Setting, cut: Cut, streams: Streams, grads: Streams, begun: Sequence[Begun], of_starts: Sequence[Array]
) -> tuple[Streams, list[Array], list[Array]]:
    """`grads` of the streams with those through `starts_of`, gradients of its middles (..., 1, (dv + 1) r), and of every λ."""
    backend = setting.backend
    xp = backend.xp
    of_decays = [xp.zeros_like(decay) for decay in setting.decays]
    if cut.blocks == 1:
        return grads, list(of_starts), of_decays
    of_middles = []
    for view, found, g in zip(long_views(setting, cut), begun, of_starts, strict=True):
        decay = setting.decay(view)
        for stream, of_blocks in enumerate(found.blocks):
            table = _other_blocks(setting, cut, view, stream, g)
            behind = xp.matrix_transpose(seen(table, decay, backend)) @ g
            of_sums, slope = _pulled_sums(setting, streams[view][stream], behind, cut.blocks, decay)
            grads[view][stream] = Rows(*(a + b for a, b in zip(grads[view][stream], of_sums, strict=True)))
            if decay is not None:
                pairs = (g @ xp.matrix_transpose(of_blocks)) * seen_slopes(table, decay, backend)
                of_decays[view] = of_decays[view] + slope + of_factor(pairs, decay, backend)
        if decay is not None:
            rows = _block_rows(cut, decay, backend)
            through = g * found.middle * slopes(decay, rows, backend)
            of_decays[view] = of_decays[view] + of_factor(through, decay, backend)
            g = g * powers(decay, rows, backend)
        of_middles.append(xp.sum(g, axis=-2, keepdims=True))
    return grads, of_middles, of_decays


def long_views(setting: Setting, cut: Cut) -> list[int]:
    """Which views have long windows."""
    return [view for view, window in enumerate(setting.windows) if cut.is_long(window)]


def _block_rows(cut: Cut, like: Array, backend: Backend) -> Array:
    """Rows from the start of a segment to those of its blocks, (G, 1)."""
    return numbers(cut.blocks, like, backend)[:, None] * cut.block


def _other_blocks(setting: Setting, cut: Cut, view: int, stream: int, like: Array) -> Array:
    """The table `pieces_before` of the blocks of a segment."""
    span = setting.windows[view].whole * cut.chunk if stream else 0
    return setting.backend.table(pieces_before, cut.blocks, cut.block, span, cut.blocks, like=like, dtype=like.dtype)


@memoized
def pieces_before(count: int, rows: int, span: int, most: int) -> np.ndarray:
    """Rows from the ends of pieces of so many rows (in columns) to the start of another, and −1 for those that it does not see.

    Pieces are less than `most` apart. With a span they are of the stream so many rows before: those behind the place of the other,
    which are no pieces of its own stream.
    """
    own = np.arange(count)
    apart = own[:, None] - own[None, :]
    sees = (apart < 0) & (own < most) if span else (apart > 0) & (apart < most)
    return np.where(sees, (apart - 1) * rows + span, -1).astype(float)


def middles_of(setting: Setting, cut: Cut, line: Line, window: Window) -> Between:
    """Sums over what is between segments."""
    backend = setting.backend
    xp = backend.xp
    whole, rest = cut.between(window)
    count = line.old + cut.segments
    shape = (*line.rows.leading, count, line.rows.z.shape[-1] * setting.w.shape[0])
    total = xp.zeros(shape, dtype=setting.w.dtype, device=backend.device(line.rows.x))
    segments = tails = None
    if count > 1 and whole > 1:
        rows = line.before(line.old * cut.segment, (count - 1) * cut.segment)
        segments = placed(_sums(setting, rows, count - 1, line.decay), 1, count, backend)
        (total,) = _last_sums((segments,), whole - 1, cut, line.decay, backend)
    if rest and count > whole:
        pieces = count - whole
        tails = _sums(setting, _tails(cut, line, rest, pieces, backend), pieces, line.decay)
        there = later(tails, line.decay, (whole - 1) * cut.segment, backend)
        total = total + placed(there, whole, count, backend)
    total = total[..., line.old :, :]
    return Between(total) if line.decay is None else Between(total, segments, tails)


def pulled_middles(
    setting: Setting, cut: Cut, line: Line, window: Window, between: Between, gradient: Array
) -> tuple[list[tuple[int, Rows]], list[Array]]:
    """Gradients of rows through `middles_of`, and where in the line the first of them is; and parts of that of λ."""
    backend, decay = setting.backend, line.decay
    xp = backend.xp
    whole, rest = cut.between(window)
    count = line.old + cut.segments
    gradient = placed(gradient, line.old, count, backend)
    start = line.front - line.old * cut.segment
    found, of_decay = [], []
    if count > 1 and whole > 1:
        rows = line.before(line.old * cut.segment, (count - 1) * cut.segment)
        (behind,) = _last_sums((xp.flip(gradient, axis=-2),), whole - 1, cut, decay, backend)
        behind = xp.flip(behind, axis=-2)[..., 1:, :]
        of_rows, slope = _pulled_sums(setting, rows, behind, count - 1, decay)
        found.append((start, of_rows))
        if decay is not None and between.segments is not None:
            both = between.segments, xp.zeros_like(between.segments)
            through = gradient * _last_sums(both, whole - 1, cut, decay, backend)[1]
            of_decay += [slope, of_factor(through, decay, backend)]
    if rest and count > whole:
        pieces, rows_of, g = count - whole, rest * cut.chunk, gradient[..., whole:, :]
        if decay is not None and between.tails is not None:
            of_decay.append(later_slope(between.tails, g, decay, (whole - 1) * cut.segment, backend))
        g = later(g, decay, (whole - 1) * cut.segment, backend)
        tails, slope = _pulled_sums(setting, _tails(cut, line, rest, pieces, backend), g, pieces, decay)
        if decay is not None:
            of_decay.append(slope)

        def behind_zeros(g: Array) -> Array:
            g = xp.reshape(g, (*g.shape[:-2], pieces, rows_of, g.shape[-1]))
            g = placed(g, cut.segment - rows_of, cut.segment, backend)
            return xp.reshape(g, (*g.shape[:-3], pieces * cut.segment, g.shape[-1]))

        found.append((start, Rows(*map(behind_zeros, tails))))
    return found, of_decay


def _tails(cut: Cut, line: Line, chunks: int, pieces: int, backend: Backend) -> Rows:
    """The last chunks of the first so many segments."""

    def of(x: Array) -> Array:
        x = backend.xp.reshape(x, (*x.shape[:-2], pieces, cut.segment, x.shape[-1]))
        x = x[..., cut.segment - chunks * cut.chunk :, :]
        return backend.xp.reshape(x, (*x.shape[:-3], -1, x.shape[-1]))

    return Rows(*map(of, line.before(line.old * cut.segment, pieces * cut.segment)))


def _last_sums(x: Sequence[Array], count: int, cut: Cut, decay: Array | None, backend: Backend) -> Sequence[Array]:
    """Sums of the rows (..., n, k) of x[0], one for a segment, and those before, `count` in all, in 2 log₂ count additions.

    Those t segments before times λ^(t · rows of a segment), if keys decay, and then the derivatives of these sums, if x[1] has
    those of x[0].
    """
    total: Sequence[Array] | None = None
    n, width = x[0].shape[-2], 1
    count = min(count, n)

    def joined(x: Sequence[Array], earlier: Sequence[Array], rows: int) -> Sequence[Array]:
        moved = [placed(y[..., : n - rows, :], rows, n, backend) for y in earlier]
        there = [later(y, decay, rows * cut.segment, backend) for y in moved]
        if decay is not None and len(x) > 1:
            slope = slopes(decay, backend.xp.full_like(decay, float(rows * cut.segment)), backend)
            there[1] = there[1] + moved[0] * slope
        return [a + b for a, b in zip(x, there, strict=True)]

    while width <= count:
        # x has the sums of `width` rows, and `total` those of fewer.
        if count & width:
            total = x if total is None else joined(x, total, width)
        width *= 2
        if width <= count:
            x = joined(x, x, width // 2)
    return total  # type: ignore[return-value]


def _at_ends(rows: Rows, pieces: int, decay: Array | None, backend: Backend) -> tuple[Rows, Array | None]:
    """Rows that weigh what they do for the last row of their piece, and how many rows before that they stand, (rows, 1)."""
    if decay is None:
        return rows, None
    xp = backend.xp
    count = rows.z.shape[-2] // pieces
    before = xp.flip(numbers(count, decay, backend), axis=0)[None, :]
    before = xp.reshape(xp.broadcast_to(before, (pieces, count)), (-1, 1))
    return rows._replace(z=rows.z * powers(decay, before, backend)), before


def _sums(setting: Setting, rows: Rows, pieces: int, decay: Array | None) -> Array:
    """Sums of Φ(x) ⊗ z over the rows of each piece, (..., pieces, (dv + 1) r), as the last row of each sees them."""
    backend, columns = setting.backend, rows.z.shape[-1]
    xp, dtype = backend.xp, setting.w.dtype
    rows, _ = _at_ends(rows, pieces, decay, backend)
    kernel, apart = _kernel("sum_rows", setting, rows, pieces)
    if kernel is not None:

        def with_block(carry: Sum | None, x: Array, z: Array) -> tuple[Sum, tuple[()]]:
            return added(carry, kernel(x, z), backend), ()

        (total, _), _ = backend.scan_rows(with_block, None, apart, FEW_CHAINS * CHAIN)
        return as_one(xp.matrix_transpose(total), backend)[..., 0, :]
    basis = Basis.of(rows.x.shape[-1], setting.degree, columns, setting.grading, backend.compiles)
    monomials = basis.features(backend)
    block = block_of(basis, columns, dtype, setting.leading, backend)

    def of_rows(carry: tuple[Array, Array], x: Array, z: Array) -> tuple[tuple[Array, Array], tuple[()]]:
        found = basis.row_sums(monomials(xp.matrix_transpose(x)), z, backend)
        return add(carry, xp.matrix_transpose(setting.turned(found))), ()

    def of_piece(_: None, *given: Array) -> tuple[None, tuple[Array]]:
        piece = _pieces_of(rows, given, backend)
        start = zero_sum((*rows.leading, columns, setting.w.shape[0]), dtype, rows.x, backend)
        total, _ = backend.scan_rows(of_rows, start, piece, block)[0]
        return None, (as_one(total, backend),)

    found: Array = backend.scan_rows(of_piece, None, [in_pieces(a, pieces, backend) for a in rows], 1)[1][0]
    return found


def _kernel(operation: str, setting: Setting, rows: Rows, pieces: int) -> tuple[Callable[..., Any] | None, Rows]:
    """What computes an operation of the rows of all pieces (..., pieces, rows, k), if anything does, and these."""

    def apart(x: Array) -> Array:
        return setting.backend.xp.reshape(x, (*x.shape[:-2], pieces, -1, x.shape[-1]))

    x, z = of_pieces = Rows(*map(apart, rows))
    columns = z.shape[-1]
    whole = rows_of(x, setting.monomials, columns, of_pieces.leading)
    whole = whole._replace(read=columns, in_all=setting.backend.rows_in_all)
    found = setting.backend.kernel(operation, whole, x, z) if setting.forms is None else None
    return None if found is None else partial(found, whole), of_pieces


def _pulled_sums(
    setting: Setting, rows: Rows, gradient: Array, pieces: int, decay: Array | None
) -> tuple[Rows, Array | None]:
    """Gradients of rows, and of λ if there is one, from that of `_sums`."""
    backend, z = setting.backend, rows.z
    rows, before = _at_ends(rows, pieces, decay, backend)
    found = _pulled_plain(setting, rows, gradient, pieces)
    if decay is None or before is None:
        return found, None
    slope = of_factor(found.z * z * slopes(decay, before, backend), decay, backend)
    return found._replace(z=found.z * powers(decay, before, backend)), slope


def _pulled_plain(setting: Setting, rows: Rows, gradient: Array, pieces: int) -> Rows:
    """`_pulled_sums` of rows that weigh what they do for the last of their piece."""
    backend, columns = setting.backend, rows.z.shape[-1]
    xp, dtype = backend.xp, setting.w.dtype
    kernel, apart = _kernel("read_and_pull", setting, rows, pieces)
    if kernel is not None:
        own = xp.reshape(gradient, (*gradient.shape[:-1], columns, setting.w.shape[0]))
        dz, dx = kernel(*apart, xp.matrix_transpose(own))
        return Rows(
            *(
                xp.reshape(sum_to_leading(g, a.shape[:-2], backend), x.shape)
                for g, a, x in zip((dx, dz), apart, rows, strict=True)
            )
        )
    # With derivatives, these give the values' share of the highest degree as well.
    lean = setting.degree >= 2 and (columns <= FEW_COLUMNS or not backend.writable)
    lean = lean and not setting.grading and not backend.compiles
    basis = Basis(rows.x.shape[-1], setting.degree, lean, setting.grading)
    monomials = basis.features(backend)
    block = block_of(basis, basis.pulled(columns, backend), dtype, setting.leading, backend)

    def of_piece(_: None, *given: Array) -> tuple[None, tuple[Array, ...]]:
        own, *parts = given
        own = xp.reshape(own, (*own.shape[:-2], columns, setting.w.shape[0]))
        pull_back = basis.puller_and_reader(setting.turned_back(xp.matrix_transpose(own)), columns, backend)

        def of_rows(_: None, x: Array, z: Array) -> tuple[None, tuple[Array, ...]]:
            found = pull_back(monomials(xp.matrix_transpose(x)), z)
            return None, tuple(sum_to_leading(g, a.shape[:-2], backend) for g, a in zip(found, (x, z), strict=True))

        found = backend.scan_rows(of_rows, None, _pieces_of(rows, parts, backend), block)[1]
        return None, tuple(as_one(g, backend) for g in found)

    given = [gradient, *(in_pieces(a, pieces, backend) for a in rows)]
    found = backend.scan_rows(of_piece, None, given, 1)[1]
    return Rows(*(xp.reshape(g, a.shape) for g, a in zip(found, rows, strict=True)))


def _pieces_of(rows: Rows, given: Sequence[Array], backend: Backend) -> Rows:
    """One piece of rows, out of what a loop handed on."""
    return Rows(*(backend.xp.reshape(x, (*a.shape[:-2], -1, a.shape[-1])) for x, a in zip(given, rows, strict=True)))


def as_one(x: Array, backend: Backend) -> Array:
    """All numbers of a problem as one row, (..., i, j) → (..., 1, i j)."""
    return backend.xp.reshape(x, (*x.shape[:-2], 1, -1))


def placed(x: Array, start: int, rows: int, backend: Backend) -> Array:
    """`rows` rows (..., rows, k) that hold those of x from `start` on, without those that have no place, and zeros besides."""
    here = x.shape[-2]
    x = x[..., min(here, max(0, -start)) : min(here, max(0, rows - start)), :]
    start = max(0, start)
    *leading, here, k = x.shape
    xp, behind = backend.xp, rows - start - here
    if not start and not behind:
        return x
    zeros = [xp.zeros((*leading, count, k), dtype=x.dtype, device=backend.device(x)) for count in (start, behind)]
    return xp.concat([zeros[0], x, zeros[1]], axis=-2)
