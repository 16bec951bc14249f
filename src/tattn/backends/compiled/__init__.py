"""Kernels for processors, compiled by numba where it is installed: the optional extra ``fast``.

numba is imported by the first call that can use a kernel, and not before. Where it is missing, too old or raises anything, there
are no kernels, and `why_not` says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from math import prod
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from ..operations import (
    CHAIN,
    OF_DOCUMENTS,
    OF_PREFIXES,
    OF_ROWS,
    OF_TUPLES,
    OF_WINDOWS,
    ROWS,
    Documents,
    Kernel,
    Prefix,
    Rows,
    Spans,
    Token,
    Tuples,
    rows_together,
)
from ..threads import MOST_THREADS, even_parts

Array = Any
# Runs a task for parts of the problems and columns of a `Work`, in threads or here.
Spread = Callable[..., list[Any]]
# By the channels that they are for.
OF_CHANNELS = {
    "real": (*OF_PREFIXES, "step", *OF_WINDOWS),
    "complex": tuple(f"complex_{operation}" for operation in (*OF_PREFIXES, "step")),
}
OPERATIONS = (
    *OF_ROWS,
    *OF_DOCUMENTS,
    *OF_TUPLES,
    *(operation for of_kind in OF_CHANNELS.values() for operation in of_kind),
)
# Switches kernels off where it is "0".
SWITCH = "TATTN_KERNELS"
# (major, minor) of numba: older ones know no NumPy 2.
_OLDEST = (0, 61)
# Address space that numba and the libraries which it loads should be allowed, in bytes.
_ROOM = 2 << 30
# Multiplications that are worth a thread.
_FEWEST = 1 << 20
# Columns of the values that are worth a thread, which makes the monomials of all rows: to read, and to pull gradients back.
_TO_READ, _TO_PULL = 4, 24
# Monomials of all rows from which some hundred calls make up for loading numba; its loops are faster for any number.
_MANY = 1 << 17
# Bytes of the monomials of a row, of which a tile of the loops has 128.
_MOST_BYTES = 1 << 16
# Scores that are worth it.
_MANY_SCORES = 1 << 19
# Rows that the loops compute, most of which should be there.
_FILLED = 0.8
# Columns that are few; where they are more, so many monomials and rows are worth turning columns for.
_NARROW, _WIDE_RANK, _WIDE_ROWS = 12, 128, 64


@dataclass(frozen=True)
class Kernels:
    """What there is of compiled code.

    Attributes
    ----------
    operations : tuple of str
        Which operations are computed by it, for NumPy arrays, torch tensors and JAX arrays on the processor; JAX has no tokens.
    version : str
        Of numba; empty if it cannot be used.
    problem : str
        Why there are none; empty if there are.
    """

    operations: tuple[str, ...] = ()
    version: str = ""
    problem: str = ""

    @property
    def on(self) -> bool:
        """Whether calls use them."""
        return not self.problem

    def __str__(self) -> str:
        if not self.on:
            return f"kernels: none: {self.problem}"
        return f"kernels: numba {self.version}: {', '.join(self.operations)}"


def kernels() -> Kernels:
    """Which kernels there are, and whether calls use them; numba is imported for this."""
    problem, loops = why_not(), _loaded()[0]
    version = "" if loops is None else loops.version
    return Kernels((), version, problem) if problem else Kernels(OPERATIONS, version)


def warm_up(dtypes: Sequence[str] = ("float32",), channels: Sequence[str] = ("real",)) -> bool:
    """Compile the kernels for calls that compute in these dtypes, which takes seconds, before the first call does.

    What is compiled is kept on disk, for other processes too.

    Parameters
    ----------
    dtypes : sequence of str
        "float32" (which narrower inputs are computed in as well), "float64".
    channels : sequence of str
        "real", "complex" (which `positions` of layers take).

    Returns
    -------
    bool
        Whether there are kernels for all of them. Calls work without (`tattn.backends.kernels` says why there are none).

    Raises
    ------
    TypeError, ValueError
        For what is no list of these.
    """
    if not isinstance(dtypes, (list, tuple)):
        raise TypeError(f"dtypes should be a list or tuple of names, got {type(dtypes).__name__}")
    for dtype in dtypes:
        if dtype not in ("float32", "float64"):
            raise ValueError(f"dtypes should be 'float32' or 'float64', got {dtype!r}")
    if not isinstance(channels, (list, tuple)):
        raise TypeError(f"channels should be a list or tuple of names, got {type(channels).__name__}")
    for kind in channels:
        if kind not in tuple(OF_CHANNELS):
            raise ValueError(f"channels should be 'real' or 'complex', got {kind!r}")
    wanted = [*OF_ROWS, *OF_DOCUMENTS, *OF_TUPLES, *(operation for kind in channels for operation in OF_CHANNELS[kind])]
    return not why_not() and not any(_fails(operation, dtype) for dtype in dtypes for operation in wanted)


def why_not() -> str:
    """Why there are no kernels; empty if there are."""
    if os.environ.get(SWITCH) == "0":
        return f"turned off by {SWITCH}=0"
    return _loaded()[1] or next(iter(_failed.values()), "")


@cache
def _loaded() -> tuple[Any, str]:
    """The compiled loops with the version of numba, or why they cannot be used."""
    problem = _too_little_room()
    if problem:
        return None, problem
    try:
        import numba

        version = str(numba.__version__)
        if tuple(map(int, version.split(".")[:2])) < _OLDEST:
            return None, f"numba should be {'.'.join(map(str, _OLDEST))} or newer, got {version}"
        from . import causal, decoding, rows, windows
    except ModuleNotFoundError as error:
        return None, "numba is not installed" if error.name == "numba" else _told(error)
    except Exception as error:
        # A library that cannot be used may raise anything.
        return None, _told(error)
    return SimpleNamespace(causal=causal, decoding=decoding, rows=rows, windows=windows, version=version), ""


def _loops_over_tuples() -> Any:
    """Those, which take more of numba than the others do."""
    from . import tuples

    return tuples


def _too_little_room() -> str:
    """Why numba should not be imported: where too little address space is allowed, libraries that it loads ask for it for ever."""
    try:
        import resource
    except ImportError:
        return ""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY or limit >= _ROOM:
        return ""
    return f"numba should be allowed {_ROOM >> 20:,} MiB of address space, got a limit of {limit >> 20:,} MiB"


# What operations raised for a dtype when they were tried.
_failed: dict[tuple[str, str], str] = {}


@cache
def _fails(operation: str, dtype: str) -> bool:
    """Whether an operation cannot be compiled, or computes something else than it should, for a row of ones."""
    try:
        ones = np.ones((1, 1, 1), dtype)
        block = Prefix(np.ones(1, dtype), np.empty((0, 4), np.int64), ones, [ones], [ones])
        zero = [(np.zeros_like(ones), np.zeros_like(ones))]
        if operation.startswith("complex"):
            found = _of_complex_numbers(operation, dtype)
        elif operation in OF_ROWS:
            found = _of_one_row(operation, ones)
        elif operation in OF_DOCUMENTS:
            found = _of_one_document(operation, ones)
        elif operation in OF_WINDOWS:
            found = _of_windows(operation, block)
        elif operation in OF_TUPLES:
            found = _of_two_tuples(operation, ones)
        elif operation == "step":
            sums = [np.zeros((1, 1, 2), dtype)]
            found = step(Token(np.ones(2, dtype), block.runs, 1.0, 1.0, 1.0), ones, [ones], [ones], sums, sums)[0]
        else:
            found = _of_prefix(operation, block, zero)
            found = found[1] if "read" in operation else found[1][2][0]
        if found != 1:
            raise ArithmeticError(f"{operation} of ones should be 1, got {found}")
    except Exception as error:
        _failed[operation, dtype] = _told(error)
        return True
    return False


def _of_complex_numbers(operation: str, dtype: str) -> Any:
    """What an operation computes of Re q a b = 1 for q = a = i, b = −1, or of its derivative by Im a, which is 1 as well."""
    q, b = (np.asarray([[x]], dtype) for x in ((0, 1), (-1, 0)))
    ones, runs = np.ones((1, 1, 1), dtype), np.asarray([[0, 1, 2, 0]], np.int64)
    w = np.asarray([0, 1, 0, -1], dtype)
    if operation == "complex_step":
        token = Token(w, np.asarray([[0, 1, 2, 0], [1, 2, 3, 0]], np.int64), 1.0, 1.0, 1.0, runs)
        real, turned = [np.zeros((1, 3, 2), dtype)] * 2, [np.zeros((1, 2, 4), dtype)] * 2
        out, lse, *_ = complex_step(token, q, [q, b], [ones, ones], real, real, (), turned)
        return out + lse
    block = Prefix(w, runs, q, [q, b], [ones, ones], 2)
    zeros = [np.zeros((1, 1, 4), dtype)] * 2
    found = _of_prefix(operation, block, [(x, x) for x in zeros])
    if "read" in operation:
        return found[1]
    of_a = found[1][1][0]
    return of_a[..., 1] - of_a[..., 0]


def _of_prefix(operation: str, block: Prefix, sums: Sequence[Any]) -> Any:
    """What an operation returns of a block with one row, for upstream 1; one document of it where that is asked for."""
    if operation.endswith("documents"):
        one, sides = np.ones((1, len(block.keys)), np.int64), 1 + len(block.keys)
        units = np.ones((1, 1, sides, block.q.shape[-1]), block.q.dtype)
        block, sums = block._replace(documents=Documents(np.zeros(1, np.int64), one[:, 0], one, units)), ()
    if "read" in operation:
        return prefix_read(block, sums, _alone)
    return prefix_pull(block, [total for total, _ in sums], sums, np.ones_like(block.shares[0]), _alone)


def _of_windows(operation: str, block: Prefix) -> Any:
    """What an operation computes of a window with one row, 1, and nothing else."""
    nothing = [np.zeros_like(block.q)]
    block = block._replace(keys=[*block.keys, *nothing], shares=[*block.shares, *nothing])
    if operation == "window_read":
        return window_read(block, [], _alone)
    return window_pull(block, [], block.q, _alone)[2][0]


def _of_one_row(operation: str, ones: np.ndarray) -> Any:
    """What an operation computes of 1 and x = 1: their mean, or their sum, 2, less its derivative, 1."""
    rows, both = Rows(2, 1, np.asarray([[0, 1, 2, 0]], np.int64), read=1), np.repeat(ones, 2, axis=-2)
    given = {"sum_rows": (ones,), "read_rows": (both / 2,)}.get(operation, (ones, both))
    found = _ROW_OPERATIONS[operation](rows, ones, *given, _alone)
    return np.sum(found[0]) - np.sum(found[1]) if isinstance(found, tuple) else np.mean(found)


def _of_one_document(operation: str, ones: np.ndarray) -> Any:
    """What an operation computes of one row of query, keys and values 1, and weights 1/2 of 1 and x."""
    one, w, runs = np.ones((1, 2), int), np.full(2, 0.5, ones.dtype), np.asarray([[0, 1, 2, 0]])
    spans = Spans(np.asarray([[0, 1]]), one, one, w, runs, 1, 1)
    x, units = np.concatenate([ones, ones], axis=-2), np.ones((1, 1, 2, 1), ones.dtype)
    if operation == "size_documents":
        return np.mean(size_documents(spans, x))
    if operation == "read_documents":
        return read_documents(spans, x, ones, units)
    dx, dz = pull_documents(spans, x, ones, ones, units)
    return np.sum(dx) * np.sum(dz)


def _of_two_tuples(operation: str, ones: np.ndarray) -> Any:
    """What an operation computes of scores 1 and 2: e^−1 and 1 of the first tuple and the second, less e^−1."""
    tuples, keys, both = Tuples(1, 2, 1, False), np.concatenate([ones, 2 * ones], axis=-1), np.repeat(ones, 2, axis=-1)
    if operation == "attend_tuples":
        total, top = attend_tuples(tuples, ones, None, (keys, both, None))
        return np.round(total - np.exp(-1) + top - 2, 5)
    ds, _, (dk, dv) = pull_tuples(tuples, ones, ones, 2 * ones, None, (keys, both, None))
    return np.round((ds - 2 + np.sum(dk + dv, axis=-1) - 2) / 3 - np.exp(-1) + 1, 5)


def _told(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _alone(task: Callable[[slice, slice], Any], work: Work) -> list[Any]:
    """What the task returns for all problems and columns, done here."""
    return [task(slice(0, work.problems), slice(0, work.columns))]


def kernels_for(
    backend: Any,
    takes: Callable[..., bool],
    values: Callable[[Array], np.ndarray] = np.asarray,
    wrapped: Callable[[np.ndarray], Array] = np.asarray,
    pays: Callable[[Rows, int, int], bool] | None = None,
    tuples_pay: Callable[[Tuples], bool] | None = None,
) -> tuple[Kernel, ...]:
    """The kernels of a backend whose arrays are, by their `values`, NumPy arrays on the same memory.

    Parameters
    ----------
    backend : Backend
        Whose threads are used.
    takes : callable
        Whether arrays of the library are such ones.
    values, wrapped : callable
        From an array to NumPy's, and back.
    pays : callable
        Whether loops over all rows, so many with numbers of so many bytes, are worth it; as measured, if not given.
    tuples_pay : callable
        The same for loops over tuples of keys.
    """
    worth, tuples_worth = pays or _pays, tuples_pay or _tuples_pay

    def taken(operation: str, *arrays: Array) -> bool:
        if not takes(*arrays) or why_not():
            return False
        return not _fails(operation, "float64" if arrays[0].dtype.itemsize == 8 else "float32")

    def as_numpy(x: Any) -> Any:
        if x is None:
            return None
        return [as_numpy(a) for a in x] if isinstance(x, (list, tuple)) else values(x)

    def back(x: Any) -> Any:
        if x is None:
            return None
        return tuple(back(a) for a in x) if isinstance(x, (list, tuple)) else wrapped(x)

    def run(operation: Callable[..., Any], block: Prefix, *given: Any) -> Any:
        w, q, keys, shares, decays = as_numpy((block.w, block.q, block.keys, block.shares, block.decays))
        documents = block.documents
        if documents is not None:
            documents = documents._replace(units=as_numpy(documents.units))
        rows = Prefix(w, block.runs, q, keys, shares, block.half, decays, documents)
        return back(operation(rows, *as_numpy(given), partial(_spread, backend)))

    def run_step(operation: Callable[..., Any], token: Token, query: Array, *given: Any) -> Any:
        # Microseconds count here, and nothing is deeper than this.
        decays = [x if isinstance(x, float) else values(x) for x in given[4]]
        rows, turned = ([[*map(values, each)] for each in some] for some in (given[:4], given[5:]))
        out, lse, *found = operation(token, values(query), *rows, decays, *turned)
        return wrapped(out), wrapped(lse), *([*map(wrapped, each)] for each in found)

    def takes_some(operation: str, rows: Rows, n: int, *arrays: Array) -> bool:
        return worth(rows, n, max(4, arrays[0].dtype.itemsize)) and taken(operation, *arrays)

    def takes_rows(operation: str, rows: Rows, *arrays: Array) -> bool:
        return takes_some(operation, rows, arrays[0].shape[-2], *arrays)

    def run_rows(operation: Callable[..., Any], rows: Rows, *given: Array) -> Any:
        return back(operation(rows, *as_numpy(given), partial(_spread, backend)))

    def takes_sizes(operation: str, _: Spans, *arrays: Array) -> bool:
        return taken(operation, *arrays)

    def takes_documents(operation: str, spans: Spans, *arrays: Array) -> bool:
        # As many rows as there are on average.
        rows = Rows(len(spans.w), spans.columns, spans.runs, in_all=spans.in_all)
        return takes_some(operation, rows, int(spans.lengths.mean()), *arrays)

    def run_documents(operation: Callable[..., Any], spans: Spans, *given: Array) -> Any:
        return back(operation(spans, *as_numpy(given)))

    def takes_tuples(operation: str, tuples: Tuples, *arrays: Array) -> bool:
        return tuples_worth(tuples) and taken(operation, *arrays)

    def run_tuples(operation: Callable[..., Any], tuples: Tuples, *given: Any) -> Any:
        return back(operation(tuples, *as_numpy(given)))

    chosen = (
        dict.fromkeys(OF_ROWS, takes_rows)
        | dict.fromkeys(OF_DOCUMENTS, takes_documents)
        | {"size_documents": takes_sizes}
        | dict.fromkeys(OF_TUPLES, takes_tuples)
    )
    functions: dict[str, Callable[..., Any]] = {
        "attend_tuples": partial(run_tuples, attend_tuples),
        "pull_tuples": partial(run_tuples, pull_tuples),
        "step": partial(run_step, step),
        "complex_step": partial(run_step, complex_step),
    }
    for operation in OF_PREFIXES:
        function = partial(run, prefix_read if "read" in operation else prefix_pull)
        functions |= {operation: function, f"complex_{operation}": function}
    functions |= {"window_read": partial(run, window_read), "window_pull": partial(run, window_pull)}
    functions |= {operation: partial(run_rows, function) for operation, function in _ROW_OPERATIONS.items()}
    functions |= {f.__name__: partial(run_documents, f) for f in (size_documents, read_documents, pull_documents)}
    return tuple(
        Kernel(operation, functions[operation], partial(chosen.get(operation, taken), operation))
        for operation in OPERATIONS
    )


def _pays(rows: Rows, n: int, itemsize: int) -> bool:
    """Whether the loops are faster than array operations for n rows of every problem, by so much that loading them is worth it."""
    if max(rows.problems * n, rows.in_all) * rows.rank < _MANY or rows.rank * itemsize > _MOST_BYTES:
        return False
    return rows.columns <= _NARROW or (rows.rank >= _WIDE_RANK and n >= _WIDE_ROWS)


def _tuples_pay(tuples: Tuples) -> bool:
    """Whether the loops are faster than array operations, by more than it takes to load them."""
    if tuples.scores < _MANY_SCORES:
        return False
    return tuples.rows >= _FILLED * (-(-tuples.rows // CHAIN) * CHAIN)


def sum_rows(rows: Rows, x: np.ndarray, z: np.ndarray, spread: Spread) -> np.ndarray:
    """The operation `sum_rows` for NumPy arrays."""
    return _over_rows(rows._replace(read=0), (x, z, None), spread)[0]


def read_rows(rows: Rows, x: np.ndarray, matrix: np.ndarray, spread: Spread) -> np.ndarray:
    """The operation `read_rows` for NumPy arrays."""
    return _over_rows(rows._replace(read=rows.columns), (x, None, matrix), spread)[1]


def sum_and_pull(
    rows: Rows, x: np.ndarray, z: np.ndarray, matrix: np.ndarray, spread: Spread
) -> tuple[np.ndarray, np.ndarray]:
    """The operation `sum_and_pull` for NumPy arrays."""
    sums, _, gradient = _over_rows(rows._replace(read=0), (x, z, matrix), spread)
    return sums, gradient


def read_and_pull(
    rows: Rows, x: np.ndarray, z: np.ndarray, matrix: np.ndarray, spread: Spread
) -> tuple[np.ndarray, np.ndarray]:
    """The operation `read_and_pull` for NumPy arrays."""
    _, found, gradient = _over_rows(rows, (x, z, matrix), spread)
    return found, gradient


_ROW_OPERATIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (sum_rows, read_rows, sum_and_pull, read_and_pull)
}


def _over_rows(
    rows: Rows, arrays: tuple[np.ndarray, np.ndarray | None, np.ndarray | None], spread: Spread
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of (x, z, M): Φ(x)ᵀ z, unless columns are read, these of Φ(x) M, and the gradient where there are both z and M."""
    loops, (x, z, matrix) = _loaded()[0].rows, arrays
    *_, n, dim = x.shape
    leading = np.broadcast_shapes(*(a.shape[:-2] for a in (x, z, matrix) if a is not None))
    problems, dtype = prod(leading), x.dtype
    whole = -(-rows.columns // loops.COLUMNS) * loops.COLUMNS, -(-rows.rank // loops.FEW) * loops.FEW
    summed, pulled = z is not None and not rows.read, z is not None and matrix is not None
    m = np.zeros((problems, *whole) if matrix is not None else (problems, 0, 0), dtype)
    if matrix is not None:
        m[:, : rows.columns, : rows.rank] = np.swapaxes(_together(matrix, leading), -1, -2)
    given = np.empty((problems, n, 0), dtype) if z is None else _together(z, leading)
    sums = np.zeros((problems, *whole) if summed else (problems, 0, 0), dtype)
    out, gradient = np.empty((problems, n, rows.read), dtype), np.empty((problems, n, dim if pulled else 0), dtype)
    own = _together(x, leading)

    def compute(p: slice, _: slice) -> None:
        loops.compute(own[p], given[p], m[p], rows.runs, sums[p], out[p], gradient[p])

    spread(compute, Work(problems, 1, 0, float(n * prod(whole))))
    sums = np.swapaxes(sums[:, : rows.columns, : rows.rank], -1, -2)
    found, read, pulled_back = (a.reshape(*leading, *a.shape[1:]) for a in (sums, out, gradient))
    return found, read, pulled_back


def size_documents(spans: Spans, x: np.ndarray) -> np.ndarray:
    """The operation `size_documents` for NumPy arrays."""
    leading, (documents, sides), dim = x.shape[:-2], spans.begins.shape, x.shape[-1]
    tops = np.empty((prod(leading), documents, sides, dim), x.dtype)
    _loaded()[0].rows.size(_together(x, leading), spans.begins, spans.lengths, tops)
    return tops.reshape(*leading, documents, sides, dim)


def read_documents(spans: Spans, x: np.ndarray, z: np.ndarray, units: np.ndarray) -> np.ndarray:
    """The operation `read_documents` for NumPy arrays."""
    leading, given = _of_documents(spans, x, z, units)
    # Rows of no document are 0.
    out = np.zeros((prod(leading), x.shape[-2] - z.shape[-2], z.shape[-1]), x.dtype)
    _loaded()[0].rows.read(*given, out)
    return out.reshape(*leading, *out.shape[1:])


def pull_documents(
    spans: Spans, x: np.ndarray, z: np.ndarray, upstream: np.ndarray, units: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The operation `pull_documents` for NumPy arrays."""
    leading, (own, columns, *given) = _of_documents(spans, x, z, units)
    wanted = np.asarray(spans.wanted or [True] * (spans.begins.shape[1] - 1))
    dx, dz = np.zeros_like(own), np.zeros((*columns.shape[:-1], spans.read), x.dtype)
    _loaded()[0].rows.pull(own, columns, _together(upstream, leading), *given, wanted, dx, dz)
    return dx.reshape(*leading, *dx.shape[1:]), dz.reshape(*leading, *dz.shape[1:])


def _of_documents(spans: Spans, x: np.ndarray, z: np.ndarray, units: np.ndarray) -> tuple[tuple[int, ...], list[Any]]:
    """The leading shape, and what loops over documents take: rows and columns (P, N, ·), units (P, documents, m + 1, d)."""
    leading = np.broadcast_shapes(x.shape[:-2], z.shape[:-2], units.shape[:-3])
    w = np.zeros(-(-len(spans.w) // (few := _loaded()[0].rows.FEW)) * few, x.dtype)
    w[: len(spans.w)] = spans.w
    shape = *spans.begins.shape, x.shape[-1]
    of_all = np.broadcast_to(units, (*leading, *shape)).reshape(prod(leading), *shape)
    rows = _together(x, leading), _together(z, leading)
    return leading, [*rows, w, spans.runs, spans.begins, spans.lengths, spans.counts, _writable(of_all)]


def attend_tuples(
    tuples: Tuples, s: np.ndarray, left: Sequence[Any] | None, right: Sequence[Any]
) -> tuple[np.ndarray, np.ndarray | None]:
    """The operation `attend_tuples` for NumPy arrays."""
    (s,), sides, settings, leading = _of_sides(tuples, (s,), *_longer_behind(left, right))
    problems, _, n = s.shape
    total = np.empty((problems, right[1].shape[-2], n), s.dtype)
    top = np.empty((problems, 0 if tuples.bounded else 1, n), s.dtype)
    _loops_over_tuples().attend(s, *sides, *settings, total, top)
    return total.reshape(*leading, *total.shape[1:]), None if tuples.bounded else top.reshape(*leading, 1, n)


def pull_tuples(
    tuples: Tuples,
    s: np.ndarray,
    h: np.ndarray,
    shift: np.ndarray | None,
    left: Sequence[Any] | None,
    right: Sequence[Any],
) -> tuple[Any, ...]:
    """The operation `pull_tuples` for NumPy arrays."""
    rows = (s, h) if shift is None else (s, h, shift)
    first, last = _longer_behind(left, right)
    (s, h, *less), sides, settings, leading = _of_sides(tuples, rows, first, last)
    (shift,) = less or [np.empty((len(s), 0, s.shape[-1]), s.dtype)]
    ds, of_sides = np.empty_like(s), []
    for keys, values in sides:
        of_values = np.zeros((len(s), tuples.columns, values.shape[-1]), s.dtype)
        of_sides.append((np.zeros_like(keys), of_values))
    _loops_over_tuples().pull(s, h, shift, *sides, *settings, ds, *of_sides)
    found = [tuple(x.reshape(*leading, *x.shape[1:]) for x in own) for own in ((ds,), *of_sides)]
    of_left, of_right = found[1:] if last is right else found[:0:-1]
    return *found[0], None if left is None else of_left, of_right


def _longer_behind(left: Sequence[Any] | None, right: Sequence[Any]) -> tuple[Sequence[Any] | None, Sequence[Any]]:
    """Both sides, the longer one behind: loops run over that, and sums of its gradients have a term for each of the other."""
    return (right, left) if left is not None and left[0].shape[-1] > right[0].shape[-1] else (left, right)


def _of_sides(tuples: Tuples, rows: Sequence[np.ndarray], left: Sequence[Any] | None, right: Sequence[Any]) -> Any:
    """Rows (..., k, n) as (P, k, n); keys and values of both sides, the left a one if there is none; which are seen, (P, N) or
    (P, 0); settings of the loops; and leading dimensions.
    """
    loops, dtype = _loops_over_tuples(), rows[0].dtype
    shapes = {x.shape[:-2] for x in (*rows, *(left or ()), *right) if x is not None}
    leading = np.broadcast_shapes(*shapes) if len(shapes) > 1 else shapes.pop()
    problems = prod(leading)
    of_sides, seen = [], []
    for side in (left, right):
        if side is None:
            of_sides.append(tuple(np.ones((problems, x.shape[-2], 1), dtype) for x in right[:2]))
        else:
            of_sides.append(tuple(_together(x, leading) for x in side[:2]))
        hidden = None if side is None else side[2]
        seen.append(np.empty((problems, 0), np.bool_) if hidden is None else _together(hidden, leading)[:, 0])
    half = rows[0].shape[-2] // 2 if tuples.paired and left is not None else 0
    lanes = loops.ONCE if rows[0].shape[-1] <= loops.LANES else loops.TWICE
    own = [_together(x, leading) for x in rows]
    return own, of_sides, (tuple(seen), half, lanes, loops.exponents(dtype)), leading


def prefix_read(block: Prefix, sums: Sequence[Sequence[np.ndarray]], spread: Callable[..., list[Any]]) -> Any:
    """The operation `prefix_read` for NumPy arrays."""
    loops = _loaded()[0].causal
    problems = _Problems(block, [total for total, _ in sums])
    total, lost = (_sums(problems, [pair[i] for pair in sums], block, len(block.keys)) for i in (0, 1))
    # Rows of no document are 0.
    out = np.zeros((*problems.q.shape[:-1], problems.z.shape[-1]), problems.q.dtype)
    w = _padded(block, loops)

    def read(p: slice, e: slice) -> None:
        cut = [total[p, :, e], lost[p, :, e], out[p, ..., e]]
        own = [_writable(x) for x in cut]
        z = _writable(problems.z[p, ..., e])
        which = *problems.fading(p), *problems.documents(p)
        loops.read(problems.q[p], problems.k[p], z, w, block.runs, block.half, *which, *own)
        _put_back(own, cut)

    (_alone if block.documents else spread)(read, problems.work(total, _TO_READ))
    return problems.of_views(total, lost, [s for s, _ in sums]), problems.whole(out)


def prefix_pull(
    block: Prefix,
    starts: Sequence[np.ndarray],
    behind: Sequence[Sequence[np.ndarray]],
    upstream: np.ndarray,
    spread: Callable[..., list[Any]],
) -> Any:
    """The operation `prefix_pull` for NumPy arrays."""
    loops = _loaded()[0].causal
    problems = _Problems(block, starts, upstream)
    total = _sums(problems, starts, block, len(block.keys))
    after, missed = (_sums(problems, [pair[i] for pair in behind], block, len(block.keys)) for i in (0, 1))
    q, k, z, g = problems.q, problems.k, problems.z, problems.together(upstream)
    # Rows of no document are 0.
    dz = np.zeros_like(z)
    w = _padded(block, loops)

    def pull(p: slice, e: slice) -> tuple[slice, np.ndarray, np.ndarray, np.ndarray]:
        given = [_writable(x) for x in (z[p, ..., e], g[p, ..., e])]
        cut = [after[p, :, e], missed[p, :, e], dz[p, ..., e]]
        s, rest, found = own = [_writable(x) for x in cut]
        of_q, of_k = np.zeros_like(q[p]), np.zeros_like(k[p])
        of_total = _writable(total[p, :, e])
        of_decays = np.zeros((len(of_q), len(block.decays)))
        loops.pull(
            q[p],
            k[p],
            *given,
            w,
            block.runs,
            block.half,
            *problems.fading(p),
            *problems.documents(p),
            of_total,
            s,
            rest,
            of_q,
            of_k,
            found,
            of_decays,
        )
        _put_back(own, cut)
        return p, of_q, of_k, of_decays

    parts = (_alone if block.documents else spread)(pull, problems.work(total, _TO_PULL))
    _, dq, dk, d_logs = parts[0]
    if len(parts) > 1:
        # What columns add to the gradients of queries and keys is added up in their order.
        dq, dk, d_logs = np.zeros_like(q), np.zeros_like(k), np.zeros((len(q), len(block.decays)))
        for p, of_q, of_k, of_logs in parts:
            dq[p] += of_q
            dk[p] += of_k
            d_logs[p] += of_logs
    of_decays = (d_logs / problems.decays[:, : d_logs.shape[1]]).astype(q.dtype)[..., None, None]
    gradients = problems.whole(dq), *map(problems.whole_views, (dk, dz, of_decays))
    return problems.of_views(after, missed, [s for s, _ in behind]), gradients


def window_read(block: Prefix, starts: Sequence[np.ndarray], spread: Callable[..., list[Any]]) -> Any:
    """The operation `window_read` for NumPy arrays."""
    loops = _loaded()[0]
    problems = _Problems(block, starts)
    total = _sums(problems, starts, block, len(block.keys) // 2)
    out = np.empty((*problems.q.shape[:-1], problems.z.shape[-1]), problems.q.dtype)
    w = _padded(block, loops.causal)

    def read_windows(p: slice, e: slice) -> None:
        cut = out[p, ..., e]
        own, z, of_all = (_writable(x) for x in (cut, problems.z[p, ..., e], total[p, :, e]))
        loops.windows.read(problems.q[p], problems.k[p], z, w, block.runs, of_all, own)
        _put_back([own], [cut])

    spread(read_windows, problems.work(total, _TO_READ))
    return problems.whole(out)


def window_pull(
    block: Prefix, starts: Sequence[np.ndarray], upstream: np.ndarray, spread: Callable[..., list[Any]]
) -> Any:
    """The operation `window_pull` for NumPy arrays."""
    loops = _loaded()[0]
    problems = _Problems(block, starts, upstream)
    total, g = _sums(problems, starts, block, len(block.keys) // 2), problems.together(upstream)
    q, k, z = problems.q, problems.k, problems.z
    w, m = _padded(block, loops.causal), total.shape[1]
    dq, dk, dz, of_total = (np.empty_like(x) for x in (q, k, z, total))

    def pull_windows(p: slice, _: slice) -> None:
        rows = w, block.runs, total[p]
        of_others = np.empty_like(k[p, m:]), np.empty_like(z[p, m:])
        loops.windows.pull(q[p], k[p], z[p], g[p], *rows, dq[p], *of_others, of_total[p])
        dk[p, m:], dz[p, m:] = of_others
        # Their own rows are the others of rows in reverse order.
        turned = (np.flip(x, axis=-2) for x in (q[p], *(np.roll(x[p], m, axis=1) for x in (k, z)), g[p]))
        loops.windows.pull(*map(np.ascontiguousarray, turned), *rows, dq[:0], *of_others, total[:0])
        dk[p, :m], dz[p, :m] = (np.flip(x, axis=-2) for x in of_others)

    spread(pull_windows, problems.work(total, dz.shape[-1] + 1))
    views = (problems.whole_views(x) for x in (dk, dz, of_total if starts else total[:, :0]))
    return problems.whole(dq), *views


def _sums(problems: _Problems, given: Sequence[np.ndarray], block: Prefix, views: int) -> np.ndarray:
    """Those of every problem and view (P, m, dv + 1, r), or (0, …) if there are none."""
    return (
        problems.views(given) if given else np.zeros((0, views, problems.z.shape[-1], len(block.w)), problems.q.dtype)
    )


def step(
    token: Token,
    query: np.ndarray,
    keys: Sequence[np.ndarray],
    values: Sequence[np.ndarray],
    sums: Sequence[np.ndarray],
    rests: Sequence[np.ndarray],
    decays: Sequence[Any] = (),
) -> Any:
    """The operation `step` for NumPy arrays."""
    *leading, n, dim = query.shape
    problems, views, value_dim, dtype = prod(leading), len(keys), values[0].shape[-1], query.dtype
    new = np.empty((views, 2, problems, len(token.w)), dtype)
    out, lse = np.empty((problems, n, value_dim), dtype), np.empty((problems, n), dtype)

    def both(arrays: Sequence[np.ndarray], shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        # Always two of each, so that one function is compiled for one view and for two.
        first, last = arrays[0], arrays[-1]
        first = _writable(first).reshape(shape)
        return first, first if views == 1 else _writable(last).reshape(shape)

    _loaded()[0].decoding.step(
        _writable(query).reshape(problems, n, dim),
        both(keys, (problems, n, dim)),
        both(values, (problems, n, value_dim)),
        both(_factors(decays, query, views), (problems,)),
        token.of_query, token.of_keys, token.largest, token.w, token.runs,
        both(sums, (problems, -1)),
        both(rests, (problems, -1)),
        new, out, lse,
    )  # fmt: skip
    shape = (views, 2, *sums[0].shape)
    found = new.reshape(shape)
    return out.reshape(*leading, n, value_dim), lse.reshape(*leading, n), found[:, 0], found[:, 1]


def complex_step(
    token: Token,
    query: np.ndarray,
    keys: Sequence[np.ndarray],
    values: Sequence[np.ndarray],
    sums: Sequence[np.ndarray],
    rests: Sequence[np.ndarray],
    decays: Sequence[Any],
    turned: Sequence[np.ndarray],
) -> Any:
    """The operation `complex_step` for NumPy arrays."""
    loops, n, dtype = _loaded()[0].decoding, query.shape[-2], query.dtype
    problems, shape = prod(query.shape[:-2]), turned[0].shape[-2:]
    rows = _rows(keys, values, _factors(decays, query, len(keys)))
    powers = np.zeros((problems, n))
    found = _taken_in(token, rows, (sums, rests), powers)
    combined, phi, room = np.zeros((problems, n, *shape), dtype), np.empty(shape[1], dtype), np.empty(shape, dtype)
    combined[..., : shape[1] // 2] = 1
    unit, most = dtype.type(token.of_keys), dtype.type(token.largest)
    new = [np.empty(x.shape, dtype) for x in turned]
    for row, old, after in zip(rows, turned, new, strict=True):
        both = (x.reshape(problems, *shape) for x in (_writable(old), after))
        loops.take_in_complex(*row, unit, most, token.pairs, phi, room, *both, combined, powers)
    columns = shape[0]
    out, lse, part = (
        np.empty((problems, n, columns - 1), dtype),
        np.empty((problems, n), dtype),
        np.empty(columns, dtype),
    )
    q = _writable(query).reshape(problems, n, -1)
    facts = dtype.type(token.of_query), most, token.pairs, token.w
    loops.read_complex(q, *facts, phi, combined, powers, part, out, lse)
    leading = query.shape[:-2]
    return out.reshape(*leading, n, columns - 1), lse.reshape(*leading, n), *found, new


def _factors(decays: Sequence[Any], query: np.ndarray, views: int) -> list[np.ndarray]:
    """What the sums of every view are multiplied by with each token, (P,), 1 where keys do not decay."""
    leading = query.shape[:-2]
    if not decays:
        return [_ones(prod(leading), query.dtype)] * views
    found = np.empty((views, *leading), query.dtype)
    for view, given in enumerate(decays):
        found[view, ...] = given
    return list(found.reshape(views, -1))


@lru_cache(maxsize=64)
def _ones(count: int, dtype: np.dtype) -> np.ndarray:
    """Factors that change nothing."""
    return np.ones(count, dtype)


def _rows(
    keys: Sequence[np.ndarray], values: Sequence[np.ndarray], factors: Sequence[np.ndarray]
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Keys (P, n, d), values (P, n, dv) and factors (P,) of every view."""
    n, problems = keys[0].shape[-2], len(factors[0])
    rows = ([_writable(x).reshape(problems, n, -1) for x in each] for each in (keys, values))
    return list(zip(*rows, factors, strict=True))


def _taken_in(
    token: Token, rows: Sequence[Any], before: Sequence[Any], powers: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Sums and rests of real monomials with keys and values."""
    loops = _loaded()[0].decoding
    found: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for row, total, rest in zip(rows, *before, strict=True):
        problems, (r, columns), dtype = len(powers), total.shape[-2:], total.dtype
        phi, room, new = (np.empty(shape, dtype) for shape in (r, (3, r * columns), (2, problems, r * columns)))
        given = _writable(total).reshape(problems, -1), _writable(rest).reshape(problems, -1)
        unit, most = dtype.type(token.of_keys), dtype.type(token.largest)
        loops.take_in(*row, unit, most, token.runs, phi, room, *given, new[0], new[1], None, powers)
        for of_kind, x in zip(found, new, strict=True):
            of_kind.append(x.reshape(total.shape))
    return found


def _writable(x: np.ndarray) -> np.ndarray:
    """The array, contiguous and such that it may be written to, which it is not."""
    return x if x.flags.c_contiguous and x.flags.writeable else x.copy()


def _put_back(own: Sequence[np.ndarray], places: Sequence[np.ndarray]) -> None:
    """What `_writable` made copies of, to where it came from."""
    for x, place in zip(own, places, strict=True):
        if x is not place:
            place[...] = x


class Work(NamedTuple):
    """What threads may share: problems, columns of the values and how many parts of these; and multiplications of a problem."""

    problems: int
    columns: int
    parts: int
    each: float


class _Problems:
    """The rows of a block with one leading dimension, that of the problems, copied where arrays broadcast."""

    def __init__(self, block: Prefix, sums: Sequence[np.ndarray], *others: np.ndarray) -> None:
        every = (block.q, *block.keys, *block.shares, *block.decays, *sums, *others)
        self.leading = np.broadcast_shapes(*(x.shape[:-2] for x in every))
        self.q = self.together(block.q)
        self.k, self.z = self.views(block.keys), self.views(block.shares)
        self.decays, self.steps = np.ones(self.k.shape[:2]), np.full(len(self.k), ROWS)
        if block.decays:
            self.decays = self.views(block.decays)[..., 0, 0].astype(np.float64)
            self.steps = rows_together(np.prod(self.decays, axis=1), str(self.q.dtype))
        self._documents = block.documents

    def fading(self, some: slice) -> tuple[np.ndarray, np.ndarray]:
        """Factors (P, m) by which keys decay, and rows of a chunk (P,)."""
        return self.decays[some], self.steps[some]

    def documents(self, some: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Where documents begin, their rows, parts (D, m) and units (P, D, m + 1, d); all rows are one if there are none."""
        (count, n, dim), views, dtype = self.q.shape, self.k.shape[1], self.q.dtype
        if self._documents is None:
            units = np.ones((count, 1, 1 + views, dim), dtype)
            return np.zeros(1, np.int64), np.full(1, n), np.ones((1, views), dtype), units[some]
        begins, lengths, counts, units = self._documents
        units = np.broadcast_to(units, (*self.leading, *units.shape[-3:])).reshape(count, *units.shape[-3:])
        parts = (1 / counts).astype(dtype)
        return np.ascontiguousarray(begins), np.ascontiguousarray(lengths), parts, _writable(units[some])

    def together(self, x: np.ndarray) -> np.ndarray:
        """(..., n, k) → (P, n, k)."""
        return _together(x, self.leading)

    def views(self, xs: Sequence[np.ndarray]) -> np.ndarray:
        """(..., n, k) for every view → (P, m, n, k), a copy."""
        return np.stack([self.together(x) for x in xs], axis=1)

    def whole(self, x: np.ndarray) -> np.ndarray:
        """The reverse of `together`."""
        return x.reshape(*self.leading, *x.shape[1:])

    def whole_views(self, x: np.ndarray) -> list[np.ndarray]:
        """The reverse of `views`."""
        return [self.whole(x[:, view]) for view in range(x.shape[1])]

    def of_views(self, total: np.ndarray, lost: np.ndarray, like: Sequence[np.ndarray]) -> list[Any]:
        """Compensated sums of every view, in the leading dimensions of those in `like`: the problems that share a view agree."""
        if not like:
            return []
        cuts = [tuple(slice(0, size) for size in s.shape[:-2]) for s in like]
        both = zip(self.whole_views(total), self.whole_views(lost), strict=True)
        return [tuple(_last(x, len(cut))[cut] for x in pair) for pair, cut in zip(both, cuts, strict=True)]

    def work(self, sums: np.ndarray, fewest: int) -> Work:
        """What there is to do, where so many columns are worth a thread."""
        columns = sums.shape[2]
        return Work(len(self.q), columns, columns // fewest, float(self.q.shape[1]) * prod(sums.shape[1:]))


def _together(x: np.ndarray, leading: tuple[int, ...]) -> np.ndarray:
    """(..., n, k) → (P, n, k), for so many problems."""
    if x.shape[:-2] != leading:
        x = np.broadcast_to(x, (*leading, *x.shape[-2:]))
    return _writable(x.reshape(prod(leading), *x.shape[-2:]))


def _last(x: np.ndarray, leading: int) -> np.ndarray:
    """The first problem along all but the last so many leading dimensions."""
    for _ in range(x.ndim - 2 - leading):
        x = x[0]
    return x


def _padded(block: Prefix, loops: Any) -> np.ndarray:
    """Weights in whole blocks of monomials, with zeros where these have none."""
    blocks = -(-len(block.w) // loops.WIDTH) if block.half is None else -(-block.half // loops.HALF)
    w = np.zeros(blocks * loops.WIDTH, block.w.dtype)
    loops.spread_out(_writable(block.w), block.half, w)
    return w


def _spread(backend: Any, task: Callable[[slice, slice], Any], work: Work) -> list[Any]:
    """What the task returns for some problems, or some columns of all, in each thread where that is worth it, in their order.

    Columns have sums of their own, so that no pass has to wait for another; the monomials of the rows are made by each thread.
    """
    count = max(1, min(backend.threads(), MOST_THREADS, int(work.problems * work.each / _FEWEST)))
    by_problems, by_columns = min(count, work.problems), 1
    if by_problems < count <= work.parts:
        by_problems, by_columns = 1, count
    tasks = [
        partial(task, slice(*of_problems), slice(*of_columns))
        for of_problems in even_parts(work.problems, by_problems)
        for of_columns in even_parts(work.columns, by_columns)
    ]
    return [tasks[0]()] if len(tasks) == 1 else backend.share(tasks)
