"""Output, lse and all gradients against the dense definition, on every library, by both methods."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import CASES, METHODS, Call, assert_close, draw, methods, run
from numpy.polynomial.polynomial import polyder, polyval
from reference import dense, through_features, value_sizes

import tattn
from tattn.backends import backend_of
from tattn.checks import checked_inputs
from tattn.methods import backward, forward
from tattn.planning.choice import work_of


@pytest.mark.parametrize("case", CASES)
@pytest.mark.grid
def test_exact_is_the_definition(library: Any, case: dict[str, Any]) -> None:
    call = draw(**case, size=3.0)
    got, _ = run(library, call, method="exact")
    expected = dense(
        call.query, call.keys, call.values, masks=call.masks, grad_out=call.grad_out, grad_lse=call.grad_lse
    )
    assert_close(got, expected, 1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.grid
def test_polynomial_is_the_definition_with_its_polynomial(library: Any, case: dict[str, Any]) -> None:
    """Forward and adjoint of the polynomial method are exactly those of softmax with P in place of exp."""
    call = draw(**case)
    plan = tattn.plan_for(n=9, dim=3, order=case["views"] + 1, bound=1.0, degree=4, dtype="float64")
    plan = through_features(plan)
    got, _ = run(library, call, plan=plan)
    p = plan.coefficients
    expected = dense(
        call.query, call.keys, call.values, masks=call.masks, grad_out=call.grad_out, grad_lse=call.grad_lse,
        function=lambda x: polyval(x, p), derivative=lambda x: polyval(x, polyder(p)),
    )  # fmt: skip
    assert_close(got, expected, 1e-12)


@pytest.mark.parametrize("method", ["exact", "polynomial"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_auto_dtype_device_and_library_are_kept(library: Any, dtype: str, method: str) -> None:
    call = draw(2)
    query, keys, values = library.arrays(
        call.query.astype(dtype), [k.astype(dtype) for k in call.keys], [v.astype(dtype) for v in call.values]
    )
    out, lse = tattn.tensor_attention(query, keys, values, tol=1e-2, method=method, return_lse=True)
    for got in (out, lse):
        assert library.is_array(got)
        assert got.dtype == query.dtype
        assert library.device(got) == library.device(query)
    assert tuple(lse.shape) == (9,)
    expected = dense(call.query, call.keys, call.values)
    np.testing.assert_allclose(library.numpy(out), expected.out, atol=2e-2 if method == "polynomial" else 1e-5)


@pytest.mark.thorough("jax")
def test_inputs_are_left_alone(library: Any) -> None:
    """NumPy's inputs are read-only here; the others are compared with what they were."""
    call = draw(2, masked=True)
    query, keys, values = library.arrays(call.query, call.keys, call.values)
    masks = library.arrays(call.masks)
    for method in ("exact", "polynomial"):
        _, pullback = tattn.tensor_attention_vjp(query, keys, values, key_masks=masks, method=method, tol=1e-2)
        pullback(library.array(call.grad_out))
    for a, b in zip((query, *keys, *values), (call.query, *call.keys, *call.values), strict=True):
        assert np.array_equal(library.numpy(a), b)


@pytest.mark.thorough("strict", "torch", "jax")
def test_blocks_and_chains_are_joined(library: Any) -> None:
    """More rows than a block and than a chain, a remainder in both; more monomials than a chain."""
    rng = np.random.default_rng(1)
    lengths = (1100, 600, 20)
    query, *keys = [rng.uniform(-1, 1, (n, 6)) for n in lengths]
    values = [rng.normal(size=(n, 2)) for n in lengths[1:]]
    grad = rng.normal(size=(1100, 2))
    plan = tattn.plan_for(n=1100, dim=6, bound=1.0, degree=5, dtype="float64")
    assert plan.rank > 256
    expected = dense(query, keys, values, grad_out=grad, function=lambda x: polyval(x, plan.coefficients),
                     derivative=lambda x: polyval(x, polyder(plan.coefficients)))  # fmt: skip
    call = Call(query, keys, values, None, grad, np.zeros(1100))
    got, _ = run(library, call, plan=plan)
    assert_close(got, expected, 1e-11)
    query, keys, values, grad = query[:200], [keys[0][:150], keys[1]], [values[0][:150], values[1]], grad[:200]
    got, _ = run(library, Call(query, keys, values, None, grad, np.zeros(200)), method="exact")
    assert_close(got, dense(query, keys, values, grad_out=grad), 1e-11)


