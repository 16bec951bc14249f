"""The paper's training problem: loss, gradients by Algorithm 1 and by the closed form, and what is promised of them."""

from __future__ import annotations

import re
import runpy
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.polynomial.polynomial import polyval
from training_reference import NAMES, core, dense_loss, derivative, steps

import tattn
from tattn.approximation.exponential import minimax
from tattn.backends import backend_of
from tattn.engines.features import weights
from tattn.features.monomials import Expansion
from tattn.features.scaling import channel_units
from tattn.paper import (
    TrainingProblem,
    algorithm1,
    exact_gradient,
    loss,
    loss_gradient,
    loss_gradient_factors,
    weight_gradients,
)
from tattn.paper.errors import SizesCall, gradient_error, sizes

Matrices = dict[str, np.ndarray]


def draw(
    seed: int = 0,
    *,
    lengths: tuple[int, int, int] = (7, 6, 5),
    widths: tuple[int, int, int, int, int] = (3, 2, 4, 3, 2),
    dim: int = 2,
    value_dim: int = 3,
    size: float = 1.0,
    leading: tuple[int, ...] = (),
    shared: str = "",
    dtype: str = "float64",
    entries: Any = None,
) -> Matrices:
    """Three modalities of different lengths and widths; names in `shared` have no leading dimensions."""
    rng = np.random.default_rng(seed)
    n, n2, n3 = lengths
    rows = dict(zip(NAMES, (n, n2, n3, n2, n3, n, *widths), strict=True))
    columns = dict(zip(NAMES, (*widths, value_dim, dim, dim, dim, value_dim, value_dim), strict=True))
    entries = entries or (lambda rng, shape: rng.uniform(-1, 1, shape))
    return {
        name: (entries(rng, (*(() if name in shared.split() else leading), rows[name], columns[name]))
               * (size if name[0] == "x" else 1.0)).astype(dtype)
        for name in NAMES
    }  # fmt: skip


def problem_of(library: Any, matrices: Matrices) -> TrainingProblem:
    return TrainingProblem(*library.arrays(*(matrices[name] for name in NAMES)))


