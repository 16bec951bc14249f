"""Draws that tests of several kinds share, and the methods over which laws, bounds and gradients run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from reference import Dense, score_by_score, sizes_of, through_features, value_sizes

import tattn
from tattn.paper import products

Shape = tuple[int, ...]


class Way(NamedTuple):
    """A method under test: plans for `n`, `dim`, `order` and the bound of the scores, in float64."""

    plan: Callable[..., tattn.Plan]
    # Whether all calls of a shape compute one function of the score; else the rows of a call decide.
    of_scores: bool = True


def promised(**options: Any) -> Callable[..., tattn.Plan]:
    """Plans that are promised a bound of 1, or another."""
    return lambda **shape: tattn.plan_for(**{"dtype": "float64", "bound": 1.0, **options, **shape})


def in_bands(*, n: Any, bound: float = 1.0, **shape: Any) -> tattn.Plan:
    """A plan in two norm bands, or in one where there is one row."""
    rows = n if isinstance(n, int) else min(n)
    return tattn.plan_for(n=n, **shape, series="banded", degree=3, bands=min(2, rows), dtype="float64")


POLYNOMIAL: dict[str, Any] = {"method": "polynomial", "channels": "complex"}
# A further method gets its laws, bounds and gradients tested by its line here.
METHODS = {
    "exact": Way(promised(method="exact")),
    "polynomial": Way(lambda **shape: through_features(promised(method="polynomial", tol=1e-2)(**shape))),
    "score by score": Way(lambda **shape: score_by_score(promised(method="polynomial", tol=1e-2)(**shape))),
    "banded": Way(in_bands, of_scores=False),
}
methods = pytest.mark.parametrize("method", list(METHODS))
# The same with complex channels, for calls of an even number of parts.
COMPLEX = {
    "exact": Way(promised(method="exact", channels="complex")),
    "polynomial": Way(lambda **shape: through_features(promised(tol=1e-2, **POLYNOMIAL)(**shape))),
    "score by score": Way(lambda **shape: score_by_score(promised(tol=1e-2, **POLYNOMIAL)(**shape))),
    "banded": Way(lambda **shape: in_bands(channels="complex", **shape), of_scores=False),
}
complex_methods = pytest.mark.parametrize("method", list(COMPLEX))


LENGTHS = (9, 7, 6, 4)


class Call(NamedTuple):
    query: np.ndarray
    keys: list[np.ndarray]
    values: list[np.ndarray]
    masks: list[np.ndarray | None] | None
    grad_out: np.ndarray
    grad_lse: np.ndarray


def draw(
    views: int, *, masked: bool = False, broadcast: bool = False, size: float = 1.0, seed: int = 0, dim: int = 3
) -> Call:
    rng = np.random.default_rng(seed)
    leading = {"q": (), "k": (), "v": (), "m": ()}
    if broadcast:
        leading = {"q": (2, 3), "k": (2, 1), "v": (3,), "m": (2, 1)}
    query = rng.uniform(-size, size, (*leading["q"], LENGTHS[0], dim))
    keys = [rng.uniform(-size, size, (*leading["k"], n, dim)) for n in LENGTHS[1 : views + 1]]
    values = [rng.normal(size=(*leading["v"], n, 5)) for n in LENGTHS[1 : views + 1]]
    masks: list[np.ndarray | None] | None = None
    if masked:
        masks = [rng.random((*leading["m"], n)) < 0.7 for n in LENGTHS[1 : views + 1]]
        for mask in masks:
            mask[..., 0] = True
        if views > 1:
            masks[1] = None
        if broadcast:
            masks[0][0] = False  # one problem has nothing to attend to
    full = leading["q"]
    return Call(query, keys, values, masks, rng.normal(size=(*full, 9, 5)), rng.normal(size=(*full, 9)))


def run(library: Any, call: Call, **options: Any) -> tuple[Dense, Any]:
    """Everything that the library computes, in NumPy, and the library's own output."""
    query, keys, values, grad_out, grad_lse = library.arrays(
        call.query, call.keys, call.values, call.grad_out, call.grad_lse
    )
    masks = None if call.masks is None else library.arrays(call.masks)
    (out, lse), pullback = tattn.tensor_attention_vjp(query, keys, values, key_masks=masks, return_lse=True, **options)
    dquery, dkeys, dvalues = pullback(grad_out, grad_lse)
    for got, given in zip((dquery, *dkeys, *dvalues), (query, *keys, *values), strict=True):
        assert tuple(got.shape) == tuple(given.shape)
        assert got.dtype == given.dtype
        assert library.device(got) == library.device(given)
        assert library.is_array(got)
    read = library.numpy
    return Dense(read(out), read(lse), read(dquery), [*map(read, dkeys)], [*map(read, dvalues)]), out


