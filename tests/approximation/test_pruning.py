"""When plans take a pruned basis, what they promise of it, and what it is checked for."""

from __future__ import annotations

from itertools import product
from math import factorial, prod
from typing import Any

import numpy as np
import pytest
from reference import changed, dense

import tattn
from tattn.approximation.pruning import Shells, dropped, smallest_pruned, sums_of, weights_of
from tattn.backends.tables import REMEMBERED, memoized
from tattn.features.monomials import rank

GRADING, DEGREE = (6, 2, 3, 2, 9), 3


def kept(degree: int, grading: tuple[int, ...]) -> np.ndarray:
    most = degree * min(grading)
    return np.array([a for a in product(range(degree + 1), repeat=len(grading)) if np.dot(a, grading) <= most])


def multinomials(alpha: np.ndarray) -> np.ndarray:
    return np.array([factorial(sum(a)) / prod(map(factorial, a)) for a in alpha.tolist()])


def unequal(light: float = 1e-3, heavy: int = 2, dim: int = 16, rows: int = 400, seed: int = 0) -> tuple[Any, ...]:
    """Query, keys and values whose first channels make the scores, up to some 0.7 with scale 1/2."""
    rng = np.random.default_rng(seed)
    sizes = np.where(np.arange(dim) < heavy, 0.9, 0.9 * light ** (1 / 3))
    query, a, b = rng.uniform(-1, 1, (3, rows, dim)) * sizes
    return query, [a, b], list(rng.normal(size=(2, rows, 16)))


def test_what_is_kept_needs_sums_of_channels_alone() -> None:
    y = np.random.default_rng(0).normal(size=(5, 7))
    sums = [y[[c for c in range(5) if GRADING[c] == k]].sum(axis=0) for k in weights_of(GRADING)]
    shells = Shells(GRADING, DEGREE, sums)
    alpha = kept(DEGREE, GRADING)
    terms = multinomials(alpha)[:, None] * np.prod(y[None] ** alpha[..., None], axis=1)
    for t, got in enumerate(shells.powers()):
        np.testing.assert_allclose(got, terms[alpha.sum(axis=1) == t].sum(axis=0), rtol=1e-12)
    for channel, weight in enumerate(GRADING):
        lowered = np.maximum(alpha - np.eye(5, dtype=int)[channel], 0)
        slopes = (multinomials(alpha) * alpha[:, channel])[:, None] * np.prod(y[None] ** lowered[..., None], axis=1)
        for t, got in enumerate(shells.slopes(weight)):
            wanted = slopes[alpha.sum(axis=1) == t].sum(axis=0)
            np.testing.assert_allclose(got * np.ones(7), wanted, rtol=1e-12, atol=1e-14)


def test_what_is_dropped_is_summed_in_full() -> None:
    sizes, coefficients = [0.01, 0.3, 0.05, 0.2, 0.001], [1.0, -0.9, 0.6, 0.2]
    every = np.array([a for a in product(range(DEGREE + 1), repeat=5) if sum(a) <= DEGREE])
    out = every[every @ np.array(GRADING) > DEGREE * min(GRADING)]
    sizes_of = np.abs(np.array(coefficients))[out.sum(axis=1)] * multinomials(out)
    lost = (sizes_of * np.prod(np.array(sizes) ** out, axis=1)).sum()
    steep = max(
        (sizes_of * out[:, c] * np.prod(np.array(sizes) ** np.maximum(out - np.eye(5, dtype=int)[c], 0), axis=1)).sum()
        for c in range(5)
    )
    np.testing.assert_allclose(dropped(coefficients, GRADING, sums_of(GRADING, sizes)), (lost, steep), rtol=1e-9)


def test_the_smallest_accepted_basis_is_taken() -> None:
    sizes = [1.0, 0.5, 0.2, 0.1, 0.05, 0.01]
    found = [smallest_pruned(sizes, [3, 4], 200, lambda p, least=least: p.rank >= least) for least in (0, 30, 60)]
    ranks = [p.rank for p in found if p]
    assert len(ranks) == 3 and ranks == sorted(ranks) and ranks[1] >= 30 and ranks[2] >= 60
    for p in found:
        assert p and p.rank == len(kept(p.degree, p.grading))
    assert smallest_pruned(sizes, [3], 200, lambda _: False) is None
    assert smallest_pruned([1.0, 0.5, 0.9], [3], 200, lambda _: True) is None


def test_a_plan_prunes_where_channels_are_unequal_and_only_there() -> None:
    query, keys, values = unequal()
    plan = tattn.plan(query, keys, values, scale=1 / 2, tol=1e-2, method="polynomial")
    whole = tattn.plan(query, keys, values, scale=1 / 2, tol=1e-2, method="polynomial", degree=3)
    assert plan.grading and plan.certified and plan.error <= 1e-2 and plan.rank == rank(16, plan.degree, plan.grading)
    assert whole.grading == () and whole.error <= 1e-2 and plan.rank < whole.rank / 2
    assert len(plan.sizes) == len(set(plan.grading))
    # With few value channels the highest monomials are not made: fewer of them save less.
    narrow = tattn.plan(query, keys, [v[:, :3] for v in values], scale=1 / 2, tol=1e-2, method="polynomial")
    assert narrow.grading == ()
    alike = tattn.plan(query[:, :2], [k[:, :2] for k in keys], values, scale=1 / 2, tol=1e-2, method="polynomial")
    assert alike.grading == () and alike.sizes == ()
    promised = tattn.plan(query, keys, values, scale=1 / 2, tol=1e-2, method="polynomial", bound=plan.bound)
    assert promised.grading == ()


