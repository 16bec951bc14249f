"""Norm bands: the bound that comes with the answer holds, for every row, whatever the numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cases import CASES, KINDS, METHODS, Call, assert_close, draw, heavy_tailed, methods, run
from reference import Dense, dense, value_sizes
from watching import calls_of

import tattn
from tattn.approximation.exponential import DEFAULT_GRID, crowded
from tattn.backends import backend_of
from tattn.methods.bands import Banding, Series, _grid_table, edges, sorted_views
from tattn.operands import Operands, View
from tattn.planning.sampling import sampled_errors
from tattn.planning.settings import using


def ratios(call: Call, got: Dense, error: np.ndarray, bounds: Dense, plan: tattn.Plan, precision: Any) -> list[float]:
    """Largest error of each result over its bound; 0/0 is 0."""
    given: Any = {"scale": plan.scale, "masks": call.masks, "grad_out": call.grad_out, "channels": plan.channels}
    truth = dense(call.query, call.keys, call.values, precision=precision, **given)
    with np.errstate(invalid="ignore"):
        allowed = np.where(np.isinf(error[..., None]), np.inf, error[..., None] * value_sizes(call.values, call.masks))
    pairs = [(got.out - truth.out, allowed), (got.dquery - truth.dquery, bounds.dquery)]
    pairs += [(a - b, c) for a, b, c in zip(got.dkeys, truth.dkeys, bounds.dkeys, strict=True)]
    pairs += [(a - b, c) for a, b, c in zip(got.dvalues, truth.dvalues, bounds.dvalues, strict=True)]
    result = []
    for off, bound in pairs:
        assert off.shape == bound.shape
        assert not np.isnan(bound).any()
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = np.where(np.isinf(bound) | (off == 0), 0.0, np.abs(off) / bound)
        result.append(float(ratio.max()))
    return result


def constant(rng: np.random.Generator, shape: tuple[int, ...], view: int) -> np.ndarray:
    return np.ones(shape) * rng.normal(size=shape[-1])


def some_zero(rng: np.random.Generator, shape: tuple[int, ...], view: int) -> np.ndarray:
    return rng.normal(size=shape) * (rng.random((shape[0], 1)) < 0.5)


def one_sign(rng: np.random.Generator, shape: tuple[int, ...], view: int) -> np.ndarray:
    return np.abs(rng.normal(size=shape)) * (-1 if view == 0 else 1)


ALL = {**KINDS, "constant": constant, "some zero": some_zero, "one sign": one_sign}
DRAWS = 460  # times eleven kinds and two dtypes: more than ten thousand


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
@pytest.mark.parametrize("channels", ["real", "complex"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", list(ALL))
def test_no_row_exceeds_its_bound(
    kind: str, dtype: str, channels: str, draws: Callable[[int], range], capsys: pytest.CaptureFixture[str]
) -> None:
    """Output and all gradients; a bound that is not finite promises nothing, and is counted."""
    precision = np.float64 if dtype == "float32" else np.longdouble
    slack, loose, promised, total = [], [], 0, 0
    for seed in draws(DRAWS if channels == "real" else DRAWS // 4):
        rng = np.random.default_rng([seed, len(kind)])
        views, dim, value_dim = int(rng.integers(1, 4)), int(rng.integers(1, 5)), int(rng.integers(1, 3))
        if channels == "complex":
            dim = 2 * (1 + dim // 2)
        lengths = rng.integers(3, 18, views + 1)
        degree, bands = int(rng.integers(2, 6)), int(rng.integers(1, 4))
        moment = 4 if degree > 3 and seed % 2 else 2
        arrays = [ALL[kind](rng, (int(n), dim), i).astype(dtype) for i, n in enumerate(lengths)]
        values = [rng.choice([-1.0, 0.0, 0.3, 1.0], (int(n), value_dim)).astype(dtype) for n in lengths[1:]]
        reach = np.prod([max(np.abs(a).max(), 0.1) for a in arrays]) * dim
        scale = float(rng.choice([0.05, 0.3, 1.0, 3.0, 8.0]) / reach)
        masks = [rng.random(int(n)) < 0.8 for n in lengths[1:]] if seed % 3 == 0 else None
        grad = rng.normal(size=(int(lengths[0]), value_dim)).astype(dtype)
        asked: Any = {"degree": degree, "bands": bands, "moment": moment, "channels": channels}
        plan = tattn.plan(arrays[0], arrays[1:], values, scale=scale, series="banded", **asked)
        (out, error), pullback = tattn.tensor_attention_vjp(
            arrays[0], arrays[1:], values, plan=plan, key_masks=masks, return_error=True
        )
        gradients, bounds = (Dense(out, out, *g) for g in pullback(grad, return_error=True))
        call = Call(arrays[0], arrays[1:], values, masks, grad, np.zeros(int(lengths[0])))
        found = ratios(call, gradients, error, bounds, plan, precision)
        assert max(found) <= 1, (seed, found, str(plan))
        loose.append([1 / f if f > 0 else np.inf for f in found])
        promised += int(np.isfinite(error).sum())
        total += error.size
        if np.isfinite(error).all() and found[0] > 0:
            slack.append(1 / found[0])
    assert promised > 0.5 * total
    with capsys.disabled():
        print(f"\n  {kind}, {dtype}, {channels}: bound/error of the worst row at the median {np.median(slack):.3g}, at least "
              f"{min(slack):.3g}; "
              f"{promised / total:.0%} of the rows with a finite bound; gradients of query, a key view and a value view: "
              f"{', '.join(f'{np.median([x[i] for x in loose]):.3g}' for i in (1, 2, -1))}")  # fmt: skip


@pytest.mark.grid
@pytest.mark.parametrize("case", CASES)
def test_every_library_gives_the_same(library: Any, case: dict[str, Any]) -> None:
    """Output, lse, gradients and bounds as NumPy's, and within the bounds of the definition."""
    from conftest import make_library

    call = draw(**case)
    plan = tattn.plan_for(n=9, dim=3, order=case["views"] + 1, series="banded", degree=3, bands=2, dtype="float64")
    got, _ = run(library, call, plan=plan)
    expected, _ = run(make_library("numpy"), call, plan=plan)
    assert_close(got, expected, 1e-11)
    arrays = library.arrays(call.query, call.keys, call.values)
    masks = None if call.masks is None else library.arrays(call.masks)
    out, _lse, error = tattn.tensor_attention(*arrays, plan=plan, key_masks=masks, return_lse=True, return_error=True)
    assert library.is_array(error)
    assert library.device(error) == library.device(out)
    assert tuple(error.shape) == tuple(out.shape[:-1])
    truth = dense(call.query, call.keys, call.values, masks=call.masks)
    allowed = library.numpy(error)[..., None] * value_sizes(call.values, call.masks)
    assert (np.abs(library.numpy(out) - truth.out) <= allowed).all()
    assert np.isfinite(library.numpy(error)).all()


