"""Run by torchrun: what ranks disagree on is an error on all of them, and the group is none the worse for it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from leaving import leave
from reference import changed

import tattn
from tattn.distributed import plan as group_plan
from tattn.distributed import tensor_attention

PLAN = tattn.plan_for(n=9, dim=3, bound=1.0, degree=4)
CAUSAL = tattn.plan_for(n=9, dim=3, bound=1.0, degree=4, causal=True)


def call(odd: bool, what: str, **further: Any) -> Any:
    """A call in which something is wrong if the rank is the odd one."""
    torch.manual_seed(0)
    q, a, b, u, v = torch.rand(5, 6, 3)
    keys, values, options = [a, b], [u, v], {"plan": PLAN}
    if odd:
        if what == "dim":
            q, keys, options = (
                q[:, :2],
                [k[:, :2] for k in keys],
                {"plan": tattn.plan_for(n=9, dim=2, bound=1.0, degree=4)},
            )
        elif what == "dtype":
            q, keys, values = q.double(), [k.double() for k in keys], [v.double() for v in values]
            options = {"plan": changed(PLAN, dtype="float64")}
        elif what == "value_dim":
            values = [v[:, :1] for v in values]
        elif what == "views":
            keys, values, options = (
                keys[:1],
                values[:1],
                {"plan": tattn.plan_for(n=9, dim=3, bound=1.0, degree=4, order=2)},
            )
        elif what == "degree":
            options = {"plan": tattn.plan_for(n=9, dim=3, bound=1.0, degree=3)}
        elif what == "bound":
            options = {"plan": tattn.plan_for(n=9, dim=3, bound=0.9, degree=4)}
        elif what == "coefficients":
            options = {"plan": changed(PLAN, coefficients=(1.0, 1.0, 0.5, 0.1, 0.1))}
        elif what == "no plan":
            options = {}
        elif what == "leading":
            keys = [keys[0].expand(2, 6, 3), keys[1]]
        elif what == "gradients":
            values[0].requires_grad_()
        elif what == "tol":
            options = {"tol": 1e-2}
        elif what == "causal":
            options = {"plan": CAUSAL, "causal": True}
        elif what == "not aligned":
            keys[1], values[1], options = keys[1][:4], values[1][:4], {"plan": CAUSAL, "causal": True}
        elif what == "more keys":
            q, options = q[:4], {"plan": CAUSAL, "causal": True}
        elif what == "another plan":
            options = {"plan": PLAN, "causal": True}
        elif what == "own":
            values[1] = values[1][:4]
        elif what == "list":
            keys[0] = keys[0].tolist()  # type: ignore[assignment]
    elif what == "tol":
        options = {}
    elif what in ("not aligned", "more keys", "another plan"):
        options = {"plan": CAUSAL, "causal": True}
    return tensor_attention(q, keys, values, **options, **further)


def good() -> None:
    q = torch.rand(4, 3)
    out = tensor_attention(q, [q, q], [torch.ones(4, 3)] * 2, plan=PLAN)
    torch.testing.assert_close(out, torch.ones(4, 3))
    out = tensor_attention(q, [q, q], [torch.ones(4, 3)] * 2, plan=CAUSAL, causal=True)
    torch.testing.assert_close(out, torch.ones(4, 3))


def refused(error: type, text: str, function: Any) -> None:
    try:
        function()
    except Exception as found:
        assert type(found) is error and text in str(found), f"{error.__name__}: {text} expected, got {found!r}"
    else:
        raise AssertionError(f"{text!r} expected, nothing was raised")


def main() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    rank, size = dist.get_rank(), dist.get_world_size()
    last = size - 1
    everywhere = [
        ("dim", ValueError, f"same dim, got {2 if rank == last else 3} on rank {rank} of {size}, 2 to 3 over all"),
        ("dtype", ValueError, f"same dtype, got {'float64' if rank == last else 'float32'} on rank"),
        ("value_dim", ValueError, f"same dv, got {1 if rank == last else 3} on rank"),
        ("views", ValueError, f"same number of views, got {1 if rank == last else 2} on rank"),
        ("degree", tattn.PlanError, f"same degree of the plan, got {3 if rank == last else 4} on rank"),
        ("bound", tattn.PlanError, f"same bound of the plan, got {0.9 if rank == last else 1.0} on rank"),
        ("coefficients", tattn.PlanError, "same coefficients of the plan, got ("),
        ("no plan", tattn.PlanError, "same plan or none, got"),
        ("leading", ValueError, "same leading dimensions, got"),
        ("gradients", ValueError, f"same need of gradients, got {rank == last} on rank"),
        ("causal", ValueError, f"same causal, got {rank == last} on rank"),
        ("tol", ValueError, f"same tol, got {0.01 if rank == last else 0.001} on rank"),
    ]
    for what, error, text in everywhere:
        refused(error, text, lambda what=what: call(rank == last, what))
        good()
        # Sums of gloo end the process where sizes differ: ranks agree without being asked to.
        refused(error, text, lambda what=what: call(rank == last, what, check=False))
        good()
    for what, error, text in (
        ("own", ValueError, "values[1] should have as many rows as keys[1], 6"),
        ("list", TypeError, "keys[0] should be an array"),
        ("not aligned", ValueError, "keys[1] should have at least as many rows as query, 6, where attention is causal"),
        (
            "more keys",
            ValueError,
            "keys[0] should have as many rows as query, 4, on every rank but the first where attention is causal: the last "
            f"rows of all are aligned; got 6 on rank {last}",
        ),
        ("another plan", tattn.PlanError, "plan was made for causal False, the call has causal True"),
    ):
        if rank != last:
            error, text = ValueError, f"rank {last} of {size} refused its arguments, and all ranks stop with it"
        for check in (True, False):
            refused(error, text, lambda what=what, check=check: call(rank == last, what, check=check))
            good()

    # One rank in a backward pass, while the others go on: an error on all of them, and no lasting one.
    rows = torch.rand(4, 3, requires_grad=True)
    for options in ({"plan": PLAN}, {"plan": CAUSAL, "causal": True}):
        for check in (True, False):
            out = tensor_attention(rows, [rows, rows], [rows, rows], **options, check=check)
            where = "backward" if rank == last else "forward"
            refused(ValueError, f"same pass, got {where} on rank {rank}", out.sum().backward if rank == last else good)
            good()

    # The same wrong on all ranks: each says so, and no one waits.
    q = torch.rand(4, 3)
    on_all: list[tuple[type, str, Any]] = [
        (tattn.PlanError, "plan should be of the polynomial method", {"plan": tattn.plan_for(n=3, dim=3, bound=1.0)}),
        (tattn.PlanError, "series 'banded'", {"plan": tattn.plan_for(n=99, dim=3, series="banded", degree=2)}),
        (ValueError, "bound cannot be combined with a plan", {"plan": PLAN, "bound": 1.0}),
        (TypeError, "causal should be True or False, got int", {"plan": CAUSAL, "causal": 1}),
        (tattn.PlanError, "plan was made for causal True, the call has causal False", {"plan": CAUSAL}),
        (
            tattn.PlanError,
            "plan should have no window to summarize, got (3, 3): a sum does not forget rows again",
            {"plan": tattn.plan_for(n=9, dim=3, bound=1.0, degree=3, window=(3, 3)), "causal": True},
        ),
        (tattn.PlanError, "plan was made for scale", {"plan": PLAN, "scale": 2.0}),
        (ValueError, "bound should be finite and above 0", {"bound": -1.0}),
        (tattn.PlanError, "the polynomial method cannot meet tol", {"tol": 1e-9}),
        (tattn.PlanError, "the polynomial method cannot meet tol", {"tol": 1e-9, "bound": 1.0}),
        (TypeError, "group should be a ProcessGroup", {"plan": PLAN, "group": "all"}),
        (TypeError, "check should be True or False, got str", {"plan": PLAN, "check": "no"}),
        (TypeError, "return_lse should be True or False, got int", {"plan": PLAN, "return_lse": 1}),
        (TypeError, "return_plan should be True or False, got NoneType", {"plan": PLAN, "return_plan": None}),
    ]
    for error, text, options in on_all:
        refused(error, text, lambda options=options: tensor_attention(q, [q, q], [q, q], **options))
        good()
    # One NaN on one rank.
    poor = q.clone()
    poor[1, 1] = torch.nan if rank == last else 0.0
    refused(ValueError, "keys[1] should hold finite numbers, got NaN", lambda: group_plan(q, [q, poor], [q, q]))
    refused(ValueError, "values[0] should hold finite numbers, got NaN", lambda: tensor_attention(q, [q, q], [poor, q]))
    good()
    poor[1, 1] = torch.inf if rank == last else 0.0
    refused(ValueError, "query should hold finite numbers, got infinity", lambda: group_plan(poor, [q, q], [q, q]))
    good()
    # A group without this rank.
    group = dist.new_group([last])
    if rank != last:
        refused((ValueError if group is not dist.GroupMember.NON_GROUP_MEMBER else TypeError), "group should",
                lambda: tensor_attention(q, [q, q], [q, q], plan=PLAN, group=group))  # fmt: skip
    else:
        tensor_attention(q, [q, q], [q, q], plan=PLAN, group=group)
    good()
    print(f"rank {rank} of {size} has seen all refusals")
    leave()


if __name__ == "__main__":
    main()
