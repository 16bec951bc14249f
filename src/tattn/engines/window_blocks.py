"""Blocks of rows in windows as compiled loops take them: each a problem of its own, forward and adjoint.

Symbols and the cut of rows are those of `windows`, with chunks of one row, and blocks no longer than any window. So row i of a
block sees its own rows up to i, of those h rows before these the ones behind the i-th, and all in between, which `window_sums`
puts together.

Where keys decay, all that a block sees weighs what it does for the row c in the middle of the block, and row i reads λ^(i − c) of
that. Blocks are short enough for all these powers to stay far from the ends of the dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from ..arrays import prod_of, sum_of, sum_to_leading
from ..backends import Array
from ..backends.operations import FEWEST_ROWS, Prefix
from ..features.monomials import run_table
from ..operands import Operands
from .chunks import Setting
from .fading import numbers, of_factor
from .features import scaled_gradient
from .window_sums import MOST_BLOCKS, Cut, Line, Rows, Streams, as_one, placed

# Rows that a kernel takes at once.
_MOST_ROWS = 1 << 13
# Workspaces that sums over all blocks may take.
_WORKSPACES = 16


def cut_of(setting: Setting, block: int, operands: Operands) -> Cut:
    """How rows are cut: a block is a segment if sums over all blocks are few numbers, since sums over many are made at once."""
    n = operands.query.shape[-2]
    cut = Cut.of_rows(n, block, setting, 1)
    inputs, sums, workspace = _numbers(setting, cut, operands)
    return cut if sums <= max(workspace, min(2 * inputs, _WORKSPACES * workspace)) else Cut.of_rows(n, block, setting)


def fits(setting: Setting, block: int, operands: Operands) -> bool:
    """Whether blocks are long enough to be worth sums of their own, and sums between segments few numbers beside the inputs."""
    cut = cut_of(setting, block, operands)
    if any(map(cut.is_long, setting.windows)) and cut.block < FEWEST_ROWS:
        return False
    inputs, sums, workspace = _numbers(setting, cut, operands)
    return sums <= max(4 * inputs, workspace)


def _numbers(setting: Setting, cut: Cut, operands: Operands) -> tuple[int, int, int]:
    """Those of the inputs, of sums over all segments, and of a workspace."""
    long = [v for v, window in zip(operands.values, setting.windows, strict=True) if cut.is_long(window)]
    inputs = sum(prod(x.shape) for x in (operands.query, *operands.keys, *operands.values))
    # Of all rows, those before the first query row included.
    sums = sum(-(-v.shape[-2] // cut.segment) * (v.shape[-1] + 1) for v in long)
    numbers = sums * setting.w.shape[0] * prod(setting.leading)
    return inputs, numbers, setting.backend.workspace // setting.backend.itemsize(setting.w.dtype)


def together(setting: Setting, cut: Cut, lines: Sequence[Line]) -> int:
    """How many segments to take at once: some thousand rows, which fit in the workspace."""
    if setting.kernel is None or cut.blocks > 1:
        return 1
    row = 2 * sum(x.shape[-1] for line in lines for x in line.rows) * prod(setting.leading)
    rows = min(_MOST_ROWS, setting.backend.workspace // (2 * row * setting.backend.itemsize(setting.w.dtype)))
    most = MOST_BLOCKS if any(map(cut.is_long, setting.windows)) else rows
    return int(max(1, min(most, rows // cut.segment)))


def numerators_by(setting: Setting, cut: Cut, q: Array, streams: Streams, starts: Sequence[Array]) -> Array:
    """N of the rows of some blocks (..., rows, dv + 1), from these and what blocks begin with, for long windows."""
    found = setting.kernel(*_weighed(setting, cut, *_blocks(setting, cut, q, streams, starts)))  # type: ignore[misc]
    return _joined(setting, _times_read(setting, cut, found))


def adjoint_by(
    setting: Setting, cut: Cut, q: Array, streams: Streams, starts: Sequence[Array], columns: Sequence[Array]
) -> tuple[Array, Streams, list[Array], list[Array]]:
    """Gradients of q, of all streams, of `starts` (..., blocks, (dv + 1) r), and of λ, from the columns (o, l, g, g_lse)."""
    backend, m = setting.backend, len(streams)
    g_hat = _apart(setting, cut, scaled_gradient(*columns, backend))  # type: ignore[call-arg]
    given = _blocks(setting, cut, q, streams, starts)
    g_hat = _times_read(setting, cut, g_hat)
    dq, d_keys, *weighed = setting.kernel(*_weighed(setting, cut, *given), g_hat)  # type: ignore[misc]
    d_shares, of_starts, slopes = _unweighed(setting, cut, given, columns, weighed)

    def summed(g: Array, like: Array) -> Array:
        return sum_to_leading(_joined(setting, g), like.shape[:-2], backend)

    grads: Streams = []
    for view, (own, leaving) in enumerate(streams):
        behind = [placed(g[m + view], 1, cut.block, backend) for g in (d_keys, d_shares)]
        grads.append(
            [
                Rows(summed(d_keys[view], own.x), summed(d_shares[view], own.z)),
                Rows(summed(behind[0], leaving.x), summed(behind[1], leaving.z)),
            ]
        )
    long = [
        sum_to_leading(as_one(g, backend)[..., 0, :], view[0].leading, backend)
        for g, view, window in zip(of_starts, streams, setting.windows, strict=False)
        if cut.is_long(window)
    ]
    return summed(dq, q), grads, long, slopes


def _apart(setting: Setting, cut: Cut, x: Array) -> Array:
    """(..., rows, k) → (..., blocks, rows of a block, k)."""
    return setting.backend.xp.reshape(x, (*x.shape[:-2], -1, cut.block, x.shape[-1]))


def _joined(setting: Setting, x: Array) -> Array:
    """The reverse of `_apart`."""
    return setting.backend.xp.reshape(x, (*x.shape[:-3], -1, x.shape[-1]))


def _blocks(
    setting: Setting, cut: Cut, q: Array, streams: Streams, starts: Sequence[Array]
) -> tuple[Prefix, list[Array]]:
    """The blocks, (..., blocks, rows, k), and what all rows of each see (..., blocks, dv + 1, r), if that is anything."""
    backend = setting.backend
    own = [Rows(*(_apart(setting, cut, x) for x in view[0])) for view in streams]
    # Row i sees those of h rows before from the one behind its own on.
    leaving = [Rows(*(placed(_apart(setting, cut, x), -1, cut.block, backend) for x in view[1])) for view in streams]
    rows = [*own, *leaving]
    table = run_table(q.shape[-1], setting.degree, setting.grading)
    block = Prefix(setting.w[:, 0], table, _apart(setting, cut, q), [x.x for x in rows], [x.z for x in rows])
    following, of_all = iter(starts), []
    for window, view in zip(setting.windows, own if starts else [], strict=bool(starts)):
        shape = view.z.shape[-1], setting.w.shape[0]
        if cut.is_long(window):
            found = next(following)
            of_all.append(backend.xp.reshape(found, (*found.shape[:-1], *shape)))
        else:
            of_all.append(backend.xp.zeros(shape, dtype=setting.w.dtype, device=backend.device(q)))
    return block, of_all


def _apart_from_middle(setting: Setting, cut: Cut, view: int) -> tuple[Array, Array, int]:
    """Rows to the middle one of a block, from its own (rows, 1), those one window before, and the last before the block."""
    own = cut.block // 2 - numbers(cut.block, setting.w, setting.backend)[:, None]
    # Those one window before begin with the second: the first row of the block does not see the first.
    return own, own + float(setting.windows[view].whole - 1), cut.block // 2 + 1


def _weights(setting: Setting, cut: Cut, view: int) -> tuple[Array, Array, Array]:
    """λ to the powers that `_apart_from_middle` has, (..., 1, rows, 1) twice and (..., 1, 1, 1)."""
    decay = setting.decays[view][..., None, :, :]
    own, leaving, before = _apart_from_middle(setting, cut, view)
    return decay**own, decay**leaving, decay**before


def _times_read(setting: Setting, cut: Cut, x: Array) -> Array:
    """Rows of blocks (..., blocks, rows, k) times λ^(i − c) of all views."""
    if not setting.decays:
        return x
    decay = prod_of(setting.decays)[..., None, :, :]
    return x * decay ** -_apart_from_middle(setting, cut, 0)[0]


def _weighed(setting: Setting, cut: Cut, block: Prefix, of_all: Sequence[Array]) -> tuple[Prefix, Sequence[Array]]:
    """What `_blocks` returns, as the middle row of each block sees it."""
    if not setting.decays:
        return block, of_all
    m, shares, seen = len(setting.decays), list(block.shares), list(of_all)
    for view in range(m):
        own, leaving, before = _weights(setting, cut, view)
        shares[view] = shares[view] * own
        shares[m + view] = shares[m + view] * leaving
        if of_all:
            seen[view] = seen[view] * before
    return block._replace(shares=shares), seen


def _unweighed(
    setting: Setting,
    cut: Cut,
    given: tuple[Prefix, Sequence[Array]],
    columns: Sequence[Array],
    grads: tuple[Sequence[Array], Sequence[Array]],
) -> tuple[Sequence[Array], Sequence[Array], list[Array]]:
    """Gradients of the shares and sums that `_blocks` gave from those of what `_weighed` makes of them, and of λ."""
    if not setting.decays:
        return *grads, []
    (block, of_all), (_, l, _, g_lse) = given, columns
    backend, m, slopes = setting.backend, len(setting.decays), []
    d_shares, of_starts = map(list, grads)
    # Σ ĝ N of a row. All that it reads is multiplied by a power of λ.
    of_row = _apart(setting, cut, backend.xp.where(l == 0, 0.0, g_lse))
    for view, decay in enumerate(setting.decays):
        apart = _apart_from_middle(setting, cut, view)
        own, leaving, before = _weights(setting, cut, view)
        terms = [-of_row * apart[0]]
        for place, rows, weight in ((view, apart[0], own), (m + view, apart[1], leaving)):
            d_shares[place] = d_shares[place] * weight
            terms.append(d_shares[place] * block.shares[place] * rows)
        if of_starts:
            of_starts[view] = of_starts[view] * before
            terms.append(of_starts[view] * of_all[view] * apart[2])
        slopes.append(sum_of([of_factor(x, decay, backend, 3) for x in terms]) / decay)
    return d_shares, of_starts, slopes
