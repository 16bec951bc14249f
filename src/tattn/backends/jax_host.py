"""Calls that JAX hands over to NumPy's compiled loops on the processor, each as one operation of its program.

The operation calls back with the memory of its arrays. XLA has nothing of it to compile, and so takes next to no time.
It maps over any axis. Its derivative, which a gradient of a gradient takes, and its form for other devices and for export are
those of array operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad, batching, mlir

from .numpy import BACKEND as NUMPY
from .operations import HOSTED

_primitive: Any
_call_back: Any
try:
    from jax.extend.core import Primitive as _primitive

    _call_back = mlir.emit_python_callback
except (ImportError, AttributeError):
    # Older versions lack one of the two, and compute by array operations.
    _primitive = _call_back = None

Array = Any
# A function of `HOSTED` by array operations: (function, call, arrays).
Operations = Callable[[Callable[..., Any], Any, Sequence[Array | None]], Sequence[Array]]


def computed(
    function: Callable[..., Any], call: Any, arrays: Sequence[Array | None], otherwise: Operations
) -> tuple[Array, ...] | None:
    """What a function returns, by compiled loops; None where there are none for these arrays."""
    known = HOSTED.get(function)
    if known is None or _primitive is None or _spread():
        return None
    wide = tuple(None if a is None else _widened(a) for a in arrays)
    like = [None if a is None else np.broadcast_to(np.zeros((), a.dtype), a.shape) for a in wide]
    if not known.compiled(call, NUMPY, like):
        return None
    shapes, dtypes = zip(*known.outputs(call, NUMPY, arrays), strict=True)
    given = [a for a in wide if a is not None]
    options = {"function": function, "call": call, "there": tuple(a is not None for a in wide), "otherwise": otherwise}
    found = _WHOLE.bind(*given, shapes=shapes, dtype=np.dtype(given[0].dtype), **options)
    return tuple(x if dtype is None else x.astype(dtype) for x, dtype in zip(found, dtypes, strict=True))


def _spread() -> bool:
    """Whether arrays may be spread over devices, which array operations are spread over with them."""
    mesh = getattr(jax.sharding, "get_abstract_mesh", lambda: None)()
    return bool(getattr(mesh, "manual_axes", ())) or len(jax.devices("cpu")) > 1


def _widened(array: Array) -> Array:
    return array.astype(jnp.float32) if array.dtype in (jnp.float16, jnp.bfloat16) else array


def _with_none(there: Sequence[bool], arrays: Sequence[Array]) -> tuple[Array | None, ...]:
    """Arrays in their places."""
    found = iter(arrays)
    return tuple(next(found) if t else None for t in there)


def _by_loops(*arrays: Any, **options: Any) -> tuple[np.ndarray, ...]:
    """On NumPy's arrays."""
    given = _with_none(options["there"], [np.asarray(a) for a in arrays])
    found = NUMPY.run(options["function"], options["call"], given)[: len(options["shapes"])]
    return tuple(np.ascontiguousarray(x) for x in found)


def _by_operations(*arrays: Array, **options: Any) -> list[Array]:
    """On JAX's arrays."""
    found = options["otherwise"](options["function"], options["call"], _with_none(options["there"], arrays))
    return list(found[: len(options["shapes"])])


def _at_once(*arrays: Array, **options: Any) -> list[Array]:
    """Outside of programs."""
    return [jnp.asarray(x) for x in _by_loops(*arrays, **options)]


def _types(*_: Any, shapes: Any, dtype: Any, **__: Any) -> list[Any]:
    return [jax.core.ShapedArray(shape, dtype) for shape in shapes]


def _mapped(
    arrays: Sequence[Array], axes: Sequence[Any], *, shapes: Any, **options: Any
) -> tuple[list[Array], list[int]]:
    """The operation of arrays that have one more axis, which becomes the first of all."""
    size = next(a.shape[axis] for a, axis in zip(arrays, axes, strict=True) if axis is not None)
    if not isinstance(size, int) or any(jnp.issubdtype(a.dtype, jnp.integer) for a in arrays):
        # A batch of any size, which is exported; or places of rows, which have no leading dimensions.
        form = partial(_by_operations, shapes=shapes, **options)
        return jax.vmap(form, tuple(axes))(*arrays), [0] * len(shapes)
    if size == 0:
        return [jnp.zeros((0, *shape), options["dtype"]) for shape in shapes], [0] * len(shapes)
    dims = max(a.ndim - (axis is not None) for a, axis in zip(arrays, axes, strict=True))

    def first(a: Array, axis: Any) -> Array:
        a = jnp.broadcast_to(a, (size, *a.shape)) if axis is None else jnp.moveaxis(a, axis, 0)
        return a.reshape(size, *(1,) * (dims + 1 - a.ndim), *a.shape[1:])

    given = [first(a, axis) for a, axis in zip(arrays, axes, strict=True)]
    wide = tuple((size, *(1,) * (dims - len(shape)), *shape) for shape in shapes)
    found = _WHOLE.bind(*given, shapes=wide, **options)
    return [x.reshape(size, *shape) for x, shape in zip(found, shapes, strict=True)], [0] * len(shapes)


def _moved(arrays: Sequence[Array], tangents: Sequence[Any], **options: Any) -> Any:
    """The operation and its derivative along tangents."""
    moving = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]

    def along(*moved: Array) -> Any:
        here = list(arrays)
        for i, a in zip(moving, moved, strict=True):
            here[i] = a
        return _by_operations(*here, **options)

    return jax.jvp(along, [arrays[i] for i in moving], [tangents[i] for i in moving])


def _lowered(context: Any, *arrays: Any, **options: Any) -> Any:
    """In a program for the processor."""
    settings = context.module_context
    if getattr(settings.lowering_parameters, "for_export", False) or len(settings.platforms) > 1:
        # What is exported runs where this process is not.
        return _OF_OPERATIONS(context, *arrays, **options)

    def back(*given: np.ndarray) -> tuple[np.ndarray, ...]:
        return _by_loops(*given, **options)

    types = context.avals_in, context.avals_out
    found, _, kept = _call_back(context, back, None, list(arrays), *types, has_side_effect=False)
    if hasattr(settings, "add_keepalive"):
        settings.add_keepalive(kept)
    return found


if _primitive is not None:
    _WHOLE: Any = _primitive("tattn_loops")
    _WHOLE.multiple_results = True
    _WHOLE.def_impl(_at_once)
    _WHOLE.def_abstract_eval(_types)
    _OF_OPERATIONS = mlir.lower_fun(_by_operations, multiple_results=True)
    mlir.register_lowering(_WHOLE, _OF_OPERATIONS)
    mlir.register_lowering(_WHOLE, _lowered, platform="cpu")
    batching.primitive_batchers[_WHOLE] = _mapped
    ad.primitive_jvps[_WHOLE] = _moved
