"""One small file for each array library, looked up by the arrays of a call.

A library is imported only if an array of it arrives. Other libraries plug in through the entry point group
``tattn.backends``. The name of the entry is the top-level module that defines the library's array type. Its value is a
`Backend` instance.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import array_api_compat

from .base import Array, Backend, lacks
from .compiled import Kernels, kernels
from .tables import memoized

__all__ = ["Array", "Backend", "Kernels", "backend_of", "kernels", "needed"]


@contextmanager
def needed(library: str, by: str) -> Iterator[None]:
    """An import of a library that something of `tattn` rests on: where it is missing, the error says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        text = f"{by} needs {library}, which is not installed: pip install 'tattn[{library}]'"
        raise ModuleNotFoundError(text, name=library) from error


def backend_of(array: Any) -> Backend | None:
    """The backend for an array, or None if it is no array of the array API standard."""
    for cls in type(array).__mro__:
        found = _by_module(cls.__module__.partition(".")[0])
        # A library's modules define other classes than arrays, which those of other libraries may inherit from.
        if found is not None and found.is_array(array):
            return found
    if not array_api_compat.is_array_api_obj(array):
        return None
    return _generic(array_api_compat.array_namespace(array))


def _by_module(module: str) -> Backend | None:
    """The backend for array types that a top-level module defines."""
    # Import statements, since torch.compile follows these and not importlib.
    if module == "numpy":
        from .numpy import BACKEND as numpy_backend

        return numpy_backend
    if module == "torch":
        from .torch import BACKEND as torch_backend

        return torch_backend
    if module in ("jax", "jaxlib"):
        from .jax import BACKEND as jax_backend

        return jax_backend
    if module == "cupy":
        from .cupy import BACKEND as cupy_backend

        return cupy_backend
    if module == "dask":
        from .dask import BACKEND as dask_backend

        return dask_backend
    if module == "array_api_strict":
        from .array_api_strict import BACKEND as strict_backend

        return strict_backend
    return _plugged(module)


@memoized
def _plugged(module: str) -> Backend | None:
    """The backend that an installed package offers for its arrays."""
    # Slow to import, and needed for libraries from outside only.
    from importlib.metadata import entry_points

    for entry in entry_points(group="tattn.backends", name=module):
        plugged = entry.load()
        if not isinstance(plugged, Backend):
            raise TypeError(
                f"entry point {entry.value!r} of group 'tattn.backends' should be a tattn.backends.Backend, "
                f"got {type(plugged).__name__}"
            )
        return plugged
    return None


class _Standard(Backend):
    """A library that is known by nothing but the standard."""

    def why_refused(self, array: Array) -> str | None:
        lacking = lacks(self, array)
        if not lacking:
            return None
        named = ", ".join(lacking[:5]) + (f" and {len(lacking) - 5} more names" if len(lacking) > 5 else "")
        return (
            f"{type(array).__module__}.{type(array).__qualname__}, which lacks {named} of the array API standard, and whose "
            "library has no plug for tattn.backends"
        )


@memoized
def _generic(xp: Any) -> Backend:
    return _Standard(xp)
