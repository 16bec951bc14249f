"""torch: gradients bind through an autograd Function that torch.func and torch.compile understand."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from threading import Event, Lock, Semaphore, local
from typing import Any, ClassVar

import array_api_compat.torch as xp
import numpy as np
import torch
from torch.utils._device import DeviceContext

from . import compiled
from .base import MOST_POWER, Array, Backend, powers_of_two
from .operations import PROGRAMS
from .tables import Tables, memoized
from .threads import libraries, run_threads, take_threads


class TorchBackend(Backend):
    name = "torch"

    def __init__(self, writable: bool, accelerator: bool) -> None:
        super().__init__(xp)
        self.tables = _TABLES
        self.writable = self.parts = writable
        # Calls cost more here than in NumPy, so blocks are larger, and an accelerator wants larger blocks still.
        self.workspace = 256 << 20 if accelerator else 8 << 20
        self.cache = 128 << 20 if accelerator else Backend.cache
        self.most_rows = 1 << 15 if accelerator else Backend.most_rows
        self.reads = writable and not accelerator

    def for_arrays(self, arrays: Sequence[Array]) -> Backend:
        tensors = [a for a in arrays if a is not None]
        # In-place writes would break the graph that autograd or the compiler records.
        return _VARIANTS[not (self.is_traced(tensors) or self.records(tensors)), not tensors[0].is_cpu]

    def is_traced(self, arrays: Sequence[Array]) -> bool:
        if torch.compiler.is_compiling():
            return True
        # Who records operations may leave tensors as they are.
        if torch._C._len_torch_dispatch_stack() and any(torch._C._get_dispatch_mode(kind) for kind in _RECORDERS):
            return True
        for a in arrays:
            if type(a) not in _OWN:
                if not isinstance(a, torch.Tensor):
                    continue
                if isinstance(a, torch._subclasses.FakeTensor):
                    return True
            if a.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(a):
                return True
        return False

    def is_array(self, array: Any) -> bool:
        return isinstance(array, torch.Tensor)

    def why_refused(self, array: Array) -> str | None:
        if not isinstance(array, torch.Tensor):
            return f"a {type(array).__name__}"
        if array.is_nested:
            return "a nested tensor: pad its rows, and say which are there by key_masks"
        if array.layout is not torch.strided:
            return f"a tensor of layout {array.layout}"
        return None

    def why_lengthless(self) -> str | None:
        if torch.compiler.is_compiling() or not torch._C._is_tracing():
            return None
        return (
            "one that torch.jit.trace records, and what it records would be wrong for others: trace a tattn.nn.TensorAttention "
            "with a bound and without decay and weights, or use torch.export or torch.compile"
        )

    def records(self, arrays: Sequence[Array | None]) -> bool:
        if torch.is_grad_enabled():
            for a in arrays:
                if a is not None and a.requires_grad:
                    return True
        # Without forward modes there are no tangents.
        return _forward_modes() and any(_has_tangent(a) for a in arrays)

    def values_of(self, arrays: Sequence[Array | None]) -> tuple[Array | None, ...]:
        return tuple(None if a is None else a.detach() for a in arrays)

    def sums_of_rows_before(self, array: Array) -> Array:
        # The standard's name looks its namespace up in a cache that torch.compile warns of.
        return torch.nn.functional.pad(torch.cumsum(array, dim=-2, dtype=array.dtype), (0, 0, 1, 0))

    def to_numpy(self, array: Array) -> np.ndarray:
        dtype = torch.float64 if array.dtype == torch.float64 else torch.float32
        host: np.ndarray = array.detach().to("cpu", dtype).numpy()
        return host

    def read(self, arrays: Sequence[Array]) -> list[np.ndarray]:
        # On the host there is nothing to wait for.
        return [self.to_numpy(a) for a in arrays] if arrays[0].device.type == "cpu" else super().read(arrays)

    def first_rows(self, rows: Array, shape: tuple[int, ...]) -> Array:
        # No view, which autograd would not let its owner change in place.
        return rows.resize_(shape)

    def integers(self, array: Array) -> np.ndarray:
        # Of no transformation, which would wrap what is copied.
        with torch._C._DisableFuncTorch():
            host: np.ndarray = array.detach().to("cpu", torch.int64).numpy()
        return host

    def multiply_into(self, target: Array, left: Array, right: Array) -> None:
        torch.mul(left, right, out=target)

    def product_into(self, target: Array, left: Array, right: Array, further: bool = False) -> None:
        if not further:
            torch.matmul(left, right, out=target)
        elif target.ndim == 2:
            torch.addmm(target, left, right, out=target)
        else:
            target += left @ right

    def transposed(self, x: Array) -> Array:
        return x.mT.contiguous()

    def exp_less(self, x: Array, shift: Array | None) -> Array:
        if not self.writable:
            return super().exp_less(x, shift)
        return (x if shift is None else x.sub_(shift)).exp_()

    def times(self, weights: Array, x: Array) -> Array:
        return x.mul_(weights) if self.writable else weights * x

    def write_rows(self, target: Array, places: Array, rows: Array) -> None:
        target.index_copy_(0, places, rows)

    def threads(self) -> int:
        if not self.reads:
            return 1
        # Who looks at operations looks at those of this thread.
        return 1 if _watched() else _limited.threads or torch.get_num_threads()

    def in_threads(self, tasks: Sequence[Callable[[], Any]], stop: Event) -> list[Any]:
        inference, threads = torch.is_inference_mode_enabled(), _limited.threads or torch.get_num_threads()
        ready = Semaphore(0)

        def alone(task: Callable[[], Any]) -> Any:
            # Its own number, and what threads that are born later begin with: that is set back once all are here.
            torch.get_num_threads()
            torch.set_num_threads(1)
            ready.release()
            with torch.inference_mode() if inference else torch.no_grad():
                return task()

        def started(count: int) -> None:
            for _ in range(count):
                ready.acquire()
            torch.set_num_threads(threads)
            if _limited.threads:
                _take_threads()

        try:
            return run_threads(tasks, stop, alone, started)
        except BaseException:
            # Interrupted before all were here, say.
            torch.set_num_threads(threads)
            raise

    def cast(self, array: Array, dtype: Any) -> Array:
        return array.to(dtype)

    def table(self, function: Callable[..., np.ndarray], *args: Any, like: Array, dtype: Any = None) -> Array:
        # What is traced holds its tables, each time that it is.
        if torch.compiler.is_compiling() or torch._C._is_tracing():
            return torch.tensor(_numbers(function, *args), dtype=dtype or torch.int64, device=like.device)
        return super().table(function, *args, like=like, dtype=dtype)

    def uploaded(self, numbers: np.ndarray, like: Array, dtype: Any) -> Array:
        # Of no transformation and fit to be saved by any, since it may be kept. The dtype is changed on the host: what is
        # copied from there has arrived when the copy returns, for all streams.
        with torch.inference_mode(False), torch._C._DisableFuncTorch():
            host = torch.as_tensor(np.array(numbers), dtype=dtype or torch.int64, device="cpu")
            return host.to(like.device)

    def power_of_two(self, power: Array) -> Array:
        # The same as elsewhere, in fewer operations.
        table = self.table(powers_of_two, like=power, dtype=power.dtype)
        last = 2 * MOST_POWER + 1
        return table[(power + MOST_POWER).nan_to_num(nan=last, posinf=last).clamp(0, last).long()]

    def keeps_tables(self, like: Array) -> bool:
        # Not in the mode of fake tensors, which takes no others, and not for subclasses.
        while torch._C._functorch.is_functorch_wrapped_tensor(like):
            like = torch._C._functorch.get_unwrapped(like)
        fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        return fake is None and type(like) in _OWN

    def captures(self, like: Array) -> bool:
        return bool(like.is_cuda) and torch.cuda.is_current_stream_capturing()

    def finish(self, arrays: Sequence[Array]) -> None:
        for device in {a.device for a in arrays if a.is_cuda}:
            torch.cuda.synchronize(device)

    def device(self, array: Array) -> Any:
        return array.device

    def devices(self) -> list[str]:
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is None or not torch.accelerator.is_available():
            return ["cpu"]
        kind = accelerator.type
        # Not every kind has names.
        name_of = getattr(torch.get_device_module(kind), "get_device_name", None)
        found = range(torch.accelerator.device_count())
        return ["cpu", *(f"{kind}:{i} ({name_of(i)})" if name_of else f"{kind}:{i}" for i in found)]

    def place(self, array: Array) -> Any:
        return array.device

    def run(self, function: Callable[..., Any], call: Any, arrays: Sequence[Array | None]) -> Any:
        # The rounding bounds assume full products and no autocast.
        device = arrays[0].device.type  # type: ignore[union-attr]
        full = device == "meta" or not (torch.compiler.is_compiling() or torch.is_autocast_enabled(device))
        with nullcontext() if full else torch.autocast(device, enabled=False):
            if not torch.compiler.is_compiling():
                with _full_precision(), _without_openmp() if device == "cpu" else nullcontext():
                    return function(call, self.for_arrays(arrays), tuple(arrays))
            narrow = _narrow()
            if narrow is not None:
                raise RuntimeError(
                    "a compiled call cannot change torch's float32 precision: call "
                    f"torch.set_float32_matmul_precision('highest') before, which the error bounds assume, got {narrow}"
                )
            return function(call, self.for_arrays(arrays), tuple(arrays))

    def differentiable(
        self, forward: Callable[..., Any], backward: Callable[..., Any], call: Any, arrays: Sequence[Array | None]
    ) -> tuple[Array, ...]:
        traced = self.is_traced(arrays)
        # Tangents outside torch.func go through the operations: there are no forward modes in a forward mode, as in `jvp` below.
        if not traced and (any(_has_tangent(a) for a in arrays) or not self.records(arrays)):
            return self.run(forward, call, arrays)  # type: ignore[no-any-return]
        function = _COMPILED[len(arrays)] if torch.compiler.is_compiling() else _Attention
        result: tuple[Array, ...] = function.apply((forward, backward, call), *arrays)
        return result

    def takes_whole(self) -> bool:
        return torch.compiler.is_compiling() and not transformed()

    def whole(self, program: str, described: tuple[Any, ...], arrays: Sequence[Array | None]) -> Any:
        if not self.takes_whole():
            return None
        text = _text_of(program, *described)
        return operator(program, text, arrays) if text else None

    def residuals(
        self, forward: Callable[..., Any], call: Any, arrays: Sequence[Array | None], residuals: Sequence[Array]
    ) -> Sequence[Array]:
        if not torch.is_grad_enabled() or not (self.is_traced(arrays) or any(_needs_gradient(a) for a in arrays)):
            return residuals
        out, _, *kept = self.run(forward, call, arrays)
        return out, *kept


# Tensors that are nothing else.
_OWN = frozenset((torch.Tensor, torch.nn.Parameter))


class _Limited(local):
    """How many threads operations of this thread used before a call that is running took OpenMP's from them; 0 outside of such."""

    threads = 0


