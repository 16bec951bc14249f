"""Tokens that come several in a call: the numbers of one after another, and of the causal call."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import tattn

N, DIM, COLUMNS = 13, 4, 3
# Where calls begin and end; the first has no state before it.
PARTS = ((0, 5), (5, 6), (6, 11), (11, 13))
COUNTED = ("plain", "masks", "masks, weights and decay")


def plan_of(views: int, n: int = N, **options: Any) -> tattn.Plan:
    given = {"bound": 1.0, "degree": 3, "dtype": "float64", "causal": True} | options
    return tattn.plan_for(n=n, dim=DIM, order=views + 1, **given)


def drawn(views: int, counted: str, leading: tuple[int, ...] = (2,), n: int = N) -> tuple[Any, dict[str, Any]]:
    """Query, keys and values, and what counts of them; a stream that starts with padding, and one that ends."""
    rng = np.random.default_rng(0)
    rows = [rng.uniform(-1, 1, (*leading, n, DIM)) for _ in range(views + 1)]
    values = [rng.normal(size=(*leading, n, COLUMNS)) for _ in range(views)]
    found: dict[str, Any] = {}
    if counted != "plain":
        mask = np.ones((*leading, n), bool)
        mask[0, :3], mask[-1, -5:] = False, False
        found["key_masks"] = [mask, *[None] * (views - 1)]
    if counted == COUNTED[2]:
        found["key_weights"] = [*[None] * (views - 1), rng.uniform(0.5, 2, (*leading, n))]
        found["decay"] = [rng.uniform(0.5, 1, leading), *[0.9] * (views - 1)]
    return (rows[0], rows[1:], values), found


def part_of(call: Any, counted: dict[str, Any], start: int, stop: int) -> tuple[Any, dict[str, Any]]:
    """Some rows of a call."""

    def cut(x: Any) -> Any:
        return x[..., start:stop, :]

    query, keys, values = call
    of_rows = {
        name: [None if x is None else x[..., start:stop] for x in given] if name != "decay" else given
        for name, given in counted.items()
    }
    return (cut(query), [cut(k) for k in keys], [cut(v) for v in values]), of_rows


def streamed(plan: tattn.Plan, call: Any, counted: dict[str, Any], parts: Any) -> tuple[list[Any], list[Any], Any]:
    """Outputs and lse of parts, and the last state."""
    state, outs, lses = tattn.DecodingState(plan), [], []
    for part in parts:
        rows, of_rows = part_of(call, counted, *part)
        (out, lse), state = state.step(*rows, return_lse=True, **of_rows)
        outs.append(out)
        lses.append(lse)
    return outs, lses, state


def moved(library: Any, call: Any, counted: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The same in a library."""
    arrays = {
        name: [library.arrays(x) if isinstance(x, np.ndarray) else x for x in given] for name, given in counted.items()
    }
    return library.arrays(*call), arrays


def close(got: Any, like: Any, **tolerances: float) -> None:
    np.testing.assert_allclose(got, like, **{"rtol": 1e-11, "atol": 1e-12} | tolerances)


@pytest.mark.parametrize("counted", COUNTED)
@pytest.mark.parametrize("channels", ["real", "complex"])
@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.grid
def test_many_tokens_are_the_causal_call(library: Any, views: int, channels: str, counted: str) -> None:
    plan = plan_of(views, channels=channels)
    call, of_rows = drawn(views, counted)
    query, keys, values = call
    expected = tattn.tensor_attention(query, keys, values, plan=plan, causal=True, return_lse=True, **of_rows)
    outs, lses, state = streamed(plan, *moved(library, call, of_rows), PARTS)
    # Rows that see their own masked key alone have −inf.
    for got, like, axis in ((outs, expected[0], -2), (lses, expected[1], -1)):
        assert all(type(x) is type(outs[0]) for x in got)
        close(np.concatenate([library.numpy(x) for x in got], axis=axis), like)
    whole = tattn.summarize(keys, values, plan, **of_rows)
    for name in ("sums", "rests"):
        for got, like in zip(getattr(state.summary, name), getattr(whole, name), strict=True):
            assert library.numpy(got).shape == like.shape
            close(library.numpy(got), like)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("counted", COUNTED)
