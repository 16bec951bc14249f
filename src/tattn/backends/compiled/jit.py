"""numba, where it is installed and works."""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

import numba


def compiled(fastmath: Set[str] = frozenset()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A function as machine code, compiled for the arrays of a call and kept on disk where there is a place for it."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        options: dict[str, Any] = {"nogil": True, "fastmath": set(fastmath)}
        try:
            found: Callable[..., Any] = numba.njit(cache=True, **options)(function)
        except RuntimeError:
            # No folder that can be written to.
            found = numba.njit(**options)(function)
        return found

    return decorate
