"""Documents one after another in the rows: another method for each of them, in batches of documents of about the same length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf, prod
from threading import Event
from typing import ClassVar

from ..arrays import sum_of, times_power
from ..backends import Array, Backend
from ..backends.progress import told
from ..backends.threads import MOST_THREADS, even_parts
from ..documents import Block, Layout, Piece, Places, Returned, blocks, pieces, together
from ..engines.in_place import Found, InPlace
from ..features.balance import over_largest, raised
from ..operands import Attended, Gradients, Operands, Upstream
from ..problem import Cost, Guarantee, Problem, ScoreRange
from . import method
from .gradient_bounds import told_error
from .polynomial import Polynomial


@dataclass(frozen=True)
class Packed:
    """Attention within each document of a layout by `inner`; operands carry the `Places`.

    `stated` are (error, grad_error) of all rows, where `inner` does not bound each.
    """

    inner: method.Method
    layout: Layout
    stated: tuple[float, float] = (inf, inf)

    name: ClassVar[str] = "packed"
    extra: ClassVar[int] = 3

    def forward(self, operands: Operands, certify: bool = False) -> Attended:
        """Output, lse, and kept: what `inner` keeps of every row, with the error stated for it behind if it is to `certify`; and
        what it keeps besides of every group, one after another.
        """
        backend, rests = self._backend(operands), list[list[Array]]()
        call, found = self._call(operands, certify), [self._returned(operands, 0) for _ in range(3)]
        # A certificate is told of each document of a group.
        standing, in_place = self._standing(operands, certify)
        if in_place is not None:
            wholes = [(0, whole) for whole in found]
            standing = self._share(in_place.forward, standing, in_place.rows, wholes, operands)
        for piece, stands in zip(self._pieces(operands), standing, strict=True):
            if stands:
                rests.append([])
                continue
            arrays, powers = self._arrays(piece, operands)
            out, lse, first, *rest = method.forward(call, backend, arrays)
            lse = raised(lse, powers) if powers else lse
            if certify and self.inner.row_errors(first) is None:
                told = told_error(call.operands(backend, arrays)[0], self.stated[0])
                first = backend.xp.concat([first, backend.xp.broadcast_to(told, tuple(first.shape))], axis=-1)
            for whole, x in zip(found, (out, lse, first), strict=True):
                whole.add(piece, x)
            rests.append([together(x, backend) for x in rest])
        out, lse, first = (whole.rows() for whole in found)
        # As many arrays of every group: without rows of the groups that keep nothing.
        full = next(filter(None, rests), [])
        rests = [rest or [x[..., :0, :] for x in full] for rest in rests]
        return Attended(out, lse, (first, *(x for rest in rests for x in rest)))

    def backward(self, operands: Operands, attended: Attended, upstream: Upstream) -> Gradients:
        """The exact derivative of `forward`."""
        first, *rest = attended.kept
        if first.shape[-1] > 1 and self.inner.row_errors(first) is None:
            # Behind what `inner` keeps stands the error that is stated.
            first = first[..., :1]
        backend, count = self._backend(operands), len(rest) // len(self.layout.groups)
        standing, in_place = self._standing(operands)
        wholes = self._wholes(operands, 1 + 2 * len(operands.views)) if in_place is not None else []
        if in_place is not None:
            of_block = partial(in_place.backward, attended=Attended(attended.out, None, (first,)), upstream=upstream)
            standing = self._share(of_block, standing, in_place.rows, wholes, operands)

        def of_groups() -> Iterator[tuple[Piece, tuple[Array, ...]]]:
            for number, (piece, stands) in enumerate(zip(self._pieces(operands), standing, strict=True)):
                if stands:
                    continue
                # Rows that are not there repeat one that is, and add nothing to gradients.
                of_rows = [*(piece.taken(x, 0) for x in (attended.out, first)), *(piece.cleaned(x) for x in upstream)]
                kept = [x for x in rest[number * count : (number + 1) * count] if x.shape[-2]]
                own = [self._apart(x, piece, operands) for x in kept]
                given, powers = self._arrays(piece, operands)
                arrays = (*given, *of_rows[:2], *own, *of_rows[2:])
                flat = method.backward(self._call(operands), backend, arrays)
                yield piece, self._of_weights(flat, powers, operands)

        return self._gradients(of_groups(), operands, wholes)

    def gradient_bounds(
        self, operands: Operands, attended: Attended, upstream: Upstream, stated: tuple[float, float]
    ) -> Gradients:
        """Those of `inner` in every document."""
        call = self._call(operands, certify=True)._replace(stated=stated)

        def of_groups() -> Iterator[tuple[Piece, tuple[Array, ...]]]:
            for piece in self._pieces(operands):
                rows = (attended.out, attended.kept[0])
                of_rows = [*(piece.taken(x, 0) for x in rows), *(piece.cleaned(x) for x in upstream)]
                given, powers = self._arrays(piece, operands)
                bounds = method.gradient_bounds(call, operands.backend, (*given, *of_rows))
                yield piece, self._of_weights(bounds, powers, operands)

        return self._gradients(of_groups(), operands)

    def row_errors(self, kept: Array) -> Array | None:
        """The bound of the error of every row (..., n)."""
        return self.inner.row_errors(kept)

    def guarantee(self, problem: Problem, scores: ScoreRange) -> Guarantee:
        """That of `inner`."""
        return self.inner.guarantee(problem, scores)

    def cost(self, problem: Problem) -> Cost:
        """That of `inner`."""
        return self.inner.cost(problem)

    def at_a_time(self, operands: Operands) -> int:
        """How many packings to compute at a time: documents in them are what is computed at a time."""
        return 1 << 62

    def _backend(self, operands: Operands) -> Backend:
        """The backend for one group of all."""
        return operands.backend.among(max(operands.lengths) * prod(operands.leading))

    def _call(self, operands: Operands, certify: bool = False) -> method.Call:
        """What `inner` computes of a group."""
        order, chain = operands.order, operands.backend.chain
        call = method.Call(self.inner, len(operands.views), operands.scale, order, certify, chain)
        return call._replace(channels=operands.channels, wanted=operands.wanted)

    def _arrays(self, piece: Piece, operands: Operands) -> tuple[list[Array | None], list[Array]]:
        """Query, keys, values, masks and decays of a group; weights by the largest of each document, with log2 of what divided
        them.
        """
        arrays = piece.arrays(operands.flat())
        if not operands.weights:
            return arrays, []
        others, weights = arrays[: -len(operands.views)], arrays[-len(operands.views) :]
        divided = [over_largest(w, operands.backend) for w in weights]
        decays = [x[..., None, :, :] for x in operands.decays]
        return [*others, *(w for w, _ in divided), *decays], [power for _, power in divided]

    def _of_weights(self, flat: tuple[Array, ...], powers: list[Array], operands: Operands) -> tuple[Array, ...]:
        """Gradients, or bounds of them, of all rows' weights from those of each document's."""
        if not powers:
            return flat
        m = len(powers)
        others, own, decays = flat[: 1 + 2 * m], flat[1 + 2 * m : 1 + 3 * m], flat[1 + 3 * m :]
        return (*others, *(times_power(g, -p, operands.backend) for g, p in zip(own, powers, strict=True)), *decays)

    def _pieces(self, operands: Operands) -> Iterator[Piece]:
        return pieces(self.layout, Places(*operands.extra), operands.backend)

    def _returned(self, operands: Operands, of: int) -> Returned:
        return Returned(self.layout, Places(*operands.extra), of, operands.backend)

    def _apart(self, x: Array, piece: Piece, operands: Operands) -> Array:
        """What `together` put one after another, of every document of a group."""
        count = piece.group.documents
        return operands.backend.xp.reshape(x, (*x.shape[:-2], count, x.shape[-2] // count, x.shape[-1]))

    def _standing(self, operands: Operands, certify: bool = False) -> tuple[list[bool], InPlace | None]:
        """Which groups consist of documents that loops compute where they stand, and these loops if there are any such."""
        groups, inner = self.layout.groups, self.inner
        none: tuple[list[bool], None] = [False] * len(groups), None
        if certify or not isinstance(inner, Polynomial):
            return none
        found = InPlace.of(operands, inner.expansion, self.layout)
        if found is None:
            return none
        dims, causal = (operands.query.shape[-1], operands.values[0].shape[-1]), operands.order.causal
        standing = [max(g.lengths) <= found.most and (causal or not inner.by_scores(g.lengths, *dims)) for g in groups]
        return standing, found if any(standing) else None

    def _share(
        self,
        of_block: Callable[[Block], Found],
        standing: Sequence[bool],
        most: int,
        wholes: Sequence[tuple[int, Returned]],
        operands: Operands,
    ) -> list[bool]:
        """Put what is computed `of_block` in its places, of the documents of some groups, by several threads.

        Back comes which of the groups need nothing else.
        """
        backend, stop, lost = operands.backend, Event(), set[int]()
        found = blocks(self.layout, Places(*operands.extra), standing, most, backend)

        def put(block: Block, _: Array) -> None:
            found = of_block(block)
            lost.update(found.lost)
            for (of, whole), x in zip(wholes, found.rows, strict=True):
                whole.put(block.rows[of], x)

        body = told(put, sum(block.rows[0].stop - block.rows[0].start for block in found))

        def some(own: Sequence[Block]) -> None:
            for block in own:
                if not stop.is_set():
                    body(block, operands.query[..., block.rows[0], :])

        count = max(1, min(len(found), MOST_THREADS, backend.threads()))
        tasks = [partial(some, found[first:last]) for first, last in even_parts(len(found), count)]
        if count > 1:
            backend.share(tasks, stop)
        else:
            tasks[0]()
        return [stands and group not in lost for group, stands in enumerate(standing)]

    def _wholes(self, operands: Operands, count: int) -> list[tuple[int, Returned]]:
        """Room for so many gradients: of which rows each is, those of the query, 0, or of a view from 1 on."""
        sides = [1 + (i - 1) % len(operands.views) if i else 0 for i in range(count)]
        return [(of, self._returned(operands, of)) for of in sides]

    def _gradients(
        self,
        of_groups: Iterator[tuple[Piece, tuple[Array, ...]]],
        operands: Operands,
        wholes: list[tuple[int, Returned]] | None = None,
    ) -> Gradients:
        """Gradients of all rows, or bounds of these, from those of the groups, and from what is in `wholes` already."""
        of_decays = []
        for piece, flat in of_groups:
            of_rows = len(flat) - len(operands.decays)
            wholes = wholes or self._wholes(operands, of_rows)
            for (_, whole), x in zip(wholes, flat, strict=False):
                whole.add(piece, x)
            of_decays.append([x[..., 0, :, :] for x in flat[of_rows:]])
        # Documents share the factors by which keys decay.
        decays = (sum_of(of_all) for of_all in zip(*of_decays, strict=True))
        return Gradients.of([*(whole.rows() for _, whole in wholes or ()), *decays], len(operands.views))
