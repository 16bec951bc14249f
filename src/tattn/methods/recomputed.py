"""The banded polynomial for most query rows, and the definition for those that it bounds too loosely.

Query rows are independent, so the output of the chosen rows is exact, and a gradient is the sum of that of the other
rows through the polynomial and that of the chosen rows through softmax. Operands carry two more arrays: the chosen rows
(..., k, 1), and for each row (..., n, 1) its place in the chosen ones followed by all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..arrays import broadcast_leading, gather_rows, sum_to_leading
from ..backends import Array, Backend
from ..engines import tuples
from ..operands import Attended, Gradients, Operands, Upstream
from ..problem import Cost, Guarantee, Problem, ScoreRange
from .banded import Banded
from .certificate import ERROR
from .gradient_bounds import stated_bounds


@dataclass(frozen=True)
class Recomputed:
    """A share of the rows exactly, and all others by `inner`, norm bands; `errors` are (error, grad_error) of the exact ones."""

    inner: Banded
    errors: tuple[float, float]
    share: float

    name: ClassVar[str] = "polynomial"
    extra: ClassVar[int] = 2

    def forward(self, operands: Operands, certify: bool = False) -> Attended:
        """Output, lse, and kept (..., n, ·): the columns of `Banded`, and lse once more.

        Where output, lse and columns of `Banded` are known, they follow the chosen rows.
        """
        backend = operands.backend
        xp = backend.xp
        chosen, place, *known = operands.extra
        if known:
            out, lse, rest = known
        else:
            out, lse, (rest, *_) = self.inner.forward(operands, certify)
        out_chosen, lse_chosen = tuples.forward(_chosen(operands, chosen))
        one = xp.ones_like(lse_chosen)
        columns = [one] * rest.shape[-1]
        if len(columns) > 1:
            columns[ERROR] = self.errors[0] * one
        rest_chosen = xp.concat(columns, axis=-1)
        out, lse, rest = (
            _placed(a, b, place, backend) for a, b in ((out_chosen, out), (lse_chosen, lse), (rest_chosen, rest))
        )
        return Attended(out, lse, (xp.concat([rest, lse], axis=-1),))

    def backward(self, operands: Operands, attended: Attended, upstream: Upstream) -> Gradients:
        """Gradients of query, keys and values, each in its own shape, in the dtype of the computation."""
        backend, (chosen, place) = operands.backend, operands.extra
        through_banded = self.inner.backward(operands, *_others(place, chosen, attended, upstream, backend))
        (rest,) = attended.kept
        out, lse, *own = (gather_rows(x, chosen, backend) for x in (attended.out, rest[..., -1:], *upstream))
        through_exact = tuples.backward(_chosen(operands, chosen), out, lse, Upstream(*own))
        return _added(operands, through_banded, through_exact)

    def gradient_bounds(
        self, operands: Operands, attended: Attended, upstream: Upstream, stated: tuple[float, float]
    ) -> Gradients:
        """From the certificate of every row, and from the errors of the exact ones."""
        backend, (chosen, place) = operands.backend, operands.extra
        others = _others(place, chosen, attended, upstream, backend)
        through_banded = self.inner.gradient_bounds(operands, *others, stated)
        own = Upstream(*(gather_rows(g, chosen, backend) for g in upstream))
        return _added(operands, through_banded, stated_bounds(_chosen(operands, chosen), own, self.errors))

    def row_errors(self, kept: Array) -> Array | None:
        """The bound of the error of every row (..., n), from what is kept of a certified call."""
        return self.inner.row_errors(kept)

    def guarantee(self, problem: Problem, scores: ScoreRange) -> Guarantee:
        """That of the banded polynomial, by bounds that come with the answer."""
        return self.inner.guarantee(problem, scores)

    def cost(self, problem: Problem) -> Cost:
        """That of the banded polynomial, and a share of the exact scores."""
        inner, exact = self.inner.cost(problem), tuples.cost(problem)
        return Cost(inner.flops + self.share * exact.flops, max(inner.bytes, exact.bytes))

    def at_a_time(self, operands: Operands) -> int:
        """How many problems to compute at a time."""
        return self.inner.at_a_time(operands)


def _chosen(operands: Operands, chosen: Array) -> Operands:
    """The operands with the chosen rows of the query alone."""
    return operands._replace(query=gather_rows(operands.query, chosen, operands.backend), extra=())


def _others(
    place: Array, chosen: Array, attended: Attended, upstream: Upstream, backend: Backend
) -> tuple[Attended, Upstream]:
    """What the banded adjoint takes: no gradient comes from the chosen rows."""
    keep = place >= chosen.shape[-2]
    (rest,) = attended.kept
    gradients = Upstream(*(backend.xp.where(keep, g, 0.0) for g in upstream))
    return Attended(attended.out, None, (rest[..., :-1],)), gradients


def _added(operands: Operands, through_banded: Gradients, through_exact: Gradients) -> Gradients:
    """Sums of what comes through both ways; the query's chosen rows (..., k, d) in their places."""
    backend, q, (chosen, place) = operands.backend, operands.query, operands.extra
    leading = broadcast_leading(q, chosen)
    dq_chosen, *others = through_exact.flat()
    zeros = backend.xp.zeros((*leading, *q.shape[-2:]), dtype=dq_chosen.dtype, device=backend.device(q))
    dq = sum_to_leading(_placed(dq_chosen, zeros, place, backend), q.shape[:-2], backend)
    added = [a + b for a, b in zip(through_banded.flat(), (dq, *others), strict=True)]
    return Gradients.of(added, len(operands.views))


def _placed(chosen: Array, every: Array, place: Array, backend: Backend) -> Array:
    """Rows of `every` (..., n, k), with the chosen ones in their places."""
    return gather_rows(backend.xp.concat([chosen, every], axis=-2), place, backend)
