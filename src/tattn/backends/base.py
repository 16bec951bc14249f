"""What every backend offers beside the array API standard, with defaults that suit any library."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from functools import partial
from itertools import accumulate, pairwise
from math import prod
from threading import Event, Lock
from types import ModuleType
from typing import Any

import array_api_compat
import numpy as np

from .operations import CHAIN, Kernel
from .progress import told
from .tables import Tables, memoized
from .threads import MOST_THREADS, SHARING, Memory, even_parts

Array = Any
# Bytes of a block of rows on a processor, of the library that makes the largest.
LARGEST_WORKSPACE = 8 << 20
# What is used of a namespace, beside dtypes and constants.
FUNCTIONS = (
    "abs", "all", "any", "arange", "argsort", "asarray", "astype", "broadcast_to", "ceil", "concat", "cos", "cumulative_sum",
    "empty", "exp", "expm1", "finfo", "flip", "floor", "full", "full_like", "isfinite", "isnan", "log", "log2", "logical_not",
    "matrix_transpose", "max", "maximum", "mean", "min", "minimum", "ones", "ones_like", "permute_dims", "repeat",
    "reshape", "round", "sin", "sort", "sqrt", "stack", "sum", "take", "where", "zeros", "zeros_like",
)  # fmt: skip
DTYPES = ("bool", "float32", "int32", "int64", "uint8")
# Powers of two that are tabled: beyond what float64 holds.
MOST_POWER = 1 << 12
Body = Callable[..., tuple[Any, tuple[Array, ...]]]


def name_of(dtype: Any) -> str:
    """Name of a dtype, or of a class that stands for one, as NumPy has them."""
    return str(dtype.__name__ if isinstance(dtype, type) else getattr(dtype, "name", dtype)).rpartition(".")[2]


class Backend:
    """One array library: its namespace, and the few things that the standard cannot say.

    Attributes
    ----------
    name : str
        Name of the library, as people write it.
    writable : bool
        Whether arrays may be assigned to in place, through views.
    parts : bool
        Whether a large batch is taken in parts to save memory; not where a loop is unrolled into a compiled program.
    compiles : bool
        Whether a program is compiled, and kept, for each plan.
    flushes : bool
        Whether numbers below the smallest normal one may count as 0.
    workspace : int
        Bytes that the temporaries of one block of rows should stay below.
    cache : int
        Bytes below which an array should stay that is read several times.
    most_rows : int
        Most rows of a block. An accelerator needs many, because every operation is a launch. Above 32,768 it has no
        effect.
    shared_scores : int
        Scores that are worth a thread.
    distinct : int
        Monomials of all rows from which on a look at the channels pays: where some are equal, so are many monomials.
    groups : int
        Groups of packed documents for which a call pays whatever their size.
    reads : bool
        Whether values can be read at once: they are on the host, and nothing records or traces the call.
    kernels : tuple of Kernel
        Compiled code for named operations (`tattn.backends.operations`).
    rows_in_all : int
        Rows of a call that is several computations one after another, as packed documents are; 0 where it is one.
    """

    name = "array API"
    writable = False
    parts = True
    compiles = False
    flushes = False
    workspace = 2 << 20
    cache = 512 << 10
    most_rows = 1 << 12
    shared_scores = 1 << 22
    distinct = 1 << 25
    groups = 32
    reads = False
    kernels: tuple[Kernel, ...] = ()
    rows_in_all = 0

    def __init__(self, xp: ModuleType | None = None) -> None:
        self._xp = xp
        self.tables = Tables()

    @property
    def xp(self) -> Any:
        """The array API namespace."""
        return self._xp

    @property
    def chain(self) -> int:
        """Terms in the longest chain of additions of its operations."""
        return max(CHAIN, *(k.chain for k in self.kernels)) if self.kernels else CHAIN

    @contextmanager
    def using(self, **changed: Any) -> Iterator[None]:
        """Other attributes for a while, in all threads: sizes of blocks, kernels, threads, for tests and measurements."""
        for name in changed:
            if not hasattr(self, name):
                raise AttributeError(f"a backend has no {name!r}")
        own = vars(self)
        before = {name: own[name] for name in changed if name in own}
        own.update(changed)
        self.forget()
        try:
            yield
        finally:
            for name in changed:
                del own[name]
            own.update(before)
            self.forget()

    def forget(self) -> None:
        """Let go of what was compiled, which rests on the attributes."""

    def within(self, chain: int) -> Backend:
        """The same backend with no kernel whose chains of additions are longer."""
        if self.chain <= chain:
            return self
        limited = copy(self)
        limited.kernels = tuple(k for k in self.kernels if k.chain <= chain)
        return limited

    def among(self, rows: int) -> Backend:
        """The same backend for a computation that is one of several, of so many `rows` in all."""
        if not self.kernels:
            return self
        found = copy(self)
        found.rows_in_all = rows
        return found

    def kernel(self, operation: str, *given: Any) -> Callable[..., Any] | None:
        """The kernel for an operation on what is given, or None."""
        return next((k.function for k in self.kernels if k.operation == operation and k.takes(*given)), None)

    @property
    def loops(self) -> Backend:
        """The backend whose kernels compute calls of this one."""
        return self

    def for_arrays(self, arrays: Sequence[Array]) -> Backend:
        """The backend to compute on these arrays with; gradients or devices may ask for another."""
        return self

    def is_traced(self, arrays: Sequence[Array]) -> bool:
        """Whether values cannot be read now because a transformation is tracing the call."""
        return False

    def is_array(self, array: Any) -> bool:
        """Whether an object, of a class that the library defines or one that inherits from it, is an array of the library."""
        return hasattr(array, "shape") and hasattr(array, "dtype")

    def device(self, array: Array) -> Any:
        """Where the array is."""
        return array_api_compat.device(array)

    def devices(self) -> list[str]:
        """The devices that the library sees, in words. What it raises says why it cannot be used."""
        return [str(device) for device in self.xp.__array_namespace_info__().devices() if device is not None]

    def place(self, array: Array) -> Any:
        """`device`, or None where a transformation hides it."""
        return None if self.is_traced([array]) else self.device(array)

    def why_refused(self, array: Array) -> str | None:
        """A reason to refuse this array, or None."""
        return None

    def why_lengthless(self) -> str | None:
        """What shapes are if they are no numbers that a method can go by, or None."""
        return None

    def dtype_name(self, dtype: Any) -> str:
        """Name of a dtype: 'float32', 'bfloat16', …"""
        return name_of(dtype)

    def compute_dtype(self, dtype: Any) -> Any:
        """The dtype to compute in: float32 where the dtype is narrower, else the same."""
        return dtype if self.dtype_name(dtype) == "float64" else self.xp.float32

    def itemsize(self, dtype: Any) -> int:
        """Bytes of a number of this dtype in the computation."""
        return 8 if self.dtype_name(dtype) == "float64" else 4

    def cast(self, array: Array, dtype: Any) -> Array:
        """The array in another floating dtype."""
        return array if array.dtype == dtype else self.xp.astype(array, dtype)

    def table(self, function: Callable[..., np.ndarray], *args: Any, like: Array, dtype: Any = None) -> Array:
        """The NumPy table ``function(*args)`` as an array on the device of `like`; integers unless `dtype` is given.

        It is kept for the calls to come, and nothing may write to it.
        """
        if not self.keeps_tables(like):
            return self._made(function(*args), like, dtype)
        device = self.device(like)
        # Devices need not be hashable; names of theirs are.
        key = function, args, dtype, device if isinstance(device, Hashable) else repr(device)
        found = self.tables.find(key)
        if found is None:
            numbers = function(*args)
            found = self._made(numbers, like, dtype)
            dropped = self.tables.add(key, found, numbers.size * self.itemsize(dtype or "float64"))
            if dropped:
                self.finish(dropped)
        if self.captures(like):
            self.tables.pin(key, found)
        return found

    def _made(self, numbers: np.ndarray, like: Array, dtype: Any) -> Array:
        # A narrow dtype may not hold all of a table.
        with np.errstate(all="ignore"):
            return self.uploaded(numbers, like, dtype)

    def uploaded(self, numbers: np.ndarray, like: Array, dtype: Any) -> Array:
        """A NumPy array as one on the device of `like`; of integers to index by if `dtype` is None."""
        if dtype is None:
            return self.indices(numbers, like)
        return self.xp.asarray(numbers, dtype=dtype, device=self.device(like))

    def keeps_tables(self, like: Array) -> bool:
        """Whether tables may be kept: not where they are part of what is traced or compiled."""
        return not (self.compiles or self.is_traced((like,)))

    def captures(self, like: Array) -> bool:
        """Whether operations are captured to be replayed, which reads what they read at the same places in memory."""
        return False

    def finish(self, arrays: Sequence[Array]) -> None:
        """Wait until operations that were started have read these arrays, whose memory is then given back."""

    def indices(self, numbers: np.ndarray, like: Array) -> Array:
        """Whole numbers as an array on the device of `like`."""
        return self.xp.asarray(numbers, dtype=self.xp.int64, device=self.device(like))

    def whole_numbers(self, array: Array) -> Array:
        """A floating array of whole numbers as one of integers, fit to index by."""
        return self.xp.astype(array, self.xp.int64)

    def entries(self, array: Array, index: Array, axis: int) -> Array:
        """Entries along an axis by number, (k,), all of which are there."""
        return self.xp.take(array, index, axis=axis)

    def apart(self, array: Array) -> Array:
        """The array, of which a compiler makes no part of what follows."""
        return array

    def power_of_two(self, power: Array) -> Array:
        """2^p for whole numbers |p| ≤ 4096, exactly, which `pow` need not be; NaN for NaN."""
        xp = self.xp
        table = self.table(powers_of_two, like=power, dtype=power.dtype)
        place = xp.where(xp.abs(power) <= MOST_POWER, power + MOST_POWER, 2.0 * MOST_POWER + 1)
        return xp.reshape(xp.take(table, xp.reshape(self.whole_numbers(place), (-1,)), axis=0), power.shape)

    def sums_of_rows_before(self, array: Array) -> Array:
        """Sums of the rows before each row (..., n, k) of a whole-number array, and of all: (..., n + 1, k)."""
        sums: Array = self.xp.cumulative_sum(array, axis=-2, dtype=array.dtype, include_initial=True)
        return sums

    def to_numpy(self, array: Array) -> np.ndarray:
        """Values on the host, in a dtype that NumPy has."""
        wide = array if self.dtype_name(array.dtype) == "float64" else self.xp.astype(array, self.xp.float32)
        return np.from_dlpack(wide)

    def integers(self, array: Array) -> np.ndarray:
        """Values of an array of whole numbers on the host, as int64."""
        return np.asarray(np.from_dlpack(array), dtype=np.int64)

    def read(self, arrays: Sequence[Array]) -> list[np.ndarray]:
        """Values of several floating arrays on the host, in one copy."""
        with self.on_device_of(arrays[0]):
            flat = self.xp.concat([self.xp.reshape(a, (-1,)) for a in arrays])
        numbers = self.to_numpy(flat)
        ends = list(accumulate((prod(a.shape) for a in arrays), initial=0))
        return [numbers[start:end].reshape(a.shape) for a, (start, end) in zip(arrays, pairwise(ends), strict=True)]

    def on_device_of(self, array: Array) -> AbstractContextManager[Any]:
        """A context for operations outside of `run`, where the library has a current device that they run on."""
        return nullcontext()

    def records(self, arrays: Sequence[Array | None]) -> bool:
        """Whether a gradient may be asked of what is computed from these arrays."""
        return False

    def values_of(self, arrays: Sequence[Array | None]) -> tuple[Array | None, ...]:
        """The same arrays as values alone, without what records gradients."""
        return tuple(arrays)

    def multiply_into(self, target: Array, left: Array, right: Array) -> None:
        """Write left · right into `target`, a view of a buffer; only called if `writable`."""
        target[...] = left * right

    def product_into(self, target: Array, left: Array, right: Array, further: bool = False) -> None:
        """Write left @ right into `target`, or add it to what is there; only called if `writable`."""
        if further:
            target += left @ right
        else:
            target[...] = left @ right

    def memory(self) -> Any:
        """What keeps arrays to be written over, if they are writable."""
        return Memory() if self.writable else None

    def product(self, left: Array, right: Array, memory: Any, name: str) -> Array:
        """Matrix product; where there is `memory` in that, until this thread's next product of this name."""
        if memory is None:
            return left @ right
        held: dict[Any, Array] = vars(memory)
        key = name, product_shape(left, right)
        if key not in held:
            held[key] = self.xp.empty(key[1], dtype=left.dtype, device=self.device(left))
        self.product_into(held[key], left, right)
        return held[key]

    def transposed(self, x: Array) -> Array:
        """The last two axes swapped, and laid out anew in memory: views of another order slow down what is made of them."""
        swapped = self.xp.matrix_transpose(x)
        return self.xp.reshape(self.xp.reshape(swapped, (-1,)), swapped.shape)

    def exp_less(self, x: Array, shift: Array | None) -> Array:
        """e^(x − shift), or eˣ; what x held is lost where arrays are writable."""
        return self.xp.exp(x if shift is None else x - shift)

    def times(self, weights: Array, x: Array) -> Array:
        """Weights · x; what x held is lost where arrays are writable."""
        return weights * x

    def cleared(self, rows: Array, there: Array) -> Array:
        """Rows (..., n, k), 0 where `there` (..., n, 1) is False."""
        return self.xp.where(there, rows, 0.0)

    def first_rows(self, rows: Array, shape: tuple[int, ...]) -> Array:
        """The first rows of an array (n, k) that nobody else holds, as an array of this shape."""
        return self.xp.reshape(rows[: prod(shape[:-1]), :], shape)

    def write_rows(self, target: Array, places: Array, rows: Array) -> None:
        """Write rows (m, k) at places (m,) of `target` (n, k); only called if `writable`."""
        target[places] = rows

    def scan_rows(
        self, body: Body, carry: Any, rows: Sequence[Array | None], block: int, chunk: int = 1
    ) -> tuple[Any, tuple[Array, ...]]:
        """Run `body` over blocks of rows, carrying a state and collecting outputs.

        Parameters
        ----------
        body : callable
            ``body(carry, *blocks) -> (carry, outputs)``; an output has the rows of its block.
        carry : nested tuples of arrays
            State handed from block to block, of constant shape.
        rows : sequence of arrays (..., n, k), or None
            Cut along the last axis but one. All have the same n.
        block : int
            Rows in a block. A library may take fewer, so that the last block is as long as the others.
        chunk : int
            What divides `block`, and has to divide the rows of every block but the last.
        """
        n = _length(rows)
        if n <= block:
            return body(carry, *rows)
        body = told(body, n)
        if self.writable:
            whole = _Whole(n, self)
            return self._scan_into(whole, body, carry, rows, range(0, n, block)), whole.arrays
        pieces: list[tuple[Array, ...]] = []
        for start in range(0, n, block):
            carry, outputs = body(carry, *_cut(rows, start, min(start + block, n)))
            pieces.append(outputs)
        return carry, tuple(self.xp.concat(list(parts), axis=-2) for parts in zip(*pieces, strict=True))

    def _scan_into(
        self,
        whole: _Whole,
        body: Body,
        carry: Any,
        rows: Sequence[Array | None],
        starts: range,
        stop: Event | None = None,
    ) -> Any:
        """The carry of the blocks with these `starts`, outputs written into those of all rows; not of all once `stop` is set."""
        for start in starts:
            if stop is not None and stop.is_set():
                break
            end = min(start + starts.step, starts.stop)
            carry, outputs = body(carry, *_cut(rows, start, end))
            whole.write(outputs, start, end)
        return carry

    def share_rows(
        self, body: Body, carry: Any, rows: Sequence[Array | None], block: int, fewest: int
    ) -> tuple[list[Any], tuple[Array, ...]]:
        """`scan_rows` by several threads where the library offers them, each with a carry of its own.

        Parameters
        ----------
        body, carry, rows, block
            As for `scan_rows`. `body` takes the buffers that it writes from `memory`, which threads do not share.
        fewest : int
            Fewest rows that are worth a thread.

        Returns
        -------
        list of carries
            In the order of the rows. How rows are divided depends only on their number and on the number of threads.
        tuple of arrays
            Outputs.
        """
        # Loops that are recorded or compiled are left as they are.
        count = min(MOST_THREADS, self.threads()) if self.writable and _length(rows) >= 2 * max(1, fewest) else 1
        if count < 2 or _length(rows) < count * fewest:
            carry, outputs = self.scan_rows(body, carry, rows, block)
            return [carry], outputs
        n = _length(rows)
        body = told(body, n)
        whole, stop = _Whole(n, self), Event()
        scan = partial(self._scan_into, whole, body, carry, rows, stop=stop)
        tasks = [partial(scan, range(first, last, block)) for first, last in even_parts(n, count)]
        return self.share(tasks, stop), whole.arrays

    def share(self, tasks: Sequence[Callable[[], Any]], stop: Event | None = None) -> list[Any]:
        """Results of the tasks, which end early once `stop` is set, side by side in the threads.

        One call at a time has these: another that runs meanwhile does its tasks one after another.
        """
        if not SHARING.acquire(blocking=False):
            return [task() for task in tasks]
        try:
            return self.in_threads(tasks, stop or Event())
        finally:
            SHARING.release()

    def threads(self) -> int:
        """How many threads the library uses for an operation, and `in_threads` may use instead."""
        return 1

    def in_threads(self, tasks: Sequence[Callable[[], Any]], stop: Event) -> list[Any]:
        """Results of the tasks, side by side in threads whose operations use no others; tasks end early once `stop` is set."""
        return [task() for task in tasks]

    def run(self, function: Callable[..., Any], call: Any, arrays: Sequence[Array | None]) -> Any:
        """``function(call, backend, arrays)``, compiled where the library does so; `call` is hashable."""
        return function(call, self.for_arrays(arrays), tuple(arrays))

    def differentiable(
        self, forward: Callable[..., Any], backward: Callable[..., Any], call: Any, arrays: Sequence[Array | None]
    ) -> tuple[Array, ...]:
        """``forward(call, backend, arrays)`` with `backward` as its gradient, if the library has gradients.

        Output, log-sum-exp, and what the adjoint needs besides, which carries no gradient.
        """
        result: tuple[Array, ...] = self.run(forward, call, arrays)
        return result

    def takes_whole(self) -> bool:
        """Whether a compiler is at work that may take a program as one operator, by `whole`."""
        return False

    def whole(self, program: str, described: tuple[Any, ...], arrays: Sequence[Array | None]) -> Any:
        """Outputs of a program of `operations.PROGRAMS` as one operator; None where no compiler that takes it is at work."""
        return None

    def residuals(
        self, forward: Callable[..., Any], call: Any, arrays: Sequence[Array | None], residuals: Sequence[Array]
    ) -> Sequence[Array]:
        """What the adjoint needs, the output first, with the path from the inputs where a second derivative will need it."""
        return residuals

    def as_container(self, cls: type, arrays: Sequence[str], constants: Sequence[str]) -> None:
        """Let the library's transformations look into instances of a dataclass, at fields of arrays and of constants."""


