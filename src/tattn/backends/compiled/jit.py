"""numba, where it is installed and works."""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

import numba


def compiled(fastmath: Set[str] = frozenset(), leaf: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A function as machine code, compiled for the arrays of a call and kept on disk where there is a place for it.

    `leaf`: it makes no arrays. Slices then go uncounted: counting their references costs as much as loops over them.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        options: dict[str, Any] = {"nogil": True, "fastmath": set(fastmath)}
        try:
            return _kept(function, _nrt=not leaf, **options)
        except KeyError:
            # The option is numba's own, and may be gone.
            return _kept(function, **options)

    return decorate


def _kept(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """A function compiled with these options, on disk if that may be."""
    try:
        found: Callable[..., Any] = numba.njit(cache=True, **options)(function)
    except RuntimeError:
        # There is no folder that can be written to.
        found = numba.njit(**options)(function)
    return found