def test_gradients_that_nobody_asks_for_take_no_monomials() -> None:
    query, keys, values = unequal()
    plans = [
        tattn.plan(query, keys, values, scale=1 / 2, tol=1e-2, method="polynomial", gradients=g) for g in (True, False)
    ]
    assert plans[1].rank < plans[0].rank
    assert max(p.error for p in plans) <= 1e-2 and plans[0].grad_error < 0.1 < plans[1].grad_error
    with pytest.raises(TypeError, match="gradients should be True or False, got int"):
        tattn.plan(query, keys, values, gradients=1)  # type: ignore[arg-type]


def test_other_data_is_checked_for_what_the_basis_leaves_out() -> None:
    query, keys, values = unequal()
    plan = tattn.plan(query, keys, values, scale=1 / 2, tol=1e-2, method="polynomial")
    tattn.tensor_attention(query, keys, values, plan=plan)
    # The channels in another order: scores are the same, and the monomials that they need are not.
    query, keys = query[:, ::-1], [k[:, ::-1] for k in keys]
    with pytest.raises(tattn.PlanError, match="plan leaves out monomials of channels that count"):
        tattn.tensor_attention(query, keys, values, plan=plan)
    tattn.tensor_attention(query, keys, values, plan=changed(plan, grading=(), sizes=(), rank=20349))


def test_attention_without_a_plan_is_pruned_too(library: Any) -> None:
    query, keys, values = unequal(rows=300)
    q, ks, vs = library.arrays(query, keys, values)
    out, plan = tattn.tensor_attention(q, ks, vs, scale=1 / 2, tol=1e-2, method="polynomial", return_plan=True)
    # Not where each plan has a program of its own.
    assert bool(plan.grading) == (library.name != "jax")
    truth = dense(query[:9], keys, values, scale=1 / 2)
    sizes = np.prod([np.abs(v).max(axis=0) for v in values], axis=0)
    assert np.max(np.abs(library.numpy(out)[:9] - truth.out) / sizes) <= plan.error


def test_an_estimated_plan_prunes_and_meets_what_it_says() -> None:
    rng = np.random.default_rng(0)
    sizes = 0.55 ** np.arange(10)
    query, a, b = rng.normal(size=(3, 500, 10)) * sizes ** (1 / 3)
    values = list(rng.normal(size=(2, 500, 12)))
    asked = {"scale": 0.15, "tol": 3e-2, "method": "polynomial", "bound": "estimated"}
    plan = tattn.plan(query, [a, b], values, **asked)
    assert plan.grading and not plan.certified and plan.sizes == () and plan.error <= 3e-2
    assert tattn.plan(query, [a, b], values, **asked, degree=plan.degree).grading == ()
    assert tattn.plan(query, [a, b], values, **asked, gradients=False).rank < plan.rank
    out, pullback = tattn.tensor_attention_vjp(query, [a, b], values, plan=plan)
    truth = dense(query[:9], [a, b], values, scale=0.15, grad_out=np.ones((9, 12)))
    assert np.max(np.abs(out[:9] - truth.out) / np.prod([np.abs(v).max(axis=0) for v in values], axis=0)) < plan.error
    dquery, _, _ = pullback(np.ones_like(out))
    weight = np.prod([np.abs(v).max(axis=0) for v in values], axis=0).sum()
    unit = plan.scale * np.abs(a).max(axis=0) * np.abs(b).max(axis=0) * weight
    assert np.max(np.abs(dquery[:9] - truth.dquery) / unit) < plan.grad_error


def test_a_degree_beyond_what_all_monomials_allow_can_be_had_pruned() -> None:
    query, keys, values = unequal(dim=64)
    asked: Any = {"scale": 0.7, "tol": 1e-2, "method": "polynomial", "gradients": False}
    with pytest.raises(tattn.PlanError, match="beyond the largest rank"):
        tattn.plan(query, keys, values, **{**asked, "tol": 1e-9})
    for bound, tol in ((None, 1e-2), ("estimated", 1e-5)):
        plan = tattn.plan(query, keys, values, **{**asked, "tol": tol}, bound=bound)
        assert plan.grading and plan.degree >= 4 and plan.rank < 1 << 18


def test_tables_of_bases_that_come_and_go_are_forgotten() -> None:
    made: list[int] = []
    table = memoized(lambda i: made.append(i))
    for i in range(REMEMBERED + 1):
        table(i)
    table(REMEMBERED)
    assert len(made) == REMEMBERED + 1
    table(0)
    assert made[-1] == 0 and len(made) == REMEMBERED + 2