def powers_of_two() -> np.ndarray:
    """The table of `power_of_two`, NaN behind."""
    with np.errstate(all="ignore"):
        return np.append(np.ldexp(1.0, np.arange(-MOST_POWER, MOST_POWER + 1)), np.nan)


def lacks(backend: Backend, array: Array) -> list[str]:
    """Names of what an array and the namespace of its library should have and do not."""
    lacking = [name for name in ("shape", "dtype", "ndim") if not hasattr(array, name)]
    try:
        backend.device(array)
    except AttributeError:
        lacking.append("device")
    return lacking + [name for name in (*FUNCTIONS, *DTYPES) if not hasattr(backend.xp, name)]


class _Whole:
    """The outputs of all rows, which threads write those of their blocks into."""

    def __init__(self, n: int, backend: Backend) -> None:
        self._n, self._backend = n, backend
        self._lock = Lock()
        self.arrays: tuple[Array, ...] = ()

    def write(self, outputs: Sequence[Array], start: int, stop: int) -> None:
        """Outputs (..., stop − start, k) of a block, in their place."""
        xp, device = self._backend.xp, self._backend.device
        with self._lock:
            if not self.arrays:
                self.arrays = tuple(
                    xp.empty((*o.shape[:-2], self._n, o.shape[-1]), dtype=o.dtype, device=device(o)) for o in outputs
                )
        for target, o in zip(self.arrays, outputs, strict=True):
            target[..., start:stop, :] = o


