"""The products of matrices and tensors that the paper is written in, batched, on any array library.

Definitions 2.1 to 2.3, C.2 and C.3 of arXiv 2405.16411, and the two facts that spare forming them: `khatri_rao_gram`
(Lemma 4.5) and `apply_kronecker` (Fact 4.6). Row-major everywhere: the last index runs fastest, and ⊗ is `numpy.kron`.

All arrays of a call are of one library, device and dtype (float64, float32, float16 or bfloat16), and so is the result;
the two narrow types compute in float32. Leading dimensions broadcast. Arguments that do not fit raise a TypeError or
ValueError that names them. Gradients are those of the library's own operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from math import prod
from typing import Any

from ..arrays import prod_of
from ..backends import Array, Backend
from ..checks import checked_dimensions, checked_factors, checked_length, factors, whole
from .checks import checked_alike, checked_pairs, checked_shape


def kronecker(*matrices: Array) -> Array:
    """Kronecker product A ⊗ B ⊗ …: entry (i1 i2, j1 j2) is A[i1, j1] · B[i2, j2]. Definition 2.1.

    Parameters
    ----------
    *matrices : arrays (..., n_μ, d_μ), at least one

    Returns
    -------
    array (..., Π n_μ, Π d_μ)
        Time and memory are its size. To multiply by it, `apply_kronecker` does without.

    Examples
    --------
    >>> import numpy as np
    >>> kronecker(np.array([[1.0, 2.0]]), np.array([[1.0], [10.0]]))
    array([[ 1.,  2.],
           [10., 20.]])
    """
    return _computed(_kronecker, checked_factors(factors("matrices", matrices)), matrices)


def khatri_rao(*matrices: Array) -> Array:
    """Column-wise Kronecker (Khatri–Rao) product A ⊘ B ⊘ …: entry (i1 i2, c) is A[i1, c] · B[i2, c]. Definition 2.2.

    Parameters
    ----------
    *matrices : arrays (..., n_μ, d), at least one

    Returns
    -------
    array (..., Π n_μ, d)
        Time and memory are its size. For a product of two of them, `khatri_rao_gram` does without.

    Examples
    --------
    >>> import numpy as np
    >>> khatri_rao(np.array([[1.0, 2.0]]), np.array([[1.0, 1.0], [10.0, 100.0]]))
    array([[  1.,   2.],
           [ 10., 200.]])
    """
    return _computed(_khatri_rao, checked_alike(matrices, -1), matrices)


def face_splitting(*matrices: Array) -> Array:
    """Row-wise Kronecker (face-splitting) product A ⊖ B ⊖ …: entry (i, c1 c2) is A[i, c1] · B[i, c2]. Definition 2.3.

    Parameters
    ----------
    *matrices : arrays (..., n, d_μ), at least one

    Returns
    -------
    array (..., n, Π d_μ)
        Time and memory are its size.

    Examples
    --------
    >>> import numpy as np
    >>> face_splitting(np.array([[1.0, 2.0]]), np.array([[1.0, 10.0]]))
    array([[ 1., 10.,  2., 20.]])
    """
    return _computed(_face_splitting, checked_alike(matrices, -2), matrices)


def third_mode(*matrices: Array) -> Array:
    """Tensor A ⊙ B ⊙ C of rank at most r: entry (i, j, k) is Σ_c A[i, c] · B[j, c] · C[k, c]. Definition C.3.

    Parameters
    ----------
    *matrices : arrays (..., n_μ, r), at least one
        The paper has three; two give A Bᵀ.

    Returns
    -------
    array (..., n_1, …, n_m)
        In O(r Π n_μ) time; memory is its size and that of the Khatri–Rao product of all matrices but the first (Fact C.11).

    Examples
    --------
    >>> import numpy as np
    >>> third_mode(np.array([[1.0, 2.0]]), np.array([[3.0, 4.0]]), np.array([[5.0, 6.0]]))
    array([[[63.]]])
    """
    backend = checked_alike(matrices, -1)
    checked_dimensions("the tensor of all matrices", max(a.ndim for a in matrices) - 2 + len(matrices))
    return _computed(_third_mode, backend, matrices)


def multilinear(core: Array, *matrices: Array) -> Array:
    """Tensor X(A, B, C): entry (i, j, k) is Σ_abc X[a, b, c] · A[i, a] · B[j, b] · C[k, c]. Definition C.2.

    Parameters
    ----------
    core : array (..., d_1, …, d_m)
        With the identity tensor this is `third_mode` (Claim C.10).
    *matrices : arrays (..., n_μ, d_μ), one for each of the core's m ≥ 1 dimensions

    Returns
    -------
    array (..., n_1, …, n_m)
        By `apply_kronecker` (Claim C.21), at its cost for k = 1.

    Examples
    --------
    >>> import numpy as np
    >>> multilinear(np.ones((2, 2)), np.array([[1.0, 2.0]]), np.array([[3.0, 4.0]]))
    array([[21.]])
    """
    named = factors("matrices", matrices)
    checked_dimensions("core, with one for each matrix,", len(named))
    backend = checked_factors([("core", core, len(named)), *named])
    for i, (name, a, _) in enumerate(named):
        checked_length(name, a, -1, core.shape[i - len(named)], f"dimension {i} of core")
    column = _vec(backend.xp, core, len(named))[..., None]
    product = _computed(_apply_kronecker, backend, (*matrices, column))
    return backend.xp.reshape(product, (*product.shape[:-2], *(a.shape[-2] for a in matrices)))


def vec(array: Array, *, order: int = 2) -> Array:
    """The last `order` dimensions as one, the last index running fastest: (..., n, d) → (..., n · d). Section C.3.

    No time and no memory where the library gives views.

    Examples
    --------
    >>> import numpy as np
    >>> vec(np.array([[1.0, 2.0], [3.0, 4.0]]))
    array([1., 2., 3., 4.])
    """
    order = whole("order", order, 1)
    return _vec(checked_factors([("array", array, order)]).xp, array, order)


def matrix(tensor: Array, *, order: int = 3) -> Array:
    """mat(X), all of the last `order` dimensions but their first as one: (..., d_1, d_2, d_3) → (..., d_1, d_2 · d_3).

    Used from Fact C.11 on. No time and no memory where the library gives views.

    Examples
    --------
    >>> import numpy as np
    >>> matrix(np.ones((2, 3, 4))).shape
    (2, 12)
    """
    order = whole("order", order, 1)
    return _vec(checked_factors([("tensor", tensor, order)]).xp, tensor, order - 1)


def tensor(matrix: Array, shape: Sequence[int]) -> Array:
    """The tensor whose `matrix` this is: (..., d_1, d_2 · d_3) and (d_1, d_2, d_3) → (..., d_1, d_2, d_3).

    No time and no memory where the library gives views.

    Examples
    --------
    >>> import numpy as np
    >>> tensor(np.ones((2, 12)), (2, 3, 4)).shape
    (2, 3, 4)
    """
    xp = checked_factors([("matrix", matrix, 2)]).xp
    shape = checked_shape(shape)
    checked_dimensions("the tensor of this shape", matrix.ndim - 2 + len(shape))
    first, *rest = shape
    wanted = f"shape {shape} asks for"
    checked_length("matrix", matrix, -2, first, wanted)
    checked_length("matrix", matrix, -1, prod(rest), wanted)
    return xp.reshape(matrix, (*matrix.shape[:-2], *shape))


def khatri_rao_gram(left: Sequence[Array], right: Sequence[Array]) -> Array:
    """(A1 ⊘ A2 ⊘ …)ᵀ (B1 ⊘ B2 ⊘ …) = (A1ᵀ B1) ∘ (A2ᵀ B2) ∘ …, neither side formed. Lemma 4.5 (C.13).

    Parameters
    ----------
    left : sequence of arrays (..., n_μ, d)
    right : sequence of as many arrays (..., n_μ, k)

    Returns
    -------
    array (..., d, k)
        A sum over Π n_μ rows in O(d k Σ n_μ) time and O(d k) memory for each factor.

    Examples
    --------
    >>> import numpy as np
    >>> a, b = np.ones((2, 10**6, 1))
    >>> khatri_rao_gram([a, a], [b, b])
    array([[1.e+12]])
    """
    return _computed(_khatri_rao_gram, checked_pairs(left, right), (*left, *right))


def apply_kronecker(matrices: Sequence[Array], x: Array) -> Array:
    """(A ⊗ B ⊗ …) x without A ⊗ B: the tensor trick vec(A X Bᵀ) = (A ⊗ B) vec(X). Fact 4.6 (C.16).

    Parameters
    ----------
    matrices : sequence of arrays (..., n_μ, d_μ)
    x : array (..., Π d_μ, k), or (Π d_μ,)
        As in matmul, one dimension alone is a vector.

    Returns
    -------
    array (..., Π n_μ, k), or (..., Π n_μ)
        One matrix product for each factor, in turn: O(k Σ_μ n_1 … n_μ · d_μ … d_m) time; memory is the largest of
        k Π_{ν ≤ μ} n_ν Π_{ν > μ} d_ν.

    Examples
    --------
    >>> import numpy as np
    >>> apply_kronecker([2 * np.eye(1000), 3 * np.eye(1000)], np.ones(10**6))[:3]
    array([6., 6., 6.])
    """
    named = factors("matrices", matrices)
    vector = getattr(x, "ndim", 2) < 2
    backend = checked_factors([*named, ("x", x, 1 if vector else 2)])
    # A list, since torch.compile takes no generator here.
    columns = prod([a.shape[-1] for a in matrices])
    checked_length("x", x, 0 if vector else -2, columns, "the Kronecker product has columns")
    result = _computed(_apply_kronecker, backend, (*matrices, x[:, None] if vector else x))
    return result[..., 0] if vector else result


def _computed(function: Callable[..., Array], backend: Backend, arrays: Sequence[Array]) -> Array:
    return backend.run(_widened, function, arrays)


def _widened(function: Callable[..., Array], backend: Backend, arrays: Sequence[Array]) -> Array:
    """``function(xp, *arrays)`` in float32 or float64, returned in the dtype of the arrays."""
    dtype = arrays[0].dtype
    wide = backend.compute_dtype(dtype)
    return backend.cast(function(backend.xp, *(backend.cast(a, wide) for a in arrays)), dtype)


def _kronecker(xp: Any, *matrices: Array) -> Array:
    return reduce(partial(_paired, xp, True, True), matrices)


def _khatri_rao(xp: Any, *matrices: Array) -> Array:
    return reduce(partial(_paired, xp, True, False), matrices)


def _face_splitting(xp: Any, *matrices: Array) -> Array:
    return reduce(partial(_paired, xp, False, True), matrices)


def _paired(xp: Any, rows: bool, columns: bool, a: Array, b: Array) -> Array:
    """Each row of a with each of b, or with the one in its place; columns likewise."""
    row, column = b.shape[-2:]
    inner = (*((1, row) if rows else (row, 1)), *((1, column) if columns else (column, 1)))
    product = a[..., :, None, :, None] * xp.reshape(b, (*b.shape[:-2], *inner))
    *leading, n, m, d, k = product.shape
    return xp.reshape(product, (*leading, n * m, d * k))


def _third_mode(xp: Any, first: Array, *rest: Array) -> Array:
    if not rest:
        return xp.sum(first, axis=-1)
    product = first @ xp.matrix_transpose(_khatri_rao(xp, *rest))
    return xp.reshape(product, (*product.shape[:-1], *(a.shape[-2] for a in rest)))


def _khatri_rao_gram(xp: Any, *arrays: Array) -> Array:
    half = len(arrays) // 2
    return prod_of([xp.matrix_transpose(a) @ b for a, b in zip(arrays[:half], arrays[half:], strict=True)])


def _apply_kronecker(xp: Any, *arrays: Array) -> Array:
    *matrices, x = arrays
    columns = x.shape[-1]
    x = _vec(xp, x, 2)
    for a in matrices:
        d = a.shape[-1]
        # The axis in front is contracted and what it becomes goes last, so the next one is in front.
        front = xp.reshape(x, (*x.shape[:-1], d, x.shape[-1] // d))
        x = _vec(xp, xp.matrix_transpose(front) @ xp.matrix_transpose(a), 2)
    return xp.matrix_transpose(xp.reshape(x, (*x.shape[:-1], columns, x.shape[-1] // columns)))


def _vec(xp: Any, array: Array, order: int) -> Array:
    """The last `order` dimensions as one; one of length 1 if they are none."""
    split = array.ndim - order
    return xp.reshape(array, (*array.shape[:split], prod(array.shape[split:])))