@pytest.mark.grid
@methods
@pytest.mark.parametrize("case", CASES)
def test_gradients_with_their_bounds(library: Any, case: dict[str, Any], method: str) -> None:
    """Every gradient within its bound of the definition's, in its own shape; the bounds as NumPy's."""
    from conftest import make_library

    call = draw(**case)
    truth = dense(call.query, call.keys, call.values, masks=call.masks, grad_out=call.grad_out, grad_lse=call.grad_lse)
    plan = METHODS[method].plan(n=9, dim=3, order=case["views"] + 1)
    found = []
    for lib in (library, make_library("numpy")):
        arrays = lib.arrays(call.query, call.keys, call.values)
        masks = None if call.masks is None else lib.arrays(call.masks)
        _, pullback = tattn.tensor_attention_vjp(*arrays, key_masks=masks, plan=plan)
        gradients, bounds = pullback(*lib.arrays(call.grad_out, call.grad_lse), return_error=True)
        found.append([bounds[0], *bounds[1], *bounds[2]])
        assert all(lib.is_array(b) for b in found[-1])
        found[-1] = [lib.numpy(b) for b in found[-1]]
        flat = [lib.numpy(g) for g in (gradients[0], *gradients[1], *gradients[2])]
        for off, bound in zip(
            (g - t for g, t in zip(flat, [truth.dquery, *truth.dkeys, *truth.dvalues], strict=True)),
            found[-1],
            strict=True,
        ):
            assert off.shape == bound.shape
            assert np.isfinite(bound).all()
            assert (np.abs(off) <= bound).all()
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-15)


def test_an_estimate_bounds_no_gradient(library: Any) -> None:
    call = draw(2)
    arrays = library.arrays(call.query, call.keys, call.values)
    estimated = tattn.plan(*arrays, bound="estimated", degree=2)
    _, pullback = tattn.tensor_attention_vjp(*arrays, plan=estimated)
    _, (dquery, dkeys, dvalues) = pullback(library.arrays(call.grad_out), return_error=True)
    for bound in (dquery, *dkeys, *dvalues):
        assert np.isinf(library.numpy(bound)).all()


@pytest.mark.parametrize("views", [1, 2, 3])
def test_gradients_are_finite_differences(views: int) -> None:
    call = draw(views, masked=True)
    plan = tattn.plan_for(n=9, dim=3, order=views + 1, series="banded", degree=3, bands=4, dtype="float64")
    arrays = [call.query, *call.keys, *call.values]

    def loss(arrays: list[np.ndarray]) -> float:
        out, lse = tattn.tensor_attention(
            arrays[0], arrays[1 : views + 1], arrays[views + 1 :], plan=plan, key_masks=call.masks, return_lse=True
        )
        return float((out * call.grad_out).sum() + (lse * call.grad_lse).sum())

    _, pullback = tattn.tensor_attention_vjp(call.query, call.keys, call.values, plan=plan, key_masks=call.masks)
    dquery, dkeys, dvalues = pullback(call.grad_out, call.grad_lse)
    rng = np.random.default_rng(2)
    for i, gradient in enumerate((dquery, *dkeys, *dvalues)):
        direction = rng.normal(size=gradient.shape)
        ahead, behind = ([a + s * 1e-6 * direction if j == i else a for j, a in enumerate(arrays)] for s in (1, -1))
        np.testing.assert_allclose(
            (loss(ahead) - loss(behind)) / 2e-6, (gradient * direction).sum(), rtol=1e-6, atol=1e-7
        )


def not_compiled(library: Any) -> None:
    if library.name.startswith("jax"):
        pytest.skip("JAX compiles this for a minute; test_one_loose_row_of_few_in_two_bands is the same in small")