_limited = _Limited()


@cache
def _of_mkl() -> Callable[[int], int]:
    """Sets how many threads MKL uses in operations of this thread, and returns how many it used; 0 if torch is without MKL."""
    try:
        found: Callable[[int], int] = ctypes.CDLL(torch._C.__file__).MKL_Set_Num_Threads_Local
    except (OSError, AttributeError):
        return lambda count: 0
    return found


def _take_threads() -> int:
    """Operations of this thread use no other from now on; how many MKL used, which computes exponentials, roots and logarithms."""
    take_threads("openmp")
    return _of_mkl()(1)


@contextmanager
def _without_openmp() -> Iterator[None]:
    """Operations of this thread alone: after each one that takes others, these wait actively in the place of ours."""
    threads = torch.get_num_threads()
    if threads == 1 or _limited.threads:
        yield
        return
    # Other libraries than torch's may be among them, each with a number of its own.
    before = [(library, library.num_threads) for library in libraries("openmp").lib_controllers]
    _limited.threads = threads
    of_mkl = _take_threads()
    try:
        yield
    finally:
        for library, number in before:
            library.set_num_threads(number)
        _of_mkl()(of_mkl)
        _limited.threads = 0


_MODES: Any = torch._C._TorchDispatchModeKey
_RECORDERS = (_MODES.FAKE, _MODES.PROXY, _MODES.FUNCTIONAL)


