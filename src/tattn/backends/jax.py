"""JAX: loops become lax.scan, calls are compiled, gradients bind through custom_vjp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import jax_host
from .base import Array, Backend, Body
from .numpy import BACKEND as NUMPY
from .operations import CHAIN

# Compiled programs that are kept, of some megabytes each.
_PROGRAMS = 64


class JaxBackend(Backend):
    name = "JAX"
    parts = False
    compiles = True
    flushes = True

    def __init__(
        self, workspace: int = Backend.workspace, cache: int = 1 << 20, most_rows: int = Backend.most_rows
    ) -> None:
        super().__init__(jnp)
        self.workspace, self.cache, self.most_rows = workspace, cache, most_rows

    def for_arrays(self, arrays: Sequence[Array]) -> Backend:
        return _ON_GPU if _accelerated(arrays) else BACKEND

    @property
    def loops(self) -> Backend:
        return NUMPY if self is BACKEND else self

    def is_array(self, array: Any) -> bool:
        return isinstance(array, jax.Array)

    def is_traced(self, arrays: Sequence[Array]) -> bool:
        return any(isinstance(a, jax.core.Tracer) for a in arrays)

    def device(self, array: Array) -> Any:
        # Arrays of any shape are made on it. Those that are made on none go along with what is spread over several.
        found = super().device(array)
        return None if isinstance(found, jax.sharding.Sharding) else found

    def place(self, array: Array) -> Any:
        if self.is_traced([array]):
            return None
        # However the parts of an array are spread over them.
        devices = tuple(sorted(array.devices(), key=lambda device: device.id))
        return devices if len(devices) > 1 else devices[0]

    def why_refused(self, array: Array) -> str | None:
        if array.dtype == jnp.float64 and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
            return "one of float64 while jax_enable_x64 is off: switch it on, or use array.astype('float32')"
        symbols = [str(length) for length in array.shape if not isinstance(length, (int, np.integer))]
        if not symbols:
            return None
        return (
            f"one of symbolic shape {array.shape}: blocks of rows go by whole numbers, so export for known lengths, or a batch "
            f"of any size as jax.jit(jax.vmap(...)), whose {symbols[0]} is not seen inside"
        )

    def devices(self) -> list[str]:
        # Those of the CPU as well, where another platform is the default.
        found = dict.fromkeys((*jax.devices(), *jax.devices("cpu")))
        return [f"{d.platform}:{d.id}" + f" ({d.device_kind})" * (d.device_kind != d.platform) for d in found]

    def cast(self, array: Array, dtype: Any) -> Array:
        return array.astype(dtype)

    def uploaded(self, numbers: np.ndarray, like: Array, dtype: Any) -> Array:
        return jnp.asarray(numbers, dtype=dtype or jnp.int32)

    def indices(self, numbers: np.ndarray, like: Array) -> Array:
        return jnp.asarray(numbers, dtype=jnp.int32)

    def whole_numbers(self, array: Array) -> Array:
        return array.astype(jnp.int32)

    def to_numpy(self, array: Array) -> np.ndarray:
        return np.asarray(array.astype(jnp.float64 if array.dtype == jnp.float64 else jnp.float32))

    def integers(self, array: Array) -> np.ndarray:
        return np.asarray(array, dtype=np.int64)

    def read(self, arrays: Sequence[Array]) -> list[np.ndarray]:
        # All copies are under way before the first is waited for.
        return [np.asarray(a) for a in jax.device_get(list(arrays))]

    def entries(self, array: Array, index: Array, axis: int) -> Array:
        # By default it looks for numbers out of range, which costs a pass.
        return jnp.take(array, index, axis=axis, mode="clip")

    def apart(self, array: Array) -> Array:
        return _apart(array)

    def values_of(self, arrays: Sequence[Array | None]) -> tuple[Array | None, ...]:
        return tuple(None if a is None else jax.lax.stop_gradient(a) for a in arrays)

    def scan_rows(
        self, body: Body, carry: Any, rows: Sequence[Array | None], block: int, chunk: int = 1
    ) -> tuple[Any, tuple[Array, ...]]:
        n = next(r.shape[-2] for r in rows if r is not None)
        if n <= block:
            return body(carry, *rows)
        block = _even(n, block, chunk)
        whole = n // block

        def step(state: Any, index: Array) -> tuple[Any, tuple[Array, ...]]:
            return body(
                state,
                *(
                    None if r is None else jax.lax.dynamic_slice_in_dim(r, index * block, block, axis=r.ndim - 2)
                    for r in rows
                ),
            )

        carry, stacked = jax.lax.scan(step, _varying(step, carry), jnp.arange(whole))
        outputs = tuple(_unstack(o) for o in stacked)
        if whole * block < n:
            carry, rest = body(carry, *(None if r is None else r[..., whole * block :, :] for r in rows))
            outputs = tuple(jnp.concatenate(pair, axis=-2) for pair in zip(outputs, rest, strict=True))
        return carry, outputs

    def run(self, function: Callable[..., Any], call: Any, arrays: Sequence[Array | None]) -> Any:
        accelerated = _accelerated(arrays)
        found = None if accelerated else jax_host.computed(function, call, arrays, _by_operations)
        if found is not None:
            return found
        shapes = tuple(None if a is None else (a.shape, a.dtype) for a in arrays)
        return _compiled(function, call, accelerated, shapes)(tuple(arrays))

    def differentiable(
        self, forward: Callable[..., Any], backward: Callable[..., Any], call: Any, arrays: Sequence[Array | None]
    ) -> tuple[Array, ...]:
        result: tuple[Array, ...] = _bound(forward, backward)(call, tuple(arrays))
        return result

    def forget(self) -> None:
        _compiled.cache_clear()

    def as_container(self, cls: type, arrays: Sequence[str], constants: Sequence[str]) -> None:
        _register(cls, tuple(arrays), tuple(constants))


def _even(n: int, block: int, chunk: int) -> int:
    """Rows of a block, or down to half of them, in whole chunks, so that n rows are whole blocks: a rest is compiled once more."""
    fewest = max(CHAIN, -(-block // 2))
    found = [rows for rows in range(block, fewest - 1, -1) if n % rows == 0 and rows % chunk == 0]
    return next((rows for rows in found if rows % CHAIN == 0), found[0]) if found else block


def _axes(array: Any) -> frozenset[str]:
    """The axes of a mesh that a value differs along, inside `jax.shard_map` with its checks; none elsewhere."""
    # Versions name it in one of two ways.
    kind = getattr(array, "manual_axis_type", None)
    found: frozenset[str] = getattr(array, "vma", None) or getattr(kind, "varying", None) or frozenset()
    return found


def _varying(step: Callable[..., Any], carry: Any) -> Any:
    """The carry of a loop, differing along the axes that it differs along after a step: JAX wants one type before and after."""
    mesh = getattr(jax.sharding, "get_abstract_mesh", lambda: None)()
    if not getattr(mesh, "manual_axes", ()):
        return carry
    while True:
        after = jax.eval_shape(step, carry, jnp.arange(1)[0])[0]
        missing = [
            tuple(_axes(o) - _axes(jax.typeof(a))) for o, a in zip(*map(jax.tree.leaves, (after, carry)), strict=True)
        ]
        if not any(missing):
            return carry
        leaves, tree = jax.tree.flatten(carry)
        cast = [jax.lax.pcast(a, axes, to="varying") if axes else a for a, axes in zip(leaves, missing, strict=True)]
        carry = jax.tree.unflatten(tree, cast)


def _added_like(gradient: Any, array: Any) -> Any:
    """The gradient of an array that all devices of an axis have alike: the sum of theirs."""
    if gradient is None or not hasattr(jax, "typeof"):
        return gradient
    axes = tuple(_axes(jax.typeof(gradient)) - _axes(jax.typeof(array)))
    return jax.lax.psum(gradient, axes) if axes else gradient  # type: ignore[no-untyped-call]


@jax.custom_jvp
def _apart(array: Array) -> Array:
    """The array as it is; older versions do not differentiate the barrier."""
    found: Array = jax.lax.optimization_barrier(array)  # type: ignore[no-untyped-call]
    return found


@_apart.defjvp
def _(arrays: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return _apart(*arrays), tangents[0]


def _unstack(stacked: Array) -> Array:
    """(blocks, ..., rows, k) -> (..., blocks · rows, k)."""
    moved = jnp.moveaxis(stacked, 0, -3)
    return moved.reshape(*moved.shape[:-3], -1, moved.shape[-1])


@cache
def _register(cls: type, arrays: tuple[str, ...], constants: tuple[str, ...]) -> None:
    jax.tree_util.register_dataclass(cls, data_fields=arrays, meta_fields=constants)


def _accelerated(arrays: Sequence[Array | None]) -> bool:
    """Whether the arrays are on an accelerator; traced ones count as where JAX computes by default."""
    for a in arrays:
        if isinstance(a, jax.Array) and not isinstance(a, jax.core.Tracer):
            return any(device.platform != "cpu" for device in a.devices())
    default = jax.config.jax_default_device  # type: ignore[attr-defined]
    return (getattr(default, "platform", default) or jax.default_backend()) != "cpu"


@lru_cache(maxsize=_PROGRAMS)
def _compiled(function: Callable[..., Any], call: Any, accelerated: bool, _: Any) -> Callable[..., Any]:
    """One program: what JAX remembers of it goes with this function."""

    @jax.jit
    def compiled(arrays: tuple[Array | None, ...]) -> Any:
        return _by_operations(function, call, arrays, _ON_GPU if accelerated else BACKEND)

    return compiled


def _by_operations(
    function: Callable[..., Any], call: Any, arrays: Sequence[Array | None], backend: JaxBackend | None = None
) -> Any:
    """What a function returns, as XLA computes it."""
    # Rounding bounds assume full products; on a GPU JAX's default would be TF32. Arrays broadcast as the standard says.
    with jax.default_matmul_precision("highest"), jax.numpy_rank_promotion("allow"):
        return function(call, backend or BACKEND, tuple(arrays))


@cache
def _bound(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    run_forward, run_backward = (partial(BACKEND.run, function) for function in (forward, backward))

    @partial(jax.custom_vjp, nondiff_argnums=(0,))
    def attention(call: Any, arrays: tuple[Array | None, ...]) -> tuple[Array, ...]:
        result: tuple[Array, ...] = run_forward(call, arrays)
        return result

    def attention_forward(call: Any, arrays: tuple[Array | None, ...]) -> tuple[Any, Any]:
        out, lse, *kept = run_forward(call, arrays)
        return (out, lse, *kept), (arrays, out, *kept)

    def attention_backward(call: Any, residuals: Any, cotangents: Any) -> tuple[tuple[Array | None, ...]]:
        arrays, *kept = residuals
        grad_out, grad_lse = (jnp.asarray(c) for c in cotangents[:2])
        grads = run_backward(call, (*arrays, *kept, grad_out, grad_lse))
        grads = [_added_like(g, a) for g, a in zip(grads, arrays, strict=False)]
        masks = arrays[len(grads) :]
        no_grads = (None if m is None else np.zeros(m.shape, jax.dtypes.float0) for m in masks)
        return ((*grads, *no_grads),)

    attention.defvjp(attention_forward, attention_backward)
    return attention


BACKEND = JaxBackend()
_ON_GPU = JaxBackend(workspace=256 << 20, cache=128 << 20, most_rows=1 << 15)