def assert_close(got: Dense, expected: Dense, tolerance: float) -> None:
    for name, a, b in zip(
        (
            "out",
            "lse",
            "dquery",
            *(f"dkeys[{i}]" for i in range(len(got.dkeys))),
            *(f"dvalues[{i}]" for i in range(len(got.dvalues))),
        ),
        (got.out, got.lse, got.dquery, *got.dkeys, *got.dvalues),
        (expected.out, expected.lse, expected.dquery, *expected.dkeys, *expected.dvalues),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=name)


CASES = [
    pytest.param(
        {"views": m, "masked": masked, "broadcast": broadcast},
        id=f"{m} views{' masked' * masked}{' broadcast' * broadcast}",
    )
    for m in (1, 2, 3)
    for masked in (False, True)
    for broadcast in (False, True)
]


class Sample(NamedTuple):
    query: np.ndarray
    keys: list[np.ndarray]
    values: list[np.ndarray]
    grad: np.ndarray


Kind = Callable[[np.random.Generator, tuple[int, ...], int], np.ndarray]


def heavy(rng: np.random.Generator, shape: tuple[int, ...], view: int) -> np.ndarray:
    return rng.standard_t(2.5, shape)


def one_channel(rng: np.random.Generator, shape: tuple[int, ...], view: int) -> np.ndarray:
    x = rng.normal(size=shape) * 1e-3
    x[:, 0] = rng.normal(size=shape[0]) * 1e3
    return x


def corners(rng: np.random.Generator, shape: tuple[int, ...], view: int) -> np.ndarray:
    """Every entry ±B: the bound on the range is attained."""
    return np.where(rng.random(shape) < 0.5, -1.0, 1.0)


def aligned(rng: np.random.Generator, shape: tuple[int, ...], view: int) -> np.ndarray:
    """Every score is −R: all keys are one row, and the series cancels most."""
    return np.ones(shape) * (-0.7 if view == 0 else 0.7)


def two_sided(rng: np.random.Generator, shape: tuple[int, ...], view: int) -> np.ndarray:
    """Every score is +R or −R."""
    return np.ones(shape) * np.where(rng.random((shape[0], 1)) < 0.5, -0.9, 0.9)


def one_huge_row(rng: np.random.Generator, shape: tuple[int, ...], view: int) -> np.ndarray:
    x = rng.normal(size=shape) * 0.1
    x[rng.integers(shape[0])] *= 30
    return x


KINDS: dict[str, Kind] = {
    "uniform": lambda rng, shape, view: rng.uniform(-1, 1, shape),
    "normal": lambda rng, shape, view: rng.normal(size=shape),
    "heavy": heavy,
    "one channel": one_channel,
    "corners": corners,
    "aligned": aligned,
    "two-sided": two_sided,
    "one huge row": one_huge_row,
}


