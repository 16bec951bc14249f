"""Products as the paper defines them, and every numbered fact of its appendix C, on every library."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product as all_of
from typing import Any

import array_api_compat
import numpy as np
import pytest
from cases import CALLS, arguments, refuse
from conftest import CPU, Library, make_library, pairs

from tattn.paper import products

pytestmark = pytest.mark.grid("jax")
Shape = tuple[int, ...]


class Products:
    """`tattn.paper.products` on one library, from NumPy arrays to NumPy arrays; library, dtype and device of results checked."""

    def __init__(self, library: Library) -> None:
        self.library = library

    def __getattr__(self, name: str) -> Callable[..., np.ndarray]:
        def computed(*given: Any, **options: Any) -> np.ndarray:
            # Arrays come alone or in lists; the shape of `tensor` is a tuple.
            arrays = [g if isinstance(g, tuple) else self.library.arrays(g) for g in given]
            result = getattr(products, name)(*arrays, **options)
            first = arrays[0][0] if isinstance(arrays[0], list) else arrays[0]
            assert self.library.is_array(result)
            assert array_api_compat.array_namespace(result) is array_api_compat.array_namespace(first)
            assert result.dtype == first.dtype
            assert self.library.device(result) == self.library.device(first)
            return self.library.numpy(result)

        return computed


class Draw:
    """Random sizes, all different, and arrays with leading dimensions that broadcast."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        # One problem, several, and a grid of them, in turn.
        self.leading: Shape = ((), (2,), (3, 2))[seed % 3]

    def sizes(self, count: int) -> list[int]:
        return [int(n) for n in self.rng.choice(np.arange(1, 8), count, replace=False)]

    def arrays(self, *shapes: Shape) -> list[np.ndarray]:
        """The first has all leading dimensions; of the others some lack one or have length 1 there."""
        drawn = []
        for i, shape in enumerate(shapes):
            kept = self.leading[int(self.rng.integers(len(self.leading) + 1)) if i else 0 :]
            leading = tuple(1 if i and self.rng.random() < 0.3 else n for n in kept)
            drawn.append(self.rng.normal(size=(*leading, *shape)))
        return drawn


@pytest.fixture(scope="module")
def on(library: Library) -> Products:
    return Products(library)


@pytest.fixture(params=range(6))
def draw(request: pytest.FixtureRequest) -> Draw:
    return Draw(request.param)


def same(got: np.ndarray, expected: np.ndarray, tolerance: float = 1e-12) -> None:
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


def t(a: np.ndarray) -> np.ndarray:
    return np.swapaxes(a, -1, -2)


def identity(d: int, order: int) -> np.ndarray:
    tensor = np.zeros((d,) * order)
    tensor[(np.arange(d),) * order] = 1
    return tensor


# The definitions, entry by entry.


def by_entry(shape: Shape, entry: Callable[..., float]) -> np.ndarray:
    result = np.empty(shape)
    for index in all_of(*map(range, shape)):
        result[index] = entry(*index)
    return result


