"""What a method of computing attention is, and the functions that a library compiles and differentiates for all of them.

A method is a frozen value without arrays: with what else does not change from call to call (`Call`) it is the static argument
of a compiler. Arrays are flat here, as libraries bind gradients, and have names from here on.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, prod
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

from ..arrays import in_parts, sum_to_leading
from ..backends import Array, Backend
from ..backends.operations import CHAIN
from ..operands import EVERY_ROW, REAL, Attended, Gradients, Operands, Order, Upstream
from ..problem import Cost, Guarantee, Problem, ScoreRange
from .gradient_bounds import told_error as told_of_values


@runtime_checkable
class Method(Protocol):
    """A way to compute attention, its gradient, and bounds of the errors of both; frozen, hashable, free of arrays."""

    name: ClassVar[str]  # `Plan.method`
    extra: ClassVar[int]  # arrays that it takes besides query, keys, values and masks

    def forward(self, operands: Operands, certify: bool = False) -> Attended:
        """Output, lse and what the adjoint needs; and the bound of every row, if it `certify`-es and finds one on the way."""

    def backward(self, operands: Operands, attended: Attended, upstream: Upstream) -> Gradients:
        """The exact derivative of `forward`, in the dtype of the computation."""

    def gradient_bounds(
        self, operands: Operands, attended: Attended, upstream: Upstream, stated: tuple[float, float]
    ) -> Gradients:
        """Bounds of the errors of all gradients, where (error, grad_error) are `stated` for all rows alike."""

    def row_errors(self, kept: Array) -> Array | None:
        """The bound of the error of every row (..., n) that came with the answer; None where one is stated for all rows."""

    def guarantee(self, problem: Problem, scores: ScoreRange) -> Guarantee:
        """What is promised of the answer before anything is computed; ValueError for a problem that it cannot compute."""

    def cost(self, problem: Problem) -> Cost:
        """Operations and bytes of a forward call."""

    def at_a_time(self, operands: Operands) -> int:
        """How many problems to compute at a time."""


class Call(NamedTuple):
    """All that a computation depends on besides arrays; hashable.

    `certify`: whether bounds come with the answer; `chain`: terms of the longest chain of additions that the plan counts with;
    `stated`: (error, grad_error) of all rows, for bounds; `wanted`: the gradients asked for, as in `Operands`.
    """

    method: Method
    views: int
    scale: float
    order: Order = EVERY_ROW
    certify: bool = False
    chain: int = CHAIN
    stated: tuple[float, float] = (inf, inf)
    channels: str = REAL
    wanted: tuple[bool, ...] = ()

    @property
    def groups(self) -> int:
        """How many arrays come before those that the method takes besides, for each view: keys, values, masks and decays."""
        return 3 + self.order.decays

    def asking(self, wanted: Sequence[bool]) -> Call:
        """The call where only some of the gradients of query, keys, values and weights are asked for."""
        return self._replace(wanted=tuple(wanted[: 1 + self.groups * self.views]))

    def operands(
        self, backend: Backend, arrays: Sequence[Array | None], extra: int | None = None
    ) -> tuple[Operands, tuple[Array, ...]]:
        """Query, views and what the method takes besides out of flat arrays; and what follows."""
        extra = self.method.extra if extra is None else extra
        found, behind = Operands.of(backend.within(self.chain), arrays, self.views, self.scale, self.order, extra)
        return found._replace(channels=self.channels), behind


def forward(call: Call, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    """Output (..., n, dv), lse (..., n, 1), and what the adjoint needs besides."""
    extra = len(arrays) - 1 - call.groups * call.views

    def attend(part: Sequence[Array | None]) -> tuple[Array, ...]:
        out, lse, kept = call.method.forward(call.operands(backend, part, extra)[0], call.certify)
        return out, lse, *kept

    limit = call.method.at_a_time(call.operands(backend, arrays, extra)[0])
    results = in_parts(attend, limit, (None, None, None), backend, arrays)
    # What the adjoint can do without is kept where it is smaller than what the adjoint gets anyway.
    kept, inputs = (sum(prod(a.shape) for a in x if a is not None) for x in (results[3:], arrays))
    return results if kept <= inputs else results[:3]


def backward(call: Call, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    """Gradients of query, keys, values and, if there are, weights, in their shapes and dtypes, from the arrays of `forward`, its
    output, what it kept and the gradients of output and lse.
    """

    def adjoint(part: Sequence[Array | None]) -> tuple[Array, ...]:
        operands, (out, *kept, grad_out, grad_lse) = call.operands(backend, part)
        attended, upstream = Attended(out, None, tuple(kept)), Upstream(grad_out, grad_lse)
        return call.method.backward(operands._replace(wanted=call.wanted), attended, upstream).flat()

    operands, _ = call.operands(backend, arrays)
    grads = in_parts(adjoint, call.method.at_a_time(operands), operands.targets, backend, arrays)
    # A mask may have leading dimensions that its rows lack; and narrow dtypes only now that all sums are over.
    return tuple(
        backend.cast(sum_to_leading(g, t.shape[:-2], backend), t.dtype)
        for g, t in zip(grads, operands.targets, strict=True)
    )


def gradient_bounds(call: Call, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    """Bounds of the errors of all gradients in their shapes, from what `backward` takes, the first of what was kept alone."""

    def bound(part: Sequence[Array | None]) -> tuple[Array, ...]:
        operands, (out, kept, grad_out, grad_lse) = call.operands(backend, part)
        attended, upstream = Attended(out, None, (kept,)), Upstream(grad_out, grad_lse)
        return call.method.gradient_bounds(operands, attended, upstream, call.stated).flat()

    operands, _ = call.operands(backend, arrays)
    return in_parts(bound, call.method.at_a_time(operands), operands.targets, backend, arrays)


def told_error(call: Call, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array]:
    """The error that is stated for all rows, infinite for a problem whose values no bound serves: (..., 1, 1)."""
    return (told_of_values(call.operands(backend, arrays)[0], call.stated[0]),)