@pytest.mark.parametrize("kernels", ["0", "1"])
@pytest.mark.parametrize("leading", [(1,), (2, 3)])
def test_many_tokens_are_as_many_steps(
    dtype: str, counted: str, kernels: str, leading: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With compiled loops and without; single tokens go on from what many left behind."""
    monkeypatch.setenv("TATTN_KERNELS", kernels)
    n = 201
    for views, channels in ((1, "real"), (2, "real"), (2, "complex"), (3, "real")):
        call, of_rows = drawn(views, counted, leading, n)
        call = tuple(np.asarray(x, dtype) if i == 0 else [a.astype(dtype) for a in x] for i, x in enumerate(call))
        for name in set(of_rows) - {"key_masks"}:
            of_rows[name] = [x.astype(dtype) if isinstance(x, np.ndarray) else x for x in of_rows[name]]
        plan = plan_of(views, n, dtype=dtype, channels=channels)
        found = streamed(plan, call, of_rows, pairwise((0, 1, 4, 70, 71, 72, 200, n)))
        expected = streamed(plan, call, of_rows, [(i, i + 1) for i in range(n)])
        tolerance = 1e-5 if dtype == "float32" else 1e-12
        for got, like, axis in zip(found[:2], expected[:2], (-2, -1), strict=True):
            got, like = (np.concatenate(x, axis=axis) for x in (got, like))
            assert (got.shape, got.dtype) == (like.shape, like.dtype)
            close(got, like, rtol=tolerance, atol=tolerance)
        for got, like in zip(found[2].summary.sums, expected[2].summary.sums, strict=True):
            assert (got.shape, got.dtype) == (like.shape, like.dtype)
            close(got, like, rtol=tolerance, atol=tolerance * np.abs(like).max())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("channels", ["real", "complex"])
@pytest.mark.parametrize("kernels", ["0", "1"])
def test_the_error_of_many_rows_in_float32(
    causal: bool, channels: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of plans for rows that all see: they count with shorter chains."""
    monkeypatch.setenv("TATTN_KERNELS", kernels)
    rng, n = np.random.default_rng(0), 3000
    cuts = [0, *sorted(rng.choice(np.arange(1, n), 20, replace=False)), n]
    # Constant rows, whose sums round alike, and others.
    for rows in (np.full((3, n, DIM), 0.3, np.float32), rng.uniform(-1, 1, (3, n, DIM)).astype(np.float32)):
        query, *keys = rows
        values = [rng.uniform(-1, 1, (n, COLUMNS)).astype(np.float32) for _ in range(2)]
        plan, wide = (
            plan_of(2, n, degree=6, dtype=dtype, causal=causal, channels=channels) for dtype in ("float32", "float64")
        )
        outs, _, state = streamed(plan, (query, keys, values), {}, pairwise(cuts))
        exact = query.astype(float), [k.astype(float) for k in keys], [v.astype(float) for v in values]
        whole = tattn.tensor_attention(*exact, causal=True, plan=plan_of(2, n, degree=6, channels=channels))
        # Both have the polynomial's error: what is left is rounding's.
        apart = np.abs(np.concatenate(outs) - whole).max()
        assert apart <= plan.error - wide.error
        truth = tattn.summarize(*exact[1:], wide)
        for got, rest, like in zip(state.summary.sums, state.summary.rests, truth.sums, strict=True):
            close(got.astype(float) + rest, like, rtol=1e-6, atol=1e-6 * np.abs(like).max())


@pytest.mark.parametrize("case", ["narrow, wide", "wide, narrow", "narrow, query wide"])
def test_rows_and_states_of_other_batches(library: Any, case: str) -> None:
    """The state has the batch that its rows have had together, from the first of several blocks on."""
    plan = plan_of(2, causal=False)
    wide, _ = drawn(2, "plain", (3,), 80)
    narrow = wide[0][0], [k[0] for k in wide[1]], [v[0] for v in wide[2]]
    first, then = (wide, narrow) if case == "wide, narrow" else (narrow, wide)
    if "query" in case:
        then = (wide[0], *narrow[1:])
    single, expected = tattn.DecodingState(plan).step(*first)[1], []
    for i in range(80):
        token, single = single.step(*part_of(then, {}, i, i + 1)[0])
        expected.append(token)
    out, after = tattn.DecodingState(plan).step(*library.arrays(*first))[1].step(*library.arrays(*then))
    close(library.numpy(out), np.concatenate(expected, axis=-2))
    for got, like in zip(after.summary.sums, single.summary.sums, strict=True):
        assert tuple(got.shape) == like.shape
        close(library.numpy(got), like)


def test_rows_that_see_too_little_of_what_a_call_has_are_not_numbers() -> None:
    """What they see would vanish beside the weights of later rows, and a row of nothing would be 0."""
    plan = plan_of(2, dtype="float32")
    query, *keys = np.random.default_rng(0).uniform(-1, 1, (3, 6, DIM)).astype(np.float32)
    values = [np.ones((6, COLUMNS), np.float32)] * 2
    weights = np.asarray([1e-15, 1e-15, 1e-15, 1e15, 1, 1], np.float32)

    def rows(start: int, stop: int) -> Any:
        return part_of((query, keys, values), {"key_weights": [weights] * 2}, start, stop)

    for state in (tattn.DecodingState(plan), None):
        start = 0 if state is not None else 2
        if state is None:
            given, options = rows(0, start)
            state = tattn.DecodingState(plan, tattn.summarize(*given[1:], plan, **options))
        given, options = rows(start, 6)
        (out, lse), _ = state.step(*given, return_lse=True, **options)
        assert np.isnan(out[: 3 - start]).all()
        assert np.isnan(lse[: 3 - start]).all()
        close(out[3 - start :], 1, rtol=1e-5)
    # Rows that are masked see those before the call.
    given, options = rows(0, 2)
    state = tattn.DecodingState(plan, tattn.summarize(*given[1:], plan, **options))
    given, options = rows(2, 4)
    (out, lse), _ = state.step(*given, return_lse=True, key_masks=np.arange(2) > 0, **options)
    assert np.isnan(out[0]).all()
    assert np.isnan(lse[0])
    close(out[1], 1, rtol=1e-5)
    # One unit for all, however small, is no trouble; nor are rows that see nothing.
    given, options = part_of((query, keys, values), {"key_weights": [weights[:1].repeat(6)] * 2}, 0, 6)
    close(tattn.DecodingState(plan).step(*given, **options)[0], 1, rtol=1e-5)
    masked = tattn.DecodingState(plan).step(*given, key_masks=np.arange(6) > 1)[0]
    close(masked, np.repeat([0.0, 1.0], (2, 4))[:, None] * np.ones(COLUMNS), rtol=1e-5)


def test_rows_that_do_not_fit() -> None:
    (query, keys, values), _ = drawn(2, "plain")
    first = tattn.DecodingState(plan_of(2))
    many, one = (part_of((query, keys, values), {}, 0, n)[0] for n in (3, 1))
    for state in (first, first.step(*many)[1]):
        for (q, ks, vs), error, message in (
            (
                (one[0], *many[1:]),
                ValueError,
                r"^keys\[0\] should have as many rows as query, 1, got shape \(2, 3, 4\)",
            ),
            ((many[0], [keys[0][:, :3], keys[1][:, :2]], many[2]), ValueError, r"^keys\[1\] should have as many rows"),
            (
                part_of(many, {}, 0, 0)[0],
                ValueError,
                r"^query should have no dimension of length 0, got shape \(2, 0, 4\)",
            ),
            ((*many[:2], one[2]), ValueError, r"^values\[0\] should have as many rows as keys\[0\], 3, got shape"),
            ((*many[:2], [many[2][0], None]), TypeError, r"^values\[1\] should be an array .*, got NoneType"),
            (
                (many[0], many[1][:1], many[2]),
                ValueError,
                r"^keys should have one entry for each of the plan's 2 views",
            ),
            ((many[0][..., :3], *many[1:]), ValueError, r"^query should have the plan's dim 4 for its last, got shape"),
            (
                (many[0].astype("float32"), *many[1:]),
                TypeError,
                r"^query should have the plan's dtype float64, got float32",
            ),
        ):
            with pytest.raises(error, match=message):
                state.step(q, ks, vs)
        with pytest.raises(ValueError, match=r"^key_masks\[0\] should have shape"):
            state.step(*many, key_masks=np.ones(1, bool))


@pytest.mark.libraries("torch")
@pytest.mark.parametrize("channels", ["real", "complex"])
def test_gradients_in_torch(channels: str) -> None:
    """Of everything, through a state: those of the causal call."""
    torch = pytest.importorskip("torch")
    plan = plan_of(2, channels=channels)
    call, of_rows = drawn(2, COUNTED[2])
    mask, weights, factor = of_rows["key_masks"][0], of_rows["key_weights"][1], of_rows["decay"][0]

    def gradients(parts: Any) -> list[Any]:
        query, a, b, u, v, w, f = (
            torch.tensor(x, requires_grad=True) for x in (call[0], *call[1], *call[2], weights, factor)
        )
        counted = {"key_masks": [torch.tensor(mask), None], "key_weights": [None, w], "decay": [f, 0.9]}
        rows = query, [a, b], [u, v]
        if parts is None:
            out = tattn.tensor_attention(*rows, plan=plan, causal=True, **counted)
        else:
            out = torch.cat(streamed(plan, rows, counted, parts)[0], dim=-2)
        return list(torch.autograd.grad(out.sin().sum(), (query, a, b, u, v, w, f)))

    for got, like in zip(gradients(PARTS), gradients(None), strict=True):
        close(got, like, rtol=1e-9, atol=1e-10)


@pytest.mark.libraries("torch")
def test_narrow_rows_in_torch() -> None:
    torch = pytest.importorskip("torch")
    plan = plan_of(2, dtype="bfloat16")
    call, _ = drawn(2, "plain")
    query, keys, values = (
        torch.tensor(x).bfloat16() if isinstance(x, np.ndarray) else [torch.tensor(a).bfloat16() for a in x]
        for x in call
    )
    out = torch.cat(streamed(plan, (query, keys, values), {}, PARTS)[0], dim=-2)
    assert out.dtype == torch.bfloat16
    whole = tattn.tensor_attention(query, keys, values, plan=plan, causal=True)
    torch.testing.assert_close(out.float(), whole.float(), rtol=2**-7, atol=2**-7)


@pytest.mark.thorough
@pytest.mark.libraries("jax")
def test_parts_in_a_scan() -> None:
    """Compiled once for parts of one length, forward and backward."""
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    plan = plan_of(2)
    (query, keys, values), _ = drawn(2, "plain", (1,), 12)
    rows = jax.numpy.asarray(
        np.stack([query[0], *(k[0] for k in keys), *(v[0, :, :2] @ np.eye(2, DIM) for v in values)])
    )

    @jax.jit
    def stream(rows: Any) -> Any:
        none = rows[1:, :0]
        state = tattn.DecodingState(plan, tattn.summarize([none[0], none[1]], [none[2], none[3]], plan))

        def some(state: Any, part: Any) -> Any:
            out, state = state.step(part[0], [part[1], part[2]], [part[3], part[4]])
            return state, out

        parts = jax.numpy.moveaxis(rows.reshape(5, 3, 4, DIM), 1, 0)
        return jax.lax.scan(some, state, parts)[1].reshape(12, DIM)

    def whole(rows: Any) -> Any:
        return tattn.tensor_attention(rows[0], list(rows[1:3]), list(rows[3:]), plan=plan, causal=True)

    close(stream(rows), whole(rows))
    gradients = (jax.grad(lambda x, f=f: jax.numpy.sin(f(x)).sum())(rows) for f in (stream, whole))
    close(*gradients, rtol=1e-9, atol=1e-10)


@pytest.mark.libraries("numpy")
def test_a_factor_that_is_none_is_refused_at_every_token(library: Any) -> None:
    """A fraction is no number of the kind that calls take, neither for the first token nor for those that are like it."""
    plan = tattn.plan_for(n=9, dim=2, bound=1.0, degree=3, causal=True)
    row = np.ones((1, 2), np.float32)
    state = tattn.DecodingState(plan)
    for _ in range(3):
        with pytest.raises(TypeError, match=r"decay\[0\] should be"):
            state.step(row, [row, row], [row, row], decay=[Fraction(1, 2), None])
        _, state = state.step(row, [row, row], [row, row])


@pytest.mark.libraries("torch")
def test_tensors_whose_signs_are_to_be_changed(library: Any) -> None:
    """torch keeps the imaginary part of a conjugate as it was, with a bit that says what is to be done."""
    import torch

    drawn = torch.randn(2, 6, 4, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)) / 4
    rows = drawn.conj().imag
    assert rows.is_neg()
    plan = tattn.plan_for(n=6, dim=4, bound=4.0, degree=3, causal=True)
    expected = tattn.tensor_attention(rows, [rows, rows], [rows, rows], plan=plan, causal=True)
    state, found = tattn.DecodingState(plan), []
    for i in range(6):
        row = rows[:, i : i + 1]
        out, state = state.step(row, [row, row], [row, row])
        found.append(out)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-5, atol=1e-6)