def test_definition_2_1_kronecker(on: Products, draw: Draw) -> None:
    n, m, d, k = draw.sizes(4)
    a, b = draw.rng.normal(size=(n, d)), draw.rng.normal(size=(m, k))
    got = on.kronecker(a, b)
    same(got, np.kron(a, b), 0)
    same(got, by_entry((n * m, d * k), lambda i, j: a[i // m, j // k] * b[i % m, j % k]), 0)


def test_definition_2_2_khatri_rao(on: Products, draw: Draw) -> None:
    n, m, d = draw.sizes(3)
    a, b = draw.rng.normal(size=(n, d)), draw.rng.normal(size=(m, d))
    same(on.khatri_rao(a, b), by_entry((n * m, d), lambda i, c: a[i // m, c] * b[i % m, c]), 0)


def test_definition_2_3_face_splitting(on: Products, draw: Draw) -> None:
    n, d, k = draw.sizes(3)
    a, b = draw.rng.normal(size=(n, d)), draw.rng.normal(size=(n, k))
    same(on.face_splitting(a, b), by_entry((n, d * k), lambda i, c: a[i, c // k] * b[i, c % k]), 0)


def test_definition_c_2_multilinear(on: Products, draw: Draw) -> None:
    *rows, d1, d2, d3 = draw.sizes(6)
    x = draw.rng.normal(size=(d1, d2, d3))
    a, b, c = (draw.rng.normal(size=s) for s in zip(rows, (d1, d2, d3), strict=True))

    def entry(i: int, j: int, k: int) -> float:
        sizes = all_of(range(d1), range(d2), range(d3))
        return sum(x[p, q, r] * a[i, p] * b[j, q] * c[k, r] for p, q, r in sizes)

    same(on.multilinear(x, a, b, c), by_entry(tuple(rows), entry))


def test_definition_c_3_third_mode(on: Products, draw: Draw) -> None:
    *rows, r = draw.sizes(4)
    a, b, c = (draw.rng.normal(size=(n, r)) for n in rows)
    same(
        on.third_mode(a, b, c),
        by_entry(tuple(rows), lambda i, j, k: sum(a[i, s] * b[j, s] * c[k, s] for s in range(r))),
    )


def test_vec_stacks_rows_and_tensor_undoes_matrix(on: Products, draw: Draw) -> None:
    shape = tuple(draw.sizes(3))
    (x,) = draw.arrays(shape)
    same(on.vec(x, order=3), x.reshape(*draw.leading, -1), 0)
    same(on.vec(x), x.reshape(*draw.leading, shape[0], -1), 0)
    same(on.matrix(x), x.reshape(*draw.leading, shape[0], -1), 0)
    same(on.matrix(x, order=2), x, 0)
    same(on.tensor(on.matrix(x), shape), x, 0)
    same(on.matrix(x, order=1), x[..., None], 0)
    same(on.tensor(x[..., None], shape[-1:]), x, 0)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.grid
def test_any_number_of_factors(on: Products, draw: Draw, count: int) -> None:
    rows, columns = draw.sizes(count), draw.sizes(count)
    d, k = draw.sizes(2)
    letters, others = "abcd"[:count], "efgh"[:count]

    def summed(arrays: list[np.ndarray], names: list[str], result: str, shape: Shape) -> np.ndarray:
        of = np.einsum(",".join("..." + n for n in names) + "->..." + result, *arrays)
        return of.reshape(*of.shape[: of.ndim - len(result)], *shape)

    arrays = draw.arrays(*zip(rows, columns, strict=True))
    names = [a + e for a, e in zip(letters, others, strict=True)]
    whole = (int(np.prod(rows)), int(np.prod(columns)))
    same(on.kronecker(*arrays), summed(arrays, names, letters + others, whole))
    core, x, *arrays = draw.arrays(tuple(columns), (whole[1], 3), *zip(rows, columns, strict=True))
    same(on.multilinear(core, *arrays), summed([core, *arrays], [others, *names], letters, tuple(rows)))
    same(on.apply_kronecker(arrays, x), on.kronecker(*arrays) @ x)
    arrays = draw.arrays(*((n, d) for n in rows))
    same(on.khatri_rao(*arrays), summed(arrays, [a + "x" for a in letters], letters + "x", (whole[0], d)))
    same(on.third_mode(*arrays), summed(arrays, [a + "x" for a in letters], letters, tuple(rows)))
    other = draw.arrays(*((n, k) for n in rows))
    same(on.khatri_rao_gram(arrays, other), t(on.khatri_rao(*arrays)) @ on.khatri_rao(*other))
    arrays = draw.arrays(*((d, c) for c in columns))
    same(on.face_splitting(*arrays), summed(arrays, ["x" + e for e in others], "x" + others, (d, whole[1])))


# The facts of appendix C, by their numbers.


def test_fact_c4_transpose_rule(on: Products, draw: Draw) -> None:
    n, m, d, k = draw.sizes(4)
    a, b = draw.arrays((n, d), (m, k))
    same(t(on.kronecker(a, b)), on.kronecker(t(a), t(b)), 0)
    a, b = draw.arrays((n, d), (m, d))
    same(t(on.khatri_rao(a, b)), on.face_splitting(t(a), t(b)), 0)
    a, b = draw.arrays((n, d), (n, k))
    same(t(on.face_splitting(a, b)), on.khatri_rao(t(a), t(b)), 0)


def test_fact_c5_swap_rule(on: Products, draw: Draw) -> None:
    n, m, d, k = draw.sizes(4)
    v1, v2, w1, w2 = draw.arrays((n, d), (n, k), (m, d), (m, k))
    left = on.face_splitting(on.khatri_rao(v1, w1), on.khatri_rao(v2, w2))
    same(left, on.khatri_rao(on.face_splitting(v1, v2), on.face_splitting(w1, w2)))


def test_fact_c7_swap_rule_with_matrix_products(on: Products, draw: Draw) -> None:
    n, m, p, q, d = draw.sizes(5)
    a, b, v, w = draw.arrays((p, n), (q, m), (n, d), (m, d))
    same(on.kronecker(a, b) @ on.khatri_rao(v, w), on.khatri_rao(a @ v, b @ w))
    same(on.apply_kronecker([a, b], on.khatri_rao(v, w)), on.khatri_rao(a @ v, b @ w))


def test_fact_c8_fact_4_4_distribution_rule(on: Products, draw: Draw) -> None:
    l, n, m, d, k = draw.sizes(5)
    u1, u2, v1, v2, w1, w2 = draw.arrays((l, d), (l, k), (n, d), (n, k), (m, d), (m, k))
    left = (u1 @ t(on.khatri_rao(v1, w1))) * (u2 @ t(on.khatri_rao(v2, w2)))
    wide = on.khatri_rao(on.face_splitting(v1, v2), on.face_splitting(w1, w2))
    same(left, on.face_splitting(u1, u2) @ t(wide))


def test_fact_c9_sums_of_low_rank(on: Products, draw: Draw) -> None:
    l, n, m, d, k = draw.sizes(5)
    drawn = draw.arrays((l, d), (l, k), (n, d), (n, k), (m, d), (m, k))
    leading = [np.broadcast_to(a, (*draw.leading, *a.shape[-2:])) for a in drawn]
    u1, u2, v1, v2, w1, w2 = drawn
    u, v, w = (np.concatenate(leading[i : i + 2], axis=-1) for i in (0, 2, 4))
    right = u1 @ t(on.khatri_rao(v1, w1)) + u2 @ t(on.khatri_rao(v2, w2))
    same(u @ t(on.khatri_rao(v, w)), right)


def test_claim_c10_identity_cores(on: Products, draw: Draw) -> None:
    l, n, m, d = draw.sizes(4)
    a, b, c = draw.arrays((l, d), (n, d), (m, d))
    same(on.multilinear(identity(d, 2), a, b), a @ t(b))
    same(on.multilinear(identity(d, 3), a, b, c), on.third_mode(a, b, c))


def test_fact_c11_tensor_to_matrix(on: Products, draw: Draw) -> None:
    l, n, m, d = draw.sizes(4)
    u, v, w = draw.arrays((l, d), (n, d), (m, d))
    same(on.matrix(on.third_mode(u, v, w)), u @ t(on.khatri_rao(v, w)))


def test_fact_c12_low_rank_stays_low_rank(on: Products, draw: Draw) -> None:
    l, n, m, p, q, r, d = draw.sizes(7)
    u, v, w, a, b, c = draw.arrays((l, d), (n, d), (m, d), (p, l), (q, n), (r, m))
    same(on.multilinear(on.third_mode(u, v, w), a, b, c), on.third_mode(a @ u, b @ v, c @ w), 1e-10)


def test_fact_c13_lemma_4_5_gram_of_khatri_rao_products(on: Products, draw: Draw) -> None:
    n, m, d, k = draw.sizes(4)
    a1, a2, b1, b2 = draw.arrays((n, d), (m, d), (n, k), (m, k))
    left = t(on.khatri_rao(a1, a2)) @ on.khatri_rao(b1, b2)
    same(left, (t(a1) @ b1) * (t(a2) @ b2))
    same(on.khatri_rao_gram([a1, a2], [b1, b2]), left)


def test_fact_c14_trace_is_product_of_vectors(on: Products, draw: Draw) -> None:
    a, b = draw.arrays(*[tuple(draw.sizes(2))] * 2)
    same(np.trace(t(a) @ b, axis1=-2, axis2=-1), (on.vec(a) * on.vec(b)).sum(-1))


def test_fact_c15_outer_product(on: Products, draw: Draw) -> None:
    n, m = draw.sizes(2)
    a, b = draw.arrays((n, 1), (m, 1))
    same(on.vec(a @ t(b))[..., None], on.kronecker(a, b), 0)


def test_fact_c16_fact_4_6_tensor_trick(on: Products, draw: Draw) -> None:
    n, m, d, k = draw.sizes(4)
    x, a, b = draw.arrays((d, k), (n, d), (m, k))
    left = on.vec(a @ x @ t(b))[..., None]
    same(left, on.kronecker(a, b) @ on.vec(x)[..., None])
    same(left, on.apply_kronecker([a, b], on.vec(x)[..., None]))


def test_fact_c17_trace_of_four(on: Products, draw: Draw) -> None:
    n, m, p, q = draw.sizes(4)
    a, b, c, d = draw.arrays((n, m), (n, p), (p, q), (m, q))
    row, column = on.vec(a)[..., None, :], on.vec(c)[..., None]
    left = np.trace(t(a) @ b @ c @ t(d), axis1=-2, axis2=-1)[..., None, None]
    same(left, row @ on.kronecker(b, d) @ column)
    same(left, row @ on.apply_kronecker([b, d], column))


def test_fact_c18_symmetric_matrices(on: Products, draw: Draw) -> None:
    n, m = draw.sizes(2)
    x, y, a, b = draw.arrays((n, m), (n, m), (n, n), (m, m))
    a, b = a + t(a), b + t(b)
    left = on.vec(x)[..., None, :] @ on.kronecker(a, b) @ on.vec(y)[..., None]
    same(left, on.vec(a @ x @ b)[..., None, :] @ on.vec(y)[..., None])


def test_fact_c19_identity_tensor(on: Products, draw: Draw) -> None:
    n, m, d = draw.sizes(3)
    v, w = draw.arrays((n, d), (m, d))
    flat = t(on.matrix(identity(d, 3)))
    same(on.kronecker(v, w) @ flat, on.khatri_rao(v, w))
    same(on.apply_kronecker([v, w], flat), on.khatri_rao(v, w))


def test_claim_c20_matrix_of_a_multilinear_product(on: Products, draw: Draw) -> None:
    l, n, m, p, q, r = draw.sizes(6)
    x, a, b, c = draw.arrays((p, q, r), (l, p), (n, q), (m, r))
    same(on.matrix(on.multilinear(x, a, b, c)), a @ on.matrix(x) @ t(on.kronecker(b, c)), 1e-11)


def test_claim_c21_vector_of_a_multilinear_product(on: Products, draw: Draw) -> None:
    l, n, m, p, q, r = draw.sizes(6)
    x, a, b, c = draw.arrays((p, q, r), (l, p), (n, q), (m, r))
    column = on.vec(x, order=3)[..., None]
    left = on.vec(on.multilinear(x, a, b, c), order=3)[..., None]
    same(left, on.kronecker(a, b, c) @ column, 1e-11)
    same(left, on.apply_kronecker([a, b, c], column), 1e-11)


def test_kronecker_and_face_splitting_swap_but_for_the_order_of_columns(on: Products, draw: Draw) -> None:
    n, m, *columns = draw.sizes(6)
    c1, c2, e1, e2 = columns
    v1, v2, w1, w2 = draw.arrays((n, c1), (n, c2), (m, e1), (m, e2))
    left = on.face_splitting(on.kronecker(v1, w1), on.kronecker(v2, w2))
    left = np.swapaxes(left.reshape(*left.shape[:-1], c1, e1, c2, e2), -3, -2).reshape(left.shape)
    same(left, on.kronecker(on.face_splitting(v1, v2), on.face_splitting(w1, w2)))


# What is never formed, and in what precision.


def test_gram_of_products_too_large_to_form(on: Products) -> None:
    rng = np.random.default_rng(0)
    # 10^15 rows, six petabytes.
    left, right = [rng.uniform(1, 2, (10**5, 1)) for _ in range(3)], [rng.uniform(1, 2, (10**5, 2)) for _ in range(3)]
    got = on.khatri_rao_gram(left, right)
    expected = np.prod([(a * b).sum(0, keepdims=True) for a, b in zip(left, right, strict=True)], axis=0)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_kronecker_product_too_large_to_form(on: Products) -> None:
    rng = np.random.default_rng(0)
    # Four of 32 × 32: a square of a million rows, eight terabytes.
    matrices = [rng.normal(size=(32, 32)) for _ in range(4)]
    columns = [rng.normal(size=32) for _ in range(4)]
    got = on.apply_kronecker(matrices, np.einsum("a,b,c,d->abcd", *columns).reshape(-1))
    expected = np.einsum("a,b,c,d->abcd", *(a @ x for a, x in zip(matrices, columns, strict=True))).reshape(-1)
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9 * abs(expected).max())


# Each with the shapes of its arguments, and with what NumPy makes of them, the same entries in row-major order.
calls = pytest.mark.parametrize("call", list(CALLS))


@calls
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_dtype_and_device_of_the_arguments(library: Library, call: str, dtype: str) -> None:
    if library.name == "strict" and dtype == "float16":
        pytest.skip("array_api_strict has no float16")
    arrays = arguments(call, dtype)
    given = library.arrays(arrays)
    got = CALLS[call][0](*given)
    assert library.is_array(got)
    assert got.dtype == given[0].dtype
    assert library.device(got) == library.device(given[0])
    expected = CALLS[call][2](*(a.astype(np.float64) for a in arrays)).reshape(got.shape)
    np.testing.assert_allclose(
        library.numpy(got), expected, rtol={"float64": 1e-14, "float32": 1e-6, "float16": 6e-4}[dtype]
    )


def test_narrow_types_are_summed_in_float32(library: Library) -> None:
    if library.name == "strict":
        pytest.skip("array_api_strict has no float16")
    # Beyond 2048 a float16 cannot be counted up by one.
    ones = library.array(np.ones((4096, 1), np.float16))
    assert library.numpy(products.khatri_rao_gram([ones], [ones])) == 4096
    small, large = (library.array(np.full((1, 1), x, np.float16)) for x in (2.0**-10, 2.0**10))
    assert library.numpy(products.kronecker(large, large, small)) == 2**10
    assert library.numpy(products.khatri_rao(small, small, small, large, large)) == 2**-10


# Arguments that do not fit.

A, B, C = np.ones((3, 2)), np.ones((4, 2)), np.ones((3, 5))
X = np.ones((2, 2, 2))


def case(error: type, message: str, name: str, *given: Any, **options: Any) -> Any:
    return pytest.param(getattr(products, name), error, f"^{message}$", given, options, id=f"{name}-{message[:40]}")


REFUSED = [
    case(ValueError, r"matrices should hold at least one array, got none", "kronecker"),
    case(ValueError, r"matrices should hold at least one array, got none", "khatri_rao"),
    case(ValueError, r"matrices should hold at least one array, got none", "multilinear", X),
    case(TypeError, r"matrices\[0\] should be an array \(.*\), got list", "kronecker", A.tolist(), A),
    case(TypeError, r"matrices\[1\] should be an array \(.*\), got list", "face_splitting", A, A.tolist()),
    case(TypeError, r"matrices\[1\] should be an array \(.*\), got NoneType", "third_mode", A, None),
    case(TypeError, r"core should be an array \(.*\), got int", "multilinear", 3, A),
    case(TypeError, r"array should be an array, got a NumPy scalar", "vec", np.float64(1)),
    case(TypeError, r"matrices\[0\] should be an array, got np\.matrix.*", "kronecker", A.view(np.matrix)),
    case(TypeError, r"matrices\[0\] should have a dtype of .*float64, got int64", "kronecker", A.astype(int)),
    case(TypeError, r"tensor should have a dtype of .*float64, got complex128", "matrix", X.astype(complex)),
    case(TypeError, r"matrices\[1\] should have matrices\[0\]'s dtype float64, got float32", "kronecker", A, A.astype("f4")),
    case(TypeError, r"matrices\[0\] should have core's dtype float64, got float32", "multilinear", X, *[A.astype("f4")] * 3),
    case(TypeError, r"x should have matrices\[0\]'s dtype float64, got float32", "apply_kronecker", [A], A.astype("f4")),
    case(ValueError, r"matrices\[1\] should have at least 2 dimensions, got shape \(2,\)", "kronecker", A, A[0]),
    case(ValueError, r"core should have at least 3 dimensions, got shape \(2, 2\)", "multilinear", X[0], A, A, A),
    case(ValueError, r"tensor should have at least 3 dimensions, got shape \(3, 2\)", "matrix", A),
    case(ValueError, r"x should have at least 1 dimension, got shape \(\)", "apply_kronecker", [A], np.array(1.0)),
    case(ValueError, r"matrices\[1\] should have no dimension of length 0, got shape \(0, 2\)", "khatri_rao", A, A[:0]),
    case(
        ValueError,
        r"matrices\[1\] should have leading dimensions that broadcast with \(2,\), .*, got \(3,\)",
        "kronecker", np.stack([A] * 2), np.stack([A] * 3),
    ),
    case(
        ValueError,
        r"matrices\[0\] should have leading dimensions that broadcast with \(2,\), .*, got \(3,\)",
        "multilinear", np.stack([X] * 2), np.ones((3, 3, 2)), A, A,
    ),
    case(ValueError, r"matrices\[1\] should have 2 columns, as many as matrices\[0\], got shape \(3, 5\)", "khatri_rao", A, C),
    case(ValueError, r"matrices\[2\] should have 2 columns, as many as matrices\[0\], got shape \(3, 5\)", "third_mode", A, B, C),
    case(ValueError, r"matrices\[1\] should have 3 rows, as many as matrices\[0\], got shape \(4, 2\)", "face_splitting", A, B),
    case(
        ValueError, r"matrices\[1\] should have 2 columns, as many as dimension 1 of core, got shape \(3, 5\)",
        "multilinear", X, A, C, A,
    ),
    case(TypeError, r"left should be a list or tuple .*, one for each factor, got ndarray; .*", "khatri_rao_gram", A, [A]),
    case(TypeError, r"right should be a list or tuple .*, got NoneType", "khatri_rao_gram", [A], None),
    case(ValueError, r"right should hold at least one array, got none", "khatri_rao_gram", [A], []),
    case(ValueError, r"left and right should have the same number .*, got 1 left and 2 right", "khatri_rao_gram", [A], [A, B]),
    case(
        ValueError, r"left\[1\] should have 2 columns, as many as left\[0\], got shape \(3, 5\)",
        "khatri_rao_gram", [A, C], [A, A],
    ),
    case(
        ValueError, r"right\[1\] should have 2 columns, as many as right\[0\], got shape \(3, 5\)",
        "khatri_rao_gram", [A, A], [A, C],
    ),
    case(
        ValueError, r"right\[1\] should have 3 rows, as many as left\[1\], got shape \(4, 2\)",
        "khatri_rao_gram", [A, A], [A, B],
    ),
    case(TypeError, r"matrices should be a list or tuple .*, got ndarray; a single factor .*", "apply_kronecker", A, B),
    case(
        ValueError, r"x should have 4 rows, as many as the Kronecker product has columns, got shape \(3, 2\)",
        "apply_kronecker", [A, B], A,
    ),
    case(
        ValueError, r"x should have 4 rows, as many as the Kronecker product has columns, got shape \(3,\)",
        "apply_kronecker", [A, B], A[:, 0],
    ),
    case(TypeError, r"order should be a whole number, got float", "vec", A, order=2.0),
    case(ValueError, r"order should be at least 1, got 0", "vec", A, order=0),
    case(TypeError, r"order should be a whole number, got NoneType", "matrix", X, order=None),
    case(TypeError, r"shape should be a list or tuple of whole numbers, got int", "tensor", A, 6),
    case(ValueError, r"shape should hold at least one whole number, got none", "tensor", A, ()),
    case(TypeError, r"shape\[1\] should be a whole number, got float", "tensor", A, (3, 2.0)),
    case(ValueError, r"shape\[1\] should be at least 1, got -1", "tensor", A, (3, -1)),
    case(ValueError, r"matrix should have 2 rows, as many as shape \(2, 3\) asks for, got shape \(3, 2\)", "tensor", A, (2, 3)),
    case(
        ValueError, r"matrix should have 4 columns, as many as shape \(3, 2, 2\) asks for, got shape \(3, 2\)",
        "tensor", A, (3, 2, 2),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("function", "error", "message", "given", "options"), REFUSED)
def test_arguments_that_do_not_fit(
    function: Callable[..., Any], error: type, message: str, given: Any, options: Any
) -> None:
    refuse(function, error, message, *given, **options)


@pytest.mark.parametrize("pair", pairs(CPU))
def test_mixed_libraries(pair: tuple[str, str]) -> None:
    ours, theirs = map(make_library, pair)
    mixed = [ours.array(A), theirs.array(A)]
    message = r"^%s should be an array of \S+, like %s, got one of \S+$"
    refuse(products.kronecker, TypeError, message % (r"matrices\[1\]", r"matrices\[0\]"), *mixed)
    refuse(products.khatri_rao_gram, TypeError, message % (r"right\[0\]", r"left\[0\]"), mixed[:1], mixed[1:])
    refuse(products.apply_kronecker, TypeError, message % ("x", r"matrices\[0\]"), mixed[:1], mixed[1])
    refuse(products.multilinear, TypeError, message % (r"matrices\[0\]", "core"), mixed[0], mixed[1], mixed[0])


@pytest.mark.libraries("strict")
def test_mixed_devices() -> None:
    xp = pytest.importorskip("array_api_strict")
    here, there = (xp.asarray(A, device=xp.Device(name)) for name in ("CPU_DEVICE", "device1"))
    message = r"^matrices\[1\] should be on matrices\[0\]'s device .*CPU_DEVICE.*, got .*device1"
    refuse(products.khatri_rao, ValueError, message, here, there)