@pytest.mark.parametrize("method", ["exact", "polynomial"])
@pytest.mark.grid
def test_many_problems_are_taken_in_parts(library: Any, method: str) -> None:
    """Computed one after another or side by side, heads give the same; shared keys collect their gradients."""
    call = draw(2, masked=True, broadcast=True)
    options = {"method": method, "tol": 1e-6} if method == "exact" else {
        "plan": through_features(tattn.plan_for(n=9, dim=3, bound=1.0, degree=3, dtype="float64"))
    }  # fmt: skip
    together, _ = run(library, call, **options)
    # Two problems would have no room; the scores of one, about.
    with library.backend.using(workspace=1, cache=3000):
        apart, _ = run(library, call, **options)
    assert_close(apart, together, 1e-13)


@pytest.mark.parametrize("views", [1, 2, 3])
@methods
def test_gradients_are_finite_differences(views: int, method: str) -> None:
    call = draw(views, masked=True)
    plan = METHODS[method].plan(n=9, dim=3, order=views + 1)

    def loss(arrays: list[np.ndarray]) -> float:
        out, lse = tattn.tensor_attention(
            arrays[0], arrays[1 : views + 1], arrays[views + 1 :], plan=plan, key_masks=call.masks, return_lse=True
        )
        return float((out * call.grad_out).sum() + (lse * call.grad_lse).sum())

    arrays = [call.query, *call.keys, *call.values]
    _, pullback = tattn.tensor_attention_vjp(call.query, call.keys, call.values, plan=plan, key_masks=call.masks)
    dquery, dkeys, dvalues = pullback(call.grad_out, call.grad_lse)
    rng = np.random.default_rng(2)
    for i, gradient in enumerate((dquery, *dkeys, *dvalues)):
        direction = rng.normal(size=gradient.shape)
        step = 1e-5
        ahead, behind = (
            [a + (j == i) * sign * step * direction if j == i else a for j, a in enumerate(arrays)] for sign in (1, -1)
        )
        np.testing.assert_allclose(
            (loss(ahead) - loss(behind)) / (2 * step), (gradient * direction).sum(), rtol=1e-7, atol=1e-8
        )


@pytest.mark.parametrize("method", ["exact", "polynomial"])
@pytest.mark.grid
def test_masked_rows_do_not_matter_whatever_they_hold(library: Any, method: str) -> None:
    call = draw(2, masked=True)
    keys, values = [k.copy() for k in call.keys], [v.copy() for v in call.values]
    for x in (keys[0], values[0]):
        x[~call.masks[0]] = 1e30
    plan = tattn.plan_for(n=9, dim=3, bound=1.0, degree=4, dtype="float64") if method == "polynomial" else None
    plan = plan and through_features(plan)
    expected, _ = run(library, call, method=method, plan=plan)
    got, _ = run(library, call._replace(keys=keys, values=values), method=method, plan=plan)
    assert_close(got, expected, 1e-14)
    # A mask counts for the range, too: without it these keys would be beyond any degree.
    planned = tattn.plan(*library.arrays(call.query, keys), key_masks=library.arrays(call.masks), tol=1e-2)
    assert planned.bound < 10


@pytest.mark.parametrize("method", ["exact", "polynomial"])
def test_one_mask_serves_all_views(library: Any, method: str) -> None:
    query, *views = library.arrays(*np.random.default_rng(0).uniform(-1, 1, (5, 12, 3)))
    (mask,) = library.arrays([np.arange(12) % 3 > 0])
    options = {"method": method, "tol": 1e-2}
    one, each = (
        tattn.tensor_attention(query, views[:2], views[2:], key_masks=masks, **options)
        for masks in (mask, [mask, mask])
    )
    assert np.array_equal(library.numpy(one), library.numpy(each))
    assert tattn.plan(query, views[:2], key_masks=mask, **options) == tattn.plan(
        query, views[:2], key_masks=[mask] * 2, **options
    )
    plan = tattn.plan_for(n=12, dim=3, bound=1.0, degree=3, dtype="float64")
    counts = tattn.summarize(views[:2], views[2:], plan, key_masks=mask).counts
    assert [float(count) for count in counts] == [8.0, 8.0]


@pytest.mark.parametrize("method", ["exact", "polynomial"])
@pytest.mark.grid
def test_nothing_to_attend_to_gives_zeros(library: Any, method: str) -> None:
    call = draw(2)
    masks = [np.zeros(k.shape[0], bool) for k in call.keys]
    got, _ = run(library, call._replace(masks=masks), method=method, tol=1e-2)
    assert (got.lse == -np.inf).all()
    for a in (got.out, got.dquery, *got.dkeys, *got.dvalues):
        assert (a == 0).all()


