"""Scores as wider rows, against their formulas, on every library."""

from __future__ import annotations

from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import pytest
from reference import dense
from watching import calls_of

import tattn
from tattn.backends import backend_of
from tattn.backends.numpy import BACKEND as NUMPY
from tattn.engines.distinct import backward, forward

N, DIM = (5, 4, 6), 6


def rows(views: int = 2, dim: int = DIM, dtype: str = "float64") -> list[Any]:
    rng = np.random.default_rng(views)
    return [rng.uniform(-1, 1, (n, dim)).astype(dtype) for n in (*N, 3)[: 1 + views]]


def chunks(x: np.ndarray) -> np.ndarray:
    return x.reshape(*x.shape[:-1], -1, 3)


def determinants(q: Any, a: Any, b: Any) -> Any:
    def stack(x: Any, places: tuple[int, int]) -> Any:
        return np.expand_dims(chunks(x), places)

    whole = np.stack(np.broadcast_arrays(stack(q, (1, 2)), stack(a, (0, 2)), stack(b, (0, 1))), axis=-2)
    return np.linalg.det(whole).sum(-1)


def pairs(i: int, j: int, x: Any, y: Any, views: int = 2) -> Any:
    """⟨x, y⟩ of two places, on the axes of all."""
    product = x @ y.T
    axes = tuple(axis for axis in range(1 + views) if axis not in (i, j))
    return np.expand_dims(product if i < j else product.T, axes)


Q, A, B = rows()
Q2, A2, B2 = (x[::-1].copy() for x in (Q, A, B))
X, Y, Z = (x[:, :2].copy() for x in (Q2, A2, B2))
# What is called, its arguments behind the keys, and the score of every tuple.
CASES: dict[str, Any] = {
    "determinant": (tattn.scores.determinant, {}, determinants(Q, A, B)),
    "strassen": (tattn.scores.strassen, {}, pairs(0, 1, Q, A) + pairs(0, 2, Q, B) + pairs(1, 2, A, B)),
    "strassen, rows of its own": (
        tattn.scores.strassen,
        {"query2": Q2, "keys2": [A2, B2]},
        pairs(0, 1, Q, A) + pairs(0, 2, Q2, B) + pairs(1, 2, A2, B2),
    ),
    "tree": (tattn.scores.tree, {}, pairs(0, 1, Q, A) + pairs(1, 2, A, B)),
    "tree, rows of its own": (tattn.scores.tree, {"keys2": [A2, B2]}, pairs(0, 1, Q, A) + pairs(1, 2, A2, B)),
    **{
        f"pair bias {between}": (
            tattn.scores.pair_bias,
            {"left": (X, Y, Z)[between[0]], "right": (X, Y, Z)[between[1]], "between": between},
            np.einsum("ic,jc,kc->ijk", Q, A, B) + pairs(*between, (X, Y, Z)[between[0]], (X, Y, Z)[between[1]]),
        )
        for between in ((0, 1), (0, 2), (1, 2), (2, 0))
    },
}


def moved(library: Any, options: dict[str, Any]) -> dict[str, Any]:
    return {name: x if name == "between" else library.arrays(x) for name, x in options.items()}


