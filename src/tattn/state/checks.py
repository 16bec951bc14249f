"""Errors of summaries: what a caller gives them, raised before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..backends import Array, Backend
from ..bounds.rounding import computed_in
from ..checks import (
    PlanError,
    check_device,
    check_library,
    check_mask,
    check_shape,
    checked_array,
    checked_leading,
    checked_masks,
    checked_of_rows,
    checked_sequence,
)
from ..decay import at_the_end, factors_of
from ..operands import View
from ..plans import FACTS, Plan
from ..problem import Problem
from ..weights import check_weights, weights_of_view

# Fields of a plan that only describe the call it was made for: shapes, costs, why. All others have to agree.
_DESCRIPTIVE = {
    "lengths", "value_dim", "leading", "flops_exact", "flops_polynomial", "bytes_exact", "bytes_polynomial", "reason",
    "workers", "bytes_sent", "seconds", "seconds_gradient",
}  # fmt: skip
AGREEING = tuple(name for name in FACTS if name not in _DESCRIPTIVE)


class Views(NamedTuple):
    """Rows of some views, checked; None for a view without new rows. `weights` as they came, (..., n_μ, 1) or None.

    `decays` are factors (..., 1, 1) of every view, () of none.
    """

    backend: Backend
    views: tuple[View | None, ...]
    value_dim: int
    weights: tuple[Array | None, ...]
    decays: tuple[Array, ...] = ()

    def fading(self, decay: Any) -> Views:
        """The same with weights for the last row of each view, where keys before it decay."""
        if decay is None:
            return self
        first = next(view.keys for view in self.views if view is not None)
        shapes = [view.leading for view in self.views if view is not None]
        decays = factors_of(decay, len(self.views), first, np.broadcast_shapes(*shapes), self.backend)
        both = zip(self.views, decays, strict=True)
        views = (None if view is None else at_the_end(view, factor, self.backend) for view, factor in both)
        return self._replace(views=tuple(views), decays=decays)


def check_streams(plan: Any) -> None:
    """PlanError unless summaries of different rows add up under the plan."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan should be a tattn.Plan, got {type(plan).__name__}")
    if plan.method != "polynomial":
        raise PlanError(
            f"plan should be of the polynomial method to summarize, got method {plan.method!r}: {plan.reason}"
        )
    if plan.series == "banded":
        raise PlanError(
            "plan should have one polynomial for all rows to summarize, got series 'banded', which sorts all rows by norm: "
            "give a bound that you promise, tattn.plan_for(..., bound=...)"
        )
    if plan.window is not None:
        raise PlanError(f"plan should have no window to summarize, got {plan.window}: a sum does not forget rows again")


def check_same_plan(plan: Plan, other: Plan) -> None:
    """PlanError that names where two plans differ, shapes and costs aside."""
    for name in AGREEING:
        a, b = getattr(plan, name), getattr(other, name)
        if a != b:
            raise PlanError(f"summaries add up if their plans agree, got {name} {a} and {b}")


def checked_parts(plan: Plan, sums: Any, rests: Any) -> Backend:
    """The backend of a summary's arrays, once they are known to fit the plan: anyone may have put them together."""
    check_streams(plan)
    expected: Any = {"views": plan.order - 1, "rank": plan.rank, "dtype": computed_in(plan.dtype)}
    backend = checked_sums("sums", sums, **expected)
    checked_sums("rests", rests, **expected, like=sums)
    return backend


def checked_views(given: tuple[Any, Any, Any, Any], problem: Problem, sums: Sequence[Array] = ()) -> Views:
    """Rows (keys, values, key_masks, key_weights) for a summary with a plan for this problem; lengths of 0 are allowed.

    `sums`: those they will be added to, if any.
    """
    keys, values, key_masks, key_weights = given
    views, dim = problem.views, problem.dim
    keys, values = checked_sequence("keys", keys), checked_sequence("values", values)
    for name, given in (("keys", keys), ("values", values)):
        if len(given) != views:
            raise ValueError(f"{name} should have one entry for each of the plan's {views} views, got {len(given)}")
    masks = checked_masks(key_masks, keys, "views of the plan")
    weights = checked_of_rows("key_weights", key_weights, keys, "views of the plan")
    if sums:
        like, first, value_dim = "the summary", sums[0], sums[0].shape[-1] - 1
    else:
        found = next(((f"keys[{i}]", k) for i, k in enumerate(keys) if k is not None), None)
        if found is None:
            raise ValueError("keys should hold at least one array, got None alone")
        (like, first), value_dim = found, None
    backend = checked_array(like, first)
    named = [(f"sums[{i}] of the summary", s) for i, s in enumerate(sums)]
    rows: list[View | None] = []
    columns: list[Array | None] = []
    for i, (k, v, mask, w) in enumerate(zip(keys, values, masks, weights, strict=True)):
        if k is None:
            for name, other in (("values", v), ("key_masks", mask), ("key_weights", w)):
                if other is not None:
                    raise ValueError(f"{name}[{i}] should be None, as keys[{i}] is, got {type(other).__name__}")
            rows.append(None)
            columns.append(None)
            continue
        for name, a in ((f"keys[{i}]", k), (f"values[{i}]", v)):
            _planned(name, a, problem.dtype, first, backend, like)
            named.append((name, a))
        if k.shape[-1] != dim:
            raise ValueError(f"keys[{i}] should have the plan's dim {dim} for its last, got shape {tuple(k.shape)}")
        if v.shape[-2] != k.shape[-2]:
            raise ValueError(
                f"values[{i}] should have as many rows as keys[{i}], {k.shape[-2]}, got shape {tuple(v.shape)}"
            )
        if value_dim is None:
            value_dim = v.shape[-1]
        elif v.shape[-1] != value_dim:
            whose = "the summary" if sums else "the values before it"
            raise ValueError(
                f"values[{i}] should have the last dimension of {whose}, {value_dim}, got shape {tuple(v.shape)}"
            )
        if mask is not None:
            check_mask(f"key_masks[{i}]", mask, f"keys[{i}]", k, first, backend)
            mask = mask[..., None]
            named.append((f"key_masks[{i}]", mask))
        if w is not None:
            check_weights(f"key_weights[{i}]", w, f"keys[{i}]", k, backend)
            w = w[..., None]
            named.append((f"key_weights[{i}]", w))
        rows.append(View(k, v, mask))
        columns.append(w)
    checked_leading(named)
    of_views = (None if view is None else _weighed(view, w, backend) for view, w in zip(rows, columns, strict=True))
    return Views(backend, tuple(of_views), value_dim or 0, tuple(columns))


