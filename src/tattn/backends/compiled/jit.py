"""numba, where it is installed and works."""

from __future__ import annotations

from collections.abc import Callable, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils
from numba.extending import intrinsic

# The files of loops: code on disk is of these.
SOURCES = tuple(
    (file.name, (found := file.stat()).st_mtime_ns, found.st_size)
    for file in sorted(Path(__file__).parent.glob("*.py"))
)


@intrinsic  # type: ignore[untyped-decorator]
def fused(_: Any, x: Any, y: Any, z: Any) -> Any:
    """The sum x y + z with one rounding where the processor has an instruction for it, and two elsewhere.

    A compiler makes one itself of a product that is added once, and not where it is added to two sums.
    """

    def generate(_: Any, builder: Any, __: Any, given: Any) -> Any:
        kind = given[0].type
        number = kind.element if isinstance(kind, ir.VectorType) else kind
        lanes = f"v{kind.count}" if isinstance(kind, ir.VectorType) else ""
        name = f"llvm.fmuladd.{lanes}{number.intrinsic_name}"
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 3), name)
        return builder.call(function, given)

    return z(z, z, z), generate


def compiled(
    fastmath: Set[str] = frozenset(), leaf: bool = True, inline: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A function as machine code, compiled for the arrays of a call and kept on disk where there is a place for it.

    `leaf`: it makes no arrays. Slices then go uncounted: counting their references costs as much as loops over them.
    `inline`: it becomes part of its callers, for short loops: an array is seven arguments.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        options: dict[str, Any] = {"nogil": True, "fastmath": set(fastmath), "forceinline": inline}
        try:
            return _kept(function, _nrt=not leaf, **options)
        except KeyError:
            # The option is numba's own, and may be gone.
            return _kept(function, **options)

    return decorate


def _kept(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """A function compiled with these options, on disk if that may be."""
    try:
        found = numba.njit(cache=True, **options)(function)
    except RuntimeError:
        # There is no folder that can be written to.
        return numba.njit(**options)(function)  # type: ignore[no-any-return]
    # numba compiles anew what stands in a file that was changed, and not what calls it from another one.
    with suppress(AttributeError):
        found._cache._cache_file._source_stamp = SOURCES
    return found  # type: ignore[no-any-return]
