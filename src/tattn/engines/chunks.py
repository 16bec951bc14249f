"""A block of rows of causal attention by the polynomial method, in chunks of a few rows: read-out and adjoint.

Symbols as in `causal_features`. A block consists of chunks of `b` rows. Within a chunk S_μ(i) = C_μ + (the chunk's rows up to i),
with C_μ the summary of all rows before it. One view need not be summed up for each row: for X(i) = w Φ(q_i) ∘ Π_{ν > 1} S_ν(i),

    N_ie = Σ_α X(i)_αe C_1αe + Σ_{j ≤ i in the chunk} ũ_je Σ_α X(i)_αe Φ(a_j)_α,

which are products of matrices. For one view X does not depend on e, and chunks are longer. The adjoint has the same two parts, of
the rows behind a chunk and of those behind j in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from ..arrays import clean, prod_of, sum_of, sum_to_leading, swap_outer, unweighed
from ..backends import Array, Backend
from ..backends.tables import memoized
from ..features.basis import read
from ..features.complex_channels import Forms
from ..features.monomials import Grading, Monomials, features, pull_back
from ..features.pairs import Pairs
from .fading import faded, numbers, of_factor, powers, seen, seen_slopes, slopes
from .features import Sum, add, channels, scaled_gradient, with_ones

# Rows of a chunk: for one view, and for more.
SPANS = 32, 16


class Window(NamedTuple):
    """How many rows a row sees of a view, its own included: so many whole chunks, and the rest."""

    whole: int
    rest: int

    @property
    def shifts(self) -> tuple[int, ...]:
        """How many chunks before the rows of a chunk those stand of which some rows of the chunk see a part."""
        return (0, *((self.whole,) if self.whole else ()), *((self.whole + 1,) if self.rest else ()))


class Setting(NamedTuple):
    """What the blocks of a call have in common: w (r, 1), units of query and keys, 1/n_μ; rows of a chunk, chunks of a tile.

    `forms`: as what complex monomials are multiplied; `kernel`: what computes blocks in place of this module; `decays`: λ of every
    view (..., 1, 1), if a key t rows before a row counts λ^t. Sums are then those that the last of their rows sees. `windows`:
    those of every view, if some row does not see all rows before it.
    """

    degree: int
    grading: Grading
    w: Array
    units: Sequence[Any]
    shares: Sequence[Any]
    chunk: int
    tile: int
    leading: tuple[int, ...]
    backend: Backend
    forms: Forms | Pairs | None = None
    kernel: Callable[..., Any] | None = None
    decays: tuple[Array, ...] = ()
    windows: tuple[Window, ...] = ()

    def turned(self, x: Array) -> Array:
        """Monomials (..., r, k) as what prefixes are made of, where channels are complex."""
        return x if self.forms is None else self.forms.turned(x, self.backend)

    def turned_back(self, x: Array) -> Array:
        """The adjoint of `turned`."""
        return x if self.forms is None else self.forms.turned_back(x, self.backend)

    def decay(self, view: int) -> Array | None:
        """λ of a view, if keys decay."""
        return self.decays[view] if self.decays else None

    @property
    def monomials(self) -> Monomials:
        """Those that the polynomial has."""
        return Monomials(self.degree, self.grading)


def chunk_of(views: int) -> int:
    """Rows of a chunk, at most."""
    return SPANS[views > 1]


def windows_of(window: Sequence[int] | None, lengths: Sequence[int], chunk: int) -> tuple[Window, ...]:
    """The windows of views of so many rows; () if none of them leaves out a row."""
    if window is None or all(w >= n for w, n in zip(window, lengths, strict=True)):
        return ()
    return tuple(Window(*divmod(min(w, n), chunk)) for w, n in zip(window, lengths, strict=True))


class Chunks(NamedTuple):
    """A block of rows in chunks: monomials (..., M, b, r), values and ones (..., M, b, dv + 1), what each chunk begins with.

    With windows a chunk has J rows of keys and values in place of b: its own, and those of others that it sees in part.
    """

    phi_q: Array
    phis: list[Array]  # of keys
    zs: list[Array]
    befores: list[Array]  # C_μ (..., M, dv + 1, r)
    sums: list[Array]  # of the block (..., dv + 1, r)
    flat: list[tuple[Array, Array]]  # channels (..., d, rows) and monomials (..., r, rows) of query and keys

    @classmethod
    def of(cls, setting: Setting, q: Array, rows: Sequence[Array | None], starts: Sequence[Array]) -> Chunks:
        """From the rows of a block, those of views one after another, and the summaries before the block."""
        backend, dtype = setting.backend, setting.w.dtype
        xp = backend.xp
        m = len(starts)
        flat = []
        for x, mask, unit in zip((q, *rows[:m]), (None, *rows[2 * m :]), setting.units, strict=True):
            x = channels(clean(x, mask, backend), unit, dtype, backend)
            flat.append((x, features(x, setting.degree, backend, setting.grading)))
        phi_q, *phis = (in_chunks(xp.matrix_transpose(setting.turned(phi)), setting) for _, phi in flat)
        zs, befores, sums = [], [], []
        for view, (v, mask, share, phi, start) in enumerate(
            zip(rows[m : 2 * m], rows[2 * m :], setting.shares, phis, starts, strict=True)
        ):
            z = in_chunks(with_ones(v, mask, dtype, backend) * share, setting)
            of_chunks = times_last(setting, view, xp.matrix_transpose(z)) @ phi
            running = _running(setting, view, of_chunks)
            befores.append(_at_chunks(setting, view, start, running) + running[..., :-1, :, :])
            sums.append(running[..., -1, :, :])
            zs.append(z)
        return cls(phi_q, phis, zs, befores, sums, flat)

    def together(self, backend: Backend) -> list[Array]:
        """What `tile_of` takes, chunks as rows."""
        return [flattened(x, backend) for x in (self.phi_q, *self.phis, *self.zs, *self.befores)]


def numerator(setting: Setting, chunks: Chunks) -> Array:
    """N of the rows of a block, (..., dv + 1, rows)."""
    backend = setting.backend
    xp = backend.xp
    m = len(chunks.zs)
    b, columns = setting.chunk, chunks.zs[0].shape[-1]

    def body(_: None, *given: Array) -> tuple[None, tuple[Array]]:
        phi_q, phis, zs, befores, _ = tile_of(given, setting, m, columns)
        x = (phi_q * setting.w[:, 0])[..., None, :, :]
        for view in range(1, m):
            x = _times(_prefix(setting, view, zs[view], phis[view], befores[view]), x, backend)
        inside = _scores(setting, 0, x, phis[0]) @ xp.matrix_transpose(zs[0])[..., None]
        found = _times_first(setting, 0, _contracted(x, befores[0], setting)) + inside[..., 0]
        return None, (flattened(found, backend),)

    _, (found,) = backend.scan_rows(body, None, chunks.together(backend), setting.tile)
    return _flat(xp.reshape(found, (*found.shape[:-1], columns, b)), setting)


def adjoint(
    setting: Setting, carry: tuple[Sum, ...], starts: Sequence[Array], rows: Sequence[Any], m: int
) -> tuple[tuple[Sum, ...], list[Array]]:
    """G_μ with the block's rows, and gradients (dq, dk…, dv…) of the block (q, o, l, g, g_lse, k…, v…, mask…)."""
    backend, dtype = setting.backend, setting.w.dtype
    xp = backend.xp
    q, o, l, g, g_lse, *views = rows
    chunks = Chunks.of(setting, q, views, starts)
    o, l, g, g_lse = (backend.cast(x, dtype) for x in (o, l, g, g_lse))
    g_hat = xp.matrix_transpose(in_chunks(scaled_gradient(o, l, g, g_lse, backend), setting))
    *_, b, r = chunks.phi_q.shape
    columns = g_hat.shape[-2]

    def body(carry: tuple[Sum, ...], *given: Array) -> tuple[tuple[Sum, ...], tuple[Array, ...]]:
        carry, found = _tile_adjoint(setting, carry, tile_of(given, setting, m, columns))
        return carry, tuple(flattened(x, backend) for x in found)

    folded = [xp.flip(x, axis=-2) for x in (*chunks.together(backend), flattened(g_hat, backend))]
    carry, flipped = backend.scan_rows(body, carry, folded, setting.tile)
    y_q, *of_views = (xp.flip(x, axis=-2) for x in flipped)
    y_q, *ys = (xp.reshape(y, (*y.shape[:-2], y.shape[-2] * b, r)) for y in (y_q, *of_views[:m]))
    dq = _pulled_back(setting, y_q, 0, chunks, None, q)
    found = []
    for view, (y, dz) in enumerate(zip(ys, of_views[m:], strict=True)):
        k, v, mask = (views[i] for i in (view, m + view, 2 * m + view))
        dz = xp.reshape(dz, (*dz.shape[:-2], dz.shape[-2] * b, columns))
        of_rows = unweighed(dz * setting.shares[view], v, mask, backend)
        own = [sum_to_leading(g, x.shape[:-2], backend) for g, x in zip(of_rows, (v, mask), strict=False)]
        found.append((_pulled_back(setting, y, view + 1, chunks, mask, k), *own))
    return carry, [dq, *chain.from_iterable(zip(*found, strict=True))]


