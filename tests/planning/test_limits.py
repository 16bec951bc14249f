"""What a call will take is said before it starts: a warning where that is long, a refusal beyond `max_flops`, the best `tol`."""

from __future__ import annotations

import warnings
from math import inf
from typing import Any

import numpy as np
import pytest
from conftest import Library
from watching import calls_of

import tattn
from tattn.planning import limits
from tattn.planning.settings import using
from tattn.plans import duration


def draw(n: int = 60, dim: int = 4, size: float = 1.0) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(0)
    query, *keys = rng.uniform(-size, size, (3, n, dim))
    return query, keys, list(rng.normal(size=(2, n, 3)))


@pytest.fixture
def slow_machine() -> Any:
    """A machine that takes a minute for what others do at once: one operation a second."""
    with using(speed=1.0, short=0.0):
        yield


@pytest.mark.usefixtures("slow_machine")
@pytest.mark.parametrize("function", [tattn.tensor_attention, tattn.tensor_attention_vjp, tattn.plan])
def test_a_chosen_method_that_takes_long_is_warned_of(function: Any) -> None:
    query, keys, values = draw(12, size=9.0)
    with pytest.warns(
        UserWarning, match=r"about [\d,]+ (d|h|min) here, .*flop by the exact method.* What helps: "
    ) as caught:
        function(query, keys, values)
    assert caught[0].filename == __file__


@pytest.mark.usefixtures("slow_machine")
def test_what_was_asked_for_is_not_warned_of() -> None:
    query, keys, values = draw(12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = tattn.plan(query, keys, values, method="exact")
        tattn.tensor_attention(query, keys, values, method="exact")
        tattn.tensor_attention(query, keys, values, plan=plan)
        tattn.plan(query, keys, values, degree=3)


def test_short_calls_are_neither_warned_of_nor_timed() -> None:
    with warnings.catch_warnings(), calls_of(limits.speed) as timed:
        warnings.simplefilter("error")
        tattn.tensor_attention(*draw())
    assert not timed


def test_a_call_may_not_take_more_than_it_is_allowed(library: Library) -> None:
    query, keys, values = draw(40)
    arrays = library.arrays(query, keys, values)
    exact, polynomial = (tattn.plan(*arrays, method=name) for name in ("exact", "polynomial"))
    plan_for = {"n": 40, "dim": 4, "value_dim": 3, "dtype": "float64", "bound": 1.0}
    for plan, flops in ((exact, exact.flops_exact), (polynomial, polynomial.flops_polynomial)):
        asked = {"method": plan.method}
        for function in (tattn.tensor_attention, tattn.tensor_attention_vjp, tattn.plan):
            function(*arrays, max_flops=flops, **asked)
            with pytest.raises(
                tattn.PlanError, match=r"the call takes .*flop by the .* more than max_flops=.*What helps"
            ):
                function(*arrays, max_flops=0.99 * flops, **asked)
        with pytest.raises(tattn.PlanError, match="max_flops"):
            tattn.tensor_attention(*arrays, plan=plan, max_flops=0.99 * flops)
        tattn.tensor_attention(*arrays, plan=plan, max_flops=flops)
    with pytest.raises(tattn.PlanError, match="max_flops"):
        tattn.plan_for(**plan_for, max_flops=1e3)
    with pytest.raises(tattn.PlanError, match="max_flops"):
        tattn.plan(*arrays, method=tattn.Exact(), max_flops=1e3)


@pytest.mark.usefixtures("bands_at_any_length")
def test_bands_are_not_tried_beyond_what_is_allowed() -> None:
    """Trying them is work as well."""
    query, keys, values = draw(300, size=6.0)
    plan = tattn.plan(query, keys, values)
    assert plan.method == "exact"
    with pytest.raises(tattn.PlanError, match="max_flops"):
        tattn.tensor_attention(query, keys, values, max_flops=1e5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_best_tolerance_is_met_and_no_smaller_one_is(dtype: str, causal: bool) -> None:
    query, keys, _ = draw(200)
    query, *keys = (x.astype(dtype) for x in (query, *keys))
    for limit in (
        {},
        {"max_rank": 70},
        {"max_flops": tattn.plan(query, keys, degree=3, causal=causal).flops_polynomial},
    ):
        tol = tattn.best_tol(query, keys, causal=causal, **limit)
        plan = tattn.plan(query, keys, tol=tol, method="polynomial", causal=causal, gradients=False)
        assert plan.error <= tol
        degrees = [tattn.plan(query, keys, degree=g, causal=causal) for g in range(1, 20)]
        allowed = [
            p
            for p in degrees
            if p.rank <= limit.get("max_rank", inf) and p.flops_polynomial <= limit.get("max_flops", inf)
        ]
        assert tol == min(p.error for p in allowed)


def test_no_tolerance_is_made_up() -> None:
    query, keys, _ = draw()
    with pytest.raises(tattn.PlanError, match="max_rank=3 allow no degree: degree 1 has rank 5"):
        tattn.best_tol(query, keys, max_rank=3)
    with pytest.raises(tattn.PlanError, match=r"scores may reach .*, where no polynomial"):
        tattn.best_tol(1e4 * query, keys)
    with pytest.raises(ValueError, match=r"query.*NaN|NaN.*query"):
        tattn.best_tol(np.nan * query, keys)


def test_times_as_people_say_them() -> None:
    assert [duration(s) for s in (0.5, 40.0, 720.0, 8000.0, 3 * 86400.0, 1e9)] == [
        "0.5 s",
        "40 s",
        "12 min",
        "2 h",
        "3 d",
        "32 y",
    ]