@pytest.mark.thorough("torch", "strict")
@pytest.mark.usefixtures("bands_at_any_length")
def test_few_loose_rows_are_recomputed_exactly(library: Any) -> None:
    """The answer, the lse and all gradients are those of the definition to `tol`, by a few exact rows."""
    not_compiled(library)
    call = heavy_tailed()
    query, keys, values = library.arrays(call.query, call.keys, call.values)
    (_out, error, plan), pullback = tattn.tensor_attention_vjp(
        query, keys, values, tol=1e-3, return_error=True, return_plan=True
    )
    assert plan.series == "banded"
    assert 0 < plan.recomputed <= 0.05
    assert "recomputed exactly" in plan.reason
    grads = library.arrays(call.grad_out, call.grad_lse)
    gradients, bounds = (
        Dense(*(None, None), library.numpy(q), [library.numpy(k) for k in ks], [library.numpy(v) for v in vs])
        for q, ks, vs in pullback(*grads, return_error=True)
    )
    error = library.numpy(error)
    assert (error <= 1e-3).all()
    assert (error[:4] < 1e-10).all()
    got, _ = run(library, call, tol=1e-3)
    truth = dense(call.query, call.keys, call.values, grad_out=call.grad_out, grad_lse=call.grad_lse)
    assert (np.abs(got.out - truth.out) <= error[:, None] * value_sizes(call.values)).all()
    assert np.abs(got.out[:4] - truth.out[:4]).max() < 1e-12
    assert_close(got, truth, 1e-2)
    for part in ("dquery", "dkeys", "dvalues"):
        for a, b, c in zip(getattr(gradients, part), getattr(truth, part), getattr(bounds, part), strict=True):
            assert (np.abs(a - b) <= c).all()
    assert np.isfinite(bounds.dvalues[0]).all()
    plain = tattn.plan(query, keys, values, series="banded", degree=plan.degree)
    loose = tattn.tensor_attention(query, keys, values, plan=plain, return_error=True)[1]
    assert (library.numpy(loose)[:4] > 1e-3).all()


@pytest.mark.usefixtures("bands_at_any_length")
@pytest.mark.parametrize("heads", [False, True], ids=["one problem", "heads and masks"])
@pytest.mark.grid
def test_one_loose_row_of_few_in_two_bands(library: Any, heads: bool) -> None:
    """The same on a size that every library compiles in seconds."""
    rng = np.random.default_rng(5)
    query, *keys = rng.uniform(-1, 1, (3, 20, 2))
    query[3] *= 30
    call = Call(query, keys, list(rng.normal(size=(2, 20, 2))), None, rng.normal(size=(20, 2)), rng.normal(size=20))
    if heads:
        # The loose row is another one in the second head.
        call = call._replace(
            query=np.stack([query, np.roll(query, 7, axis=0)])[:, None],
            masks=[np.arange(20) % 5 > 0, None],
            grad_out=np.broadcast_to(call.grad_out, (2, 1, 20, 2)).copy(),
            grad_lse=np.broadcast_to(call.grad_lse, (2, 1, 20)).copy(),
        )
    # No polynomial of this rank is certified beforehand.
    with using(banded=((2, 2),), bands=2, most_recomputed=0.2, max_rank=6):
        got, _ = run(library, call, tol=0.3)
        query, keys, values = library.arrays(call.query, call.keys, call.values)
        masks = None if call.masks is None else library.arrays(call.masks)
        used = tattn.tensor_attention(query, keys, values, key_masks=masks, tol=0.3, return_plan=True)[1]
    assert 0 < used.recomputed <= 0.2
    truth = dense(call.query, call.keys, call.values, masks=call.masks, grad_out=call.grad_out, grad_lse=call.grad_lse)
    for head, row in enumerate((3, 10) if heads else (3,)):
        own = (head, 0, row) if heads else row
        assert np.abs(got.out[own] - truth.out[own]).max() < 1e-12
    assert_close(got, truth, 0.3)


@pytest.mark.thorough
@pytest.mark.usefixtures("bands_at_any_length")
def test_recomputed_rows_with_heads_masks_and_shared_keys(library: Any) -> None:
    not_compiled(library)
    call = heavy_tailed()
    heads = np.stack([call.query, np.roll(call.query, 7, axis=0)])[:, None]
    masks = [np.arange(300) % 5 > 0, None]
    wide = Call(
        heads,
        call.keys,
        call.values,
        masks,
        np.broadcast_to(call.grad_out, (2, 1, 300, 3)).copy(),
        np.zeros((2, 1, 300)),
    )
    got, _ = run(library, wide, tol=1e-3)
    truth = dense(wide.query, wide.keys, wide.values, masks=masks, grad_out=wide.grad_out)
    assert_close(got, truth, 1e-2)
    assert np.abs(got.out[1, 0, 7:11] - truth.out[1, 0, 7:11]).max() < 1e-12


