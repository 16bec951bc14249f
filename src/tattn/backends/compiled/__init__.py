"""Kernels for processors, compiled by numba where it is installed: the optional extra ``fast``.

numba is imported by the first call that can use a kernel, and not before. Where it is missing, too old or raises anything, there
are no kernels, and `why_not` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..operations import (
    CHAIN,
    OF_DOCUMENTS,
    OF_PREFIXES,
    OF_ROWS,
    OF_TUPLES,
    OF_WINDOWS,
    Kernel,
    Prefix,
    Rows,
    Spans,
    Token,
    Tuples,
)

# The name of the switch is for those who set it.
from .loading import SWITCH as SWITCH
from .loading import loaded, why_not
from .operations.causal import prefix_pull, prefix_read
from .operations.documents import pull_documents, read_documents, size_documents
from .operations.problems import in_parts
from .operations.rows import ROW_OPERATIONS
from .operations.tokens import complex_step, step
from .operations.tuples import attend_tuples, pull_tuples
from .operations.windows import window_pull, window_read
from .trials import fails

Array = Any
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
# Monomials of all rows from which some hundred calls with the gradient make up for loading numba; loops are faster for any number.
_MANY = 1 << 16
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
    problem, loops = why_not(), loaded()[0]
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
    return not why_not() and not any(fails(operation, dtype) for dtype in dtypes for operation in wanted)


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
        return not fails(operation, "float64" if arrays[0].dtype.itemsize == 8 else "float32")

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
        return back(operation(rows, *as_numpy(given), partial(in_parts, backend)))

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
        return back(operation(rows, *as_numpy(given), partial(in_parts, backend)))

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
    functions |= {operation: partial(run_rows, function) for operation, function in ROW_OPERATIONS.items()}
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
