"""Rotary positions: turned by the right angle, at any position, and of no effect where all positions are shifted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import COMPLEX, complex_methods, draw, refuse
from reference import as_complex, dense

import tattn

ALPHA, BETA = 100.0 ** -np.linspace(0, 1, 2), np.array([0.7, -0.3])


def turned(x: np.ndarray, positions: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """By definition, in the precision of what is given."""
    z = as_complex(x) * np.exp(1j * positions[..., :, None] * frequencies[..., None, :])
    return np.concatenate([z.real, z.imag], axis=-1)


def with_positions(query: Any, keys: Any, positions: Any, frequencies: Any) -> tuple[Any, list[Any]]:
    """The recipe: the query by the frequencies of all views, one after another, and keys by minus their own."""
    for f in frequencies:
        query = tattn.rotary(query, positions[0], f)
    return query, [tattn.rotary(k, p, -f) for k, p, f in zip(keys, positions[1:], frequencies, strict=True)]


@pytest.mark.parametrize("whole", [True, False], ids=["whole numbers", "floats"])
def test_rows_are_turned_by_the_angle(library: Any, whole: bool) -> None:
    rng = np.random.default_rng(0)
    rows, frequencies = rng.normal(size=(2, 1, 5, 6)), rng.normal(size=(3, 3))
    positions = rng.integers(-9, 9, (2, 1, 5)) if whole else rng.normal(size=5)
    got = tattn.rotary(*library.arrays(rows, positions, frequencies))
    assert library.is_array(got)
    np.testing.assert_allclose(library.numpy(got), turned(rows, positions, frequencies), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_angles_are_right_at_large_positions(library: Any, dtype: str) -> None:
    """A few units in the last place, up to 10^6, where an angle of float32 itself would be off by a tenth."""
    rng = np.random.default_rng(0)
    positions = np.append(rng.integers(0, 10**6, 300), 10**6)
    # Of so many digits that their products with positions are exact in long double.
    frequencies = np.append(1.0, rng.integers(0, 2**40, 7) / 2**40).astype(dtype)
    rows = np.where(rng.random((301, 16)) < 0.5, -1.0, 1.0).astype(dtype)
    got = library.numpy(tattn.rotary(*library.arrays(rows, positions, frequencies)))
    wide = [x.astype(np.longdouble) for x in (rows, positions, frequencies)]
    assert got.dtype == dtype
    assert np.abs(got - turned(*wide)).max() <= 8 * np.finfo(dtype).eps


@complex_methods
@pytest.mark.parametrize("shift", [1, 12345])
def test_a_shift_of_all_positions_changes_nothing(method: str, shift: int) -> None:
    call = draw(2, dim=4)
    plan = COMPLEX[method].plan(n=[len(x) for x in (call.query, *call.keys)], dim=4, order=3)
    positions = [np.arange(len(x)) for x in (call.query, *call.keys)]
    here, there = (
        tattn.tensor_attention(
            *with_positions(call.query, call.keys, [p + by for p in positions], (ALPHA, BETA)), call.values, plan=plan
        )
        for by in (0, shift)
    )
    np.testing.assert_allclose(there, here, rtol=0, atol=1e-12)
    still = tattn.tensor_attention(call.query, call.keys, call.values, plan=plan)
    assert np.abs(here - still).max() > 1e-3


def test_scores_depend_on_differences_of_positions() -> None:
    call = draw(2, dim=4)
    positions = [np.arange(len(x)) for x in (call.query, *call.keys)]
    query, keys = with_positions(call.query, call.keys, positions, (ALPHA, BETA))
    z, a, b = (as_complex(x) for x in (call.query, *call.keys))
    i, j, k = 5, 2, 4
    phase = ALPHA * (i - j) + BETA * (i - k)
    expected = (z[i] * a[j] * b[k] * np.exp(1j * phase)).real.sum() / 4
    one = [x[[at]] for x, at in zip((query, *keys), (i, j, k), strict=True)]
    got = dense(one[0], one[1:], [np.ones((1, 1))] * 2, channels="complex")
    np.testing.assert_allclose(got.lse[0], expected, rtol=1e-12)


def test_one_view_is_rope() -> None:
    """Ordinary attention of turned rows: the imaginary parts of the query have the other sign."""
    call = draw(1, dim=4)
    positions = [np.arange(len(x)) for x in (call.query, *call.keys)]
    query, keys = with_positions(call.query, call.keys, positions, (ALPHA,))
    got = tattn.tensor_attention(query, keys, call.values, method="exact", channels="complex")
    flipped = query * np.array([1, 1, -1, -1])
    np.testing.assert_allclose(got, dense(flipped, keys, call.values).out, rtol=1e-12, atol=1e-14)


@pytest.mark.thorough("jax")
def test_decoding_from_a_far_position_is_the_causal_call(library: Any) -> None:
    call = draw(2, dim=4)
    n, start = 6, 10**5
    query, keys = call.query[:n], [k[:n] for k in call.keys]
    values = library.arrays([v[:n] for v in call.values])
    positions = np.arange(start, start + n)
    plan = tattn.plan_for(n=n, dim=4, bound=2.0, degree=5, dtype="float64", causal=True, channels="complex")
    moved = library.arrays(query, keys, [positions] * 3, [ALPHA, BETA])
    q, ks = with_positions(*moved)
    whole = library.numpy(tattn.tensor_attention(q, ks, values, plan=plan, causal=True))
    state = tattn.DecodingState(plan)
    for i in range(n):
        token = slice(i, i + 1)
        p = library.arrays([positions[token]] * 3)
        one, of_keys = with_positions(moved[0][token, :], [k[token, :] for k in moved[1]], p, moved[3])
        out, state = state.step(one, of_keys, [v[token, :] for v in values])
        np.testing.assert_allclose(library.numpy(out), whole[token], rtol=0, atol=1e-12)
    near = with_positions(query, keys, [np.arange(n)] * 3, (ALPHA, BETA))
    from_zero = tattn.tensor_attention(*near, call.values and [v[:n] for v in call.values], plan=plan, causal=True)
    np.testing.assert_allclose(whole, from_zero, rtol=0, atol=1e-11)


@pytest.mark.libraries("torch")
def test_gradients_in_torch() -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    frequencies = torch.rand(2, generator=generator, dtype=torch.float64).requires_grad_()
    positions = torch.tensor([0.0, 1.5, 40.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(tattn.rotary, (rows, positions, frequencies))


@pytest.mark.libraries("jax")
def test_gradients_in_jax() -> None:
    import jax
    import jax.numpy as jnp

    rng = np.random.default_rng(0)
    rows, weight, f = jnp.asarray(rng.normal(size=(3, 4))), jnp.asarray(rng.normal(size=(3, 4))), jnp.asarray(ALPHA)

    def loss(rows: Any, f: Any) -> Any:
        return (tattn.rotary(rows, jnp.asarray([0.0, 1.5, 40.0]), f) * weight).sum()

    drows, df = jax.jit(jax.grad(loss, argnums=(0, 1)))(rows, f)
    back = tattn.rotary(weight, jnp.asarray([0.0, 1.5, 40.0]), -f)
    np.testing.assert_allclose(drows, back, rtol=1e-12, atol=1e-13)
    step = 1e-6
    for c in range(2):
        moved = jnp.asarray(np.eye(2)[c] * step)
        np.testing.assert_allclose(df[c], (loss(rows, f + moved) - loss(rows, f - moved)) / (2 * step), rtol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    rows, positions, frequencies = np.ones((5, 6)), np.arange(5), np.ones(3)
    refuse(
        tattn.rotary,
        ValueError,
        "rows' last dimension should be even.*got 5",
        np.ones((4, 5)),
        np.arange(4),
        np.ones(2),
    )
    refuse(tattn.rotary, ValueError, r"positions should have shape \(..., 5\)", rows, np.arange(4), frequencies)
    refuse(tattn.rotary, ValueError, r"frequencies should have shape \(..., 3\)", rows, positions, np.ones(6))
    refuse(tattn.rotary, TypeError, "frequencies should have a dtype of float16", rows, positions, np.ones(3, int))
    refuse(tattn.rotary, TypeError, "positions should have a dtype", rows, positions > 2, frequencies)
    refuse(
        tattn.rotary,
        ValueError,
        "frequencies should have leading dimensions",
        np.ones((2, 5, 6)),
        positions,
        np.ones((3, 3)),
    )