def _length(rows: Sequence[Array | None]) -> int:
    """How many rows there are."""
    n: int = next(r.shape[-2] for r in rows if r is not None)
    return n


def _cut(rows: Sequence[Array | None], start: int, stop: int) -> tuple[Array | None, ...]:
    """The same rows of all."""
    return tuple(None if r is None else r[..., start:stop, :] for r in rows)


def product_shape(left: Array, right: Array) -> tuple[int, ...]:
    """Shape of a matrix product (..., n, k) of (..., k, m)."""
    leading = np.broadcast_shapes(left.shape[:-2], right.shape[:-2]) if left.ndim + right.ndim > 4 else ()
    return (*leading, left.shape[-2], right.shape[-1])


@memoized
def block_rows(row_bytes: int, workspace: int, at_most: int) -> int:
    """Rows in a block whose temporaries take `row_bytes` a row: a power of two or a few quarters more, for few distinct shapes."""
    fitting = max(16, workspace // max(1, row_bytes))
    power = 1 << int(math.log2(fitting))
    step = max(128, power // 4) if power >= 256 else power
    rows = min(at_most, fitting // step * step)
    # Rows of a buffer that are a power of two apart displace each other in caches.
    return int(rows - 128 if rows > 256 and rows % 256 == 0 else rows)