def sample(kind: str, seed: int, views: int, bound: float, dtype: str, channels: str = "real") -> tuple[Sample, float]:
    """A draw, scaled so that its scores reach about `bound`, and the scale."""
    rng = np.random.default_rng([seed, views, len(kind)])
    dim, value_dim = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    if channels == "complex":
        dim = 2 * (1 + dim // 2)
    lengths = rng.integers(1, 24, views + 1)
    arrays = [KINDS[kind](rng, (int(n), dim), i).astype(dtype) for i, n in enumerate(lengths)]
    # Of complex channels every size is there twice.
    q, *keys = [sizes_of(a.astype(float), channels) for a in arrays]
    top = q / 2 if channels == "complex" else q
    for k in keys:
        top = (top[:, None, :] * k[None]).reshape(-1, dim)
    reach = top.sum(-1).max()
    signs = rng.choice([-1.0, 1.0])
    values = [
        np.where(rng.random((int(n), value_dim)) < 0.5, 1.0, signs) * rng.choice([1.0, rng.random()])
        for n in lengths[1:]
    ]
    grad = rng.normal(size=(int(lengths[0]), value_dim))
    return Sample(arrays[0], arrays[1:], [v.astype(dtype) for v in values], grad.astype(dtype)), float(bound / reach)


def ratios(plan: tattn.Plan, drawn: Sample, got: Dense, truth: Dense) -> list[float]:
    """Largest error of output, dquery, dkeys and dvalues over what the plan allows for it."""
    values, g = [v.astype(float) for v in drawn.values], np.abs(drawn.grad.astype(float))
    q, *keys = (sizes_of(x.astype(float), plan.channels) for x in (drawn.query, *drawn.keys))
    sizes = value_sizes(values)[0]
    weight = (g * sizes).sum(-1)  # W_i
    tops = [k.max(0) for k in keys]
    result = [np.abs(got.out - truth.out) / (plan.error * sizes)]
    result.append(
        np.abs(got.dquery - truth.dquery) / (plan.grad_error * plan.scale * np.prod(tops, 0) * weight[:, None])
    )
    for i in range(len(keys)):
        others = np.prod([q.max(0), *tops[:i], *tops[i + 1 :]], 0)
        result.append(np.abs(got.dkeys[i] - truth.dkeys[i]) / (plan.grad_error * plan.scale * others * weight.sum()))
        rest = np.prod([np.ones(sizes.shape), *(np.abs(v).max(0) for j, v in enumerate(values) if j != i)], 0)
        result.append(np.abs(got.dvalues[i] - truth.dvalues[i]) / (plan.error * rest * g.sum(0)))
    return [float(np.nanmax(r)) for r in result]


def heavy_tailed(seed: int = 0, n: int = 300) -> Call:
    """Mostly small rows, and a few whose scores no polynomial of low degree follows."""
    rng = np.random.default_rng(seed)
    query, *keys = rng.uniform(-1, 1, (3, n, 12))
    query[:4] *= 12
    return Call(query, keys, list(rng.normal(size=(2, n, 3))), None, rng.normal(size=(n, 3)), rng.normal(size=n))


def entries(names: str) -> Callable[..., np.ndarray]:
    return partial(np.einsum, names)


CALLS: dict[str, tuple[Callable[..., Any], list[Shape], Callable[..., np.ndarray]]] = {
    "kronecker": (products.kronecker, [(3, 2), (2, 4), (1, 2)], entries("ai,bj,ck->abcijk")),
    "khatri_rao": (products.khatri_rao, [(3, 2), (2, 4, 2)], entries("ai,...bi->...abi")),
    "face_splitting": (products.face_splitting, [(3, 2), (2, 3, 4)], entries("ai,...aj->...aij")),
    "third_mode": (products.third_mode, [(3, 2), (4, 2), (5, 2)], entries("ai,bi,ci->abc")),
    "multilinear": (products.multilinear, [(2, 2, 3, 4), (3, 2), (4, 3), (1, 4)], entries("...ijk,ai,bj,ck->...abc")),
    "vec": (products.vec, [(2, 3, 4)], entries("...->...")),
    "matrix": (products.matrix, [(2, 3, 4)], entries("...->...")),
    "tensor": (lambda a: products.tensor(a, (2, 3, 2)), [(4, 2, 6)], entries("...->...")),
    "khatri_rao_gram": (
        lambda *a: products.khatri_rao_gram(a[:2], a[2:]),
        [(3, 2), (4, 2), (3, 5), (2, 4, 5)],
        entries("ai,bi,aj,...bj->...ij"),
    ),
    "apply_kronecker": (
        lambda *a: products.apply_kronecker(a[:2], a[2]),
        [(3, 2), (2, 4, 5), (10, 3)],
        lambda a, b, x: np.kron(a, b) @ x,
    ),
    "apply_kronecker to a vector": (
        lambda *a: products.apply_kronecker(a[:2], a[2]),
        [(3, 2), (4, 5), (10,)],
        lambda a, b, x: np.kron(a, b) @ x,
    ),
}


def arguments(call: str, dtype: str = "float64") -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.uniform(0.5, 1, shape).astype(dtype) for shape in CALLS[call][1]]


def refuse(function: Any, error: type, message: str, *positional: Any, **arguments: Any) -> None:
    """Check that a call raises just this kind of error, with a message of one line."""
    with pytest.raises(error, match=message) as caught:
        function(*positional, **arguments)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)


def write_other_library(folder: Path) -> None:
    """Put an array library that nobody knows into a folder, `otherlib`: array-api-strict under another name."""
    original = find_spec("array_api_strict")
    if original is None or original.origin is None:
        pytest.skip("array_api_strict is not installed")
    (folder / "otherlib").mkdir()
    for file in Path(original.origin).parent.glob("*.py"):
        text = file.read_text(encoding="utf-8").replace("array_api_strict", "otherlib")
        (folder / "otherlib" / file.name).write_text(text, encoding="utf-8")