def test_exact_takes_any_finite_input(library: Any) -> None:
    """Scores of ±10⁴ neither overflow nor give NaN."""
    call = draw(2, size=30.0)
    got, _ = run(library, call, method="exact", scale=0.5)
    expected = dense(call.query, call.keys, call.values, scale=0.5, grad_out=call.grad_out, grad_lse=call.grad_lse)
    assert_close(got, expected, 1e-9)


def test_scores_beyond_a_promise_are_not_silent() -> None:
    """A polynomial of odd degree turns negative there: NaN, not a number that looks right."""
    query, keys, values = np.full((3, 2), -6.0), [np.full((4, 2), 3.0)] * 2, [np.ones((4, 2))] * 2
    plan = tattn.plan_for(n=4, dim=2, bound=0.5, degree=3, dtype="float64")
    out, lse = tattn.tensor_attention(query, keys, values, plan=plan, return_lse=True)
    assert np.isnan(out).all()
    assert np.isnan(lse).all()


@pytest.mark.parametrize("method", ["exact", "polynomial"])
def test_narrow_dtypes_compute_in_float32(method: str) -> None:
    """The error is at most twice that of rounding inputs and output to the narrow dtype."""
    call = draw(2)
    query, *rest = [a.astype(np.float16) for a in (call.query, *call.keys, *call.values)]
    out, pullback = tattn.tensor_attention_vjp(query, rest[:2], rest[2:], method=method, tol=1e-3)
    dquery, _, _ = pullback(call.grad_out.astype(np.float16))
    assert out.dtype == dquery.dtype == np.float16
    expected = dense(query, rest[:2], rest[2:], grad_out=call.grad_out.astype(np.float16))
    rounded = np.abs(expected.out.astype(np.float16) - expected.out).max()
    assert np.abs(out - expected.out).max() <= 2 * rounded + 1e-3
    assert np.abs(dquery - expected.dquery).max() <= 2e-3 * np.abs(expected.dquery).max() + 1e-3


def test_huge_and_tiny_channels_neither_overflow_nor_vanish() -> None:
    """float32 monomials of 1e12 and of 1e-12 that multiply to ordinary scores."""
    rng = np.random.default_rng(3)
    query, *keys = rng.uniform(-1, 1, (3, 40, 3)).astype(np.float32)
    values = list(rng.normal(size=(2, 40, 2)).astype(np.float32))
    factors = np.float32([1e12, 1e-12, 1e3])
    grown = [query * factors, keys[0] / factors, keys[1]]
    plan = tattn.plan(query, keys, values, method="polynomial")
    expected, pullback = tattn.tensor_attention_vjp(query, keys, values, plan=plan)
    out, grown_pullback = tattn.tensor_attention_vjp(grown[0], grown[1:], values, tol=1e-3, method="polynomial")
    np.testing.assert_allclose(out, expected, atol=1e-5)
    grad = rng.normal(size=out.shape).astype(np.float32)
    np.testing.assert_allclose(grown_pullback(grad)[0] * factors, pullback(grad)[0], atol=1e-3)


def test_a_channel_that_is_zero_still_has_a_gradient() -> None:
    call = draw(2)
    keys = [call.keys[0] * [0.0, 1.0, 1.0], call.keys[1]]
    plan = through_features(tattn.plan_for(n=9, dim=3, bound=1.0, tol=1e-9, dtype="float64", method="polynomial"))
    _, pullback = tattn.tensor_attention_vjp(call.query, keys, call.values, plan=plan)
    expected = dense(call.query, keys, call.values, grad_out=call.grad_out)
    got = pullback(call.grad_out)[1][0]
    assert np.abs(expected.dkeys[0][:, 0]).max() > 1e-3
    np.testing.assert_allclose(got, expected.dkeys[0], atol=1e-8)


@pytest.mark.parametrize(("size", "key_size"), [(0.0, 1e-20), (1e-33, 1.0)])
@pytest.mark.parametrize("value_dim", [4, 20])
@pytest.mark.grid
def test_a_channel_that_the_query_lacks_gives_keys_no_gradient(
    library: Any, size: float, key_size: float, value_dim: int
) -> None:
    rng = np.random.default_rng(0)
    query, *keys = rng.uniform(-1, 1, (3, 60, 4)).astype(np.float32)
    *values, grad = rng.normal(size=(3, 60, value_dim)).astype(np.float32)
    query[:, 1] *= np.float32(size)
    keys[0][:, 1] *= np.float32(key_size)
    plan = tattn.plan_for(n=60, dim=4, bound=1.0, tol=1e-4, value_dim=value_dim, method="polynomial")
    given = [library.array(x) for x in (query, *keys, *values, grad)]
    _, pullback = tattn.tensor_attention_vjp(given[0], given[1:3], given[3:5], plan=plan)
    _, dkeys, _ = pullback(given[5])
    expected = dense(query.astype(np.float64), [k.astype(np.float64) for k in keys], values, grad_out=grad)
    for got, wanted in zip(dkeys, expected.dkeys, strict=True):
        found = library.numpy(got)[:, 1]
        np.testing.assert_allclose(found, wanted[:, 1], rtol=1e-2, atol=1e-2 * np.abs(wanted[:, 1]).max())


