"""The plan of a call whose rows are spread: one that was given, or one for the caller's bound. No values are read."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..checks import Inputs, checked_options, positive
from ..planning import plan_for
from ..planning.choice import check_kind
from ..plans import Plan
from ..state.checks import check_streams


class Asked(NamedTuple):
    """The options of a call whose rows are spread, as the caller gave them."""

    scale: Any
    tol: Any
    plan: Any = None
    bound: Any = None
    degree: Any = None
    causal: Any = False


def promised_plan(inputs: Inputs, asked: Asked) -> tuple[Plan | None, float]:
    """The plan, None if neither it nor a bound was given, and the scale; errors name what does not fit."""
    scale, tol, plan, bound, *_ = asked
    if plan is not None:
        if bound is not None:
            raise ValueError("bound cannot be combined with a plan, which has its own")
        check_streams(plan)
        number = checked_options(plan.scale if scale is None else scale, inputs.dim, tol, inputs.views, inputs.dtype)
        # The plan says what channels are.
        check_kind(plan, inputs._replace(channels=plan.channels), number, "polynomial")
        return plan, number
    number = checked_options(scale, inputs.dim, tol, inputs.views, inputs.dtype)
    if bound is None:
        return None, number
    promised = plan_for(
        n=[max(1, n) for n in inputs.lengths], dim=inputs.dim, bound=positive("bound", bound), order=inputs.views + 1,
        tol=tol, dtype=inputs.dtype, scale=number, value_dim=inputs.value_dim, method="polynomial",
        causal=inputs.order.causal,
    )  # fmt: skip
    return promised, number