@memoized
def _numbers(function: Callable[..., np.ndarray], *args: Any) -> list[Any]:
    """A table as numbers, which torch.compile can take for constants."""
    numbers: list[Any] = function(*args).tolist()
    return numbers


def _watched() -> bool:
    """Whether somebody looks at operations, to count or to record them."""
    modes = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
    return bool(modes or torch._C._is_tracing())


def _plain(*tensors: Array) -> bool:
    """Whether tensors of this thread's eager mode are nothing but numbers in memory."""
    if torch._C._len_torch_dispatch_stack() or torch._C._is_tracing():
        return False
    # A default device only says where new tensors go.
    for place in range(torch._C._len_torch_function_stack()):
        if type(torch._C._get_function_stack_at(place)) is not DeviceContext:
            return False
    return all(map(_OWN.__contains__, map(type, tensors)))


def _numbers_of(tensor: Array) -> np.ndarray:
    """A plain tensor as a NumPy array on the same memory, if that holds its numbers."""
    if tensor.requires_grad or tensor.is_neg():
        tensor = tensor.detach().resolve_neg()
    host: np.ndarray = tensor.numpy()
    return host


def _needs_gradient(array: Array | None) -> bool:
    return array is not None and bool(array.requires_grad)


def _forward_modes() -> bool:
    """Whether tensors may have tangents: compilers refuse dual tensors by themselves."""
    forward_ad: Any = torch.autograd.forward_ad
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def _has_tangent(array: Array | None) -> bool:
    # Those of torch.func are traced.
    if array is None or not _forward_modes() or torch._C._functorch.is_functorch_wrapped_tensor(array):
        return False
    forward_ad: Any = torch.autograd.forward_ad
    return forward_ad.unpack_dual(array).tangent is not None