@pytest.mark.libraries("torch")
def test_shared_narrow_gradients_are_summed_in_float32() -> None:
    """bfloat16 counts to 256: thousands of heads that share keys are added up before the result is narrowed."""
    torch = pytest.importorskip("torch")
    query = torch.zeros(4096, 4, 2, dtype=torch.bfloat16)
    keys = [torch.zeros(4, 2, dtype=torch.bfloat16)] * 3
    values = [torch.full((4, 2), 0.5, dtype=torch.bfloat16)] * 3
    out, pullback = tattn.tensor_attention_vjp(query, keys, values, method="exact")
    _, _, dvalues = pullback(torch.ones_like(out))
    assert (dvalues[0] == 4096 * 4 * 0.25 / 4).all()


def test_heads_of_different_channel_sizes_stay_apart() -> None:
    """What is large in one head is small in the other; each keeps its own arithmetic in range."""
    rng = np.random.default_rng(0)
    grown = np.float32([[1e4, 1e-4, 1], [1e-4, 1e4, 1]])[:, None]
    plain = rng.uniform(-1, 1, (3, 2, 30, 3)).astype(np.float32)
    values = list(rng.normal(size=(2, 2, 30, 2)).astype(np.float32))
    query, keys = plain[0] * grown, [plain[1] / grown, plain[2]]
    out, plan = tattn.tensor_attention(query, keys, values, method="polynomial", tol=1e-2, return_plan=True)
    difference = np.abs(out - dense(query, keys, values).out)
    assert (difference <= plan.error * value_sizes(values)).all()


@pytest.mark.parametrize("method", ["exact", "polynomial"])
@pytest.mark.parametrize("n", [9, 5000])
def test_the_output_may_be_written_to(method: str, n: int) -> None:
    plan = through_features(tattn.plan_for(n=n, dim=3, bound=1.0, degree=2, dtype="float64"))
    out = tattn.tensor_attention(np.zeros((n, 3)), [np.zeros((2, 3))] * 2, [np.ones((2, 2))] * 2,
                                 **({"plan": plan} if method == "polynomial" else {"method": method}))  # fmt: skip
    out += 1
    assert (out == 2).all()


@pytest.mark.parametrize(("sizes", "views"), [((1e20, 1e19, 1e-38), 2), ((1e-23, 1e-23, 1e23, 1e23), 3)])
def test_products_of_rows_neither_overflow_nor_vanish(sizes: tuple[float, ...], views: int) -> None:
    """float32 rows whose scores are ordinary and whose partial products are not, by both methods; the range is right."""
    rng = np.random.default_rng(0)
    plain = [rng.uniform(0.5, 1, (6, 2)) for _ in sizes]
    query, *keys = [(p * s).astype(np.float32) for p, s in zip(plain, sizes, strict=True)]
    values = [rng.normal(size=(6, 2)).astype(np.float32) for _ in range(views)]
    truth = dense(query, keys, values)
    for options in ({"method": "exact"}, {"method": "polynomial", "tol": 0.5}):
        plan = tattn.plan(query, keys, values, **options)
        out, pullback = tattn.tensor_attention_vjp(query, keys, values, plan=plan)
        assert (np.abs(out - truth.out) <= plan.error * value_sizes(values)).all()
        assert np.isfinite(pullback(out)[0]).all()


def test_scores_beyond_the_dtype_are_not_taken_for_masked() -> None:
    query, keys = np.full((3, 2), 1e25, np.float32), [np.full((4, 2), -1e25, np.float32)]
    plan = tattn.plan_for(n=4, dim=2, order=2, bound=1.0, method="exact")
    out, lse = tattn.tensor_attention(query, keys, [np.ones((4, 2), np.float32)], plan=plan, return_lse=True)
    assert not np.isfinite(out).any()
    assert np.isnan(lse).all()


