"""Documents that stand one after another in the rows, as batches of documents of about the same length.

`Documents` are read from offsets on the host. A `Layout` puts them into groups. The documents of a group are problems of a
batch, whose rows are padded in front to those of the longest: so the last rows stay aligned, as causal attention aligns them.
Rows are gathered on the device. Every row is in one group at most, so the adjoint gathers, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from math import prod
from threading import Lock
from typing import NamedTuple

import numpy as np

from .arrays import are_weights, clean
from .backends import Array, Backend

# Lengths of a group differ by this factor at most, or by a power of it where there would be too many groups; where groups are
# compiled, by the other.
_RATIO, _COMPILED_RATIO = 1.15, 2.0
# Rows that are worth a further group.
_ROWS = 2048


class Group(NamedTuple):
    """Documents, the rows (L, L_1, …, L_m) of query and views that they are padded to, and whether some have fewer."""

    documents: int
    lengths: tuple[int, ...]
    padded: tuple[bool, ...]


class Layout(NamedTuple):
    """Groups; which side query and each view are on; rows of each side, and whether some of them are in no group. Hashable.

    Those that have the same offsets are on one side.
    """

    groups: tuple[Group, ...]
    sides: tuple[int, ...]
    rows: tuple[int, ...]
    missing: tuple[bool, ...]


class Places(NamedTuple):
    """The first row and the number of rows of every document (documents, sides), in the order of the groups; and where each row
    of every side stands in the groups, one side after another (rows, 1).
    """

    starts: Array
    counts: Array
    places: Array


class Documents(NamedTuple):
    """Offsets 0 … n of every side, and which side query and each view are on."""

    offsets: tuple[np.ndarray, ...]
    sides: tuple[int, ...]

    @classmethod
    def of(cls, offsets: Sequence[np.ndarray]) -> Documents:
        """From those of query and every view."""
        distinct: list[np.ndarray] = []
        sides = []
        for own in offsets:
            same = [i for i, other in enumerate(distinct) if np.array_equal(own, other)]
            sides.append(same[0] if same else len(distinct))
            if not same:
                distinct.append(own)
        return cls(tuple(distinct), tuple(sides))

    @property
    def lengths(self) -> np.ndarray:
        """Rows of every document (documents, sides)."""
        return np.stack([np.diff(own) for own in self.offsets], axis=1)

    @property
    def longest(self) -> tuple[int, ...]:
        """The rows of the longest, of query and every view."""
        longest = self.lengths.max(axis=0)
        return tuple(max(1, int(longest[side])) for side in self.sides)

    def alike(self) -> tuple[tuple[int, ...], int]:
        """Lengths (n, n_1, …) and number of documents of equal length that have as many scores, and about as many rows."""
        of_views = self.lengths.astype(float)[:, list(self.sides)]
        rows, scores = of_views.sum(axis=0), max(1.0, float(of_views.prod(axis=1).sum()))
        logs = np.log(rows)
        count = max(1, round(float(np.exp((logs.sum() - np.log(scores)) / (len(rows) - 1)))))
        log_count = float(np.log(count))
        # Documents are a whole number, so that rows are not just as many.
        more = (np.log(scores) - log_count - (logs - log_count).sum()) / len(rows)
        return tuple(max(1, round(float(n))) for n in np.exp(logs - log_count + more)), count

    def laid_out(self, like: Array, rows: int | None, backend: Backend, least: int = 1) -> tuple[Layout, Places]:
        """Groups of so many `rows` of a side at most, where they have several documents, padded to `least` rows; and `Places` on
        the device of `like`.

        `rows` None is for libraries that compile every group: they get few.
        """
        lengths = self.lengths
        # Without a row of the query there is nothing to compute.
        some = np.nonzero(lengths[:, self.sides[0]])[0]
        order, cuts = _grouped(np.maximum(lengths[some], least), rows, backend.groups)
        some = some[order]
        lengths = lengths[some]
        groups, padded = [], np.empty_like(lengths)
        for start, stop in pairwise(cuts):
            own = lengths[start:stop]
            longest = np.maximum(own.max(axis=0), least)
            padded[start:stop] = longest
            shorter = (own < longest).any(axis=0)
            rows_of_views = tuple(int(longest[s]) for s in self.sides)
            groups.append(Group(stop - start, rows_of_views, tuple(bool(shorter[s]) for s in self.sides)))
        starts, places, missing = [], [], []
        for side, offsets in enumerate(self.offsets):
            counts, stops = lengths[:, side], np.cumsum(padded[:, side])
            # Rows of documents in no group stand behind all.
            firsts = np.full(len(offsets) - 1, stops[-1])
            firsts[some] = stops - counts
            n = int(offsets[-1])
            missing.append(bool(counts.sum() < n))
            found = np.repeat(firsts - offsets[:-1], np.diff(offsets)) + np.arange(n)
            places.append(np.minimum(found, stops[-1]))
            # For documents without rows one that is there.
            starts.append(np.minimum(offsets[some], n - 1))
        numbers = np.stack(starts, axis=1), lengths, np.concatenate(places)[:, None]
        layout = Layout(tuple(groups), self.sides, tuple(map(len, places)), tuple(missing))
        return layout, Places(*(backend.indices(x, like) for x in numbers))


def _grouped(lengths: np.ndarray, rows: int | None, most: int) -> tuple[np.ndarray, list[int]]:
    """An order of documents with these rows (documents, sides), and where groups begin in it, and the last of them ends."""
    ratio = _RATIO if rows else _COMPILED_RATIO
    most += int(lengths.sum()) // _ROWS if rows else 0
    while True:
        levels = np.ceil(np.log(lengths) / np.log(ratio) - 1e-9)
        order = np.lexsort((*lengths.T, *levels.T))
        cuts = _changes(levels[order])
        if len(cuts) <= most:
            break
        ratio *= ratio
    if not rows:
        return order, cuts
    fine = [0]
    for start, stop in pairwise(cuts):
        several = max(1, rows // int(lengths[order[start:stop]].max()))
        # Of about equal size.
        parts = -(-(stop - start) // several)
        fine += [start + (stop - start) * (part + 1) // parts for part in range(parts)]
    return order, fine


def _changes(of_rows: np.ndarray) -> list[int]:
    """Where rows (n, k) differ from those before, with 0 and n."""
    changes = np.nonzero((np.diff(of_rows, axis=0) != 0).any(axis=1))[0] + 1
    return [0, *changes.tolist(), len(of_rows)]


class Piece:
    """The rows of one group: taken out of arrays (..., n, k) as batches (..., documents, L, k).

    `of` are starts and counts of its documents, as in `Places`.
    """

    def __init__(self, group: Group, sides: Sequence[int], of: tuple[Array, Array], backend: Backend) -> None:
        self.group, self._sides, self._of, self._backend = group, sides, of, backend
        self._rows: dict[int, tuple[Array, Array]] = {}

    def taken(self, x: Array, of: int) -> Array:
        """Rows of the query, `of` 0, or of view `of` − 1; where there are too few, the first of a document once more."""
        xp, index = self._backend.xp, self._numbers(of)[0]
        found = xp.take(x, xp.reshape(index, (-1,)), axis=-2)
        return xp.reshape(found, (*x.shape[:-2], *index.shape, x.shape[-1]))

    def cleaned(self, x: Array) -> Array:
        """`taken` of the query, with 0 in rows that are not there."""
        found = self.taken(x, 0)
        return clean(found, self._real(0), self._backend) if self.group.padded[0] else found

    def mask(self, mask: Array | None, of: int) -> Array | None:
        """The mask or weights of a view, False or 0 in rows that are not there; None where all are."""
        if mask is None:
            return self._real(of) if self.group.padded[of] else None
        found = self.taken(mask, of)
        if not self.group.padded[of]:
            return found
        return (
            clean(found, self._real(of), self._backend) if are_weights(mask, self._backend) else found & self._real(of)
        )

    def places(self, of: int, problems: int, n: int) -> Array:
        """Where the rows stand in so many problems of n rows one after another, or behind all of these where they are not there."""
        xp, (index, real) = self._backend.xp, self._numbers(of)
        if self.group.padded[of]:
            index = xp.where(real, index, problems * n)
        if problems > 1:
            starts = n * xp.arange(problems, dtype=index.dtype, device=self._backend.device(index))
            index = xp.minimum(index + starts[:, None, None], xp.full_like(index, problems * n))
        return xp.reshape(index, (-1,))

    def arrays(self, arrays: Sequence[Array | None]) -> list[Array | None]:
        """Query, keys, values (or None) and masks of all rows as those of the group."""
        query, *rest = arrays
        m = len(self.group.lengths) - 1
        found: list[Array | None] = [self.taken(query, 0)]
        for i, x in enumerate(rest[: 2 * m]):
            found.append(None if x is None else self.taken(x, i % m + 1))
        return found + [self.mask(x, i + 1) for i, x in enumerate(rest[2 * m : 3 * m])]

    def _real(self, of: int) -> Array:
        """Which rows are there (documents, L, 1)."""
        return self._numbers(of)[1][..., None]

    def _numbers(self, of: int) -> tuple[Array, Array]:
        """Which rows of all they are, and which of them are there (documents, L)."""
        side, xp = self._sides[of], self._backend.xp
        if side not in self._rows:
            starts, counts = (x[:, side : side + 1] for x in self._of)
            length = self.group.lengths[of]
            place = xp.arange(length, dtype=starts.dtype, device=self._backend.device(starts)) - (length - counts)
            real = place >= 0
            self._rows[side] = starts + xp.where(real, place, xp.zeros_like(place)), real
        return self._rows[side]


def pieces(layout: Layout, places: Places, backend: Backend) -> Iterator[Piece]:
    """The groups, one after another."""
    ends = accumulate((group.documents for group in layout.groups), initial=0)
    for group, (first, stop) in zip(layout.groups, pairwise(ends), strict=True):
        yield Piece(group, layout.sides, (places.starts[first:stop, :], places.counts[first:stop, :]), backend)


class Block(NamedTuple):
    """Documents of some groups that stand together: the rows of query and every view from the first of them to the last, and of
    every document where its rows begin, how many there are, and how many those of its group are padded to (documents, m + 1); and
    the number of its group (documents,).

    Rows are counted from the first of the query on, and behind the query's those of the first view, and so on.
    """

    rows: tuple[slice, ...]
    begins: np.ndarray
    lengths: np.ndarray
    padded: np.ndarray
    groups: np.ndarray

    @property
    def apart(self) -> np.ndarray:
        """How far it is from every document of the query to the next, (documents,)."""
        first, last = self.begins[:, 0], self.rows[0].stop - self.rows[0].start
        return np.diff(first, append=last)


def blocks(layout: Layout, places: Places, chosen: Sequence[bool], most: int, backend: Backend) -> list[Block]:
    """The documents of the chosen groups as they stand, in blocks of `most` rows where they are shorter; reads values."""
    groups = np.repeat(range(len(layout.groups)), [group.documents for group in layout.groups])
    groups = groups[own := np.asarray(chosen)[groups]]
    starts, lengths = (backend.integers(x)[own][:, list(layout.sides)] for x in places[:2])
    order = np.argsort(starts[:, 0])
    starts, lengths, groups = starts[order], lengths[order], groups[order]
    padded = np.asarray([group.lengths for group in layout.groups])[groups]
    stops = np.maximum.accumulate(starts + lengths, axis=0)
    # A document without rows behind all others is said to start at the last row of theirs.
    starts = np.where(lengths > 0, starts, stops)
    found, first = [], 0
    while first < len(starts):
        fitting = [
            np.searchsorted(of_side, begin + most, "right")
            for of_side, begin in zip(stops.T, starts[first], strict=True)
        ]
        last = max(first + 1, int(min(fitting)))
        begin, end = starts[first], np.maximum(starts[first], stops[last - 1])
        before = np.cumsum(end - begin) - (end - begin)
        rows = tuple(slice(int(a), int(b)) for a, b in zip(begin, end, strict=True))
        some = slice(first, last)
        found.append(Block(rows, starts[some] - begin + before, lengths[some], padded[some], groups[some]))
        first = last
    return found


def together(x: Array, backend: Backend) -> Array:
    """The rows of all documents of a group one after another: (..., documents, L, k) → (..., documents · L, k)."""
    return backend.xp.reshape(x, (*x.shape[:-3], x.shape[-3] * x.shape[-2], x.shape[-1]))


class Returned:
    """Rows of all groups, put back where those of the query are, or of view `of` − 1: (..., n, k), 0 for rows in no group.

    Where arrays are writable each group's are written as it comes: all groups' results beside the whole would be twice the memory.
    """

    def __init__(self, layout: Layout, places: Places, of: int, backend: Backend) -> None:
        self._layout, self._places, self._of, self._backend = layout, places, of, backend
        self._side = layout.sides[of]
        self._found: list[Array] = []
        self._whole: Array = None
        # Threads put rows.
        self._lock = Lock()

    def add(self, piece: Piece, x: Array) -> None:
        """Rows of the next group (..., documents, L, k)."""
        if not self._backend.writable:
            self._found.append(together(x, self._backend))
            return
        n, k = self._layout.rows[self._side], x.shape[-1]
        whole = self._of_all(x, x.shape[:-3])
        places = piece.places(self._of, prod(x.shape[:-3]), n)
        self._backend.write_rows(whole, places, self._backend.xp.reshape(x, (-1, k)))

    def put(self, rows: slice, x: Array) -> None:
        """Rows (..., stop − start, k) from one to another, those of groups before these are added; where arrays are writable."""
        xp, n, k = self._backend.xp, self._layout.rows[self._side], x.shape[-1]
        whole = self._of_all(x, x.shape[:-2])
        xp.reshape(whole[:-1, :], (*x.shape[:-2], n, k))[..., rows, :] = x

    def _of_all(self, x: Array, leading: tuple[int, ...]) -> Array:
        """Room for the rows of all problems, like some of these."""
        xp, n = self._backend.xp, self._layout.rows[self._side]
        with self._lock:
            if self._whole is None:
                make = xp.zeros if self._layout.missing[self._side] else xp.empty
                # The last is for rows that are not there.
                self._whole = make((prod(leading) * n + 1, x.shape[-1]), dtype=x.dtype, device=self._backend.device(x))
                self._leading = leading
            return self._whole

    def rows(self) -> Array:
        """Those of all groups."""
        xp = self._backend.xp
        n = self._layout.rows[self._side]
        if self._whole is not None:
            return self._backend.first_rows(self._whole, (*self._leading, n, self._whole.shape[-1]))
        if self._layout.missing[self._side]:
            self._found.append(xp.zeros_like(self._found[0][..., :1, :]))
        ends = [0, *accumulate(self._layout.rows)]
        own = self._places.places[ends[self._side] : ends[self._side + 1], 0]
        return xp.take(xp.concat(self._found, axis=-2), own, axis=-2)


def rows_at_once(numbers: int, leading: Sequence[int], dtype: object, backend: Backend, blocks: int = 1) -> int | None:
    """Rows of a group where each of them, in every problem of a batch, has so many `numbers` at a time; of some blocks at most."""
    if backend.compiles:
        return None
    fitting = 2 * backend.workspace // (backend.itemsize(dtype) * max(1, numbers))
    return max(1, min(blocks * backend.most_rows, fitting) // prod(leading))