def _tile_adjoint(setting: Setting, carry: tuple[Sum, ...], tile: Any) -> tuple[tuple[Sum, ...], list[Array]]:
    """G_μ with the rows of some chunks, from the last to the first, and gradients of their Φ(q), Φ(k) and z (..., M, b, ·).

    The gradients of λ (..., 1, 1), if there are some, stand behind G_μ.
    """
    _, phis, zs, befores, g_hat = tile
    backend = setting.backend
    xp = backend.xp
    m = len(zs)
    y_q, xs = of_query(setting, tile)
    after, ys, dzs, of_decays = [], [], [], []
    for view, (total, z, phi, x) in enumerate(zip(carry[:m], zs, phis, xs, strict=True)):
        pulled = of_view(setting, view, (x, phi, z, g_hat))
        # All of a view's gradient is summed over the problems that share it, or none: what is behind it is.
        leading = total[0].shape[:-2]
        of_chunks = to_view(pulled.before, leading, backend)
        running = _running(setting, view, of_chunks)
        behind = _at_chunks(setting, view, total[0], running) + running[..., :-1, :, :]
        after.append(add(_faded(setting, view, total, running.shape[-3] - 1), running[..., -1, :, :]))
        dz = read(xp.matrix_transpose(phi), behind, backend)
        if setting.decays:
            slope = _decay_slope(setting, view, (z, befores[view], behind), dz)
            slope = slope + rows_slope(setting, view, (z, befores[view]), (g_hat, x, pulled.scores))
            of_decays.append(add(carry[m + view], slope))
            dz = times_last(setting, view, dz)
        dzs.append(xp.matrix_transpose(dz + to_view(pulled.values, leading, backend)))
        last = xp.matrix_transpose(times_last(setting, view, xp.matrix_transpose(z)))
        ys.append(last @ behind + to_view(pulled.features, leading, backend))
    return (*after, *of_decays), [y_q, *ys, *dzs]