def _weighed(view: View, column: Array | None, backend: Backend) -> View:
    """A view with weights (..., n, 1) in the place of its mask, if there are any."""
    if column is None:
        return view
    (mask,) = backend.run(weights_of_view, None, (view.keys, view.mask, column))
    return view._replace(mask=mask)


def checked_reader(query: Any, sums: Sequence[Array], dim: int, dtype: str) -> Backend:
    """The backend of a query that reads a summary with these sums; it may have no rows."""
    backend = checked_array("sums[0] of the summary", sums[0])
    _planned("query", query, dtype, sums[0], backend, "the summary")
    if query.shape[-1] != dim:
        raise ValueError(f"query should have the plan's dim {dim} for its last, got shape {tuple(query.shape)}")
    checked_leading([*((f"sums[{i}] of the summary", s) for i, s in enumerate(sums)), ("query", query)])
    return backend


def checked_rows(query: Any, keys: Any) -> int:
    """How many rows there are in query and in every view, at least one."""
    checked_array("query", query)
    check_shape("query", query)
    n: int = query.shape[-2]
    for i, k in enumerate(checked_sequence("keys", keys)):
        name = f"keys[{i}]"
        checked_array(name, k)
        check_shape(name, k)
        if k.shape[-2] != n:
            raise ValueError(f"{name} should have as many rows as query, {n}, got shape {tuple(k.shape)}")
    return n


def checked_sums(name: str, sums: Any, *, views: int, rank: int, dtype: str, like: Sequence[Array] = ()) -> Backend:
    """The backend of a summary's sums (..., rank, dv + 1), or of arrays that should have the shapes of those in `like`."""
    sums = checked_sequence(name, sums)
    if len(sums) != views:
        raise ValueError(f"{name} should have one entry for each of the plan's {views} views, got {len(sums)}")
    first = like[0] if like else sums[0]
    backend = checked_array("sums[0]" if like else f"{name}[0]", first)
    for i, s in enumerate(sums):
        _planned(f"{name}[{i}]", s, dtype, first, backend, "the summary")
        shape = tuple(s.shape)
        if like and shape != tuple(like[i].shape):
            raise ValueError(f"{name}[{i}] should have the shape {tuple(like[i].shape)}, got {shape}")
        if shape[-2] != rank or shape[-1] < 2 or shape[-1] != sums[0].shape[-1]:
            raise ValueError(f"{name}[{i}] should have shape (..., {rank}, dv + 1), dv alike for all, got {shape}")
    checked_leading([(f"{name}[{i}]", s) for i, s in enumerate(sums)])
    return backend


def checked_addends(left: Sequence[Array], right: Sequence[Array], backend: Backend) -> None:
    """Sums of two summaries of one plan add up: library, device, dv, and leading dimensions that broadcast."""
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        name = f"sums[{i}] of the summary added"
        check_library(name, b, backend, like="those of the first")
        check_device(name, b, a, backend, "the first's")
        if a.shape[-1] != b.shape[-1]:
            raise ValueError(
                f"{name} should be for values of dv {a.shape[-1] - 1}, as the first, got {b.shape[-1] - 1}"
            )
        checked_leading([(f"sums[{i}]", a), (name, b)])


def _planned(name: str, array: Any, dtype: str, like: Any, backend: Backend, of: str) -> None:
    """An array (..., n, k) of the library and device of `like`, of this dtype; n may be 0."""
    check_library(name, array, backend, of)
    given = backend.dtype_name(array.dtype)
    if given != dtype:
        raise TypeError(f"{name} should have the plan's dtype {dtype}, got {given}")
    check_device(name, array, like, backend, of)
    check_shape(name, array, rowless=True)
