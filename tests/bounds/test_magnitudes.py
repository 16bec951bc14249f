"""Views and channels whose sizes differ by as much as a dtype has: every bound that is returned holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from reference import dense, through_features, value_sizes

import tattn
from tattn.backends import backend_of
from tattn.checks import checked_inputs
from tattn.features.scaling import channel_units, units_of
from tattn.planning import measured

# Decimal exponents of the largest and the smallest normal numbers, and of the smallest of all.
DECADES = {"float32": (37.5, -37.5, -44.0), "float64": (307.0, -307.0, -322.0)}
PROMISED = 2.0


class Wide(NamedTuple):
    """A call, the largest Σ_c |scale q a …| of its rows, and whether it has denormal numbers."""

    query: np.ndarray
    keys: list[np.ndarray]
    values: list[np.ndarray]
    reach: float
    denormal: bool


def wide(seed: int, views: int, scale: float, dtype: str, denormals: bool) -> Wide:
    """Scores of at most about `PROMISED`, channels of sizes apart, and factors of each view and channel that cancel."""
    rng = np.random.default_rng([seed, views])
    lengths, dim = (14, 12, 11, 9)[: views + 1], 3
    kind = rng.choice(["normal", "one sign", "constant", "some zero"])
    rows = []
    for i, n in enumerate(lengths):
        x = rng.normal(size=(n, dim))
        if kind == "one sign":
            x = np.abs(x) * (-1 if i == 0 else 1)
        elif kind == "constant":
            x = np.ones((n, dim)) * rng.choice([-1.0, 1.0], dim)
        elif kind == "some zero":
            x = x * (rng.random((n, 1)) < 0.6) * (rng.random(dim) < 0.8)
        rows.append(x)
    rows[0] = rows[0] * 10 ** rng.uniform(-3, 0, dim)
    rows[0] = rows[0] * (rng.uniform(0.1, 0.75) * PROMISED / max(reach(rows, 1.0), 1e-9))
    highest, lowest, least = DECADES[dtype]
    exponents = _exponents(rng, (views + 1, dim), highest - 2, least if denormals else lowest + 2, np.log10(scale))
    arrays = [(x * np.longdouble(10) ** e).astype(dtype) for x, e in zip(rows, exponents, strict=True)]
    values = [rng.normal(size=(n, 2)).astype(dtype) for n in lengths[1:]]
    tiny = any(((x != 0) & (np.abs(x) < np.finfo(dtype).smallest_normal)).any() for x in arrays)
    return Wide(arrays[0], arrays[1:], values, reach(arrays, scale), tiny)


def _exponents(rng: np.random.Generator, shape: tuple[int, int], most: float, least: float, scale: float) -> np.ndarray:
    """Of every view and channel (m + 1, d), the sum over the views being that of 1 / scale."""
    while True:
        found = rng.uniform(least, most, shape).astype(np.longdouble)
        last = rng.integers(shape[0], size=shape[1])
        channel = np.arange(shape[1])
        found[last, channel] -= found.sum(0) + scale
        if (found <= most).all() and (found >= least).all():
            return found


def reach(rows: list[np.ndarray], scale: float) -> float:
    """The largest Σ_c |scale q a …|."""
    total = np.abs(rows[0].astype(np.longdouble)) * scale
    for x in rows[1:]:
        total = (total[:, None] * np.abs(x.astype(np.longdouble))).reshape(-1, x.shape[-1])
    return float(total.sum(-1).max())


def calls(library: Any, views: int, scale: float, dtype: str) -> Iterator[tuple[str, Wide, Any]]:
    """Ways to compute draws, each with a function for the output, lse, bounds and plan."""
    for seed in range({"numpy": 40, "torch": 16}.get(library.name, 4)):
        drawn = wide(seed, views, scale, dtype, denormals=seed % 2 == 1 and library.name[:3] != "jax")
        query, keys, values = library.arrays(drawn.query, drawn.keys, drawn.values)
        arrays, shapes = (query, keys, values), {"n": (14, 12, 11, 9)[: views + 1], "dim": 3}
        options: dict[str, dict[str, Any]] = {
            "exact": {"method": "exact"},
            "banded": {"plan": tattn.plan(*arrays, series="banded", degree=4, bands=3, scale=scale)},
        }
        if not drawn.denormal and drawn.reach <= PROMISED:
            options["promised"] = {
                "plan": through_features(
                    tattn.plan_for(
                        **shapes, order=views + 1, value_dim=2, bound=PROMISED, dtype=dtype, scale=scale, tol=1e-2
                    )
                )
            }
        if library.name[:3] != "jax":
            # JAX compiles for every plan.
            options["auto"] = {"tol": 1e-2}
            try:
                options["degree"] = {"plan": through_features(tattn.plan(*arrays, degree=7, scale=scale))}
            except tattn.PlanError as error:
                assert drawn.denormal and "would overflow" in str(error)
        for way, given in options.items():
            yield f"{way}, seed {seed}", drawn, (arrays, {"scale": scale, **given})


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("views", "scale"), [(1, 1.0), (2, 1.0), (2, 2.0**100), (3, 2.0**-90)])
@pytest.mark.grid
def test_every_bound_holds_over_all_magnitudes(library: Any, views: int, scale: float, dtype: str) -> None:
    finite = 0
    for name, drawn, (arrays, options) in calls(library, views, scale, dtype):
        out, lse, error, plan = tattn.tensor_attention(
            *arrays, **options, return_lse=True, return_error=True, return_plan=True
        )
        out, lse, error = (library.numpy(x).astype(np.longdouble) for x in (out, lse, error))
        truth = dense(drawn.query, drawn.keys, drawn.values, scale=scale, precision=np.longdouble)
        known = np.isfinite(error)
        off = np.abs(out - truth.out) / value_sizes(drawn.values)
        assert (off[known] <= error[known, None]).all(), (name, off.max(-1), error)
        if plan.series != "banded":
            known &= error < 1
            # The logarithm rounds once more.
            allowed = -np.log1p(-error[known]) + 8 * np.finfo(dtype).eps * (1 + np.abs(truth.lse[known]))
            assert (np.abs(lse - truth.lse)[known] <= allowed).all(), (name, lse, truth.lse)
        finite += known.all()
        if options.get("method") == "exact":
            assert known.all(), name
    assert finite >= 8


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scale", [1.0, 1e-40, 1e35])
def test_units_of_channels_are_normal_numbers_whose_product_is_the_scale(
    library: Any, scale: float, dtype: str
) -> None:
    rng = np.random.default_rng(0)
    highest, _, least = DECADES[dtype]
    sizes = 10 ** rng.uniform(least, highest, (3, 1, 4000)).astype(np.longdouble)
    sizes[1] *= rng.random(sizes[1].shape) < 0.9
    # JAX takes denormal numbers for 0.
    taken = np.finfo(dtype).smallest_normal if library.name[:3] == "jax" else 0.0
    tops = [np.where(x < taken, 0.0, x).astype(dtype) for x in sizes]
    given = library.arrays(tops)
    units = [library.numpy(x) for x in units_of(given, given, scale, backend_of(given[0]))]
    for unit in units:
        assert (unit >= np.finfo(dtype).smallest_normal).all()
        assert np.isfinite(unit).all()
    product = np.prod([u.astype(np.longdouble) for u in units], axis=0)
    zero = np.any([top == 0 for top in tops], axis=0)
    np.testing.assert_allclose(product[~zero], scale, rtol=1e-6)
    # Nothing is added to a score where a view is zero, but products with large entries would be NaN.
    assert max((top[zero] * unit[zero]).max() for top, unit in zip(tops, units, strict=True)) <= 8


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("views", [1, 2, 4])
def test_units_of_usual_channels_are_those_of_all(library: Any, views: int, dtype: str) -> None:
    rng = np.random.default_rng(views)
    for scale in (1.0, 0.3, 1e-2):
        # One row for each view: its entries are the largest of their channels.
        rows = [(10 ** rng.uniform(-2, 2, (1, 50))).astype(dtype) for _ in range(views + 1)]
        rows[0] *= (0.1 / scale / np.prod(rows, axis=0)).astype(dtype)
        given = library.arrays(*rows)
        backend = backend_of(given[0])
        found = channel_units(given[0], given[1:], [None] * views, scale, backend)
        for unit, expected in zip(found, units_of(given, given, scale, backend), strict=True):
            assert np.array_equal(library.numpy(unit), library.numpy(expected))
        # None is left to the general rule.
        assert (np.abs(np.log2(rows)) < 40).all()


@pytest.mark.filterwarnings("ignore:overflow encountered in:RuntimeWarning")
@pytest.mark.parametrize(
    ("sizes", "share"),
    [
        ((1e36, 1e-24, 1e-24), -1.0),
        ((1e-12, 1e-12, 1e-36), -1.0),
        ((1e-36, 1e25, 1e25), 0.1),
        ((1e-36, 3e37, 1.0), 0.1),
    ],
)
def test_mean_scores_whose_factors_leave_float32(library: Any, sizes: tuple[float, ...], share: float) -> None:
    """The lowest mean score is no higher than the true one, whichever product of means vanishes or overflows."""
    rng = np.random.default_rng(0)
    scale = float(abs(share) / np.prod(np.float64(sizes)))
    rows = [rng.uniform(0.9, 1, (12, 2)) * [size, (0.5 / scale) ** (1 / 3)] for size in sizes]
    rows[2] *= [np.sign(share), -1.0]
    query, *keys = library.arrays([x.astype(np.float32) for x in rows])
    found = measured(checked_inputs(query, keys, None, None), scale)
    scores = np.einsum("ic,jc,kc->ijk", *rows) * scale
    assert found.lowest_mean <= scores.mean((1, 2)).min()
    assert found.bound >= np.abs(scores).max() * (1 - 1e-6)


def test_a_channel_of_denormal_numbers_beside_a_huge_one(library: Any) -> None:
    for dtype, huge, tiny in (("float32", 1e36, 1e-43), ("float64", 1e306, 1e-320)):
        query, key = np.array([[huge, 1]], dtype), np.array([[tiny, 0.5], [2 * tiny, -0.5]], dtype)
        value = np.array([[1.0], [2.0]], dtype)
        given = library.arrays(query, [key], [value])
        if library.name[:3] == "jax":
            # It takes denormal numbers for 0.
            key[:, 0] = 0
        truth = dense(query, [key], [value], scale=1.0)
        promised = tattn.plan_for(n=(1, 2), dim=2, bound=1.0, order=2, value_dim=1, dtype=dtype, scale=1.0, tol=1e-3)
        for options in ({"method": "exact"}, {"plan": promised}):
            out, error = tattn.tensor_attention(*given, scale=1.0, **options, return_error=True)
            assert (np.abs(library.numpy(out) - truth.out) <= 2 * library.numpy(error)[:, None]).all()
            assert (library.numpy(error) <= 1e-3).all()