def of_query(setting: Setting, tile: Any) -> tuple[Array, list[Array]]:
    """Gradients of Φ(q) of some chunks (..., M, b, r), and X_μ(i) of every view, (..., M, dv + 1 or 1, b, r)."""
    phi_q, phis, zs, befores, g_hat = tile
    backend, m = setting.backend, len(zs)
    xp = backend.xp
    w = setting.w[:, 0]
    weighted = (phi_q * w)[..., None, :, :]
    if m == 1:
        pairs = (xp.matrix_transpose(g_hat) @ xp.matrix_transpose(zs[0])) * _triangle(setting, 0, g_hat)
        y_q = xp.matrix_transpose(_times_first(setting, 0, g_hat)) @ befores[0] + pairs @ phis[0]
        return y_q * w, [weighted]
    prefixes = [_prefix(setting, *view) for view in zip(range(m), zs, phis, befores, strict=True)]
    both = swap_outer(prod_of(prefixes), backend)
    y_q = (xp.matrix_transpose(g_hat)[..., None, :] @ both)[..., 0, :]
    xs = [prod_of([*prefixes[:view], *prefixes[view + 1 :], weighted]) for view in range(m)] if m > 2 else [
        _times(prefixes[1 - view], weighted, backend) for view in range(m)
    ]  # fmt: skip
    return y_q * w, xs


class Pulled(NamedTuple):
    """Gradients of what chunks begin with (..., M, dv + 1, r), of Φ(k) (..., M, J, r) and of z (..., M, dv + 1, J), in chunks.

    `scores`: of all pairs in a chunk, (..., M, dv + 1 or 1, b, J).
    """

    before: Array
    features: Array
    values: Array
    scores: Array


