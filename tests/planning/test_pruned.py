"""Bases pruned by weighted degree: which monomials are kept, and everything that computes with them against dense sums."""

from __future__ import annotations

from itertools import product
from math import factorial, prod
from typing import Any

import numpy as np
import pytest
from reference import changed

import tattn
from tattn.backends import backend_of
from tattn.features.basis import Basis
from tattn.features.monomials import degrees, exponents, features, multinomials, pull_back, rank

# (degree, weights): heavy channels in front, behind and mixed, channels left out, units above 1.
CASES = [
    (2, (1, 1, 1)),
    (3, (1, 2, 3, 1)),
    (3, (4, 2, 3, 2, 9)),
    (2, (3, 2, 5, 4)),
    (4, (2, 3, 7, 4)),
    (1, (1, 2)),
    (3, (1, 5, 5)),
]


def kept(degree: int, grading: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All multi-indices of the basis, by weighted degree and then by smallest channel first."""
    most = degree * min(grading)
    found = [
        alpha
        for alpha in product(range(degree + 1), repeat=len(grading))
        if sum(w * a for w, a in zip(grading, alpha, strict=True)) <= most
    ]
    return sorted(
        found, key=lambda alpha: (sum(w * a for w, a in zip(grading, alpha, strict=True)), *(-a for a in alpha))
    )


def pruned_plan(degree: int, grading: tuple[int, ...], views: int, **more: Any) -> tattn.Plan:
    """A plan with a pruned Taylor polynomial, for data of small scores."""
    full = tattn.plan_for(
        n=7, dim=len(grading), bound=0.5, order=views + 1, dtype="float64", degree=degree, series="taylor", **more
    )
    return changed(full, grading=grading, rank=len(kept(degree, grading)))


def truncated(plan: tattn.Plan, *, derivative: int | None = None) -> Any:
    """P of the products y (..., d) of a tuple's channels, or its derivative by y_c."""
    alpha = np.array(kept(plan.degree, plan.grading))
    weights = np.array(
        [plan.coefficients[sum(a)] * factorial(sum(a)) / prod(map(factorial, a)) for a in alpha.tolist()]
    )
    if derivative is not None:
        weights = weights * alpha[:, derivative]
        alpha = alpha - (np.arange(alpha.shape[1]) == derivative)
        alpha, weights = alpha[weights != 0], weights[weights != 0]

    def value(y: np.ndarray) -> np.ndarray:
        return np.prod(y[..., None, :] ** alpha, axis=-1) @ weights

    return value


@pytest.mark.parametrize(("degree", "grading"), CASES)
def test_kept_are_the_monomials_of_small_weighted_degree(degree: int, grading: tuple[int, ...]) -> None:
    expected = kept(degree, grading)
    dim = len(grading)
    assert exponents(dim, degree, grading).tolist() == [list(alpha) for alpha in expected]
    assert rank(dim, degree, grading) == len(expected)
    assert degrees(dim, degree, grading).tolist() == [sum(alpha) for alpha in expected]
    weights = [factorial(sum(a)) / prod(map(factorial, a)) for a in expected]
    np.testing.assert_allclose(multinomials(dim, degree, grading), weights, rtol=1e-14)


@pytest.mark.parametrize(("dim", "degree"), [(1, 3), (3, 4), (5, 2)])
def test_alike_weights_are_the_whole_basis_in_its_order(dim: int, degree: int) -> None:
    assert np.array_equal(exponents(dim, degree, (1,) * dim), exponents(dim, degree))
    assert np.array_equal(exponents(dim, degree, (3,) * dim), exponents(dim, degree))


@pytest.mark.parametrize(("degree", "grading"), CASES)
@pytest.mark.grid
def test_features_and_both_adjoints_are_dense_sums(library: Any, degree: int, grading: tuple[int, ...]) -> None:
    rng = np.random.default_rng(degree)
    dim, rows, columns = len(grading), 9, 3
    x, z = rng.normal(size=(2, dim, rows)), rng.normal(size=(columns, rows))
    alpha = np.array(kept(degree, grading))
    dense_phi = np.prod(x[:, None] ** alpha[None, :, :, None], axis=2)
    array, backend = library.array(x), backend_of(library.array(x))
    phi = features(array, degree, backend, grading)
    np.testing.assert_allclose(library.numpy(phi), dense_phi, rtol=1e-13)

    # ∂Φ/∂x_c, (2, d, r, rows).
    lowered = alpha[None] - np.eye(dim, dtype=int)[:, None]
    slopes = alpha.T[None, :, :, None] * np.prod(x[:, None, None] ** np.maximum(lowered, 0)[None, ..., None], axis=3)
    y = rng.normal(size=(len(alpha), rows))
    got = pull_back(array, phi, library.array(y), degree, backend, grading)
    np.testing.assert_allclose(library.numpy(got), np.einsum("lcrn,rn->lcn", slopes, y), rtol=1e-12, atol=1e-12)

    basis = Basis.of(dim, degree, columns, grading)
    assert basis.size == basis.held == len(alpha)
    matrix = rng.normal(size=(2, len(alpha), columns))
    rows_of_z = library.array(z.T)
    sums = basis.row_sums(phi, rows_of_z, backend)
    np.testing.assert_allclose(library.numpy(sums), dense_phi @ z.T, rtol=1e-12, atol=1e-12)
    phi = basis.features(backend)(array)
    # Of all columns, as with weights.
    pull_back_and_read = basis.puller_and_reader(library.array(matrix), columns, backend)
    dx, read = pull_back_and_read(phi, rows_of_z)
    wanted = np.einsum("lcrn,lre,en->lnc", slopes, matrix, z)
    np.testing.assert_allclose(library.numpy(dx), wanted, rtol=1e-12, atol=1e-11)
    wanted = np.einsum("lrn,lre->lne", dense_phi, matrix)
    np.testing.assert_allclose(library.numpy(read), wanted, rtol=1e-12, atol=1e-11)


def reference(
    plan: tattn.Plan,
    query: np.ndarray,
    keys: list[np.ndarray],
    values: list[np.ndarray],
    grad: np.ndarray,
    masks: list[np.ndarray | None] | None = None,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Output and gradients (dquery, dkeys, dvalues) of the softmax with the truncated P in place of exp, by dense sums."""
    m, n = len(keys), len(query)
    letters = "abc"[:m]
    y = plan.scale * np.einsum(f"xz,{','.join(f'{c}z' for c in letters)}->x{letters}z", query, *keys)
    seen = np.ones(y.shape[:-1], bool)
    for i, k in enumerate(keys):
        of_view = np.ones((n, len(k)), bool) if masks is None or masks[i] is None else np.tile(masks[i], (n, 1))
        if plan.causal:
            of_view &= np.arange(len(k))[None, :] <= np.arange(n)[:, None] + len(k) - n
        seen &= of_view.reshape(n, *(len(k) if j == i else 1 for j in range(m)))
    weights = np.where(seen, truncated(plan)(y), 0.0)
    axes = tuple(range(1, m + 1))
    total = weights.sum(axis=axes, keepdims=True)
    f = weights / total
    of_values = ",".join(f"{c}e" for c in letters)
    out = np.einsum(f"x{letters},{of_values}->xe", f, *values)
    w = np.einsum(f"xe,{of_values}->x{letters}", grad, *values)
    shifted = (w - (grad * out).sum(-1).reshape(n, *(1,) * m)) / total
    # dP/dy_c of every tuple and channel.
    dy = np.stack([np.where(seen, truncated(plan, derivative=c)(y), 0.0) * shifted for c in range(plan.dim)], axis=-1)
    grads = []
    for target in range(m + 1):
        names = "x" + letters
        others = [a for i, a in enumerate((query, *keys)) if i != target]
        given = ",".join(f"{c}z" for i, c in enumerate(names) if i != target)
        grads.append(plan.scale * np.einsum(f"{names}z,{given}->{names[target]}z", dy, *others))
    for target in range(m):
        others = [v for i, v in enumerate(values) if i != target]
        given = "".join(f",{c}e" for i, c in enumerate(letters) if i != target)
        grads.append(np.einsum(f"x{letters},xe{given}->{letters[target]}e", f, grad, *others))
    return out, grads


def drawn(views: int, dim: int, rows: int = 6, value_dim: int = 3) -> tuple[Any, ...]:
    rng = np.random.default_rng(views)
    query = rng.uniform(-1, 1, (rows, dim))
    keys = [rng.uniform(-1, 1, (rows + i, dim)) for i in range(views)]
    values = [rng.normal(size=(rows + i, value_dim)) for i in range(views)]
    return query, keys, values, rng.normal(size=(rows, value_dim))


def flat(grads: Any) -> list[Any]:
    dquery, dkeys, dvalues = grads
    return [dquery, *dkeys, *dvalues]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("views", "degree", "grading"), [(1, 3, (4, 2, 3, 2, 9)), (2, 4, (2, 3, 7, 4)), (3, 2, (3, 2, 5))]
)
@pytest.mark.grid
def test_output_and_gradients_are_those_of_the_truncated_polynomial(
    library: Any, views: int, degree: int, grading: tuple[int, ...], causal: bool
) -> None:
    plan = pruned_plan(degree, grading, views, causal=causal)
    query, keys, values, grad = drawn(views, len(grading))
    masks = [np.arange(len(k)) % 3 != 1 for k in keys[:-1]] + [None]
    wanted, wanted_grads = reference(plan, query, keys, values, grad, masks)
    q, ks, vs, g, given = library.arrays(query, keys, values, grad, masks)
    out, pullback = tattn.tensor_attention_vjp(q, ks, vs, plan=plan, key_masks=given, causal=causal)
    np.testing.assert_allclose(library.numpy(out), wanted, rtol=1e-12, atol=1e-13)
    for got, expected in zip(flat(pullback(g)), wanted_grads, strict=True):
        np.testing.assert_allclose(library.numpy(got), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.thorough("jax")
def test_leading_dimensions_broadcast(library: Any) -> None:
    plan = pruned_plan(3, (4, 2, 3, 2, 9), 2)
    rng = np.random.default_rng(0)
    query, a, b = (rng.uniform(-1, 1, shape) for shape in ((2, 1, 5, 5), (3, 6, 5), (7, 5)))
    u, v, grad = (rng.normal(size=shape) for shape in ((3, 6, 2), (2, 1, 7, 2), (2, 3, 5, 2)))
    q, ks, vs, g = library.arrays(query, [a, b], [u, v], grad)
    out, pullback = tattn.tensor_attention_vjp(q, ks, vs, plan=plan)
    dq, dks, dvs = pullback(g)
    sums = [np.zeros(x.shape) for x in (query, a, b, u, v)]
    for i, j in product(range(2), range(3)):
        one, grads = reference(plan, query[i, 0], [a[j], b], [u[j], v[i, 0]], grad[i, j])
        np.testing.assert_allclose(library.numpy(out)[i, j], one, rtol=1e-12, atol=1e-13)
        for total, place, part in zip(sums, ((i, 0), j, (), j, (i, 0)), grads, strict=True):
            total[place] += part
    for got, total in zip((dq, *dks, *dvs), sums, strict=True):
        np.testing.assert_allclose(library.numpy(got), total, rtol=1e-11, atol=1e-13)


def test_gradients_are_differences_of_the_output() -> None:
    plan = pruned_plan(3, (4, 2, 3, 2, 9), 2)
    query, keys, values, grad = drawn(2, 5)
    _, pullback = tattn.tensor_attention_vjp(query, keys, values, plan=plan)
    dquery, dkeys, _ = pullback(grad)
    rng = np.random.default_rng(1)
    for target, gradient in ((0, dquery), (1, dkeys[0]), (2, dkeys[1])):
        arrays = [query, *keys]
        step = rng.normal(size=arrays[target].shape) * 1e-5

        def along(sign: float, target: int = target, arrays: Any = arrays, step: Any = step) -> float:
            moved = [a + sign * step if i == target else a for i, a in enumerate(arrays)]
            return float((grad * tattn.tensor_attention(moved[0], moved[1:], values, plan=plan)).sum())

        np.testing.assert_allclose((along(1) - along(-1)) / 2, (gradient * step).sum(), rtol=1e-7)


def test_summaries_of_pieces_add_up_and_go_through_a_file(library: Any, tmp_path: Any) -> None:
    plan = pruned_plan(4, (2, 3, 7, 4), 2)
    query, keys, values, grad = drawn(2, 4)
    wanted, wanted_grads = reference(plan, query, keys, values, grad)
    q, ks, vs, g = library.arrays(query, keys, values, grad)
    first = tattn.summarize([k[:2, ...] for k in ks], [v[:2, ...] for v in vs], plan)
    whole = first.update([k[2:, ...] for k in ks], [v[2:, ...] for v in vs])
    assert tuple(whole.sums[0].shape) == (plan.rank, 4)
    out, pullback = whole.attend_vjp(q)
    np.testing.assert_allclose(library.numpy(out), wanted, rtol=1e-11, atol=1e-13)
    dquery, dsums = pullback(g)
    np.testing.assert_allclose(library.numpy(dquery), wanted_grads[0], rtol=1e-10, atol=1e-12)
    _, back = tattn.summarize_vjp(ks, vs, plan)
    dkeys, dvalues = back(dsums)
    for got, expected in zip((*dkeys, *dvalues), wanted_grads[1:], strict=True):
        np.testing.assert_allclose(library.numpy(got), expected, rtol=1e-10, atol=1e-12)
    whole.save(tmp_path / "summary.npz")
    again = tattn.Summary.load(tmp_path / "summary.npz")
    assert again.plan == plan
    np.testing.assert_allclose(again.attend(query), wanted, rtol=1e-11, atol=1e-13)


def test_decoding_goes_token_by_token() -> None:
    plan = pruned_plan(3, (1, 2, 3, 1), 2, causal=True)
    rng = np.random.default_rng(0)
    query, *keys = rng.uniform(-1, 1, (3, 5, 4))
    wanted, _ = reference(plan, query, keys, keys, np.zeros((5, 4)))
    state = tattn.DecodingState(plan)
    for i in range(5):
        token = slice(i, i + 1)
        out, state = state.step(query[token], [k[token] for k in keys], [k[token] for k in keys])
        np.testing.assert_allclose(out[0], wanted[i], rtol=1e-11, atol=1e-13)


def test_a_pruned_plan_says_what_it_leaves_out_and_never_goes_by_scores() -> None:
    plan = pruned_plan(3, (1, 2, 3, 1), 2)
    assert f"3, {plan.rank} of 35" in str(plan)
    assert changed(plan, grading=(), rank=35).by_scores((3, 3, 3), 4) and not plan.by_scores((3, 3, 3), 4)