def few(library: Any, many: int, some: int) -> int:
    """Draws: JAX compiles each shape, and array-api-strict checks each step."""
    return {"jax": some, "jax-cuda": some, "strict": many // 4}.get(library.name, many)


# The steps of Algorithm 1 against their dense counterparts.


class Factors:
    """The factors of Lemma F.1 for all rows, dense, by the functions under test."""

    def __init__(self, library: Any, leading: tuple[int, ...] = ()) -> None:
        self.matrices = m = draw(leading=leading)
        self.polynomial = minimax(4, 2.0)
        q, a, b, u, v = (m[left] @ m[right] for left, right in zip(NAMES[:5], NAMES[6:], strict=True))
        self.values = u, v
        moved = q, a, b = library.arrays(q, a, b)
        self.backend = backend = backend_of(q).for_arrays(moved)
        units = channel_units(q, [a, b], [None, None], 0.5, backend)
        w = weights(Expansion(self.polynomial.coefficients), q, backend)
        self.u2, self.u3 = (algorithm1.key_factor(k, i, 4, backend) for k, i in zip((a, b), units[1:], strict=True))
        ones = backend.xp.sum(self.u2, axis=-1, keepdims=True) * backend.xp.sum(self.u3, axis=-1, keepdims=True)
        self.u1 = algorithm1.query_factor(q, units[0], w, ones, 4, backend)
        self.dense = [library.numpy(x).swapaxes(-1, -2) for x in (self.u1, self.u2, self.u3)]
        self.expected = steps(m, function=lambda x: polyval(x, self.polynomial.coefficients))


@pytest.mark.parametrize("leading", [(), (2,)])
@pytest.mark.grid
def test_attention_is_of_low_rank(library: Any, leading: tuple[int, ...]) -> None:
    """Lemma F.1: U1 (U2 ⊘ U3)ᵀ is softmax with P in place of exp."""
    made = Factors(library, leading)
    assert made.dense[0].shape[-1] == 15  # C(2 + 4, 4)
    np.testing.assert_allclose(np.einsum("...ir,...jr,...kr->...ijk", *made.dense), made.expected.f, atol=1e-14)


def test_output_takes_two_sums(library: Any) -> None:
    """Lemma F.2: U1 ((U2ᵀ u) ∘ (U3ᵀ v)) is the output of that softmax."""
    made = Factors(library, (2,))
    pairs = np.prod([f.swapaxes(-1, -2) @ x for f, x in zip(made.dense[1:], made.values, strict=True)], axis=0)
    out = algorithm1.output(made.u1, library.array(pairs), made.backend)
    np.testing.assert_allclose(library.numpy(out), made.expected.output, atol=1e-14)


def test_slope_is_of_low_rank(library: Any) -> None:
    """Lemmas F.3 and F.7: w − r is [c, −r] ([u, 1] ⊘ [v, 1])ᵀ."""
    made = Factors(library, (2,))
    c, o = library.arrays(made.expected.c, made.expected.output)
    columns = library.numpy(algorithm1.query_columns(c, o, made.backend))
    u, v = (np.concatenate([x, np.ones_like(x[..., :1])], -1) for x in made.values)
    got = np.einsum("...ie,...je,...ke->...ijk", columns, u, v)
    np.testing.assert_allclose(got, made.expected.w - made.expected.r[..., None, None], atol=1e-13)


def test_projected_factors_are_those_of_the_paper(library: Any) -> None:
    """Lemmas F.5 and F.7, Fact 4.4: T_μ are A_μᵀ P_μ for the stacked P_μ of the paper, and P1 (P2 ⊘ P3)ᵀ is p."""
    made = Factors(library)
    u1, u2, u3 = made.dense
    u, v = made.values
    c, r = made.expected.c, made.expected.r[:, None]

    def face(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return np.einsum("ir,ie->ire", left, right).reshape(len(left), -1)

    stacked = (
        np.hstack([face(u1, c), -r * u1]),
        np.hstack([face(u2, u), u2]),
        np.hstack([face(u3, v), u3]),
    )
    np.testing.assert_allclose(np.einsum("iz,jz,kz->ijk", *stacked), made.expected.p, atol=1e-13)
    ones = np.hstack([u, np.ones_like(u[:, :1])]), np.hstack([v, np.ones_like(v[:, :1])])
    for factor, columns, dense, name in zip(
        (made.u1, made.u2, made.u3), (np.hstack([c, -r]), *ones), stacked, ("a1", "a2", "a3"), strict=True
    ):
        z, a = library.arrays(columns, made.matrices[name])
        got = library.numpy(algorithm1.projected(factor, z, a, made.backend))
        # The same columns: those with e = dv last come last in the paper.
        rank, k = factor.shape[-2], columns.shape[-1]
        by_column = got.reshape(rank, k, -1)
        ordered = np.concatenate([by_column[:, :-1].reshape(rank * (k - 1), -1), by_column[:, -1]])
        np.testing.assert_allclose(ordered, dense.T @ made.matrices[name], atol=1e-12)


def test_assembly_is_the_tensor_trick(library: Any) -> None:
    """Theorem F.8: T1 (T2 ⊘ T3)ᵀ, in blocks of columns."""
    rng = np.random.default_rng(0)
    t = [rng.normal(size=(*leading, 333, d)) for leading, d in (((2, 1), 3), ((3,), 2), ((), 4))]
    moved = library.arrays(*t)
    backend = backend_of(moved[0]).for_arrays(moved)
    got = library.numpy(algorithm1.assembled(*moved, backend))
    expected = np.einsum("...zl,...zx,...zy->...lxy", *t)
    np.testing.assert_allclose(got, expected.reshape(2, 3, 3, 8), atol=1e-11)


@pytest.mark.parametrize("upstream", [False, True])
@pytest.mark.parametrize("shared", ["", "a2 a4 x2 y1 e", "a1 x1"])
@pytest.mark.grid
def test_algorithm_is_the_closed_form_with_its_polynomial(library: Any, shared: str, upstream: bool) -> None:
    m = draw(leading=(2,), shared=shared)
    polynomial = minimax(3, 1.0)
    q, a, b, u, v = (m[left] @ m[right] for left, right in zip(NAMES[:5], NAMES[6:], strict=True))
    target = np.random.default_rng(1).normal(size=m["e"].shape) if upstream else m["e"]
    arrays = library.arrays(q, a, b, u, v, m["a1"], m["a2"], m["a3"], target)
    call = algorithm1.Algorithm1Call(polynomial.coefficients, 0.5, upstream)
    (got,) = backend_of(arrays[0]).run(algorithm1.gradient, call, tuple(arrays))
    expected = steps(
        m, upstream=target if upstream else None, function=lambda x: polyval(x, polynomial.coefficients)
    ).gradient
    np.testing.assert_allclose(library.numpy(got), expected, atol=1e-13)


# The gradient against derivatives of the loss.


def test_exact_gradient_is_the_derivative_of_the_loss(library: Any) -> None:
    m = draw(size=2.0)
    expected = derivative(lambda x: dense_loss(m, x), core(m))
    got = exact_gradient(problem_of(library, m))
    assert library.is_array(got)
    np.testing.assert_allclose(library.numpy(got), expected, atol=1e-11)


@pytest.mark.libraries("torch")
def test_gradients_are_those_of_autograd_through_the_core(library: Any) -> None:
    import torch

    m = draw(lengths=(9, 8, 7))
    problem = problem_of(library, m)
    x = library.array(core(m)).requires_grad_()
    q = (problem.a1 @ x).reshape(9, 2, 4)
    scores = torch.einsum("ixy,jx,ky->ijk", q, problem.a2, problem.a3) * problem.scale
    f = torch.softmax(scores.reshape(9, -1), -1).reshape(scores.shape)
    out = torch.einsum("ijk,je,ke->ie", f, problem.a4 @ problem.y1, problem.a5 @ problem.y2)
    (0.5 * (out - problem.e).square().sum()).backward()
    expected = library.numpy(x.grad)
    np.testing.assert_allclose(library.numpy(exact_gradient(problem)), expected, atol=1e-14)
    result = loss_gradient(problem, eps=1e-7, method="polynomial")
    assert np.abs(library.numpy(result.gradient) - expected).max() <= result.error


@pytest.mark.parametrize("method", ["exact", "polynomial"])
@pytest.mark.grid
def test_loss_is_the_definition(library: Any, method: str) -> None:
    m = draw(leading=(3,), shared="a2 x1")
    got = loss(problem_of(library, m), method=method, tol=1e-9)
    assert tuple(got.shape) == (3,)
    np.testing.assert_allclose(library.numpy(got), dense_loss(m), rtol=1e-7)


@pytest.mark.parametrize("method", ["exact", "polynomial"])
@pytest.mark.grid
def test_weight_gradients_are_derivatives_of_the_loss(library: Any, method: str) -> None:
    """Finite differences; a weight that problems share takes the sum, also where E alone has many problems."""
    for shared in ("x1 y2 a3", "a1 a2 a3 a4 a5 x1 x2 x3 y1 y2"):
        m = draw(leading=(2,), shared=shared)
        got = weight_gradients(problem_of(library, m), method=method, tol=1e-9)
        for name, array in got._asdict().items():
            expected = derivative(lambda x, m=m, name=name: dense_loss({**m, name: x}), m[name])
            assert tuple(array.shape) == m[name].shape
            np.testing.assert_allclose(library.numpy(array), expected, atol=1e-7, err_msg=name)


@pytest.mark.libraries("torch")
def test_weight_gradients_are_those_of_autograd(library: Any) -> None:
    problem = problem_of(library, draw())
    for name in ("x1", "x2", "x3", "y1", "y2"):
        getattr(problem, name).requires_grad_()
    loss(problem, method="exact").backward()
    got = weight_gradients(problem, method="exact")
    for name, array in got._asdict().items():
        assert not array.requires_grad
        np.testing.assert_allclose(library.numpy(array), library.numpy(getattr(problem, name).grad), atol=1e-13)
    assert not loss_gradient(problem, eps=1e-3).gradient.requires_grad
    assert not exact_gradient(problem).requires_grad


# What is promised.


def corners(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.choice([-1.0, 1.0], shape)


def aligned(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Rows alike but for their sign: every score is ±R."""
    one = rng.choice([-1.0, 1.0], (*shape[:-2], 1, shape[-1]))
    return one * rng.choice([-1.0, 1.0], (*shape[:-1], 1))


def heavy(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_t(3, shape) / 3


KINDS = {"uniform": None, "corners": corners, "aligned": aligned, "heavy": heavy}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.grid("strict", "torch", "jax")
def test_no_gradient_is_further_off_than_promised(
    library: Any, kind: str, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for seed in range(few(library, 60, 1)):
        rng = np.random.default_rng([seed, len(kind)])
        dim, value_dim = (int(x) for x in rng.integers(1, 4, 2))
        lengths = tuple(int(n) for n in rng.integers(1, 14, 3))
        widths = tuple(int(d) for d in rng.integers(1, 5, 5))
        leading, shared = [((), ""), ((2,), "a2 x1 y2"), ((3,), "x1 x2 x3 y1 y2")][seed % 3]
        size = float(rng.choice([0.1, 0.3, 0.5, 0.7, 1.0]))
        m = draw(
            seed, lengths=lengths, widths=widths, dim=dim, value_dim=value_dim, leading=leading, shared=shared,
            size=size, dtype=dtype, entries=KINDS[kind],
        )  # fmt: skip
        upstream = rng.normal(size=(lengths[0], value_dim)).astype(dtype) if seed % 2 else None
        truth = steps(m, upstream=upstream, precision=np.float64 if dtype == "float32" else np.longdouble).gradient
        eps = float(10.0 ** rng.uniform(-2, 1) if dtype == "float32" else 10.0 ** rng.uniform(-10, 0))
        problem, given = problem_of(library, m), None if upstream is None else library.array(upstream)
        for method in ("auto", "polynomial", "exact"):
            try:
                result = loss_gradient(problem, eps=eps, method=method, upstream=given)
            except tattn.PlanError:
                continue
            assert result.error <= eps
            got = library.numpy(result.gradient)
            assert got.dtype == dtype
            off = float(np.abs(got - truth).max())
            assert off <= result.error, (seed, method, off, result.error)
            if result.plan.method == "polynomial" and method == "polynomial":
                found.append((off / result.error, result.error / eps))
                made = loss_gradient_factors(problem, eps=eps, upstream=given)
                t = [library.numpy(x).astype(float) for x in (made.t1, made.t2, made.t3)]
                whole = np.einsum("...lz,...xz,...yz->...lxy", *t).reshape(truth.shape)
                assert made.error == result.error
                assert np.abs(whole - truth).max() <= made.error
    assert len(found) >= few(library, 20, 0)
    if not found:
        return
    ratio, used = np.array(found).T
    with capsys.disabled():
        print(
            f"\n  {library.name}, {kind}, {dtype}, {len(found)} by polynomial: bound/error {1 / np.median(ratio):.3g} at the "
            f"median, at least {1 / ratio.max():.3g}; bound/eps {np.median(used):.3g} at the median"
        )


@pytest.mark.parametrize("upstream", [False, True])
def test_bound_holds_for_the_worst_polynomial(upstream: bool) -> None:
    """exp times 1 ± δ, signs by what they do to one entry of the gradient: the derivation, without the luck of a polynomial."""
    ratios = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        n, n2, n3 = (int(x) for x in rng.integers(1, 5, 3))
        m = draw(seed, lengths=(n, n2, n3), widths=(1,) * 5, dim=1, value_dim=int(rng.integers(1, 3)), entries=corners)
        m["e"] = m["e"] * rng.choice([0.0, 1.0, 10.0])
        g = rng.normal(size=m["e"].shape) if upstream else None
        delta, exact = float(rng.choice([0.01, 0.3, 0.8])), steps(m, upstream=g)
        slope = (exact.w - exact.r[:, None, None]) * np.einsum("il,jx,ky->ijk", m["a1"], m["a2"], m["a3"])
        off = []
        for signs in (np.sign(slope), -np.sign(slope), rng.choice([-1.0, 1.0], slope.shape)):
            factor = 1 + delta * signs
            moved = steps(m, upstream=g, function=lambda x, factor=factor: np.exp(x) * factor)
            off.append(np.abs(moved.gradient - exact.gradient).max())
        products = [m[left] @ m[right] for left, right in zip(NAMES[:5], NAMES[6:], strict=True)]
        arrays = (*products, *(m[name] for name in NAMES if name != "e"), m["e"] if g is None else g)
        found = sizes(SizesCall(1.0, upstream, 2.0**-53), backend_of(m["a1"]), arrays)
        ratios.append(max(off) / gradient_error(found, delta, 0.0))
    assert (0.3 if upstream else 0.1) < max(ratios) <= 1


@pytest.mark.parametrize("upstream", [False, True])
@pytest.mark.parametrize("rounded", ["scores", "values"])
@pytest.mark.grid
def test_bound_holds_for_rounding_of_the_products_alone(library: Any, rounded: str, upstream: bool) -> None:
    """The gradient with A1 X1, A2 X2, A3 X3, or with A4 Y1, A5 Y2, in float32 and all else in float64."""
    for seed in range(10):
        m = draw(seed, size=0.7, dtype="float32", widths=(40,) * 5, dim=3)
        left, right = ("a1", "x1") if rounded == "scores" else ("a4", "y1")
        m[left][:, 20:], m[right][20:] = m[left][:, :20], -m[right][:20]  # they cancel
        g = np.float32(np.random.default_rng(seed).normal(size=m["e"].shape)) if upstream else None
        arrays = library.arrays(*(m[name] for name in (*NAMES[:5], *NAMES[6:])), m["e"] if g is None else g)
        products = [a @ x for a, x in zip(arrays[:5], arrays[5:10], strict=True)]
        call = SizesCall(1 / 3, upstream, 2.0**-24)
        found = sizes(call, backend_of(arrays[0]), (*products, *arrays))
        bound = gradient_error(found._replace(**{"scores" if rounded == "values" else "values": 0.0}), 0.0, 0.0)
        computed = [library.numpy(x).astype(float) for x in products]
        true = [
            m[left].astype(float) @ m[right].astype(float) for left, right in zip(NAMES[:5], NAMES[6:], strict=True)
        ]

        def gradient(q: Any, a: Any, b: Any, u: Any, v: Any, m: Matrices = m, g: Any = g) -> np.ndarray:
            x = np.einsum("ic,jc,kc->ijk", q, a, b) / 3
            f = np.exp(x) / np.exp(x).sum((1, 2), keepdims=True)
            o = np.einsum("ijk,je,ke->ie", f, u, v)
            c = o - m["e"] if g is None else g
            p = f * (np.einsum("ie,je,ke->ijk", c, u, v) - (c * o).sum(-1)[:, None, None])
            return np.einsum("ijk,il,jx,ky->lxy", p, m["a1"], m["a2"], m["a3"], optimize=True) / 3

        mixed = [*computed[:3], *true[3:]] if rounded == "scores" else [*true[:3], *computed[3:]]
        off = np.abs(gradient(*mixed) - gradient(*true)).max()
        assert 0 < off <= bound


def test_narrow_types_compute_in_float32() -> None:
    m = {name: value.astype(np.float16) for name, value in draw(size=0.3).items()}
    result = loss_gradient(TrainingProblem(**m), eps=1e-2, method="polynomial")
    assert result.gradient.dtype == np.float32
    assert np.abs(result.gradient - steps(m).gradient).max() <= result.error
    assert weight_gradients(TrainingProblem(**m)).x1.dtype == np.float16


# Modules, heads, modalities.


@pytest.mark.thorough("jax")
def test_upstream_gradient_takes_the_place_of_the_residual(library: Any) -> None:
    """Upstream output − E gives the gradients of the loss; any other, those of Σ upstream ∘ output."""
    m = draw()
    problem = problem_of(library, m)
    c = library.array(steps(m).c)
    np.testing.assert_allclose(
        library.numpy(exact_gradient(problem, upstream=c)), library.numpy(exact_gradient(problem)), atol=1e-14
    )
    g = np.random.default_rng(1).normal(size=(2, *m["e"].shape))
    moved = library.array(g)

    def objective(x: np.ndarray) -> np.ndarray:
        return (g * steps(m, x=x).output).sum((-1, -2))

    expected = np.stack([derivative(lambda x, i=i: objective(x)[i], core(m)) for i in range(2)])
    np.testing.assert_allclose(library.numpy(exact_gradient(problem, upstream=moved)), expected, atol=1e-11)
    result = loss_gradient(problem, eps=1e-5, method="polynomial", upstream=moved)
    assert np.abs(library.numpy(result.gradient) - expected).max() <= 1e-5
    got = weight_gradients(problem, method="exact", upstream=moved)
    for name, array in got._asdict().items():
        weight = derivative(lambda x, name=name: (g * steps({**m, name: x}).output).sum(), m[name])
        np.testing.assert_allclose(library.numpy(array), weight, atol=1e-10, err_msg=name)


@pytest.mark.thorough("jax")
def test_heads_are_leading_dimensions(library: Any) -> None:
    """Heads share the inputs and have weights of their own: each gradient is that of its head alone."""
    m = draw(leading=(2, 3), shared="a1 a2 a3 a4 a5 e", size=0.5)
    together = loss_gradient(problem_of(library, m), eps=1e-5, method="polynomial")
    exact = library.numpy(exact_gradient(problem_of(library, m)))
    assert tuple(together.gradient.shape) == exact.shape == (2, 3, 3, 8)
    for head in [(0, 0), (1, 2)]:
        alone = {name: value[head] if value.ndim > 2 else value for name, value in m.items()}
        truth = steps(alone).gradient
        np.testing.assert_allclose(exact[head], truth, atol=1e-14)
        assert np.abs(library.numpy(together.gradient)[head] - truth).max() <= together.error


@pytest.mark.thorough("jax")
def test_five_modalities_at_once_and_two_by_two(library: Any) -> None:
    """Text attends to four more modalities: by one attention of order five, and by two layers of order three."""
    rng = np.random.default_rng(0)
    lengths = (5, 4, 3, 2, 6)
    arrays = [rng.uniform(-1, 1, (n, 2)) for n in lengths]
    text, *others = library.arrays(*arrays)
    options: dict[str, Any] = {"tol": 1e-6, "method": "polynomial"}
    together = library.numpy(tattn.tensor_attention(text, others, others, **options))
    scores = np.einsum("iz,az,bz,cz,dz->iabcd", *arrays) / 2
    f = np.exp(scores) / np.exp(scores).sum((1, 2, 3, 4), keepdims=True)
    np.testing.assert_allclose(together, np.einsum("iabcd,ae,be,ce,de->ie", f, *arrays[1:]), atol=1e-6)

    first = tattn.tensor_attention(text, others[:2], others[:2], **options)
    second = library.numpy(tattn.tensor_attention(first, others[2:], others[2:], **options))
    rows = arrays[0]
    for a, b in (arrays[1:3], arrays[3:]):
        scores = np.einsum("iz,az,bz->iab", rows, a, b) / 2
        f = np.exp(scores) / np.exp(scores).sum((1, 2), keepdims=True)
        rows = np.einsum("iab,ae,be->ie", f, a, b)
    np.testing.assert_allclose(second, rows, atol=1e-5)


def test_example_of_modalities_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "modalities.py"), run_name="__main__")
    assert "five modalities" in capsys.readouterr().out


# Streaming.


@pytest.mark.thorough("jax")
def test_small_blocks_change_nothing(library: Any) -> None:
    m = draw(lengths=(53, 41, 37), leading=(2,), shared="a1 x2 e", size=0.5)
    problem = problem_of(library, m)
    matrices = [getattr(problem, name) for name in NAMES]
    truth = steps(m).gradient
    with backend_of(problem.a1).for_arrays(matrices).using(workspace=1 << 10):
        np.testing.assert_allclose(library.numpy(exact_gradient(problem)), truth, atol=1e-13)
        result = loss_gradient(problem, eps=1e-8, method="polynomial")
    np.testing.assert_allclose(library.numpy(result.gradient), truth, atol=1e-9)


def test_memory_does_not_grow_with_the_rows() -> None:
    """Beyond arrays of the size of the inputs: no P_μ, no features of all rows, no pairs of keys."""

    def peak(n: int, function: Any) -> int:
        problem = TrainingProblem(**draw(lengths=(n, n, n), widths=(4,) * 5, dim=4, value_dim=4, size=0.3))
        function(problem)
        tracemalloc.start()
        function(problem)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    def algorithm(problem: TrainingProblem) -> Any:
        result = loss_gradient(problem, eps=1e-4, method="polynomial")
        assert result.plan.rank >= 70
        return result

    # q, a, b, u, v and a few arrays of their size, 32 bytes a row each, against 8 · 70 · 5 for a row of P_μ.
    assert peak(40_000, algorithm) - peak(20_000, algorithm) < 20_000 * 32 * 20
    # 8 n² bytes for one number a pair.
    assert peak(200, exact_gradient) < 8 << 20


# Arguments that do not fit.


def test_lengths_that_do_not_agree_are_named(library: Any) -> None:
    good = draw()
    wrong = {
        "a4": ("should have as many rows as a2 has rows, 6, got shape (9, 3)", (9, 3)),
        "a5": ("should have as many rows as a3 has rows, 5, got shape (9, 2)", (9, 2)),
        "e": ("should have as many rows as a1 has rows, 7, got shape (9, 3)", (9, 3)),
        "x1": ("should have as many rows as a1 has columns, 3, got shape (9, 2)", (9, 2)),
        "x2": ("should have as many columns as x1 has columns, 2, got shape (2, 9)", (2, 9)),
        "x3": ("should have as many rows as a3 has columns, 4, got shape (9, 2)", (9, 2)),
        "y1": ("should have as many rows as a4 has columns, 3, got shape (9, 3)", (9, 3)),
        "y2": ("should have as many columns as y1 has columns, 3, got shape (2, 9)", (2, 9)),
        "a1": ("should have at least two dimensions", (3,)),
        "a2": ("should have no dimension of length 0", (0, 2)),
        "a3": ("should have leading dimensions that broadcast with (2,)", (3, 5, 4)),
    }
    for name, (message, shape) in wrong.items():
        other = {"a1": np.zeros((2, 7, 3))} if name == "a3" else {}
        with pytest.raises(ValueError, match="^" + re.escape(f"{name} {message}")):
            problem_of(library, {**good, **other, name: np.zeros(shape)})
    with pytest.raises(TypeError, match=r"^y1 should have a1's dtype float64, got float32"):
        problem_of(library, {**good, "y1": good["y1"].astype("float32")})


def test_matrices_of_another_kind_are_named() -> None:
    good = draw()
    for name in NAMES:
        with pytest.raises(TypeError, match=rf"^{name} should be an array"):
            TrainingProblem(**{**good, name: None})
    with pytest.raises(TypeError, match=r"^upstream should be an array"):
        exact_gradient(TrainingProblem(**good), upstream=1.0)
    with pytest.raises(ValueError, match=r"^upstream should have shape \(..., 7, 3\), got \(7, 2\)"):
        exact_gradient(TrainingProblem(**good), upstream=np.zeros((7, 2)))


@pytest.mark.parametrize("name", [*NAMES, "upstream"])
def test_entries_that_are_not_finite_are_named(name: str) -> None:
    m = {**draw(), "upstream": np.ones((7, 3))}
    m[name][0, 0] = np.nan
    upstream = m.pop("upstream")
    with pytest.raises(ValueError, match=rf"^{name} should hold finite numbers, got NaN among them"):
        loss_gradient(TrainingProblem(**m), eps=1e-3, upstream=upstream if name == "upstream" else None)


def test_products_that_overflow_are_named() -> None:
    m = {name: value.astype(np.float32) for name, value in draw().items()}
    m["a3"], m["x3"] = m["a3"] * np.float32(1e30), m["x3"] * np.float32(1e30)
    with pytest.raises(ValueError, match=r"^a3 @ x3 should hold finite numbers, got"):
        loss_gradient(TrainingProblem(**m), eps=1e-3)


@pytest.mark.parametrize(
    ("eps", "error"), [(0, ValueError), (-1e-3, ValueError), (np.nan, ValueError), ("a", TypeError)]
)
def test_eps_must_be_positive(eps: Any, error: type) -> None:
    for function in (loss_gradient, loss_gradient_factors):
        with pytest.raises(error, match=r"^eps should be"):
            function(TrainingProblem(**draw()), eps=eps)


def test_method_must_exist() -> None:
    with pytest.raises(ValueError, match=r"^method should be one of"):
        loss_gradient(TrainingProblem(**draw()), eps=1e-3, method="fast")


def test_an_eps_beyond_the_dtype_is_refused_with_what_it_reaches() -> None:
    m = draw(size=0.3, dtype="float32")
    for method in ("auto", "exact"):
        with pytest.raises(tattn.PlanError, match=r"cannot be reached in float32.*Use float64") as caught:
            loss_gradient(TrainingProblem(**m), eps=1e-9, method=method)
        reached = float(re.search(r"up to (\S+)\. Use", str(caught.value))[1])
        result = loss_gradient(TrainingProblem(**m), eps=1.05 * reached, method=method)
        assert result.error <= 1.05 * reached
    with pytest.raises(tattn.PlanError, match=r"rounding in float32 leaves .*float64 reaches further"):
        loss_gradient(TrainingProblem(**m), eps=1e-9, method="polynomial")
    wide = {name: value.astype(np.float64) for name, value in m.items()}
    assert loss_gradient(TrainingProblem(**wide), eps=1e-9).error <= 1e-9


def test_entries_beyond_any_degree_are_refused_with_what_was_found() -> None:
    m = draw(size=10.0)
    largest = np.abs(m["a1"] @ m["x1"]).max()
    message = r"entries of a. @ x. are up to B=.* R=.* no degree up to 40 .*method='exact' \(.* operations\)"
    with pytest.raises(tattn.PlanError, match=message) as caught:
        loss_gradient(TrainingProblem(**m), eps=1e-3, method="polynomial")
    assert float(re.search(r"B=([\d.e+]+)", str(caught.value))[1]) >= 0.99 * largest
    with pytest.raises(tattn.PlanError, match=message):
        loss_gradient_factors(TrainingProblem(**m), eps=1e-3)
    result = loss_gradient(TrainingProblem(**m), eps=1e-3)
    assert result.plan.method == "exact"
    assert np.abs(result.gradient - steps(m).gradient).max() <= result.error
    wide = draw(widths=(2, 2, 2, 2, 2), dim=30, value_dim=2)
    with pytest.raises(tattn.PlanError, match=r"takes degree \d+ and rank .* beyond the largest rank"):
        loss_gradient(TrainingProblem(**wide), eps=1e-9, method="polynomial")


def test_auto_takes_the_cheaper_method() -> None:
    small, large = draw(lengths=(3, 3, 3)), draw(lengths=(300, 300, 300))
    for matrices, method in ((small, "exact"), (large, "polynomial")):
        plan = loss_gradient(TrainingProblem(**matrices), eps=1e-4).plan
        assert plan.method == method
        assert (plan.flops_polynomial < plan.flops_exact) == (method == "polynomial")


@pytest.mark.libraries("jax")
def test_traced_values_cannot_be_certified() -> None:
    jax = pytest.importorskip("jax")
    matrices = {name: jax.numpy.asarray(value, jax.numpy.float32) for name, value in draw().items()}
    call = jax.jit(lambda m: loss_gradient(TrainingProblem(**m), eps=1e-3).gradient)
    with pytest.raises(tattn.PlanError, match=r"traced .* exact_gradient"):
        call(matrices)
    got = jax.jit(lambda m: exact_gradient(TrainingProblem(**m)))(matrices)
    np.testing.assert_allclose(got, steps(draw()).gradient, atol=1e-5)


@pytest.mark.parametrize("method", ["polynomial", "exact"])
@pytest.mark.parametrize(("values", "inputs"), [(1e-12, 1e10), (1e-25, 1e10), (1e5, 1e-10)])
@pytest.mark.grid
def test_the_error_holds_where_products_of_sizes_vanish(
    library: Any, method: str, values: float, inputs: float
) -> None:
    size = {"e": 0.0, "x": 0.5 / inputs, "y": values}
    matrices = {
        name: (m * (inputs if name in ("a1", "a2", "a3") else size.get(name[0], 1.0))).astype(np.float32)
        for name, m in draw(3).items()
    }
    found = loss_gradient(problem_of(library, matrices), eps=1e30, method=method)
    truth = steps(matrices).gradient
    assert found.error > 0
    assert (np.abs(library.numpy(found.gradient) - truth) <= found.error).all()
