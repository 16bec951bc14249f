"""What every backend offers beside the array API standard, with answers that suit any library."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial, wraps
from itertools import pairwise
from threading import Lock
from types import ModuleType
from typing import Any, TypeVar

import array_api_compat
import numpy as np

Array = Any
F = TypeVar("F", bound=Callable[..., Any])
REMEMBERED = 256
# Python lets one thread at a time start operations, so that more would wait for each other.
MOST_THREADS = 8
Body = Callable[..., tuple[Any, tuple[Array, ...]]]


class Backend:
    """One array library: its namespace, and the few things that the standard cannot say.

    Attributes
    ----------
    name : str
        Name of the library as a person writes it.
    writable : bool
        Whether arrays may be assigned to in place, through views.
    parts : bool
        Whether many problems are worth taking one after another to save memory; not where a loop is unrolled into a
        compiled program.
    compiles : bool
        Whether programs are compiled, and kept, for each plan that is used.
    workspace : int
        Bytes that the temporaries of one block of rows should stay below.
    cache : int
        Bytes that an array which is gone over several times should stay below.
    reads : bool
        Whether values can be read at once: they are there, on the host, and nothing records or traces the call.
    """

    name = "array API"
    writable = False
    parts = True
    compiles = False
    workspace = 2 << 20
    cache = 512 << 10
    reads = False

    def __init__(self, xp: ModuleType | None = None) -> None:
        self._xp = xp

    @property
    def xp(self) -> Any:
        """The array API namespace."""
        return self._xp

    def for_arrays(self, arrays: Sequence[Array]) -> Backend:
        """The backend to compute on these arrays with; gradients or devices may ask for another."""
        return self

    def is_traced(self, arrays: Sequence[Array]) -> bool:
        """Whether values cannot be read now because a transformation is tracing the call."""
        return False

    def device(self, array: Array) -> Any:
        """Where the array is."""
        return array_api_compat.device(array)

    def is_supported(self, array: Array) -> str | None:
        """A reason to refuse this array, or None."""
        return None

    def dtype_name(self, dtype: Any) -> str:
        """Name of a dtype: 'float32', 'bfloat16', …"""
        return str(getattr(dtype, "name", dtype)).rpartition(".")[2]

    def compute_dtype(self, dtype: Any) -> Any:
        """The dtype to compute in: float32 where the dtype is narrower, else the same."""
        return dtype if self.dtype_name(dtype) == "float64" else self.xp.float32

    def cast(self, array: Array, dtype: Any) -> Array:
        """The array in another floating dtype."""
        return array if array.dtype == dtype else self.xp.astype(array, dtype)

    def table(self, function: Callable[..., np.ndarray], *args: Any, like: Array, dtype: Any = None) -> Array:
        """The NumPy table ``function(*args)`` as an array on the device of `like`; integers unless `dtype` is given."""
        if dtype is None:
            return self.indices(function(*args), like)
        return self.xp.asarray(function(*args), dtype=dtype, device=self.device(like))

    def indices(self, numbers: np.ndarray, like: Array) -> Array:
        """Whole numbers as an array on the device of `like`."""
        return self.xp.asarray(numbers, dtype=self.xp.int64, device=self.device(like))

    def whole_numbers(self, array: Array) -> Array:
        """A floating array of whole numbers as one of integers, fit to index by."""
        return self.xp.astype(array, self.xp.int64)

    def to_numpy(self, array: Array) -> np.ndarray:
        """Values on the host, in a dtype that NumPy has."""
        wide = array if self.dtype_name(array.dtype) == "float64" else self.xp.astype(array, self.xp.float32)
        return np.from_dlpack(wide)

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

    def product(self, left: Array, right: Array, memory: dict[Any, Array], name: str) -> Array:
        """Matrix product; where arrays are writable in `memory`, until the next product of this name."""
        if not self.writable:
            return left @ right
        key = name, product_shape(left, right)
        if key not in memory:
            memory[key] = self.xp.empty(key[1], dtype=left.dtype, device=self.device(left))
        self.product_into(memory[key], left, right)
        return memory[key]

    def exp_less(self, x: Array, shift: Array | None) -> Array:
        """e^(x − shift), or eˣ; what x held is lost where arrays are writable."""
        return self.xp.exp(x if shift is None else x - shift)

    def times(self, weights: Array, x: Array) -> Array:
        """Weights · x; what x held is lost where arrays are writable."""
        return weights * x

    def write_rows(self, target: Array, places: Array, rows: Array) -> None:
        """Write rows (m, k) at places (m,) of `target` (n, k); only called if `writable`."""
        target[places] = rows

    def scan_rows(
        self, body: Body, carry: Any, rows: Sequence[Array | None], block: int
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
            Rows in a block.
        """
        n = _length(rows)
        if n <= block:
            return body(carry, *rows)
        if self.writable:
            whole = _Whole(n, self)
            return self._scan_into(whole, body, carry, rows, block, 0, n), whole.arrays
        pieces: list[tuple[Array, ...]] = []
        for start in range(0, n, block):
            carry, outputs = body(carry, *_cut(rows, start, min(start + block, n)))
            pieces.append(outputs)
        return carry, tuple(self.xp.concat(list(parts), axis=-2) for parts in zip(*pieces, strict=True))

    def _scan_into(
        self, whole: _Whole, body: Body, carry: Any, rows: Sequence[Array | None], block: int, first: int, last: int
    ) -> Any:
        """The carry of rows first … last, whose outputs are written into those of all rows."""
        for start in range(first, last, block):
            stop = min(start + block, last)
            carry, outputs = body(carry, *_cut(rows, start, stop))
            whole.write(outputs, start, stop)
        return carry

    def share_rows(
        self, make_body: Callable[[], Body], carry: Any, rows: Sequence[Array | None], block: int, fewest: int
    ) -> tuple[list[Any], tuple[Array, ...]]:
        """`scan_rows` by several threads where the library offers them, each with a body and a carry of its own.

        Parameters
        ----------
        make_body : callable
            Makes the ``body`` of `scan_rows`, and what it writes on.
        carry, rows, block
            As for `scan_rows`.
        fewest : int
            Rows that are worth a thread.

        Returns
        -------
        list of carries
            In the order of the rows, which depends on nothing but their number and that of threads.
        tuple of arrays
            Outputs.
        """
        # Loops that are recorded or compiled are left as they are.
        count = min(MOST_THREADS, _length(rows) // max(1, fewest)) if self.writable else 1
        count = min(count, self.threads()) if count > 1 else count
        # One call at a time is shared: others that run meanwhile have no threads left for them.
        if count < 2 or not _SHARING.acquire(blocking=False):
            carry, outputs = self.scan_rows(make_body(), carry, rows, block)
            return [carry], outputs
        try:
            n = _length(rows)
            whole = _Whole(n, self)
            ends = [n * i // count for i in range(count + 1)]

            def scan(first: int, last: int) -> Any:
                return self._scan_into(whole, make_body(), carry, rows, block, first, last)

            tasks = [partial(scan, first, last) for first, last in pairwise(ends)]
            return self.in_threads(tasks), whole.arrays
        finally:
            _SHARING.release()

    def threads(self) -> int:
        """How many threads the library uses for an operation, and `in_threads` may use instead."""
        return 1

    def in_threads(self, tasks: Sequence[Callable[[], Any]]) -> list[Any]:
        """Results of the tasks, each run in a thread of its own whose operations use no others."""
        return [task() for task in tasks]

    def run(self, function: Callable[..., Any], call: Any, arrays: Sequence[Array | None]) -> Any:
        """``function(call, backend, arrays)``, compiled where the library does so; `call` is hashable."""
        return function(call, self, tuple(arrays))

    def differentiable(
        self, forward: Callable[..., Any], backward: Callable[..., Any], call: Any, arrays: Sequence[Array | None]
    ) -> tuple[Array, ...]:
        """``forward(call, backend, arrays)`` with `backward` as its gradient, if the library has gradients.

        Output, log-sum-exp, and what the adjoint needs besides, which carries no gradient.
        """
        result: tuple[Array, ...] = self.run(forward, call, arrays)
        return result

    def residuals(
        self, forward: Callable[..., Any], call: Any, arrays: Sequence[Array | None], residuals: Sequence[Array]
    ) -> Sequence[Array]:
        """What the adjoint needs, the output first, with the path from the inputs where a second derivative will need it."""
        return residuals

    def as_container(self, cls: type, arrays: Sequence[str], constants: Sequence[str]) -> None:
        """Let the library's transformations look into instances of a dataclass, at fields of arrays and of constants."""

    def synchronize(self, array: Array) -> None:
        """Wait until `array` has been computed."""


_SHARING = Lock()


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


def run_threads(tasks: Sequence[Callable[[], Any]]) -> list[Any]:
    """Results of the tasks, of which this thread runs the first."""
    with ThreadPoolExecutor(len(tasks) - 1, thread_name_prefix="tattn") as pool:
        others = [pool.submit(task) for task in tasks[1:]]
        return [tasks[0](), *(other.result() for other in others)]


def product_shape(left: Array, right: Array) -> tuple[int, ...]:
    """Shape of a matrix product (..., n, k) of (..., k, m)."""
    leading = np.broadcast_shapes(left.shape[:-2], right.shape[:-2]) if left.ndim + right.ndim > 4 else ()
    return (*leading, left.shape[-2], right.shape[-1])


def memoized(function: F) -> F:
    """Compute once for each tuple of hashable arguments; compilers that trace Python take the result as it is.

    The last `REMEMBERED` results are kept: bases that are pruned for the data at hand are many.
    """
    results: dict[Any, Any] = {}
    lock = Lock()

    @wraps(function)
    def look_up(*args: Any) -> Any:
        found = results.get(args, results)
        if found is results:
            found = function(*args)
            with lock:
                if len(results) >= REMEMBERED:
                    results.pop(next(iter(results)))
                results[args] = found
        return found

    # What torch.compiler.assume_constant_result sets; torch must not be imported for it.
    look_up._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return look_up  # type: ignore[return-value]


@memoized
def block_rows(row_bytes: int, workspace: int, at_most: int) -> int:
    """Rows in a block whose temporaries take `row_bytes` a row: a power of two or a few quarters more, for few distinct shapes."""
    fitting = max(16, workspace // max(1, row_bytes))
    power = 1 << int(math.log2(fitting))
    step = max(128, power // 4) if power >= 256 else power
    rows = min(at_most, fitting // step * step)
    # Rows of a buffer that are a power of two apart displace each other in caches.
    return int(rows - 128 if rows > 256 and rows % 256 == 0 else rows)