@pytest.mark.parametrize("name", CASES)
def test_the_product_of_rows_is_the_score(library: Any, name: str) -> None:
    of, options, score = CASES[name]
    query, keys = of(*library.arrays(Q, [A, B]), **moved(library, options))
    assert library.is_array(query) and all(library.is_array(k) for k in keys)
    found = np.einsum("ic,jc,kc->ijk", library.numpy(query), *(library.numpy(k) for k in keys))
    np.testing.assert_allclose(found, score, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.grid("jax")
def test_attention_with_it(library: Any, name: str) -> None:
    """Within the certified error of the softmax of the score."""
    of, options, score = CASES[name]
    values = [np.random.default_rng(n).normal(size=(n, 2)) for n in N[1:]]
    scale = 0.05
    query, keys = of(*library.arrays(Q, [A, B]), **moved(library, options))
    out, plan = tattn.tensor_attention(
        query, keys, library.arrays(values), scale=scale, tol=1e-2, method="polynomial", return_plan=True
    )
    weights = np.exp(scale * score)
    exact = np.einsum("ijk,jc,kc->ic", weights / weights.sum((1, 2), keepdims=True), *values)
    sizes = np.prod([np.abs(v).max(axis=0) for v in values], axis=0)
    assert plan.dim == query.shape[-1]
    assert (np.abs(library.numpy(out) - exact) <= plan.error * sizes).all()


COPIES: dict[str, Any] = {
    "determinant": lambda q, a, b: tattn.scores.determinant(q[..., :3], [a[..., :3], b[..., :3]]),
    "strassen": lambda q, a, b: tattn.scores.strassen(q, [a, b]),
    "strassen, rows of its own": lambda q, a, b: tattn.scores.strassen(q, [a, b], q * q, [a * a, b * b]),
    "tree": lambda q, a, b: tattn.scores.tree(q, [a, b]),
}


# Rows of its own leave too many channels for the slopes.
SERVED = {name: ["forward"] if "own" in name else ["forward", "backward"] for name in COPIES}


def many(seed: int, rows: int = 150, dtype: str = "float64") -> list[Any]:
    """Query and two keys of 4 channels, values, and gradients of output and lse."""
    rng = np.random.default_rng(seed)
    arrays = rng.uniform(-1, 1, (3, rows, 4)), rng.normal(size=(3, rows, 2)), rng.normal(size=(1, rows))
    return [x.astype(dtype) for of in arrays for x in of]


@pytest.mark.libraries("numpy", "torch")
@pytest.mark.parametrize(
    "name", [*(pytest.param(n, marks=pytest.mark.thorough) for n in COPIES if "own" in n), *list(COPIES)[:2], "tree"]
)
def test_channels_that_are_equal_share_monomials(library: Any, name: str) -> None:
    """Output, lse and every gradient are those of all monomials, channel by channel; one entry that differs, and it is those."""
    q, a, b, u, v, g, g_lse = library.arrays(*many(0))
    rng = np.random.default_rng(1)
    hidden, weights = library.arrays(rng.random(150) < 0.7, rng.uniform(0, 1, 150))
    query, keys = COPIES[name](q, a, b)
    backend = backend_of(q)
    plan = tattn.plan_for(n=150, dim=query.shape[-1], bound=2.0, degree=4, scale=0.3, dtype="float64")

    def found(least: int, query: Any) -> tuple[list[np.ndarray], list[str]]:
        with backend.using(distinct=least), calls_of(forward, backward) as calls:
            (out, lse), pullback = tattn.tensor_attention_vjp(
                query, keys, [u, v], plan=plan, key_masks=[hidden, None], key_weights=[None, weights], return_lse=True
            )
            dq, dk, dv, (_, dw) = pullback(g, g_lse)
        return [library.numpy(x) for x in (out, lse, dq, *dk, *dv, dw)], [call.name for call in calls]

    for spoiled in (0.0, 1e-3):
        changed = library.numpy(query).copy()
        changed[120, -1] += spoiled
        changed = library.array(changed)
        own, used = found(0, changed)
        whole, unused = found(1 << 60, changed)
        assert unused == [] and used == ([] if spoiled else SERVED[name])
        for x, y in zip(own, whole, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-13 * np.abs(y).max())


@pytest.mark.parametrize("name", COPIES)
def test_shared_monomials_keep_the_bounds(name: str, draws: Any) -> None:
    """In float32, where little but rounding is left of the error."""
    for seed in draws(40):
        arrays = many(seed, 80, "float32")
        q, a, b, u, v, g, _ = arrays
        query, keys = COPIES[name](q, a, b)
        bound = float(np.abs(np.einsum("ic,jc,kc->ijk", query, *keys)).max()) * 0.01
        plan = tattn.plan_for(n=80, dim=query.shape[-1], bound=bound, degree=4, scale=0.01, dtype="float32")
        with NUMPY.using(distinct=0), calls_of(forward, backward) as calls:
            out, pullback = tattn.tensor_attention_vjp(query, keys, [u, v], plan=plan, return_error=True)
            grads, bounds = pullback(g, return_error=True)
        assert [call.name for call in calls] == SERVED[name]
        wide = [x.astype(np.float64) for x in (query, *keys, u, v)]
        truth, exactly = tattn.tensor_attention_vjp(wide[0], wide[1:3], wide[3:], scale=0.01, method="exact")
        sizes = np.abs(u).max(axis=0) * np.abs(v).max(axis=0)
        assert (np.abs(out[0] - truth) <= out[1][:, None] * sizes).all()
        for x, y, most in zip(flat(grads), flat(exactly(g.astype(np.float64))), flat(bounds), strict=True):
            assert (np.abs(x - y) <= most).all()


def flat(gradients: Any) -> list[np.ndarray]:
    dq, dk, dv = gradients
    return [dq, *dk, *dv]


@pytest.mark.libraries("torch")
def test_torch_takes_derivatives_of_every_channel() -> None:
    """Second derivatives, and those in forward mode, where copies of a channel go their own ways."""
    torch = pytest.importorskip("torch")
    from tattn.backends.torch import BACKEND

    q, a, b, u, v, g, _ = (torch.tensor(x) for x in many(0, 60))
    query, keys = tattn.scores.strassen(q, [a, b])
    plan = tattn.plan_for(n=60, dim=12, bound=2.0, degree=2, scale=0.3, dtype="float64")
    leaves = [x.clone().requires_grad_() for x in (query, *keys)]
    ways = [torch.tensor(np.random.default_rng(i).normal(size=x.shape)) for i, x in enumerate(leaves)]

    def found(least: int) -> list[Any]:
        # Of tensors that are recorded, and of others.
        with BACKEND.using(distinct=least), BACKEND.for_arrays(leaves).using(distinct=least):
            out = tattn.tensor_attention(leaves[0], leaves[1:], [u, v], plan=plan)
            first = torch.autograd.grad(out, leaves, g, create_graph=True)
            twice = torch.autograd.grad(sum((x * w).sum() for x, w in zip(first, ways, strict=True)), leaves)
            of = lambda *x: tattn.tensor_attention(x[0], x[1:], [u, v], plan=plan)  # noqa: E731
            return [*first, *twice, torch.func.jvp(of, (query, *keys), tuple(ways))[1]]

    for x, y in zip(found(0), found(1 << 60), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_trees_of_any_order(library: Any) -> None:
    q, *keys = rows(3)
    query, wide = tattn.scores.tree(*library.arrays(q, keys))
    found = np.einsum("ic,jc,kc,lc->ijkl", library.numpy(query), *(library.numpy(k) for k in wide))
    expected = sum(pairs(i, i + 1, x, y, 3) for i, (x, y) in enumerate(zip((q, *keys), keys, strict=False)))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_dimensions_before_the_rows_broadcast(library: Any) -> None:
    """Between rows of one place, and between places."""
    batch = np.stack([Q, 2 * Q])
    query, keys = tattn.scores.strassen(*library.arrays(Q, [A, B]), query2=library.array(batch))
    assert [tuple(x.shape) for x in (query, *keys)] == [(2, 5, 18), (4, 18), (6, 18)]
    expected = pairs(0, 1, Q, A) + 2 * pairs(0, 2, Q, B) + pairs(1, 2, A, B)
    found = np.einsum("ic,jc,kc->ijk", library.numpy(query)[1], *(library.numpy(k) for k in keys))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def alike(x: np.ndarray) -> list[int]:
    """For every channel the first that it equals up to its sign; −1 for channels of ones."""
    first = [next(i for i, o in enumerate(x.T) if (c == o).all() or (c == -o).all()) for c in x.T]
    return [-1 if (c == 1).all() else i for c, i in zip(x.T, first, strict=True)]


def distinct(arrays: Any, degree: int) -> list[int]:
    """How many monomials of channels there are, how many differ in any of the arrays, and how many in each."""
    labels = [alike(x) for x in arrays]
    found = []
    for t in range(degree + 1):
        for monomial in combinations_with_replacement(range(arrays[0].shape[-1]), t):
            found.append(tuple(tuple(sorted(of[c] for c in monomial if of[c] >= 0)) for of in labels))
    return [len(found), len(set(found)), *(len(set(own)) for own in zip(*found, strict=True))]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("determinant", [1820, 1794, 210, 210, 210]),
        ("strassen", [7315, 7315, 210, 210, 210]),
        ("strassen, rows of its own", [7315, 7315, 1820, 1820, 1820]),
        ("tree", [1820, 1820, 210, 210, 210]),
        ("tree, rows of its own", [1820, 1820, 210, 1820, 210]),
        ("pair bias (0, 2)", [495, 495, 495, 210, 495]),
    ],
)
def test_monomials_of_equal_channels(name: str, expected: list[int]) -> None:
    """The table of the module: a plan's rank, and how many of its monomials are no copies of others."""
    of, options, _ = CASES[name]
    query, keys = of(Q, [A, B], **options)
    assert distinct((query, *keys), 4) == expected
    plan = tattn.plan_for(n=100, dim=query.shape[-1], bound=0.5, degree=4, dtype="float64")
    assert plan.rank == expected[0]
    told = f"{expected[0]:,} {expected[1]:,} {', '.join(f'{count:,}' for count in expected[2:])}"
    assert told in " ".join((tattn.scores.__doc__ or "").split())