def of_view(setting: Setting, view: int, given: Sequence[Array]) -> Pulled:
    """What the rows of chunks give to a view by X, from X, Φ(k), z and ĝ."""
    x, phi, z, g_hat = given
    backend = setting.backend
    xp = backend.xp
    triangle = _triangle(setting, view, g_hat)
    upper, first = xp.matrix_transpose(triangle), _times_first(setting, view, g_hat)
    if len(setting.shares) == 1:
        of_chunks = first @ x[..., 0, :, :]
        pairs = (z @ g_hat) * upper
    else:
        of_chunks = (first[..., None, :] @ x)[..., 0, :]
        # ũ_je ĝ_ie for i ≥ j, (..., M, dv + 1, j, i) → (..., M, j, (dv + 1) i).
        pairs = swap_outer(xp.matrix_transpose(z)[..., None] * (g_hat[..., None, :] * upper[..., None, :, :]), backend)
        pairs = flattened(pairs, backend)
    inside = pairs @ xp.reshape(x, (*x.shape[:-3], -1, x.shape[-1]))
    scores = _all_scores(setting, x, phi)
    own = (xp.matrix_transpose(scores * triangle[..., None, :, :]) @ g_hat[..., None])[..., 0]
    return Pulled(of_chunks, inside, own, scores)


def rows_slope(setting: Setting, view: int, own: Sequence[Array], of_rows: Sequence[Array]) -> Array:
    """What the rows of some chunks give to λ (..., 1, 1) by what they read, in their chunks and before these.

    From z and the sums before chunks, and from ĝ, X and scores of all pairs in a chunk.
    """
    decay, backend = setting.decays[view], setting.backend
    xp = backend.xp
    (z, before), (g_hat, x, scores) = own, of_rows
    of_chunk = decay[..., None, :, :]
    of_first = slopes(of_chunk, numbers(setting.chunk, decay, backend, 1), backend)
    from_before = of_first * (g_hat * _contracted(x, before, setting))
    pairs = g_hat[..., :, None] * xp.matrix_transpose(z)[..., None, :]
    inside = xp.sum(pairs * scores, axis=-3) * seen_slopes(_apart(setting, view, z), of_chunk, backend)
    return sum_of([of_factor(part, decay, backend, 3) for part in (from_before, inside)])


def _decay_slope(setting: Setting, view: int, own: Sequence[Array], dz: Array) -> Array:
    """What the sums of some chunks give to λ (..., 1, 1), as they are carried on.

    From z, the sums before chunks and the gradients of those at their ends; and from what the rows behind give to z
    (..., M, dv + 1, b).
    """
    decay, backend = setting.decays[view], setting.backend
    xp = backend.xp
    z, before, behind = own
    of_chunk = decay[..., None, :, :]
    through = slopes(of_chunk, xp.full_like(of_chunk, float(setting.chunk)), backend) * (before * behind)
    parts = through, last_slopes(setting, view) * (xp.matrix_transpose(z) * dz)
    return sum_of([of_factor(part, decay, backend, 3) for part in parts])


