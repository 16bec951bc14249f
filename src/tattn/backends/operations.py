"""What compiled code may replace: named operations, whose array form in `engines` stays the reference and needs nothing.

=============  =====================================================================================================
operation      what it computes
=============  =====================================================================================================
moments        ``(k, v, mask, unit, degree, grading)``, keys (..., n, d), values (..., n, dv), units and masks as in
               `engines.features` → Φ(k · unit)ᵀ [v, 1], (..., r, dv + 1)
sum_rows       ``(rows, x, z)``, a `Rows`, rows (..., n, d) in units and columns (..., n, c) → Φ(x)ᵀ z, (..., r, c)
read_rows      ``(rows, x, matrix)``, M (..., r, c) → Φ(x) M, (..., n, c)
sum_and_pull   ``(rows, x, z, matrix)`` → Φ(x)ᵀ z, and the gradient Σ_e z_e ∂(Φ M)_e/∂x, (..., n, d)
read_and_pull  ``(rows, x, z, matrix)`` → the first columns of Φ(x) M, (..., n, c'), and the gradient
prefix_read    ``(block, sums)``, a `Prefix` and compensated sums of every view → the sums with its rows, and numerators
               (..., n, dv + 1) of causal attention
prefix_pull    ``(block, starts, behind, upstream)``, the sums (..., dv + 1, r) before it, compensated sums of the gradients
               behind it, and gradients (..., n, dv + 1) of the numerators → the sums behind with its rows, and gradients of
               q, all keys, all shares and, where keys decay, all factors (..., 1, 1)
size_documents ``(spans, x)``, a `Spans` and rows (..., N, d) of query and all views, one after another → the largest |entry|
               of each channel of each document's query and views, (..., documents, m + 1, d), NaN where one is not finite
read_documents ``(spans, x, z, units)``, columns (..., N − n, c) of the views' rows and units (..., documents, m + 1, d) → with
               A = Φ(a)ᵀ z over a's count, and so on for the other views, Φ(q) (w · A ∘ B), (..., n, c)
pull_documents ``(spans, x, z, upstream, units)`` → gradients of x, and of the first columns of z, (..., N − n, c')
attend_tuples  ``(tuples, s, left, right)``, a `Tuples`, query rows (..., d, n), and two sides: keys (..., d, N), values and ones
               (..., c, N), and which of them are seen (..., 1, N) or None for all; of the left one None, or all pairs of both are
               tuples, whose keys and values k and v are products → Σ w v over tuples, (..., c, n), for weights
               w = e^(kᵀ s − top), and top (..., 1, n), the largest score, or None where that is not subtracted
pull_tuples    ``(tuples, s, h, shift, left, right)``, h (..., c, n), and what scores are less (..., 1, n) or None → with
               f = e^(kᵀ s − shift) and p = f ∘ vᵀ h the sums k p, (..., d, n); and for both sides, None for none, the gradients
               of keys and of the first columns of values that s pᵀ and h fᵀ, those of tuples, lead to
window_read    ``(block, starts)``, a `Prefix` of blocks of rows with the keys and shares of every view, and then as many others,
               and the sums (..., dv + 1, r) of every view that all rows of a block see, or none → numerators (..., n, dv + 1)
               of rows that see those of their view up to their own, and the others from this on
window_pull    ``(block, starts, upstream)``, gradients (..., n, dv + 1) of these → gradients of q, all keys, all shares and, if
               there are some, the starts, each for every block
step           ``(token, query, keys, values, sums, rests, decays)``, a `Token`, rows (..., n, ·) of n tokens, what two views at
               most have been summed up to, (..., r, dv + 1), all with the same leading dimensions, and by what sums are
               multiplied before every token, for each view an array that broadcasts to these or a number, () if by nothing →
               output (..., n, dv), lse (..., n), sums and rests with the tokens
=============  =====================================================================================================

``prefix_read_documents`` and ``prefix_pull_documents`` are ``prefix_read`` and ``prefix_pull`` of a block with documents.
No sums are before and behind it: these are (), given and returned.

Where channels are complex, a name begins with "complex": there monomials, sums of prefixes and weights are those of
`features.pairs`. ``complex_step`` takes, and returns with the token, sums of these beside the others,
(..., dv + 1, r).

A backend offers a kernel in `Backend.kernels`. It says for which arrays it is there, and how long its chains of additions are: a
plan states the rounding of those, so a plan for arrays of that backend counts with them, and a call whose plan counts with
shorter ones does without the kernel. Those of tuples count with chains of `bounds.rounding.EXACT_CHAIN` whatever computes them, and
with an exponential that loses two units at most: a kernel of theirs should have neither longer ones nor a worse one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

OF_ROWS = ("sum_rows", "read_rows", "sum_and_pull", "read_and_pull")
OF_DOCUMENTS = ("size_documents", "read_documents", "pull_documents")
OF_TUPLES = ("attend_tuples", "pull_tuples")
OF_WINDOWS = ("window_read", "window_pull")
OF_PREFIXES = ("prefix_read", "prefix_pull", "prefix_read_documents", "prefix_pull_documents")
OPERATIONS = (
    "moments",
    *OF_ROWS,
    *OF_DOCUMENTS,
    *OF_TUPLES,
    *OF_WINDOWS,
    *(kind + name for kind in ("", "complex_") for name in (*OF_PREFIXES, "step")),
)
# Terms in a chain of additions of the array form.
CHAIN = 128
# Rows of causal attention whose sums compiled loops join to those before them at once, and rows that they take at a time.
ROWS, FEW = 64, 4
# log2 of how far apart the weights of keys that decay may be among rows that are joined at once, over all views; and fewest rows.
_APART, _FEWEST = {"float32": 48, "float64": 256}, 8
# Rows of a block in windows, where what a row sees is more than rows of two blocks.
FEWEST_ROWS = 16


def of_channels(operation: str, paired: bool, views: int) -> str:
    """The operation's name for these channels: of a product of two complex numbers the real part is that of real channels."""
    return f"complex_{operation}" if paired and views > 1 else operation