@pytest.mark.usefixtures("bands_at_any_length")
@pytest.mark.libraries("torch")
def test_recomputed_rows_have_torch_gradients() -> None:
    torch = pytest.importorskip("torch")
    call = heavy_tailed()
    tensors = [torch.tensor(a, requires_grad=True) for a in (call.query, *call.keys, *call.values)]
    out, plan = tattn.tensor_attention(tensors[0], tensors[1:3], tensors[3:], return_plan=True)
    assert plan.recomputed > 0
    gradients = torch.autograd.grad((out * torch.tensor(call.grad_out)).sum(), tensors)
    _, pullback = tattn.tensor_attention_vjp(call.query, call.keys, call.values)
    dquery, dkeys, dvalues = pullback(call.grad_out)
    for a, b in zip(gradients, (dquery, *dkeys, *dvalues), strict=True):
        np.testing.assert_allclose(a.numpy(), b, rtol=1e-10, atol=1e-12)


def small_scores(n: int, spread: float) -> Call:
    """Scores far smaller than the largest norms allow for: a polynomial certified beforehand needs a higher degree."""
    rng = np.random.default_rng(3)
    query, *keys = rng.normal(size=(3, n, 8)) * spread
    return Call(query, keys, list(rng.normal(size=(2, n, 4))), None, rng.normal(size=(n, 4)), np.zeros(n))


@pytest.mark.usefixtures("bands_at_any_length")
def test_auto_prefers_bands_to_a_costlier_polynomial() -> None:
    call = small_scores(1000, 0.4)
    out, error, plan = tattn.tensor_attention(call.query, call.keys, call.values, return_error=True, return_plan=True)
    beforehand = tattn.plan(call.query, call.keys, call.values)
    assert beforehand.method == "polynomial"
    assert plan.series == "banded"
    assert plan.degree < beforehand.degree
    assert plan.flops_polynomial < beforehand.flops_polynomial
    assert (error <= 1e-3).all()
    truth = tattn.tensor_attention(call.query, call.keys, call.values, method="exact")
    assert (np.abs(out - truth) <= error[:, None] * value_sizes(call.values)).all()


def test_auto_leaves_bands_to_calls_that_are_long_enough() -> None:
    """The same call as before: sorting, certificates and a trial take longer than two degrees more."""
    call = small_scores(1000, 0.4)
    plan = tattn.tensor_attention(call.query, call.keys, call.values, return_plan=True)[1]
    assert plan == tattn.plan(call.query, call.keys, call.values)


@pytest.mark.usefixtures("bands_at_any_length")
def test_auto_goes_back_to_the_polynomial_where_samples_promised_too_much() -> None:
    """And the plan says what bands would have left: two rows of 600, which are not among the 256 that were looked at."""
    call = small_scores(600, 0.4)
    with using(banded=((2, 2),), bands=1), calls_of(sampled_errors) as seen:
        _, plan = tattn.tensor_attention(call.query, call.keys, call.values, tol=1e-5, return_plan=True)
    assert seen
    assert plan.series != "banded"
    assert "would leave 0.3% of the rows above tol" in plan.reason


def test_polynomial_with_loose_rows_says_how_loose() -> None:
    call = heavy_tailed()
    with pytest.raises(
        tattn.PlanError, match=r"degree \d in 8 norm bands leaves .*% of the rows above tol .*50%: .*100%"
    ):
        tattn.tensor_attention(30 * call.query, call.keys, call.values, method="polynomial")


def test_other_methods_return_their_stated_error(library: Any) -> None:
    call = draw(2)
    query, keys, values = library.arrays(call.query, call.keys, call.values)
    for method in ("exact", "polynomial"):
        _, error, plan = tattn.tensor_attention(query, keys, values, method=method, return_error=True, return_plan=True)
        np.testing.assert_allclose(library.numpy(error), plan.error)
        assert plan.error < (1e-12 if method == "exact" else 1e-3)
    estimated = tattn.plan(query, keys, values, bound="estimated", degree=2)
    _, error = tattn.tensor_attention(query, keys, values, plan=estimated, return_error=True)
    assert np.isinf(library.numpy(error)).all()