@pytest.mark.libraries("torch")
def test_torch_tables_survive_modes() -> None:
    """A first call in inference mode leaves nothing behind that autograd cannot take."""
    torch = pytest.importorskip("torch")
    arrays = [torch.rand(7, 5, dtype=torch.float64) for _ in range(5)]
    plan = through_features(tattn.plan_for(n=7, dim=5, bound=1.5, degree=3, dtype="float64", scale=0.3))
    with torch.inference_mode():
        tattn.tensor_attention(arrays[0], arrays[1:3], arrays[3:], plan=plan)
    arrays[0].requires_grad_()
    tattn.tensor_attention(arrays[0], arrays[1:3], arrays[3:], plan=plan).sum().backward()
    assert arrays[0].grad is not None


@pytest.mark.parametrize("series", ["minimax", "banded"])
def test_little_is_kept_for_the_adjoint(series: str) -> None:
    """No more than inputs are, however many problems; gradients are the same with and without."""
    plan = tattn.plan_for(n=8, dim=4, degree=3, dtype="float64", series=series, bound=None if series == "banded" else 1.0,
                          **({"bands": 2} if series == "banded" else {}))  # fmt: skip
    rng = np.random.default_rng(0)
    for n, some in ((8, False), (2000, True)):
        query, a, b, g = rng.uniform(-1, 1, (4, 2, n, 4))
        arrays = (query, a, b, a, b, None, None)
        work = work_of(checked_inputs(query, [a, b], [a, b], None), plan)
        out, lse, rest, *kept = forward(work.call, backend_of(query), arrays)
        assert bool(kept) == some
        assert sum(x.size for x in kept) <= 5 * query.size
        residuals = ((out, rest, *kept, g, 0 * lse), (out, rest, g, 0 * lse))
        with_it, without = (backward(work.call, backend_of(query), (*arrays, *r)) for r in residuals)
        for one, other in zip(with_it, without, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.grid
@pytest.mark.parametrize(
    ("made", "causal"),
    [
        ({"method": "exact", "bound": 4.0}, False),
        ({"method": "exact", "bound": 4.0}, True),
        ({"degree": 4, "bound": 4.0}, False),
        ({"degree": 4, "bound": 4.0}, True),
        ({"degree": 2, "series": "banded"}, False),
    ],
    ids=str,
)
def test_rows_that_are_nan_state_no_error(library: Any, made: dict[str, Any], causal: bool) -> None:
    """A row of the query spoils its own output alone. Its error is infinite, and so are bounds of the gradients that see it."""
    rng = np.random.default_rng(0)
    query, *rows = rng.uniform(-1, 1, (5, 12, 4))
    query[5] = np.nan
    query, *rows = library.arrays(query, *rows)
    plan = tattn.plan_for(n=12, dim=4, dtype="float64", causal=causal, **made)
    given: Any = {"plan": plan, "causal": causal, "return_error": True}
    (out, error), pullback = tattn.tensor_attention_vjp(query, rows[:2], rows[2:], **given)
    spoiled = np.isnan(library.numpy(out)).all(axis=-1)
    assert spoiled.tolist() == [i == 5 for i in range(12)]
    np.testing.assert_array_equal(np.isinf(library.numpy(error)), spoiled)
    grads, bounds = pullback(out * 0 + 1, return_error=True)
    for grad, bound in zip((grads[0], *grads[1], *grads[2]), (bounds[0], *bounds[1], *bounds[2]), strict=True):
        lost = ~np.isfinite(library.numpy(grad))
        assert lost.any()
        assert (library.numpy(bound)[lost] == np.inf).all()


def test_a_plan_of_the_exact_method_states_the_rounding_of_the_call() -> None:
    """That of sums over more rows than it was made for; it holds for fewer."""
    rng = np.random.default_rng(0)
    query, *rows = rng.uniform(-1, 1, (5, 3000, 2)).astype(np.float32)
    short, long = (tattn.plan_for(n=(5, n, n), dim=2, bound=1.0, method="exact") for n in (5, 3000))
    given: Any = {"return_error": True, "return_plan": True}
    _, error, returned = tattn.tensor_attention(query[:5], rows[:2], rows[2:], plan=short, **given)
    assert error.min() == error.max() == pytest.approx(long.error)
    assert long.error > 1.2 * short.error
    assert (returned.error, returned.grad_error, returned.lengths) == (long.error, long.grad_error, long.lengths)
    few = [x[:5] for x in rows]
    _, error, returned = tattn.tensor_attention(query[:5], few[:2], few[2:], plan=long, **given)
    assert error.max() == pytest.approx(long.error)
    assert returned == long