def tile_of(given: Sequence[Array], setting: Setting, m: int, columns: int) -> Any:
    """Φ(q), Φ(k) and z of every view, what their chunks begin with, and ĝ if given: as `Chunks` has them."""
    r = setting.w.shape[0]

    def apart(x: Array, rows: int) -> Array:
        return setting.backend.xp.reshape(x, (*x.shape[:-1], rows, x.shape[-1] // rows))

    phi_q, *rest = given
    phis = [apart(x, x.shape[-1] // r) for x in rest[:m]]
    zs = [apart(x, x.shape[-1] // columns) for x in rest[m : 2 * m]]
    befores = [apart(x, columns) for x in rest[2 * m : 3 * m]]
    g_hat = apart(rest[3 * m], columns) if len(rest) > 3 * m else None
    return apart(phi_q, setting.chunk), phis, zs, befores, g_hat


def _prefix(setting: Setting, view: int, z: Array, phi: Array, before: Array) -> Array:
    """S_μ(i) of every row of some chunks, (..., M, dv + 1, b, r)."""
    xp = setting.backend.xp
    # z_je for the rows j ≤ i, and 0 for others: (..., M, dv + 1, b, J), a product with the monomials of all rows.
    masked = xp.matrix_transpose(z)[..., None, :] * _triangle(setting, view, z)[..., None, :, :]
    inside = xp.reshape(masked, (*masked.shape[:-3], -1, masked.shape[-1])) @ phi
    inside = xp.reshape(inside, (*inside.shape[:-2], z.shape[-1], setting.chunk, phi.shape[-1]))
    rise = before[..., None, :]
    if setting.decays:
        rise = rise * xp.matrix_transpose(_first(setting, view))[..., None, :, :]
    if not setting.backend.writable or np.broadcast_shapes(rise.shape, inside.shape) != tuple(inside.shape):
        return inside + rise
    inside += rise
    return inside


def _times(x: Array, y: Array, backend: Backend) -> Array:
    """Product x ∘ y, in the place of x where that may be and y does not have more leading dimensions."""
    if not backend.writable or np.broadcast_shapes(x.shape, y.shape) != tuple(x.shape):
        return x * y
    x *= y
    return x


def flattened(x: Array, backend: Backend) -> Array:
    """The numbers of each chunk as one row: (..., M, i, j) → (..., M, i j)."""
    return backend.xp.reshape(x, (*x.shape[:-2], -1))


def _scores(setting: Setting, view: int, x: Array, phi: Array) -> Array:
    """`_all_scores` for j ≤ i, times λ^(i − j) if there is one."""
    return _all_scores(setting, x, phi) * _triangle(setting, view, x)[..., None, :, :]


def _all_scores(setting: Setting, x: Array, phi: Array) -> Array:
    """Σ_α X(i)_αe Φ(a_j)_α for i and j in the same chunk: (..., M, e, b, r) and (..., M, J, r) → (..., M, e, b, J)."""
    xp = setting.backend.xp
    *leading, e, b, r = x.shape
    found = read(xp.matrix_transpose(phi), xp.reshape(x, (*leading, e * b, r)), setting.backend)
    return xp.reshape(found, (*found.shape[:-2], e, b, phi.shape[-2]))


def _contracted(x: Array, c: Array, setting: Setting) -> Array:
    """Σ_α X(i)_αe C_αe: (..., M, e, b, r) with e = dv + 1 or 1, and (..., M, dv + 1, r) → (..., M, dv + 1, b)."""
    backend = setting.backend
    transposed = backend.xp.matrix_transpose(x)
    if x.shape[-3] == 1:
        return read(transposed[..., 0, :, :], c, backend)
    return read(transposed, c[..., None, :], backend)[..., 0, :]


def _pulled_back(setting: Setting, y: Array, place: int, chunks: Chunks, mask: Array | None, like: Array) -> Array:
    """Gradient of the rows `like` of a block from that of their monomials (..., rows, r)."""
    dx = of_channels(setting, y, *chunks.flat[place])
    return sum_to_leading(clean(dx * setting.units[place], mask, setting.backend), like.shape[:-2], setting.backend)


def of_channels(setting: Setting, y: Array, x: Array, phi: Array) -> Array:
    """Gradient of channels x (..., d, rows) with monomials Φ, from that of these (..., rows, r): (..., rows, d)."""
    xp = setting.backend.xp
    # The rest is linear in y, so what rows are shared by is summed first.
    y = setting.turned_back(xp.matrix_transpose(sum_to_leading(y, x.shape[:-2], setting.backend)))
    return xp.matrix_transpose(pull_back(x, phi, y, setting.degree, setting.backend, setting.grading))


def _triangle(setting: Setting, view: int, like: Array) -> Array:
    """1 for j ≤ i and 0 for others, (b, b), in windows (b, J); or λ^(i − j) in place of 1, (..., 1, b, J)."""
    backend = setting.backend
    if setting.decays:
        return seen(_apart(setting, view, like), setting.decays[view][..., None, :, :], backend)
    window = setting.windows[view] if setting.windows else None
    return backend.table(_seen_inside, setting.chunk, window, like=like, dtype=setting.w.dtype)


def _apart(setting: Setting, view: int, like: Array) -> Array:
    """Rows between a row of a chunk and those that it sees in part, i − j, and −1 for those that it does not see, (b, J)."""
    window = setting.windows[view] if setting.windows else None
    return setting.backend.table(_rows_apart, setting.chunk, window, like=like, dtype=setting.w.dtype)


def _first(setting: Setting, view: int) -> Array:
    """λ^(i + 1), what row i of a chunk takes of the sums before it: (..., 1, 1, b)."""
    decay = setting.decays[view][..., None, :, :]
    return powers(decay, numbers(setting.chunk, decay, setting.backend, 1), setting.backend)


def _times_first(setting: Setting, view: int, x: Array) -> Array:
    """Columns (..., M, k, b) of the rows of chunks, times what each takes of the sums before."""
    return x * _first(setting, view) if setting.decays else x


def times_last(setting: Setting, view: int, x: Array) -> Array:
    """Columns (..., M, k, b) of the rows of chunks, times λ^(b − 1 − j), what the last row of the chunk takes of each."""
    if not setting.decays:
        return x
    decay, backend = setting.decays[view][..., None, :, :], setting.backend
    return x * powers(decay, backend.xp.flip(numbers(setting.chunk, decay, backend), axis=0), backend)


def last_slopes(setting: Setting, view: int) -> Array:
    """Derivatives of what `times_last` multiplies by, (..., 1, 1, b)."""
    decay, backend = setting.decays[view][..., None, :, :], setting.backend
    return slopes(decay, backend.xp.flip(numbers(setting.chunk, decay, backend), axis=0), backend)


def _faded(setting: Setting, view: int, total: Sum, chunks: int) -> Sum:
    """A sum after so many chunks."""
    if not setting.decays:
        return total
    return faded(total, setting.decays[view], chunks * setting.chunk, setting.backend)


def _at_chunks(setting: Setting, view: int, total: Array, running: Array) -> Array:
    """A sum (..., k, r) as each of the chunks has it, of which there are `running` sums: (..., M, k, r)."""
    total = total[..., None, :, :]
    if not setting.decays:
        return total
    decay, backend = setting.decays[view][..., None, :, :], setting.backend
    rows = numbers(running.shape[-3] - 1, decay, backend)[:, None, None] * setting.chunk
    return total * powers(decay, rows, backend)


@memoized
def _rows_apart(b: int, window: Window | None) -> np.ndarray:
    """The table of `_apart`: for the rows of a chunk, and those before it of which its rows see a part."""
    rows, shifts = np.arange(b), (0,) if window is None else window.shifts
    apart = np.concatenate([rows[:, None] - rows[None, :] + shift * b for shift in shifts], axis=1)
    most = b if window is None else window.whole * b + window.rest
    return np.where((apart >= 0) & (apart < most), apart, -1).astype(float)


@memoized
def _seen_inside(b: int, window: Window | None) -> np.ndarray:
    """The table of `_triangle`."""
    return (_rows_apart(b, window) >= 0).astype(float)


def _running(setting: Setting, view: int, of_chunks: Array) -> Array:
    """Sums over the chunks before each, and over all of them: (..., M, k, r) → (..., M + 1, k, r)."""
    backend = setting.backend
    xp = backend.xp
    *leading, chunks, k, r = of_chunks.shape
    before = backend.table(_before, chunks, like=of_chunks, dtype=of_chunks.dtype)
    if setting.decays:
        decay = setting.decays[view]
        apart = numbers(chunks + 1, decay, backend)[:, None] - numbers(chunks, decay, backend, 1)[None, :]
        before = before * powers(decay, xp.where(apart > 0, apart, 0.0) * setting.chunk, backend)
    return xp.reshape(before @ xp.reshape(of_chunks, (*leading, chunks, k * r)), (*leading, chunks + 1, k, r))


@memoized
def _before(chunks: int) -> np.ndarray:
    """The table of `_running`."""
    return np.tril(np.ones((chunks + 1, chunks)), -1)


def in_chunks(x: Array, setting: Setting) -> Array:
    """(..., rows, k) → (..., M, b, k)."""
    *leading, rows, k = x.shape
    return setting.backend.xp.reshape(x, (*leading, rows // setting.chunk, setting.chunk, k))


def _flat(x: Array, setting: Setting) -> Array:
    """(..., M, k, b) → (..., k, rows)."""
    *leading, chunks, k, b = x.shape
    return setting.backend.xp.reshape(swap_outer(x, setting.backend), (*leading, k, chunks * b))


def to_view(of_chunks: Array, leading: tuple[int, ...], backend: Backend) -> Array:
    """Sum over the leading dimensions (before M) that a view lacks: (..., M, k, r)."""
    xp = backend.xp
    *_, chunks, k, r = of_chunks.shape
    flat = xp.reshape(of_chunks, (*of_chunks.shape[:-3], chunks * k, r))
    return xp.reshape(sum_to_leading(flat, leading, backend), (*leading, chunks, k, r))