def test_bands_cover_the_rows() -> None:
    for n in (1, 2, 3, 7, 8, 9, 64, 1000):
        for bands in range(1, min(n, 16) + 1):
            cut = edges(n, bands)
            assert len(cut) == bands
            assert cut[0][0] == 0
            assert cut[-1][1] == n
            assert all(a[1] == b[0] for a, b in itertools.pairwise(cut))
            assert all(start < stop for start, stop in cut)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bands": 10}, "bands should be at most the rows of every view, 9, got 10"),
        ({"moment": 3}, "moment should be even, got 3"),
        ({"moment": 4, "degree": 3}, "moment should be at most the degree 3"),
        ({"degree": 300}, "degree should be at most 100, got 300"),
        ({"bound": 1.0}, "bound cannot be combined with series 'banded'"),
        ({"method": "exact"}, "series 'banded' belongs to the polynomial method"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    call = draw(2)._replace(keys=[np.ones((9, 3))] * 2, values=[np.ones((9, 5))] * 2)
    with pytest.raises(ValueError, match=message):
        tattn.plan(call.query, call.keys, call.values, series="banded", **options)


def test_a_plan_with_more_bands_than_rows_is_refused() -> None:
    call = draw(2)
    plan = tattn.plan_for(n=100, dim=3, series="banded", dtype="float64")
    with pytest.raises(tattn.PlanError, match="8 bands, more than the 6 rows"):
        tattn.tensor_attention(call.query, call.keys, call.values, plan=plan)


@pytest.mark.libraries("torch")
@pytest.mark.thorough
def test_torch_transformations() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    tensors = [
        torch.tensor(rng.uniform(-1, 1, s), requires_grad=True) for s in [(6, 3), (5, 3), (4, 3), (5, 2), (4, 2)]
    ]
    plan = tattn.plan_for(n=(6, 5, 4), dim=3, series="banded", degree=2, bands=2, dtype="float64")

    def of(q: Any, a: Any, b: Any, u: Any, v: Any) -> Any:
        return tattn.tensor_attention(q, [a, b], [u, v], plan=plan, return_error=True)

    assert torch.autograd.gradcheck(lambda *t: of(*t)[0], tensors)
    assert torch.autograd.gradgradcheck(lambda *t: of(*t)[0], tensors)
    plain = [t.detach() for t in tensors]
    stacked = [torch.stack([t, 0.5 * t]) for t in plain]
    for mapped, single in zip(torch.func.vmap(of)(*stacked), of(*plain), strict=True):
        torch.testing.assert_close(mapped[0], single, rtol=1e-12, atol=1e-13)
    torch._dynamo.reset()
    compiled = torch.compile(of, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*tensors), of(*tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    for a, b in zip(
        torch.autograd.grad(compiled(*tensors)[0].sum(), tensors),
        torch.autograd.grad(of(*tensors)[0].sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.libraries("jax")
@pytest.mark.thorough("jax")
def test_jax_transformations() -> None:
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(0)
    arrays = [jax.numpy.asarray(rng.uniform(-1, 1, s)) for s in [(6, 3), (5, 3), (4, 3), (5, 2), (4, 2)]]
    plan = tattn.plan_for(n=(6, 5, 4), dim=3, series="banded", degree=2, bands=2, dtype="float64")

    def of(q: Any, a: Any, b: Any, u: Any, v: Any) -> Any:
        return tattn.tensor_attention(q, [a, b], [u, v], plan=plan, return_error=True)

    def loss(*a: Any) -> Any:
        return of(*a)[0].sum()

    for a, b in zip(jax.jit(of)(*arrays), of(*arrays), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11)
    _, pullback = tattn.tensor_attention_vjp(arrays[0], arrays[1:3], arrays[3:], plan=plan)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(*arrays), pullback(jax.numpy.ones((6, 2)))[0], rtol=1e-10)
    stacked = [jax.numpy.stack([a, 0.5 * a]) for a in arrays]
    np.testing.assert_allclose(jax.vmap(jax.grad(loss))(*stacked)[0], jax.grad(loss)(*arrays), rtol=1e-10)


@pytest.mark.parametrize("moment", [2, 4])
def test_bounds_are_the_formulas_of_the_proofs(moment: int) -> None:
    """Error and all gradient bounds against docs/errors.md written out over all pairs."""
    rng = np.random.default_rng(6)
    q, a, b = (rng.normal(size=(n, 3)) for n in (8, 7, 6))
    u, v, g = (rng.normal(size=(n, 2)) for n in (7, 6, 8))
    g_lse, scale, t = rng.normal(size=8), 0.15, moment
    plan = tattn.plan(q, [a, b], [u, v], series="banded", degree=4, bands=2, moment=t, scale=scale)
    (out, lse, error), pullback = tattn.tensor_attention_vjp(
        q, [a, b], [u, v], plan=plan, return_lse=True, return_error=True
    )
    _, (of_query, of_keys, of_values) = pullback(g, g_lse, return_error=True)

    backend = backend_of(q)
    banding = Banding(4, t, 2, scale, 2)
    views = sorted_views(banding, Operands(backend, q, (View(a, u), View(b, v)), scale))
    series = Series.of(banding, views, q, backend)
    bands = []
    for view in views:
        n = len(view.rows)
        bands.append(np.empty(n, int))
        bands[-1][view.by.order[:, 0]] = np.repeat([0, 1], [stop - start for start, stop in edges(n, 2)])
    table = series.table[np.ix_(*bands)]  # of every triple (i, j, k)
    x = scale * np.einsum("ic,jc,kc->ijk", q, a, b)
    assert (np.abs(x) <= series.ranges[np.ix_(*bands)]).all()
    kappa, steep, growth = (table[..., 5 + kind] * x**t for kind in range(3))
    l = np.exp(lse) / 42
    top, key_top = np.abs(u).max(0) * np.abs(v).max(0), np.abs(a).max(0) * np.abs(b).max(0)

    def rms(y: np.ndarray, z: np.ndarray) -> np.ndarray:
        return np.sqrt((y**2).T @ z**2 / len(y))

    # The output.
    d = kappa.mean((1, 2)) / l
    d_e = np.einsum("ijk,je,ke->ie", kappa, np.abs(u), np.abs(v)) / 42 / l[:, None] / top
    own = np.minimum(1, (np.abs(out) / top + d_e) / (1 - d)[:, None])
    assert (d < 1).all()
    np.testing.assert_allclose(error, (d_e + d[:, None] * own).max(1), rtol=1e-6)
    # The query's gradient.
    e_prime, grown = np.sqrt(steep.mean((1, 2))) / l, growth.mean((1, 2)) ** (1 / t)
    weight, shift = np.abs(g) @ top, np.abs((g * out).sum(1) - g_lse)
    sigma, tau = rms(u, a) * rms(v, b), np.sqrt((a**2).mean(0) * (b**2).mean(0))
    near = (1 + grown) / (l * (1 - d))
    expected = (e_prime + d * near)[:, None] * (np.abs(g) @ sigma + shift[:, None] * tau)
    expected += (weight * error)[:, None] * np.minimum(key_top, near[:, None] * tau)
    np.testing.assert_allclose(of_query, scale * expected, rtol=5e-3)
    # Keys and values of both views: the second is the first with the views exchanged.
    g_top = np.abs(g).max(0)
    largest = (np.abs(g) / g_top).max(1)
    h = [largest / l, largest * d / (l * (1 - d)), shift / l, (shift * d + weight * error) / (l * (1 - d))]

    def power(y: np.ndarray, p: float) -> np.ndarray:
        return np.asarray(y) ** p

    for number, (axes, key, other, value, other_value) in enumerate([("ijk->j", a, b, u, v), ("ijk->k", b, a, v, u)]):
        n = len(key)
        others = len(other)

        def total(sums: np.ndarray, weights: np.ndarray, axes: str = axes, others: int = others) -> np.ndarray:
            return np.einsum(axes, weights[:, None, None] * sums)[:, None] / others

        def near_one(weights: np.ndarray, total: Any = total) -> np.ndarray:
            mass = weights.sum()
            return power(mass, 0.5) + power(mass, 0.5 - 1 / t) * power(total(growth, weights), 1 / t)

        value_bound = total(kappa, h[0]) * np.abs(other_value).max(0)
        value_bound = value_bound + near_one(h[1]) * np.sqrt(h[1].sum()) * np.sqrt((other_value**2).mean(0))
        np.testing.assert_allclose(of_values[number], g_top * value_bound / n, rtol=5e-3)
        spread = [np.sqrt(w @ q**2) for w in h]
        beside = np.sqrt(total(steep, h[0])) * spread[0] + near_one(h[1]) * spread[1]
        alone = np.sqrt(total(steep, h[2])) * spread[2] + near_one(h[3]) * spread[3]
        with_values = (np.abs(value) * g_top) @ rms(other_value, other)
        key_bound = beside * with_values + alone * np.sqrt((other**2).mean(0))
        np.testing.assert_allclose(of_keys[number], scale * key_bound / n, rtol=5e-3)


@pytest.mark.parametrize(("degree", "moment"), [(2, 2), (3, 2), (4, 4), (6, 4)])
def test_table_bounds_what_it_says(degree: int, moment: int) -> None:
    """κ, κ′² R^(t−2) and K^t of every range, on a fine grid of scores; nothing is promised beyond."""
    table = _grid_table(degree, moment)
    assert table.shape == (len(DEFAULT_GRID) + 1, degree + 4)
    assert (table[-1, -3:] >= 1e30).all()
    polynomials = [crowded(degree, moment, bound).coefficients for bound in DEFAULT_GRID]
    np.testing.assert_array_equal(table[:-1, : degree + 1], polynomials)
    for bound, row in zip(DEFAULT_GRID, table[:-1], strict=True):
        if row[-1] >= 1e30:
            assert bound > 16
            continue
        if bound < 0.5:
            continue  # rounding hides them here; the polynomials' own tests take more digits
        x = np.linspace(-bound, bound, 2001)
        x = x[np.abs(x) > 0.05 * bound]
        polynomial = np.polynomial.Polynomial(row[: degree + 1])
        kappa = np.max(np.abs(np.exp(x) - polynomial(x)) / np.abs(x) ** moment)
        steep = np.max(np.abs(np.exp(x) - polynomial.deriv()(x)) / np.abs(x) ** (moment - 1))
        growth = np.max(np.abs(np.expm1(x) / x))
        found = np.array([kappa, steep**2 * bound ** (moment - 2), growth**moment])
        rounding = 1e-15 * np.exp(bound) / np.array([0.05 * bound, 1.0, 1.0]) ** moment
        assert (found <= row[-3:] * (1 + 1e-9) + rounding).all()
        assert (row[-3:] <= 1.01 * found + rounding).all()


@pytest.mark.parametrize("method", ["polynomial", "exact", "banded"])
@pytest.mark.grid
def test_bounds_know_of_a_gradient_of_lse_alone(library: Any, method: str) -> None:
    call = draw(2)
    call = call._replace(grad_out=np.zeros_like(call.grad_out))
    query, keys, values = library.arrays(call.query, call.keys, call.values)
    options: dict[str, Any] = {"method": method, "tol": 0.1}
    if method == "banded":
        options = {"plan": tattn.plan(query, keys, values, series="banded", degree=2, bands=2)}
    _, pullback = tattn.tensor_attention_vjp(query, keys, values, **options)
    gradients, bounds = pullback(*library.arrays(call.grad_out, call.grad_lse), return_error=True)
    truth = dense(call.query, call.keys, call.values, grad_out=call.grad_out, grad_lse=call.grad_lse)
    for got, bound, true in zip(
        (gradients[0], *gradients[1]), (bounds[0], *bounds[1]), (truth.dquery, *truth.dkeys), strict=True
    ):
        assert (np.abs(library.numpy(got) - true) <= library.numpy(bound)).all()
        assert library.numpy(bound).max() < 1e3


@pytest.mark.parametrize(("levels", "n", "count"), [(1, 40, 6), (2, 40, 6), (5, 40, 6), (40, 40, 6), (300, 300, 256)])
@pytest.mark.grid
def test_bands_are_of_falling_norms(library: Any, levels: int, n: int, count: int) -> None:
    """However many rows are of one size: the largest of each band is not above that of a sort."""
    rng = np.random.default_rng(levels)
    q = rng.choice(np.linspace(0.5, 2, levels), (3, n, 1)) * np.array([1.0, -1.0, 1.0])
    q, a = library.arrays(q, rng.normal(size=(n, 3)))
    backend = backend_of(q)
    by = sorted_views(Banding(4, 2, count, 1.0, 1), Operands(backend, q, (View(a, a),), 1.0))[0].by
    size, order, norms = np.abs(library.numpy(q)).max(-1), library.numpy(by.order)[..., 0], library.numpy(by.norms)
    np.testing.assert_array_equal(np.sort(order, axis=-1), np.broadcast_to(np.arange(n), order.shape))
    falling = np.take_along_axis(size, order, axis=-1)
    tops = np.stack([falling[:, start:stop].max(-1) for start, stop in edges(n, count)], axis=-1)
    firsts = [start for start, _ in edges(n, count)]
    assert (tops <= -np.sort(-size, axis=-1)[:, firsts]).all()
    np.testing.assert_allclose(norms[..., 0] / norms[:, :1, 0], tops / tops[:, :1], rtol=1e-12)


@pytest.mark.thorough("jax")
def test_a_masked_key_has_no_gradient_even_where_rows_are_lost(library: Any) -> None:
    """Query rows whose normaliser loses its sign are NaN, and so are gradients, but not those of what takes no part."""
    rng = np.random.default_rng(0)
    q, a, b = rng.normal(size=(3, 20, 3)) * np.array([3, 1, 1])[:, None, None]
    u, v = rng.normal(size=(2, 20, 2))
    mask = np.arange(20) > 3
    query, keys, values = library.arrays(q, [a, b], [u, v])
    plan = tattn.plan(query, keys, values, series="banded", degree=3, bands=4, scale=1.0)
    out, pullback = tattn.tensor_attention_vjp(query, keys, values, plan=plan, key_masks=[library.array(mask), None])
    assert np.isnan(library.numpy(out)).any()
    _, dkeys, dvalues = pullback(out * 0 + 1)
    assert (library.numpy(dkeys[0])[~mask] == 0).all()
    assert (library.numpy(dvalues[0])[~mask] == 0).all()


@pytest.mark.parametrize("sizes", [(1e30, 1e30), (1e-25, 1e-25), (1e30, 1e-30, 1e30), (1e30, 1e-25, 1e-25)])
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
def test_nothing_is_promised_near_the_ends_of_the_range(sizes: tuple[float, ...]) -> None:
    """Values whose products leave float32, at the end or on the way."""
    rng = np.random.default_rng(0)
    views = len(sizes)
    query, *keys = (rng.normal(size=(20, 3)).astype("float32") for _ in range(views + 1))
    values = [(rng.normal(size=(20, 2)) * s).astype("float32") for s in sizes]
    plan = tattn.plan(0.5 * query, keys, values, series="banded", degree=3, bands=2)
    (_, error), pullback = tattn.tensor_attention_vjp(0.5 * query, keys, values, plan=plan, return_error=True)
    assert np.isinf(error).all()
    _, (dquery, dkeys, dvalues) = pullback(np.ones((20, 2), "float32"), return_error=True)
    for bound in (dquery, *dkeys, *dvalues):
        assert np.isinf(bound).all()


def test_bounds_of_gradients_near_the_ends_of_the_range() -> None:
    """A query so small that its squares vanish, with keys that make up for it."""
    rng = np.random.default_rng(0)
    q, a, b = (rng.normal(size=(20, 3)) for _ in range(3))
    u, v, g = (rng.normal(size=(20, 2)).astype("float32") for _ in range(3))
    query, keys = (q * 1e-25).astype("float32"), [(a * 1e12).astype("float32"), (b * 1e13).astype("float32")]
    plan = tattn.plan(query, keys, series="banded", degree=3, bands=2, scale=1.0)
    _, pullback = tattn.tensor_attention_vjp(query, keys, [u, v], plan=plan)
    _, (_, dkeys, _) = pullback(g, return_error=True)
    assert all(np.isinf(bound).all() for bound in dkeys)


@pytest.mark.parametrize("method", ["polynomial", "exact", "banded"])
@pytest.mark.grid
@pytest.mark.thorough("jax")
def test_masks_with_more_problems_than_their_keys(library: Any, method: str) -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 8, 2)), rng.normal(size=(7, 2)), rng.normal(size=(7, 2))
    masks = [rng.random((3, 7)) < 0.7 for _ in range(2)]
    query, keys, values = library.arrays(0.3 * q, [k, k], [v, v])
    options: dict[str, Any] = {"method": method}
    if method == "banded":
        options = {"plan": tattn.plan(query, keys, values, series="banded", degree=4, bands=2)}
    out, pullback = tattn.tensor_attention_vjp(query, keys, values, key_masks=library.arrays(masks), **options)
    truth = dense(0.3 * q, [k, k], [v, v], masks=masks, grad_out=np.ones((3, 8, 2)))
    np.testing.assert_allclose(library.numpy(out), truth.out, atol=1e-2)
    _, dkeys, _ = pullback(out * 0 + 1)
    np.testing.assert_allclose(library.numpy(dkeys[0]), truth.dkeys[0], atol=2e-2)


def test_a_scale_beyond_the_dtype_with_rows_that_make_up_for_it() -> None:
    rng = np.random.default_rng(0)
    q, a, b, u, v = (rng.normal(size=(20, 3)) for _ in range(5))
    plain = tattn.tensor_attention(q, [a, b], [u, v], scale=1.0, method="exact")
    small = [x.astype("float32") for x in (q * 1e8, a * 1e-23, b * 1e-23)]
    wide = tattn.tensor_attention(
        small[0], small[1:], [u.astype("float32"), v.astype("float32")], scale=1e38, method="exact"
    )
    np.testing.assert_allclose(wide, plain, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "sizes", "scale"),
    [
        ("float32", (1e-33, 1e-33, 1e36), 1e29),
        ("float32", (1e36, 1e-30, 1e-35), 1e28),
        ("float64", (1e-290, 1e-290, 1e300), 1e279),
    ],
)
@pytest.mark.grid
@pytest.mark.thorough("jax")
def test_views_that_differ_by_many_decades(library: Any, dtype: str, sizes: tuple[float, ...], scale: float) -> None:
    """Bounds as good as for rows of one size, though squares vanish or overflow: scores are made of products."""
    rng = np.random.default_rng(0)
    plain = rng.normal(size=(3, 60, 4))
    wide = [(x * size).astype(dtype) for x, size in zip(plain, sizes, strict=True)]
    values = [rng.normal(size=(60, 2)).astype(dtype) for _ in range(2)]
    alike = float(scale * np.prod(np.longdouble(sizes)))
    found = []
    for rows, factor in ((plain.astype(dtype), alike), (wide, scale)):
        query, keys, u = library.arrays(rows[0], list(rows[1:]), values)
        plan = tattn.plan(query, keys, u, series="banded", degree=3, bands=4, scale=factor)
        out, error = tattn.tensor_attention(query, keys, u, plan=plan, return_error=True)
        found.append((library.numpy(out), library.numpy(error)))
    truth = dense(wide[0], wide[1:], values, scale=scale, precision=np.longdouble)
    (_, expected), (out, error) = found
    assert (np.abs(out - truth.out) <= error[:, None] * value_sizes(values)).all()
    assert (error <= 2.5 * expected).all()


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
@pytest.mark.parametrize("size", [1e3, 1e6, 1e12])
@pytest.mark.grid
@pytest.mark.thorough("jax")
def test_nothing_is_promised_beyond_the_largest_range(library: Any, size: float) -> None:
    """There P itself, of a degree above the moment's, grows faster than what is to bound its error."""
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 20, 3)) * size
    given = library.arrays(query, [key], [rng.normal(size=(20, 2))])
    plan = tattn.plan(*given, series="banded", degree=5, bands=2, scale=1.0)
    (_, error), pullback = tattn.tensor_attention_vjp(*given, plan=plan, return_error=True)
    _, (dquery, dkeys, dvalues) = pullback(given[0][:, :2], return_error=True)
    assert all(np.isinf(library.numpy(bound)).all() for bound in (error, dquery, *dkeys, *dvalues))