def streams(*rows: np.ndarray) -> list[Any]:
    """As others take them: a batch of one stream and one head."""
    torch = pytest.importorskip("torch")
    return [torch.tensor(x)[None, None] for x in rows]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [6, 8])
def test_determinants_of_simplicial_attention(causal: bool, dim: int) -> None:
    """Channels that no three share are multiplied there, as in `tensor_attention` itself."""
    theirs = pytest.importorskip("simplicial_attention")
    q, a, b, u, v = np.random.default_rng(0).uniform(-1, 1, (5, 7, dim))
    expected = theirs.naive_two_simplicial_attend(
        *streams(q), tuple(streams(a, b)), tuple(streams(u, v)), causal=causal, use_signed_determinant=True
    )
    query, keys = tattn.scores.determinant(q[:, :6], [a[:, :6], b[:, :6]])
    query, *keys = (np.hstack([wide, x[:, 6:]]) for wide, x in zip((query, *keys), (q, a, b), strict=True))
    out = tattn.tensor_attention(query, keys, [u, v], scale=dim**-0.5, causal=causal, method="exact")
    np.testing.assert_allclose(out, expected[0, 0].numpy(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_strassen_attention_of_others(causal: bool) -> None:
    """There products with the query are divided by √d, and those of two keys are not."""
    theirs = pytest.importorskip("strassen_attention")
    q, a, b, u, v = np.random.default_rng(0).uniform(-1, 1, (5, 7, DIM))
    expected = theirs.strassen_attend(*streams(q, a, b, u, v), causal=causal)
    query, keys = tattn.scores.strassen(q * DIM**-0.5, [a, b])
    out = tattn.tensor_attention(query, keys, [u, v], scale=1.0, causal=causal, method="exact")
    np.testing.assert_allclose(out, expected[0, 0].numpy(), rtol=1e-10, atol=1e-12)


def test_rotations_change_no_determinant() -> None:
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    rotation *= np.linalg.det(rotation)

    def turned(x: Any) -> Any:
        return (chunks(x) @ rotation).reshape(x.shape)

    values = [np.random.default_rng(n).normal(size=(n, 2)) for n in N[1:]]
    outs = [
        tattn.tensor_attention(*tattn.scores.determinant(q, [a, b]), values, scale=0.5, method="exact")
        for q, a, b in ((Q, A, B), (turned(Q), turned(A), turned(B)))
    ]
    np.testing.assert_allclose(*outs, rtol=1e-12)


def test_gradients_in_torch() -> None:
    torch = pytest.importorskip("torch")
    values = [torch.tensor(np.random.default_rng(n).normal(size=(n, 2))) for n in N[1:]]

    def attention(q: Any, a: Any, b: Any) -> Any:
        query, keys = tattn.scores.strassen(q, [a, b])
        return tattn.tensor_attention(query, keys, values, scale=0.3, method="exact")

    given = [torch.tensor(x, requires_grad=True) for x in (Q, A, B)]
    assert torch.autograd.gradcheck(attention, given)


@pytest.mark.parametrize(
    ("of", "arguments", "message"),
    [
        ("determinant", (Q[:, :5], [A[:, :5], B[:, :5]]), r"query should have a multiple of 3 channels, got shape \(5, 5\)"),
        ("determinant", (Q, [A]), r"keys should be 2 arrays, got 1"),
        ("strassen", (Q, [A, B[:, :5]]), r"keys\[1\] should have 6 columns, as many as query, got shape \(6, 5\)"),
        ("strassen", (Q, [A, B], Q[:4]), r"query2 should have 5 rows, as many as query, got shape \(4, 6\)"),
        ("strassen", (Q, [A, B], None, [A]), r"keys2 should be 2 arrays, as many as keys, got 1"),
        ("tree", (Q, [A, B], [A[:, :2], B]), r"keys\[1\] should have 2 columns, as many as keys2\[0\], got shape \(6, 6\)"),
        ("pair_bias", (Q, [A, B], X, Y[:, :1]), r"right should have 2 columns, as many as left, got shape \(4, 1\)"),
        ("pair_bias", (Q, [A, B], X, Y, (1, 1)), r"between should be two different places, got \(1, 1\)"),
        ("pair_bias", (Q, [A, B], X, Y, (0, 3)), r"between\[1\] should be .*, got 3"),
        ("pair_bias", (Q, [A, B], X, Z), r"right should have 4 rows, as many as keys\[0\], got shape \(6, 2\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(of: str, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(tattn.scores, of)(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Q, [A, B], X, "y"), "right should be an array"),
        ((Q, [A, B], X, Y.astype(np.float32)), "right should have .* dtype float64, got float32"),
        ((Q, [A, B], X, Y, [0, 1]), r"between should be a tuple of two places, such as \(0, 1\), got list"),
        ((Q, A, X, Y), "keys should be a list or tuple"),
    ],
)
def test_other_types_are_refused_by_name(arguments: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        tattn.scores.pair_bias(*arguments)


def test_order_two_is_what_dense_says(library: Any) -> None:
    """A bias beside ordinary scores of single keys."""
    query, keys = tattn.scores.pair_bias(*library.arrays(Q, [A], X, Y))
    value = np.random.default_rng(0).normal(size=(4, 2))
    out = tattn.tensor_attention(query, keys, library.arrays([value]), scale=0.7, method="exact")
    truth = dense(np.hstack([Q, X]), [np.hstack([A, Y])], [value], scale=0.7)
    np.testing.assert_allclose(library.numpy(out), truth.out, rtol=1e-12, atol=1e-13)