def rows_together(factors: Any, dtype: str) -> np.ndarray:
    """How many rows compiled loops join to those before them at once where keys decay, for products of all views' factors.

    0 where even the fewest are too far apart.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = -np.log2(np.asarray(factors, np.float64))
        found = np.zeros(apart.shape, np.int64)
        rows = _FEWEST
        while rows <= ROWS:
            found[(rows - 1) * apart <= _APART[dtype]] = rows
            rows *= 2
    return found


def rows_in_range(factor: float, dtype: str) -> int:
    """How many rows of a window may weigh what they do for one in their middle, for a product of all views' factors.

    0 where these are too few for compiled loops, or the product is NaN.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = float(-np.log2(np.float64(factor)))
    if not (FEWEST_ROWS - 1) * apart <= _APART[dtype]:
        return 0
    return 1 + int(_APART[dtype] / max(apart, 1e-9))


def at_once(factor: float, dtype: str, windowed: bool) -> int:
    """`rows_in_range` in windows, or else `rows_together`: of the rows that decay fastest; 0 where loops do not serve them."""
    return rows_in_range(factor, dtype) if windowed else int(rows_together(factor, dtype))


class Kernel(NamedTuple):
    """One operation in compiled code: ``function`` takes what the operation does, for arrays where ``takes`` is true of them.

    ``takes`` gets what `moments` does; a `Rows` or `Spans` and the arrays of a pass, its rows first; a `Tuples`, query and keys; or
    query, keys and values, of a causal call or of tokens, and the arrays by which these decay.
    """

    operation: str
    function: Callable[..., Any]
    takes: Callable[..., bool]
    chain: int = CHAIN


class Rows(NamedTuple):
    """What a pass over all rows multiplies with, whose block has at most 4,096 of them.

    How many monomials there are, and columns of the sums or of the matrix; runs as in `Prefix`, of NumPy; how many problems there
    are side by side, and how many of the columns are read beside a gradient; and how many rows the whole call has, if it is more
    than one computation.
    """

    rank: int
    columns: int
    runs: Any
    problems: int = 1
    read: int = 0
    in_all: int = 0