# torch 2.9 and later have a setting for each library's products. The older one stands for all and cannot be read once one of
# these is written.
_BY_KIND = hasattr(torch._C, "_get_fp32_precision_getter")
_SETTINGS = (("cuda", "matmul"), ("mkldnn", "matmul")) if _BY_KIND else (("torch", "float32_matmul_precision"),)
_FULL = "ieee" if _BY_KIND else "highest"
_NARROW = ("tf32", "bf16", "high", "medium")


def _read(setting: tuple[str, str]) -> str:
    """A setting as it holds, which it may have from a more general one."""
    value: str = torch._C._get_fp32_precision_getter(*setting) if _BY_KIND else torch.get_float32_matmul_precision()
    return value


def _write(setting: tuple[str, str], value: str) -> None:
    if _BY_KIND:
        torch._C._set_fp32_precision_setter(*setting, value)
    else:
        torch.set_float32_matmul_precision(value)


def _written(setting: tuple[str, str]) -> str:
    """A narrow setting as it was written: "none" if it has its value from a more general one."""
    library, kind = setting
    value = _read(setting)
    if not _BY_KIND or library == "generic":
        return value
    general = ("generic" if kind == "all" else library, "all")
    if _read(general) != value:
        return value
    # Reading does not tell: whether it changes with the general one does.
    restored = _written(general)
    _write(general, _FULL)
    inherited = _read(setting) != value
    _write(general, restored)
    return "none" if inherited else value


def _narrow() -> str | None:
    """A setting by which torch multiplies float32 in less, and its value."""
    for setting in _SETTINGS:
        value = _read(setting)
        if value in _NARROW:
            return f"{'.'.join(setting)} {value!r}"
    return None


# What torch.compile can't trace it takes as constant: the precision when the call is compiled.
_narrow._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _Precision:
    """What the calls that are running changed in torch's settings of precision, and how many they are."""

    lock = Lock()
    running = 0
    before: ClassVar[dict[tuple[str, str], str]] = {}


@contextmanager
def _full_precision() -> Iterator[None]:
    """Full float32 products, whatever the caller's settings; threads that overlap restore these once."""
    with _Precision.lock:
        for setting in _SETTINGS:
            if _read(setting) in _NARROW:
                _Precision.before[setting] = _written(setting)
                _write(setting, _FULL)
        _Precision.running += 1
    try:
        yield
    finally:
        with _Precision.lock:
            _Precision.running -= 1
            if _Precision.running == 0:
                while _Precision.before:
                    setting, value = _Precision.before.popitem()
                    # What was written meanwhile stays.
                    if _read(setting) == _FULL:
                        _write(setting, value)


