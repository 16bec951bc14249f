"""Complex channels, as pairs of real rows, against the definition: every method, order and library."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import COMPLEX, KINDS, Call, assert_close, complex_methods, draw, ratios, refuse, run, sample
from numpy.polynomial import Polynomial
from reference import Dense, as_complex, changed, dense, through_features
from watching import calls_of

import tattn
from tattn.backends.numpy import BACKEND
from tattn.features.complex_channels import Turn
from tattn.features.monomials import exponents, features
from tattn.features.pairs import Pairs, pair_weights
from tattn.methods.bands import level_sizes
from tattn.state import sums
from tattn.state.summary import call_of

orders = pytest.mark.parametrize("views", [1, 2, 3])


def expected(call: Call, plan: tattn.Plan) -> Dense:
    """The definition, with the plan's polynomial in place of exp if it has one."""
    given: Any = {"masks": call.masks, "causal": plan.causal, "window": plan.window, "channels": plan.channels}
    if plan.series not in (None, "banded"):
        polynomial = Polynomial(plan.coefficients)
        given |= {"function": polynomial, "derivative": polynomial.deriv()}
    return dense(call.query, call.keys, call.values, grad_out=call.grad_out, grad_lse=call.grad_lse, **given)


def triple_loop(q: np.ndarray, keys: list[np.ndarray], values: list[np.ndarray]) -> np.ndarray:
    """Output for two views, number by number."""
    out = np.zeros((len(q), values[0].shape[1]))
    z, a, b = (as_complex(x) for x in (q, *keys))
    for i in range(len(q)):
        total = 0.0
        for j in range(len(a)):
            for k in range(len(b)):
                score = sum((z[i, c] * a[j, c] * b[k, c]).real for c in range(z.shape[1])) / q.shape[1]
                total += np.exp(score)
                out[i] += np.exp(score) * values[0][j] * values[1][k]
        out[i] /= total
    return out


def test_the_score_is_the_real_part_of_products_of_complex_numbers() -> None:
    call = draw(2, dim=6)
    out = tattn.tensor_attention(call.query, call.keys, call.values, method="exact", channels="complex")
    np.testing.assert_allclose(out, triple_loop(call.query, call.keys, call.values), rtol=1e-13)


@orders
@complex_methods
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.grid
def test_every_method_is_its_definition(library: Any, method: str, views: int, masked: bool) -> None:
    """Output, lse and gradients; with masks and leading dimensions that broadcast, too."""
    call = draw(views, dim=6, masked=masked, broadcast=masked)
    plan = COMPLEX[method].plan(n=[x.shape[-2] for x in (call.query, *call.keys)], dim=6, order=views + 1)
    got, _ = run(library, call, plan=plan)
    # Norm bands have polynomials of their own, far closer to exp than this.
    assert_close(got, expected(call, plan), 2e-3 if method == "banded" else 1e-12)


@orders
@pytest.mark.parametrize("option", [{"method": "exact"}, {"degree": 4}, {"window": [3] * 3}], ids=str)
@pytest.mark.grid
def test_causal_calls(library: Any, views: int, option: dict[str, Any]) -> None:
    call = draw(views, dim=4)
    query, grad_out, grad_lse = call.query[:4], call.grad_out[:4], call.grad_lse[:4]
    call = call._replace(query=query, grad_out=grad_out, grad_lse=grad_lse)
    options = {**option, "window": option["window"][:views]} if "window" in option else option
    lengths = [x.shape[-2] for x in (query, *call.keys)]
    asked: Any = {"bound": 1.0, "dtype": "float64", "causal": True, "channels": "complex", **options}
    plan = tattn.plan_for(n=lengths, dim=4, order=views + 1, **asked)
    got, _ = run(library, call, plan=plan, causal=True, window=plan.window)
    assert_close(got, expected(call, plan), 1e-12)