class Spans(NamedTuple):
    """Documents of several rows each, which are taken where they stand, and what a pass over them multiplies with.

    `begins`, `lengths` and `counts` (documents, m + 1), of NumPy: where the rows of a document's query and views begin in the array
    of all, those of the query first; how many there are; and what sums over them are divided by. Weights w (r,) in the dtype of the
    computation, and runs as in `Prefix`, of NumPy; how many columns there are, and how many of them need a gradient; of which views
    gradients are wanted, () of all; and how many rows the whole call has.
    """

    begins: Any
    lengths: Any
    counts: Any
    w: Any
    runs: Any
    columns: int
    read: int
    wanted: tuple[bool, ...] = ()
    in_all: int = 0


class Tuples(NamedTuple):
    """A call of the exact method where every query row sees all tuples of keys that are seen at all.

    How many query rows and scores there are; how many columns of the values need gradients; whether scores are known to be so
    small that nothing has to be subtracted from them; and whether channels are complex.
    """

    rows: int
    scores: int
    columns: int
    bounded: bool
    paired: bool = False


class Token(NamedTuple):
    """What all tokens of a stream are computed with.

    Weights w (r,) for each of dv + 1 columns, one after another (r (dv + 1),), and runs of monomials as in `Prefix`, both of
    NumPy; factors of the channels of queries and keys, and the largest |entry| in these. Where channels are complex w has no
    columns, and `pairs` are the runs of complex monomials.
    """

    w: Any
    runs: Any
    of_query: float
    of_keys: float
    largest: float
    pairs: Any = None


class Documents(NamedTuple):
    """Documents among the rows of a causal block.

    Where each begins and how many rows it has (documents,), and what sums over its rows are divided by (documents, m), of NumPy;
    and units of query and keys (..., documents, m + 1, d).
    """

    begins: Any
    lengths: Any
    counts: Any
    units: Any


class Prefix(NamedTuple):
    """A block of rows of causal attention, in the dtype of the computation.

    Weights w (r,); which monomials are a channel times others, `features.monomials.Run` as rows (count, 4) of integers; query and
    keys in units (..., n, d); values and ones times shares (..., n, dv + 1); and `half`, how many complex monomials there are, None
    for real channels. `decays` are factors (..., 1, 1) of each view by which keys decay, with products that `rows_together` has
    rows for; none if they do not. `documents`, if the rows are such: each begins anew, no sums are before it and none are returned,
    and query, keys, values and ones are as they are given, to be multiplied by the units and shares of each.
    """

    w: Any
    runs: Any
    q: Any
    keys: Sequence[Any]
    shares: Sequence[Any]
    half: int | None = None
    decays: Sequence[Any] = ()
    documents: Documents | None = None


class Program(NamedTuple):
    """What a compiler takes whole, as one operator of its library, where it would unroll every block of rows.

    The operator gets arrays and a text, from which `read` makes the static argument of `forward` and `backward`, which return
    and take what those of `Backend.differentiable` do, three outputs. `written` makes the text, or "" where none says all.
    `shapes` are those of the outputs for these arrays.
    """

    written: Callable[..., str]
    read: Callable[[str], Any]
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    shapes: Callable[[Any, Sequence[Any]], Sequence[tuple[int, ...]]]


# By name: modules that compute put theirs here, and exported programs of a library find them again.
PROGRAMS: dict[str, Program] = {}


class Hosted(NamedTuple):
    """How a function ``(call, backend, arrays)`` may run by the compiled loops of another backend, on the same processor.

    `compiled`, of the same, says whether these compute most of it, and `outputs` gives shape and dtype of what comes out first,
    None for that of the computation. Both look at shapes and dtypes alone.
    """

    compiled: Callable[..., bool]
    outputs: Callable[..., Sequence[tuple[tuple[int, ...], Any]]]


# By function: modules that compute put theirs here.
HOSTED: dict[Callable[..., Any], Hosted] = {}