def _compute(method: Any, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    forward, _, call = method
    out, lse, *kept = BACKEND.run(forward, call, arrays)
    # torch.compile wants an output to be returned once.
    return out, lse, *(k.clone() if k is lse else k for k in kept)


def _of_each(pull: Callable[..., tuple[Array, ...]], grads: tuple[Array, ...]) -> tuple[Array, ...]:
    """Gradients pulled back; one after another where ``is_grads_batched`` has put several in each, which few operations take."""
    legacy = torch._C._functorch.is_legacy_batchedtensor
    if torch.compiler.is_compiling() or not any(map(legacy, grads)):
        return pull(*grads)
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    # One that has no batch gets one of a single gradient.
    apart = [torch._remove_batch_dim(g, level, 1, 0) for g in grads]
    found = [_of_each(pull, tuple(g[k % len(g)] for g in apart)) for k in range(max(map(len, apart)))]
    return tuple(torch._add_batch_dim(torch.stack(several), 0, level) for several in zip(*found, strict=True))


class _Adjoint(torch.autograd.Function):
    """Inputs: (forward, backward, what they depend on besides arrays), and the arrays."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.method, *arrays = inputs
        ctx.count, ctx.kept = len(arrays), len(output) - 2
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*arrays, output[0], *output[2:])
        ctx.save_for_forward(*arrays)

    @staticmethod
    def backward(ctx: Any, grad_out: Array, grad_lse: Array, *_: Array) -> tuple[Array | None, ...]:
        forward, backward, call = ctx.method
        # Read once: what a checkpoint computed again is gone after that.
        saved = ctx.saved_tensors
        arrays, kept = saved[: ctx.count], saved[ctx.count :]
        kept = BACKEND.residuals(forward, call, arrays, kept)
        # A gradient that is left out costs nothing, where the computation can do without.
        needed = ctx.needs_input_grad[1:]
        asking = getattr(call, "asking", None)
        call = asking(needed) if asking else call
        grads = _of_each(lambda *g: BACKEND.run(backward, call, (*arrays, *kept, *g)), (grad_out, grad_lse))
        found = (g if need else None for g, need in zip(grads, needed, strict=False))
        return (None, *found, *(None for _ in arrays[len(grads) :]))

    @staticmethod
    def vmap(info: Any, in_dims: Any, method: Any, *arrays: Array | None) -> Any:
        # A mapped axis becomes one more leading axis, left of those that are there already.
        mapped = list(zip(arrays, in_dims[1:], strict=True))
        ndim = max(a.ndim - (d is not None) for a, d in mapped if a is not None)
        moved = []
        for a, d in mapped:
            if a is not None and d is not None:
                a = a.movedim(d, 0)
                a = a.reshape(a.shape[0], *(1,) * (ndim - a.ndim + 1), *a.shape[1:])
            moved.append(a)
        results: Any = _Attention.apply(method, *moved)  # type: ignore[no-untyped-call]
        # What is kept for the adjoint has the axis only if what it was made from has.
        return results, (0, 0, *(0 if kept.ndim > ndim else None for kept in results[2:]))


class _Attention(_Adjoint):
    """For eager calls and torch.func."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _Adjoint.setup_context(ctx, inputs, output)
        ctx.shapes = [x.shape for x in output[:2]]
        # Zeros for what has no gradient, and for all that is kept, would be as large as that.
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Array | None) -> tuple[Array | None, ...]:
        given = next((g for g in grads[:2] if g is not None), None)
        if given is None:
            return tuple(None for _ in range(1 + ctx.count))
        both = zip(grads, ctx.shapes, strict=False)
        return _Adjoint.backward(ctx, *(given.new_zeros(()).expand(shape) if g is None else g for g, shape in both))

    @staticmethod
    def forward(method: Any, *arrays: Array | None) -> tuple[Array, ...]:
        # Autograd lets nobody change a view in place that a function returned beside others.
        return tuple(x.clone() if x._is_view() else x for x in _compute(method, arrays))

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Array | None) -> tuple[Array | None, ...]:
        forward, _, call = ctx.method
        arrays = ctx.saved_tensors
        moving = [i for i, t in enumerate(tangents) if t is not None]

        def along(*moved: Array) -> tuple[Array, Array]:
            here = list(arrays)
            for i, a in zip(moving, moved, strict=True):
                here[i] = a
            result: tuple[Array, Array] = BACKEND.run(forward, call, here)[:2]
            return result

        primals = tuple(arrays[i] for i in moving)
        out, lse = torch.func.jvp(along, primals, tuple(tangents[i] for i in moving))[1]
        return out, lse, *(None,) * ctx.kept


