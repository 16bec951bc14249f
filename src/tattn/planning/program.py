"""Attention as compilers take it: with a plan as a program that is one operator, and by the compiled loops of another library."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from ..arrays import broadcast_leading
from ..backends import Array, Backend
from ..backends.operations import HOSTED, PROGRAMS, Hosted, Program
from ..checks import documents_of
from ..methods import Banded, Call, Exact, Packed, Polynomial, backward, forward, told_error
from ..methods.certificate import COLUMNS, ERROR
from ..plans import Plan
from ..stored import plan_of_facts
from .choice import packed
from .selection import Unread

ATTENTION, PACKED = "attention", "packed attention"


@lru_cache(maxsize=256)
def written(plan: Plan | tuple[Any, ...], certify: bool, decays: bool = False) -> str:
    """A plan or the fields of an `Unread`, whether errors of rows are asked for and whether keys decay, as text; "" for a method
    that a text does not tell.
    """
    plan = Unread(*plan).plan() if isinstance(plan, tuple) else plan
    facts = plan.facts()
    try:
        told = plan_of_facts(facts)
    except ValueError:
        return ""
    return json.dumps([certify, facts, *([True] if decays else [])]) if told.algorithm == plan.algorithm else ""


@lru_cache(maxsize=256)
def read(text: str) -> Call:
    """The call that `written` wrote of."""
    certify, facts, *decays = json.loads(text)
    plan = plan_of_facts(facts)
    order = plan.problem.order._replace(decays=bool(decays))
    call = Call(plan.algorithm, plan.order - 1, plan.scale, order, certify, plan.problem.chain)
    call = call._replace(channels=plan.channels)
    return call._replace(stated=(plan.error, plan.grad_error)) if plan.certified else call


def error_column(plan: Plan) -> int:
    """Where the errors of rows stand in what is kept of a certified call: in a certificate, or behind one column."""
    return ERROR if plan.series == "banded" else 1


def _banded(call: Call) -> bool:
    return isinstance(call.method, Banded)


def _forward(call: Call, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    """Output, lse and what the adjoint needs, (..., n, ·), with the errors of rows in a column if they are asked for."""
    out, lse, kept = forward(call, backend, arrays)[:3]
    if call.certify and not _banded(call):
        (told,) = told_error(call, backend, arrays)
        kept = backend.xp.concat([kept, backend.xp.broadcast_to(told, tuple(kept.shape))], axis=-1)
    return out, lse, kept


def _backward(call: Call, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    """Gradients of query, keys and values, and of weights and factors if there are."""
    *given, kept, grad_out, grad_lse = arrays
    if call.certify and not _banded(call):
        kept = kept[..., :1]  # type: ignore[index]
    return backward(call, backend, (*given, kept, grad_out, grad_lse))


def _shapes(call: Call, arrays: Sequence[Array | None]) -> Sequence[tuple[int, ...]]:
    """Of output, lse and what is kept."""
    query, values = arrays[0], arrays[1 + call.views]
    rows = (*broadcast_leading(*arrays), query.shape[-2])  # type: ignore[union-attr]
    columns = (COLUMNS if _banded(call) else 2) if call.certify else 1
    return (*rows, values.shape[-1]), (*rows, 1), (*rows, columns)  # type: ignore[union-attr]


class _Packed(NamedTuple):
    """A call for every document, and its plan."""

    call: Call
    plan: Plan

    def parts(self, arrays: Sequence[Array | None]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
        """The arrays of the call, offsets of query and every view, and what follows."""
        first = 1 + self.call.groups * self.call.views
        last = first + 1 + self.call.views
        return arrays[:first], arrays[first:last], arrays[last:]

    def work(self, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Call, tuple[Array | None, ...]]:
        """What to compute, once offsets can be read."""
        given, offsets, behind = self.parts(arrays)
        lengths = [x.shape[-2] for x in given[: 1 + self.call.views]]
        documents = documents_of(offsets, lengths, self.call.order, backend)
        call, found = packed(self.call, self.plan, documents, backend, given)
        return call, (*found, *behind)


@lru_cache(maxsize=256)
def _read_packed(text: str) -> _Packed:
    return _Packed(read(text), plan_of_facts(json.loads(text)[1]))


def _forward_packed(of: _Packed, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    call, given = of.work(backend, arrays)
    return forward(call, backend, given)[:3]


def _backward_packed(of: _Packed, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    call, given = of.work(backend, arrays)
    return backward(call, backend, given)


def _shapes_packed(of: _Packed, arrays: Sequence[Array | None]) -> Sequence[tuple[int, ...]]:
    return _shapes(of.call, of.parts(arrays)[0])


PROGRAMS[PACKED] = Program(written, _read_packed, _forward_packed, _backward_packed, _shapes_packed)
PROGRAMS[ATTENTION] = Program(written, read, _forward, _backward, _shapes)


def _compiled(call: Call, backend: Backend, arrays: Sequence[Array | None]) -> bool:
    """Whether compiled loops compute most of it."""
    method = call.method.inner if isinstance(call.method, Packed) else call.method
    return isinstance(method, (Exact, Polynomial)) and method.compiled(call.operands(backend, arrays)[0])


def _outputs(call: Call, backend: Backend, arrays: Sequence[Array | None]) -> list[tuple[tuple[int, ...], Any]]:
    # The error of a row that is stated for all is kept where documents differ in it.
    told = call.certify and isinstance(call.method, Packed)
    return [(shape, None) for shape in _shapes(call._replace(certify=told), arrays)]


def _gradients(call: Call, backend: Backend, arrays: Sequence[Array | None]) -> list[tuple[tuple[int, ...], Any]]:
    return [(tuple(x.shape), x.dtype) for x in call.operands(backend, arrays)[0].targets]


HOSTED[forward], HOSTED[backward] = Hosted(_compiled, _outputs), Hosted(_compiled, _gradients)
