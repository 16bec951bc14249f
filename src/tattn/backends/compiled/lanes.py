"""Vectors of a processor as values of compiled loops, which keep them in registers from one round of a loop to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import llvmlite.binding as llvm  # type: ignore[import-untyped]
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, models, register_model

# Numbers of lanes, in instructions.
_NUMBER = ir.IntType(32)


def _bytes() -> int:
    """Of a vector: the widest of the processor, or as many as two of its short ones have."""
    try:
        return 64 if llvm.get_host_cpu_features().get("avx512f") else 32
    except RuntimeError:
        # What the processor can do is not known.
        return 32


BYTES = _bytes()


class Lanes(types.Type):
    """A vector of numbers of a dtype."""

    def __init__(self, dtype: Any) -> None:
        self.dtype, self.count = dtype, BYTES * 8 // dtype.bitwidth
        super().__init__(f"Lanes({dtype}, {self.count})")


@register_model(Lanes)
class _Model(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Lanes) -> None:
        super().__init__(manager, kind, ir.VectorType(manager.lookup(kind.dtype).get_value_type(), kind.count))


@intrinsic  # type: ignore[untyped-decorator]
def lanes(_: Any, x: Any) -> Any:
    """How many numbers of an array's dtype a vector has."""
    count = Lanes(x.dtype).count
    return types.intp(x), lambda context, *__: context.get_constant(types.intp, count)


def _place(context: Any, builder: Any, kinds: Any, given: Any, vector: Any) -> Any:
    """The address of a vector that begins at an entry of an array of one dimension."""
    array = context.make_array(kinds[0])(context, builder, given[0])
    return builder.bitcast(builder.gep(array.data, [given[1]]), vector.as_pointer())


def _picked(builder: Any, x: Any, y: Any, numbers: Sequence[int]) -> Any:
    """Lanes of two vectors, one behind the other."""
    return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(_NUMBER, len(numbers)), list(numbers)))


@intrinsic  # type: ignore[untyped-decorator]
def load(_: Any, x: Any, at: Any) -> Any:
    """The vector that begins at an entry of an array (n,)."""
    kind = Lanes(x.dtype)

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        place = _place(context, builder, signature.args, given, context.get_value_type(kind))
        return builder.load(place, align=x.dtype.bitwidth // 8)

    return kind(x, types.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def store(_: Any, x: Any, at: Any, vector: Any) -> Any:
    """A vector into an array (n,), from an entry on."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        place = _place(context, builder, signature.args, given, given[2].type)
        builder.store(given[2], place, align=x.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(x, types.intp, vector), generate


@intrinsic  # type: ignore[untyped-decorator]
def spread(_: Any, x: Any) -> Any:
    """The same number in every lane."""
    kind = Lanes(x)

    def generate(context: Any, builder: Any, __: Any, given: Any) -> Any:
        nothing = ir.Constant(context.get_value_type(kind), ir.Undefined)
        one = builder.insert_element(nothing, given[0], ir.Constant(_NUMBER, 0))
        return _picked(builder, one, nothing, [0] * kind.count)

    return kind(x), generate


@intrinsic  # type: ignore[untyped-decorator]
def plus(_: Any, x: Any, y: Any) -> Any:
    """The sum x + y."""
    return x(x, x), lambda context, builder, signature, given: builder.fadd(*given)


@intrinsic  # type: ignore[untyped-decorator]
def times(_: Any, x: Any, y: Any) -> Any:
    """The product x y."""
    return x(x, x), lambda context, builder, signature, given: builder.fmul(*given)


@intrinsic  # type: ignore[untyped-decorator]
def add_totals(_: Any, x: Any, at: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Four entries of an array (n,), one after another, get the sums of all lanes of four vectors."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        count = a.count

        def joined(one: Any, other: Any, of_four: Sequence[int]) -> Any:
            """Lanes of one and of the other side by side, of each four these and then those two behind them, added up."""
            numbers = [four + lane for four in range(0, count, 4) for lane in of_four]
            firsts, lasts = numbers, [number + 2 for number in numbers]
            return builder.fadd(_picked(builder, one, other, firsts), _picked(builder, one, other, lasts))

        first, last = (joined(given[i], given[i + 1], (0, count, 1, count + 1)) for i in (2, 4))
        found = joined(first, last, (0, 1, count, count + 1))
        while count > 4:
            count //= 2
            low, high = range(count), range(count, 2 * count)
            found = builder.fadd(_picked(builder, found, found, low), _picked(builder, found, found, high))
        place = _place(context, builder, signature.args, given, found.type)
        before = builder.load(place, align=x.dtype.bitwidth // 8)
        builder.store(builder.fadd(before, found), place, align=x.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(x, types.intp, a, b, c, d), generate