def _with_arguments(count: int) -> Any:
    """For torch.compile: `count` arrays by name, since it takes ctx for the first of ``*arrays``, and no jvp."""
    names = ", ".join(f"a{i}" for i in range(count))
    forward = eval(f"lambda method, {names}: compute(method, ({names},))", {"compute": _compute})
    return type(f"_Attention{count}", (_Adjoint,), {"forward": staticmethod(forward)})


def transformed() -> bool:
    """Whether a transformation of torch.func is at work, which operators do not serve."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _text_of(program: str, *described: Any) -> str:
    """The text of a program's call."""
    return PROGRAMS[program].written(*described)


# Asked when the call is traced.
transformed._dynamo_marked_constant = _text_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def operator(program: str, text: str, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    """A program as an operator, which runs eagerly, in blocks and in place, at any length; no second derivatives."""
    # A mask of shape (0,) is none: `torch.jit.trace` takes no lists that may hold None.
    none = arrays[0].new_empty(0, dtype=torch.bool)  # type: ignore[union-attr]
    given = [none if a is None else a for a in arrays]
    result: tuple[Array, ...] = _whole(given, program, text)
    return result


def _given(arrays: Sequence[Array]) -> tuple[Array | None, ...]:
    return tuple(None if a.shape == (0,) else a for a in arrays)


@torch.library.custom_op(
    "tattn::whole", mutates_args=(), schema="(Tensor[] arrays, str program, str call) -> (Tensor, Tensor, Tensor)"
)
def _whole(arrays: Any, program: Any, call: Any) -> Any:
    """The outputs of a program."""
    known = PROGRAMS[program]
    out, lse, kept = BACKEND.run(known.forward, known.read(call), _given(arrays))[:3]
    # An operator returns no tensor twice.
    return out.contiguous(), lse.contiguous(), (kept.clone() if kept is lse else kept).contiguous()


@_whole.register_fake
def _(arrays: Any, program: Any, call: Any) -> Any:
    known = PROGRAMS[program]
    dtype = BACKEND.compute_dtype(arrays[0].dtype)
    return tuple(arrays[0].new_empty(s, dtype=dtype) for s in known.shapes(known.read(call), _given(arrays)))


@torch.library.custom_op(
    "tattn::whole_backward", mutates_args=(), schema="(Tensor[] arrays, str program, str call) -> Tensor[]"
)
def _whole_backward(arrays: Any, program: Any, call: Any) -> Any:
    """The gradients of a program: arrays, then output and what was kept, and the gradients of the first two outputs."""
    known = PROGRAMS[program]
    return [g.contiguous() for g in BACKEND.run(known.backward, known.read(call), _given(arrays))]


@_whole_backward.register_fake
def _(arrays: Any, program: Any, call: Any) -> Any:
    return [a.new_empty(a.shape) for a in arrays[:-4] if a.is_floating_point()]


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    arrays, ctx.program, ctx.call = inputs
    out, _, kept = output
    ctx.save_for_backward(*arrays, out, kept)


def _pull(ctx: Any, grad_out: Array, grad_lse: Array, _: Array) -> Any:
    saved = ctx.saved_tensors
    grads = _whole_backward([*saved, grad_out, grad_lse], ctx.program, ctx.call)
    return [*grads, *(None for _ in saved[len(grads) : -2])], None, None


_whole.register_autograd(_pull, setup_context=_setup)

# Up to query, and keys, values, weights and factors of eight views.
_COMPILED = {count: _with_arguments(count) for count in range(2, 34)}

_TABLES = Tables()
# By (writable, accelerator): in-place writes would break a graph that is being recorded.
_VARIANTS = {(w, a): TorchBackend(writable=w, accelerator=a) for w in (True, False) for a in (True, False)}
BACKEND = _VARIANTS[True, False]
# Where nothing records the call, and arrays are on the host.
BACKEND.kernels = compiled.kernels_for(BACKEND, _plain, _numbers_of, torch.from_numpy)