@pytest.mark.parametrize("views", [2, 3])
def test_causal_calls_of_many_blocks(views: int) -> None:
    """Prefixes are carried from block to block, and back in the adjoint."""
    rng = np.random.default_rng(0)
    n = 60 if views == 2 else 24
    query, *keys = rng.uniform(-1, 1, (views + 1, n, 4))
    values = list(rng.normal(size=(views, n, 2)))
    call = Call(query, keys, values, None, rng.normal(size=(n, 2)), rng.normal(size=n))
    plan = tattn.plan(query, keys, values, degree=4, causal=True, channels="complex")
    with BACKEND.using(workspace=1 << 12):
        (out, lse), pullback = tattn.tensor_attention_vjp(query, keys, values, plan=plan, causal=True, return_lse=True)
        dquery, dkeys, dvalues = pullback(call.grad_out, call.grad_lse)
    assert_close(Dense(out, lse, dquery, list(dkeys), list(dvalues)), expected(call, plan), 1e-11)


@pytest.mark.parametrize("turn", [Turn(6, 4), Turn(2, 7), Turn(4, 3, (1, 2, 1, 2)), Turn(6, 4, level=4)], ids=str)
def test_monomials_of_complex_numbers(turn: Turn) -> None:
    """Each is z^α, one of every conjugate pair, and all blocks at once are what they are one by one."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(3, turn.dim))
    phi = features(rows.T, turn.degree, BACKEND, turn.grading)
    if turn.level is not None:
        phi = phi[-level_sizes(turn.dim, turn.level)[-1] :]
    found = turn.turned(phi, BACKEND)
    real, half = turn.real, (len(phi) + turn.real) // 2
    z = as_complex(rows)
    every = np.concatenate([z, z.conj()], axis=-1)
    alpha = exponents(turn.dim, turn.degree, turn.grading)[-len(phi) :]
    expected = np.prod(every[:, None, :] ** alpha, axis=-1).T
    own = np.concatenate([found[:real], found[real:half] + 1j * found[half:], found[real:half] - 1j * found[half:]])
    for x in (own, expected):
        x[...] = x[np.lexsort(np.concatenate([x.real, x.imag], axis=1).round(8).T)]
    np.testing.assert_allclose(own, expected, rtol=1e-12, atol=1e-12)
    # So many columns are turned one block at a time.
    wide = 10

    def several(x: np.ndarray) -> np.ndarray:
        return np.tile(x, (1, wide))

    with calls_of(Turn._whole) as seen:
        np.testing.assert_allclose(turn.turned(several(phi), BACKEND), several(found), rtol=1e-12, atol=1e-13)
        y = rng.normal(size=found.shape)
        apart = turn.turned_back(several(y), BACKEND)[:, : y.shape[1]]
        np.testing.assert_allclose(turn.turned_back(y, BACKEND), apart, rtol=1e-12, atol=1e-13)
    assert [call.result for call in seen] == [False, False, True]
    np.testing.assert_allclose((apart * phi).sum(), (y * found).sum(), rtol=1e-12)


@pytest.mark.parametrize(
    "pairs", [Pairs(Turn(*which)) for which in ((6, 4), (2, 7), (16, 2), (4, 3, (1, 2, 1, 2)), (8, 0))]
)
def test_complex_monomials_that_rows_make(pairs: Pairs) -> None:
    """Each is a channel or its conjugate times another, and they are the turned ones in another order."""
    turn, half = pairs.turn, pairs.half
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(3, turn.dim))
    z = as_complex(rows)
    every = np.concatenate([z, z.conj()], axis=-1).T
    made = np.ones((half, 3), dtype=complex)
    for channel, start, stop, source in pairs.runs:
        made[start:stop] = every[channel] * made[source : source + stop - start]
    phi = features(rows.T, turn.degree, BACKEND, turn.grading)
    found = pairs.turned(phi, BACKEND)
    np.testing.assert_allclose(found[:half] + 1j * found[half:], made, rtol=1e-12, atol=1e-12)
    assert len({tuple(row) for row in np.concatenate([made, made.conj()]).round(9)}) == len(phi)
    y = rng.normal(size=found.shape)
    np.testing.assert_allclose((pairs.turned_back(y, BACKEND) * phi).sum(), (y * found).sum(), rtol=1e-12)
    # All of them, weighted, are the polynomial of the real part.
    q, a, b = made.T
    coefficients = tuple(rng.normal(size=turn.degree + 1))
    if not turn.grading:
        w = pair_weights(coefficients, turn.dim, ())[:, 0]
        total = w[:half] @ (q.real * (a * b).real) + w[half:] @ (q.imag * (a * b).imag)
        np.testing.assert_allclose(total, Polynomial(coefficients)((z[0] * z[1] * z[2]).sum().real), rtol=1e-10)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_no_error_of_a_causal_call_exceeds_the_plan(
    kind: str, dtype: str, kernels: bool, draws: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:
        monkeypatch.setenv("TATTN_KERNELS", "0")
    precision = np.float64 if dtype == "float32" else np.longdouble
    for seed in draws(40):
        rng = np.random.default_rng(seed)
        views, bound = int(rng.integers(1, 4)), float(rng.choice([0.1, 0.5, 1.0, 2.0, 3.0]))
        drawn, scale = sample(kind, seed, views, bound, dtype, "complex")
        n = min(len(x) for x in (drawn.query, *drawn.keys))
        drawn = drawn._replace(query=drawn.query[:n], grad=drawn.grad[:n])
        asked: Any = {"degree": int(rng.integers(1, 9)), "scale": scale, "causal": True, "channels": "complex"}
        plan = tattn.plan(drawn.query, drawn.keys, drawn.values, **asked)
        if not np.isfinite(plan.error):
            continue
        out, pullback = tattn.tensor_attention_vjp(drawn.query, drawn.keys, drawn.values, plan=plan, causal=True)
        dquery, dkeys, dvalues = pullback(drawn.grad)
        given: Any = {"scale": scale, "grad_out": drawn.grad, "causal": True, "channels": "complex"}
        truth = dense(drawn.query, drawn.keys, drawn.values, precision=precision, **given)
        found = ratios(plan, drawn, Dense(out, out, dquery, list(dkeys), list(dvalues)), truth)
        assert max(found) <= 1, (seed, found, str(plan))


def kept(q: np.ndarray, a: np.ndarray, b: np.ndarray, plan: tattn.Plan) -> float:
    """What a pruned basis keeps of P of the score of three rows: products of what channels add, up to a weighted degree."""
    y = plan.scale * (as_complex(q) * as_complex(a) * as_complex(b)).real
    weights = plan.grading[: y.size]
    most, total = plan.degree * min(weights), 0.0
    # Σ_t c_t t! Π y_c^n_c / n_c! over Σ n_c = t, channel by channel.
    found = {(0, 0): 1.0}
    for one, weight in zip(y, weights, strict=True):
        wider: dict[tuple[int, int], float] = {}
        for (t, w), value in found.items():
            power = value
            for n in range(plan.degree - t + 1):
                power = power * one / n if n else power
                if w + n * weight <= most:
                    key = t + n, w + n * weight
                    wider[key] = wider.get(key, 0.0) + power
        found = wider
    factorial = np.cumprod([1.0, *range(1, plan.degree + 1)])
    for (t, _), value in found.items():
        total += plan.coefficients[t] * factorial[t] * value
    return total


def test_a_pruned_basis_keeps_what_it_says() -> None:
    rng = np.random.default_rng(1)
    sizes = np.tile([1.0, 0.04, 0.02, 0.03, 0.01, 0.02], 2)
    query, *keys = (rng.uniform(-1, 1, (n, 12)) * sizes for n in (3, 40, 30))
    values = [rng.normal(size=(len(k), 13)) for k in keys]
    asked: Any = {"scale": 0.7, "tol": 3e-3, "method": "polynomial", "channels": "complex", "gradients": False}
    plan = tattn.plan(query, keys, values, **asked)
    assert plan.grading, "the draw should be one that is pruned"
    assert plan.grading[:6] == plan.grading[6:]
    assert len(plan.sizes) == len(set(plan.grading))
    weights = np.array([[[kept(q, a, b, plan) for b in keys[1]] for a in keys[0]] for q in query])
    pairs = np.einsum("ijk,je,ke->ie", weights, *values) / weights.sum(axis=(1, 2))[:, None]
    out, pullback = tattn.tensor_attention_vjp(query, keys, values, plan=plan)
    np.testing.assert_allclose(out, pairs, rtol=1e-12, atol=1e-14)
    truth = dense(query, keys, values, scale=0.7, channels="complex")
    assert (np.abs(out - truth.out) <= plan.error * np.prod([np.abs(v).max(0) for v in values], 0)).all()
    grad = rng.normal(size=out.shape)
    _, dkeys, _ = pullback(grad)
    step = rng.normal(size=keys[0].shape)
    ahead, behind = (
        tattn.tensor_attention(
            query, [keys[0] + h * step, keys[1]], values, plan=changed(plan, source="promise", sizes=())
        )
        for h in (1e-6, -1e-6)
    )
    np.testing.assert_allclose((dkeys[0] * step).sum(), (grad * (ahead - behind)).sum() / 2e-6, rtol=1e-6)


@orders
@pytest.mark.grid
def test_summaries_and_decoding(library: Any, views: int) -> None:
    """Pieces that are added, a token after the other, and rows that continue a summary: one call."""
    call = draw(views, dim=4)
    n = 4
    query, keys, values = call.query[:n], [k[:n] for k in call.keys], [v[:n] for v in call.values]
    asked: Any = {"bound": 1.0, "degree": 3, "dtype": "float64", "channels": "complex"}
    plan = tattn.plan_for(n=n, dim=4, order=views + 1, **asked)
    q, ks, vs = library.arrays(query, keys, values)
    parts = [tattn.summarize([k[s, :] for k in ks], [v[s, :] for v in vs], plan) for s in (slice(0, 1), slice(1, n))]
    whole = tattn.tensor_attention(q, ks, vs, plan=through_features(plan))
    np.testing.assert_allclose(library.numpy((parts[0] + parts[1]).attend(q)), library.numpy(whole), rtol=1e-12)
    causal = dense(query, keys, values, causal=True, channels="complex", function=Polynomial(plan.coefficients))
    state = tattn.DecodingState(plan)
    for i in range(n):
        token = slice(i, i + 1)
        out, state = state.step(q[token, :], [k[token, :] for k in ks], [v[token, :] for v in vs])
        np.testing.assert_allclose(library.numpy(out), causal.out[token], rtol=1e-11, atol=1e-13)


@orders
def test_rows_that_continue_a_summary(views: int) -> None:
    """Causal, from the sums of the rows before, with the gradients of rows and sums."""
    call = draw(views, dim=4)
    query = call.query[:3]
    keys, values = [k[:5] for k in call.keys], [v[:5] for v in call.values]
    if views == 3:
        keys, values = [k[:4] for k in call.keys], [v[:4] for v in call.values]
    head = len(keys[0]) - 3
    plan = tattn.plan_for(n=9, dim=4, order=views + 1, bound=1.0, degree=3, dtype="float64", channels="complex")
    before, to_rows = tattn.summarize_vjp([k[:head] for k in keys], [v[:head] for v in values], plan)
    rows = (query, *(k[head:] for k in keys), *(v[head:] for v in values), *before.sums)
    of = call_of(plan)
    masks = (None,) * views
    out, _, normaliser = sums.read_causal(of, BACKEND, (*rows, *masks))
    polynomial = Polynomial(plan.coefficients)
    given: Any = {"causal": True, "function": polynomial, "derivative": polynomial.deriv(), "channels": "complex"}
    truth = dense(query, keys, values, grad_out=call.grad_out[:3], **given)
    np.testing.assert_allclose(out, truth.out, rtol=1e-11, atol=1e-13)
    columns = (out, normaliser, call.grad_out[:3], np.zeros((3, 1)))
    found = sums.read_causal_backward(of, BACKEND, (*rows, *masks, *columns))
    np.testing.assert_allclose(found[0], truth.dquery, rtol=1e-10, atol=1e-13)
    of_heads = to_rows(found[1 + 2 * views :])
    both = [np.concatenate(pair) for pair in zip((*of_heads[0], *of_heads[1]), found[1:], strict=False)]
    for got, want in zip(both, (*truth.dkeys, *truth.dvalues), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-13)


def test_gradients_of_a_summary() -> None:
    call = draw(2, dim=4)
    plan = tattn.plan_for(n=9, dim=4, bound=1.0, degree=3, dtype="float64", channels="complex")
    summary, to_rows = tattn.summarize_vjp(call.keys, call.values, plan)
    _, to_summary = summary.attend_vjp(call.query, return_lse=True)
    dquery, dsums = to_summary(call.grad_out, call.grad_lse)
    dkeys, dvalues = to_rows(dsums)
    truth = expected(call, plan)
    for got, want in zip((dquery, *dkeys, *dvalues), (truth.dquery, *truth.dkeys, *truth.dvalues), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-13)


def test_a_saved_summary_and_a_plan_as_facts_know_their_channels(tmp_path: Any) -> None:
    call = draw(2, dim=4)
    plan = tattn.plan_for(n=9, dim=4, bound=1.0, degree=3, dtype="float64", channels="complex")
    summary = tattn.summarize(call.keys, call.values, plan)
    summary.save(tmp_path / "summary.npz")
    again = tattn.Summary.load(tmp_path / "summary.npz")
    assert again.plan == plan
    assert again.plan.channels == "complex"
    assert (again.attend(call.query) == summary.attend(call.query)).all()
    real = tattn.summarize(call.keys, call.values, tattn.plan_for(n=9, dim=4, bound=1.0, degree=3, dtype="float64"))
    with pytest.raises(tattn.PlanError, match="channels complex and real"):
        summary + real


@pytest.mark.parametrize("degree", [1, 2, 5])
@pytest.mark.parametrize("dim", [2, 6])
def test_the_rank_is_that_of_as_many_real_channels(dim: int, degree: int) -> None:
    real, paired = (
        tattn.plan_for(n=100, dim=dim, bound=1.0, degree=degree, channels=channels) for channels in ("real", "complex")
    )
    assert paired.rank == real.rank


def test_a_bound_is_of_moduli() -> None:
    """The score reaches it where all numbers point one way, whatever the real and imaginary parts are."""
    rng = np.random.default_rng(0)
    turns = rng.uniform(0, 2 * np.pi, (2, 3))
    size = np.ones((1, 3))
    z, a = np.exp(1j * turns[0]) * size, np.exp(1j * turns[1]) * size
    b = np.exp(-1j * turns.sum(0)) * size
    query, *keys = (np.concatenate([x.real, x.imag], axis=-1) for x in (z, a, b))
    plan = tattn.plan(query, keys, method="exact", channels="complex", scale=0.5)
    assert 1.5 <= plan.bound <= 1.5 * 1.05
    truth = dense(query, keys, [np.ones((1, 1))] * 2, scale=0.5, channels="complex")
    np.testing.assert_allclose(truth.lse, 1.5)


def test_bounds_of_gradients_are_of_moduli() -> None:
    """What `Plan.grad_error` says, for real and imaginary parts alike."""
    call = draw(2, dim=4)
    plan = tattn.plan(call.query, call.keys, call.values, degree=4, channels="complex")
    _, pullback = tattn.tensor_attention_vjp(call.query, call.keys, call.values, plan=plan)
    _, (of_query, of_keys, _) = pullback(call.grad_out, return_error=True)
    query, *keys = (np.abs(as_complex(x)).max(axis=0) for x in (call.query, *call.keys))
    weight = np.abs(call.grad_out) @ np.prod([np.abs(v).max(axis=0) for v in call.values], axis=0)
    allowed = plan.grad_error * plan.scale * np.tile(keys[0] * keys[1], 2) * weight[:, None]
    np.testing.assert_allclose(of_query, allowed, rtol=0.01)
    assert (of_query >= allowed).all()
    allowed = plan.grad_error * plan.scale * np.tile(query * keys[1], 2) * weight.sum()
    np.testing.assert_allclose(of_keys[0], np.broadcast_to(allowed, of_keys[0].shape), rtol=0.01)


def test_an_estimated_plan() -> None:
    call = draw(2, dim=4)
    plan = tattn.plan(call.query, call.keys, call.values, bound="estimated", degree=4, channels="complex")
    out = tattn.tensor_attention(call.query, call.keys, call.values, plan=plan)
    truth = dense(call.query, call.keys, call.values, channels="complex")
    np.testing.assert_allclose(out, truth.out, atol=1e-3)
    largest, _ = tattn.measure_error(call.query, call.keys, call.values, out, channels="complex")
    assert largest < 1e-3


@pytest.mark.libraries("torch")
def test_torch_transformations() -> None:
    """Autograd, and one graph by torch.compile, which traces no further than the call."""
    import torch

    call = draw(2, dim=4)
    plan = tattn.plan_for(n=[9, 7, 6], dim=4, bound=1.0, degree=3, dtype="float64", channels="complex")
    arrays = [torch.tensor(x, requires_grad=True) for x in (call.query, *call.keys, *call.values)]

    def of(q: Any, a: Any, b: Any, u: Any, v: Any) -> Any:
        return tattn.tensor_attention(q, [a, b], [u, v], plan=plan)

    truth = expected(call._replace(grad_lse=np.zeros(9)), plan)
    for function in (of, torch.compile(of, fullgraph=True, backend="aot_eager")):
        out = function(*arrays)
        np.testing.assert_allclose(out.detach(), truth.out, rtol=1e-11, atol=1e-13)
        grads = torch.autograd.grad((out * torch.tensor(call.grad_out)).sum(), arrays)
        for got, want in zip(grads, (truth.dquery, *truth.dkeys, *truth.dvalues), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.libraries("jax")
def test_jax_transformations() -> None:
    import jax
    import jax.numpy as jnp

    call = draw(2, dim=4)
    plan = tattn.plan_for(n=[9, 7, 6], dim=4, bound=1.0, degree=3, dtype="float64", channels="complex")

    def loss(q: Any, a: Any, b: Any, u: Any, v: Any) -> Any:
        return (tattn.tensor_attention(q, [a, b], [u, v], plan=plan) * call.grad_out).sum()

    arrays = [jnp.asarray(x) for x in (call.query, *call.keys, *call.values)]
    truth = expected(call._replace(grad_lse=np.zeros(9)), plan)
    grads = jax.jit(jax.grad(loss, argnums=tuple(range(5))))(*arrays)
    for got, want in zip(grads, (truth.dquery, *truth.dkeys, *truth.dvalues), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.libraries("torch")
def test_narrow_dtypes_compute_in_float32(dtype: str) -> None:
    import torch

    call = draw(2, dim=4)
    narrow = [torch.tensor(x).to(getattr(torch, dtype)) for x in (call.query, *call.keys, *call.values)]
    out = tattn.tensor_attention(narrow[0], narrow[1:3], narrow[3:], method="exact", channels="complex")
    q, a, b, u, v = (x.double().numpy() for x in narrow)
    assert str(out.dtype) == f"torch.{dtype}"
    np.testing.assert_allclose(out.double(), dense(q, [a, b], [u, v], channels="complex").out, atol=4e-3)


def test_what_does_not_fit_is_refused() -> None:
    call = draw(2, dim=3)
    given = call.query, call.keys, call.values
    odd = "query's last dimension should be even for channels='complex'.*got 3"
    for function in (tattn.tensor_attention, tattn.tensor_attention_vjp, tattn.plan):
        refuse(function, ValueError, odd, *given, channels="complex")
        refuse(
            function,
            ValueError,
            "channels should be 'real' or 'complex', got 'quaternions'",
            *given,
            channels="quaternions",
        )
    refuse(tattn.plan_for, ValueError, "dim should be even", n=9, dim=3, bound=1.0, channels="complex")
    refuse(tattn.plan_for, ValueError, "channels should be", n=9, dim=4, bound=1.0, channels=2)
    call = draw(2, dim=4)
    given = call.query, call.keys, call.values
    refuse(tattn.measure_error, ValueError, "channels should be", *given, call.grad_out, channels=None)
    plan = tattn.plan_for(n=9, dim=4, bound=1.0, dtype="float64")
    hint = "got complex128: give real parts followed by imaginary parts, and channels='complex'"
    refuse(tattn.tensor_attention, TypeError, hint, as_complex(given[0]), [as_complex(k) for k in given[1]], given[2])
    made_for = "plan was made for channels real, the call has channels complex"
    refuse(tattn.tensor_attention, tattn.PlanError, made_for, *given, plan=plan, channels="complex")


@pytest.mark.libraries("torch")
def test_a_compiled_call_knows_its_channels() -> None:
    """What a compiler takes as one operator is told by its plan alone."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    query, a, b, u, v = (torch.tensor(x) for x in rng.uniform(-1, 1, (5, 30, 6)))
    plan = tattn.plan_for(n=30, dim=6, bound=2.0, degree=4, dtype="float64", channels="complex")

    def attend(query: Any) -> Any:
        return tattn.tensor_attention(query, [a, b], [u, v], plan=plan)

    found, expected = [], attend(query)
    for backend in ("eager", "aot_eager"):
        leaf = query.clone().requires_grad_()
        out = torch.compile(attend, fullgraph=True, backend=backend)(leaf)
        found.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
    leaf = query.clone().requires_grad_()
    (grad,) = torch.autograd.grad(attend(leaf).square().sum(), leaf)
    for out, of_query in found:
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(of_query, grad, rtol=1e-10, atol=1e-12)