@pytest.mark.parametrize("size", [1e-9, 1e-3, 0.3])
@pytest.mark.grid("jax")
def test_a_channel_of_ones_bounds_lse(library: Any, size: float) -> None:
    """With values of one in a channel of every view the bound of the output is at least twice that of the normaliser."""
    rng = np.random.default_rng(0)
    query, *keys = rng.normal(size=(3, 40, 3)) * size
    values = [np.concatenate([rng.normal(size=(40, 2)), np.ones((40, 1))], axis=1) for _ in range(2)]
    given = library.arrays(query, keys, values)
    plan = tattn.plan(*given, series="banded", degree=4, bands=3, scale=1.0)
    _, lse, error = tattn.tensor_attention(*given, plan=plan, return_lse=True, return_error=True)
    truth = dense(query, keys, values, scale=1.0, precision=np.longdouble)
    allowed = -np.log1p(-library.numpy(error) / 2) + 4 * np.finfo(float).eps * (1 + np.abs(truth.lse))
    assert (np.abs(library.numpy(lse) - truth.lse) <= allowed).all()


@pytest.mark.thorough("jax")
def test_a_query_row_with_a_tiny_gradient_has_a_bound(library: Any) -> None:
    """Products of such a gradient with the values vanish, and what is lost of them is bounded."""
    rng = np.random.default_rng(5)
    query, *keys = np.float32(rng.normal(size=(3, 40, 2)))
    values = list(np.float32(1e-5 * rng.normal(size=(2, 40, 3))))
    grad = np.float32(rng.normal(size=(40, 3)))
    grad[0], grad[1] = 1e-37, 0
    plan = tattn.plan_for(n=40, dim=2, series="banded", degree=4, bands=2, dtype="float32")
    query, keys, values, grad = library.arrays(query, keys, values, grad)
    _, pullback = tattn.tensor_attention_vjp(query, keys, values, plan=plan)
    _, (of_query, *_) = pullback(grad, return_error=True)
    bounds = library.numpy(of_query)
    assert (bounds[0] > 0).all() and (bounds[1] == 0).all() and np.isfinite(bounds[2:]).all()
