"""Run by torchrun: sharded attention against the whole call, on every rank; what differs is raised."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from leaving import leave
from torch import Tensor

import tattn
from tattn.distributed import plan as group_plan
from tattn.distributed import tensor_attention

DEVICE = torch.device(os.environ.get("TESTED_DEVICE", "cpu"))
CASES: list[dict[str, Any]] = [
    {"views": 1},
    {"views": 2, "dtype": "float32"},
    {"views": 2, "masked": True},
    {"views": 2, "heads": True},
    {"views": 3, "masked": True, "dtype": "float32"},
    {"views": 2, "empty": True},
    {"views": 1, "causal": True, "masked": True},
    {"views": 2, "causal": True, "dtype": "float32"},
    {"views": 2, "causal": True, "masked": True, "heads": True, "empty": True},
    {"views": 2, "causal": True, "rows": 150, "masked": True, "dtype": "float32"},
    {"views": 2, "causal": True, "rows": 60, "heads": True},
    {"views": 3, "causal": True, "more": (0, 4, 2), "masked": True},
    {"views": 2, "causal": True, "more": (3, 1), "empty": True},
    {"views": 2, "causal": True, "rows": 60, "dtype": "bfloat16"},
    {"views": 2, "masked": True, "channels": "complex"},
    {"views": 2, "causal": True, "channels": "complex"},
]


def draw(case: dict[str, Any]) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor | None] | None, Tensor, Tensor]:
    """The whole call, the same on all ranks: query, keys, values, masks, and gradients of output and lse."""
    rng = np.random.default_rng(len(repr(case)))
    views, dtype = case["views"], getattr(torch, case.get("dtype", "float64"))
    heads = (2,) if case.get("heads") else ()

    def tensor(a: np.ndarray) -> Tensor:
        return torch.tensor(a, device=DEVICE, dtype=None if a.dtype == bool else dtype)

    n, dim = case.get("rows", 11), 4 if case.get("channels") else 3
    lengths = [n + more for more in case.get("more", (0,) * views)] if case.get("causal") else [9, 13, 4][:views]
    query = tensor(rng.uniform(-1, 1, (*heads, n, dim)))
    # One head of keys in the first view serves all.
    keys = [tensor(rng.uniform(-1, 1, (*(heads if i else ()), n, dim))) for i, n in enumerate(lengths)]
    values = [tensor(rng.normal(size=(*(heads if i else ()), n, 2))) for i, n in enumerate(lengths)]
    masks: list[Tensor | None] | None = None
    if case.get("masked"):
        seen = [rng.random(length) < 0.7 for length in lengths]
        # Where attention is causal, the first rows see nothing.
        seen[0][: n // 3] &= not case.get("causal")
        masks = [tensor(s) for s in seen]
        masks[-1] = masks[-1] if views == 1 else None
    grad, grad_lse = tensor(rng.normal(size=(*heads, n, 2))), tensor(rng.normal(size=(*heads, n)))
    return query, keys, values, masks, grad, grad_lse


def cuts(n: int, size: int, seed: int, empty: bool) -> list[slice]:
    """Uneven shards of n rows; with `empty`, rank 0 has none and the last all that others leave."""
    rng = np.random.default_rng(seed)
    ends = np.sort(rng.integers(0, n + 1, size - 1))
    if empty:
        ends[: len(ends) // 2 + 1] = 0
    return [slice(int(a), int(b)) for a, b in zip([0, *ends], [*ends, n], strict=True)]


def shards(case: dict[str, Any], lengths: list[int], seed: int) -> list[slice]:
    """This rank's rows of query and views: of one cut if attention is causal, what a view has more being the first rank's."""
    rank, size, empty = dist.get_rank(), dist.get_world_size(), bool(case.get("empty"))
    if not case.get("causal"):
        return [cuts(n, size, seed + i, empty)[rank] for i, n in enumerate(lengths)]
    own = cuts(lengths[0], size, seed, empty)[rank]
    return [slice(own.start + (n - lengths[0] if rank else 0), own.stop + n - lengths[0]) for n in lengths]


def same(got: Tensor, expected: Tensor, case: Any, what: str) -> None:
    tolerance = 1e-12 if got.dtype == torch.float64 else 2e-5
    if got.dtype == torch.bfloat16:
        # One rounding, from numbers of which float32's do not show.
        torch.testing.assert_close(
            got, expected, rtol=2**-7, atol=tolerance, msg=lambda text: f"{what} of {case}: {text}"
        )
        return
    torch.testing.assert_close(
        got, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what} of {case}: {text}"
    )


def gradients(outs: Any, grads: Any, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(outs, inputs, grads))


def plan_of(case: dict[str, Any], query: Tensor) -> tattn.Plan:
    return tattn.plan_for(
        n=9, dim=query.shape[-1], order=case["views"] + 1, bound=1.0, degree=4, dtype=str(query.dtype)[6:],
        causal=bool(case.get("causal")), channels=case.get("channels", "real"),
    )  # fmt: skip


def check(case: dict[str, Any], compiled: bool = False) -> None:
    query, keys, values, masks, grad, grad_lse = draw(case)
    options: dict[str, Any] = {"plan": plan_of(case, query), "causal": bool(case.get("causal")), "return_lse": True}
    whole = [t.requires_grad_() for t in (query, *keys, *values)]
    out, lse = tattn.tensor_attention(query, keys, values, key_masks=masks, **options)
    expected = gradients((out, lse), (grad, grad_lse), whole)

    rows = shards(case, [t.shape[-2] for t in (query, *keys)], 10)
    of_tensors = [rows[0], *rows[1:], *rows[1:]]
    own = [t.detach()[..., r, :].clone().requires_grad_() for t, r in zip(whole, of_tensors, strict=True)]
    own_masks = None if masks is None else [m if m is None else m[r] for m, r in zip(masks, rows[1:], strict=True)]
    m = len(keys)

    def call(*tensors: Tensor) -> Any:
        return tensor_attention(tensors[0], tensors[1 : m + 1], tensors[m + 1 :], key_masks=own_masks, **options)

    function = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    got, got_lse = function(*own)
    here = (..., rows[0], slice(None))
    same(got, out[here], case, "output")
    same(got_lse, lse[..., rows[0]], case, "lse")
    found = gradients((got, got_lse), (grad[here].clone(), grad_lse[..., rows[0]].clone()), own)
    names = ["query", *(f"keys[{i}]" for i in range(m)), *(f"values[{i}]" for i in range(m))]
    for g, e, r, name in zip(found, expected, of_tensors, names, strict=True):
        same(g, e[..., r, :], case, f"gradient of {name}")


def check_weights(case: dict[str, Any], compiled: bool = False) -> None:
    """Weights of rows, far from one, and decay: output, lse and all gradients, with a promise and with a plan from the data."""
    query, keys, values, masks, grad, grad_lse = draw(case)
    rng = np.random.default_rng(3)
    views, causal = len(keys), bool(case.get("causal"))
    options: dict[str, Any] = {"plan": plan_of(case, query), "causal": causal, "return_lse": True}
    least = -12 if query.dtype == torch.float32 else -25
    weights: list[Tensor | None] = [
        torch.tensor(rng.uniform(0, 1, k.shape[:-1]) ** 4 * 10.0 ** (least * (1 + i)), device=DEVICE, dtype=k.dtype)
        for i, k in enumerate(keys)
    ]
    if case.get("unweighted"):
        weights[0] = None
    factors: list[Tensor] = []
    if "decay" in case:
        factors = [torch.tensor(case["decay"], device=DEVICE, dtype=query.dtype, requires_grad=True)]
        options["decay"] = [*factors, 0.9, None][:views]
    if case.get("light"):
        weights = [None] * views
    whole = [t.requires_grad_() for t in (query, *keys, *values)]
    weighted = [w.requires_grad_() for w in weights if w is not None]
    out, lse = tattn.tensor_attention(query, keys, values, key_masks=masks, key_weights=weights, **options)
    expected = gradients((out, lse), (grad, grad_lse), whole + weighted + factors)

    rows = shards(case, [t.shape[-2] for t in (query, *keys)], 10)
    of_tensors = [rows[0], *rows[1:], *rows[1:]]
    own = [t.detach()[..., r, :].clone().requires_grad_() for t, r in zip(whole, of_tensors, strict=True)]
    own_masks = None if masks is None else [m if m is None else m[r] for m, r in zip(masks, rows[1:], strict=True)]
    own_weights = [
        None if w is None else w.detach()[..., r].clone().requires_grad_()
        for w, r in zip(weights, rows[1:], strict=True)
    ]
    given = own[0], own[1 : views + 1], own[views + 1 :]
    counted: dict[str, Any] = {"key_masks": own_masks, "key_weights": own_weights}
    of_weights = [w for w in own_weights if w is not None]

    def call(*tensors: Tensor) -> Any:
        following = iter(tensors[2 * views + 1 :])
        counted = [None if w is None else next(following) for w in own_weights]
        rows = tensors[0], tensors[1 : views + 1], tensors[views + 1 : 2 * views + 1]
        return tensor_attention(*rows, key_masks=own_masks, key_weights=counted, **options)

    function = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    got, got_lse = function(*own, *of_weights)
    here = (..., rows[0], slice(None))
    same(got, out[here], case, "output with weights")
    same(got_lse, lse[..., rows[0]], case, "lse with weights")
    leaves = own + of_weights
    found = gradients((got, got_lse), (grad[here].clone(), grad_lse[..., rows[0]].clone()), leaves + factors)
    for part, e in zip(found[len(leaves) :], expected[len(whole + weighted) :], strict=True):
        # A factor is that of all ranks, and each has a part of its gradient.
        dist.all_reduce(part)
        same(part, e, case, "gradient of a factor")
    for g, e, r in zip(found[: len(own)], expected, of_tensors, strict=False):
        same(g, e[..., r, :], case, "gradient with weights")
    seen = [(w, r) for w, r in zip(weights, rows[1:], strict=True) if w is not None]
    for g, e, (w, r) in zip(found[len(own) :], expected[len(whole) :], seen, strict=False):
        top = w.detach().amax()
        same(g * top, e[..., r] * top, case, "gradient of weights")
    order = {name: options[name] for name in ("causal", "decay") if name in options}
    got, made = tensor_attention(*given, **counted, tol=1e-2, return_plan=True, **order)
    counted = {"key_masks": masks, "key_weights": weights, **order}
    plan = tattn.plan(
        query, keys, values, tol=1e-2, method="polynomial", key_masks=masks, key_weights=weights, causal=causal
    )
    assert (made.degree, made.bound, made.coefficients) == (plan.degree, plan.bound, plan.coefficients)
    out = tattn.tensor_attention(query, keys, values, plan=plan, **counted)
    same(got, out[here], case, "output with weights and a plan of the data")


def check_vanishing() -> None:
    """Rows that have come to weigh nothing are no masked rows: what sees them alone is no number, as on one rank."""
    rows = torch.ones(90, 3, device=DEVICE)
    masks = torch.arange(90, device=DEVICE) < 20
    plan = tattn.plan_for(n=90, dim=3, bound=1.0, degree=2, causal=True)
    (own,) = shards({"causal": True}, [90], 1)
    options: dict[str, Any] = {"plan": plan, "causal": True, "decay": [0.01, 0.01], "return_lse": True}
    out, lse = tensor_attention(rows[own], [rows[own]] * 2, [rows[own]] * 2, key_masks=masks[own], **options)
    whole, whole_lse = tattn.tensor_attention(rows, [rows] * 2, [rows] * 2, key_masks=masks, **options)
    assert whole[:20].isfinite().all() and whole[-20:].isnan().all()
    for found, found_lse in ((out, lse), (whole, whole_lse)):
        seen = found.isfinite()
        same(found[seen], torch.ones_like(found[seen]), "rows that fade", "output")
        assert not found_lse.isinf().any()
    seen = whole_lse[own].isfinite()
    same(lse[seen], whole_lse[own][seen], "rows that fade", "lse")

    del options["decay"]
    light = torch.where(torch.arange(90, device=DEVICE) < 30, 1e-20, 1.0)

    def call(rows: Tensor, weights: Tensor) -> Any:
        return tensor_attention(rows, [rows] * 2, [rows] * 2, key_weights=weights, **options)

    for function in (call, *([torch.compile(call, backend="aot_eager")] if dist.get_world_size() == 2 else [])):
        out, lse = function(rows[own], light[own])
        assert out[max(0, 30 - own.start) :].isfinite().all() and not lse.isinf().any()
        assert own.start or out[:20].isnan().all()


def check_refused_weights() -> None:
    query = torch.ones(3, 3, device=DEVICE)
    ours = {"key_weights": [torch.ones(3, device=DEVICE), None] if dist.get_rank() else None}
    for options, message in (
        ({"decay": [0.5, 0.5]}, "decay should come with causal=True"),
        ({"decay": [0.5, 2.0], "causal": True}, "decay[1] should be from 0 to 1"),
        *(
            (({"causal": True, "decay": [0.5, 0.1 * dist.get_rank()]}, "same decay"),)
            if dist.get_world_size() > 1
            else ()
        ),
        *(((ours, "key weights"),) if dist.get_world_size() > 1 else ()),
    ):
        try:
            tensor_attention(query, [query] * 2, [query] * 2, bound=1.0, tol=0.1, **options)
        except ValueError as found:
            assert message in str(found), found
        else:
            raise AssertionError(f"{message}: not refused")


def check_data_plans() -> None:
    """The plan of all ranks is that of all rows, and one call makes and uses it."""
    rank, size = dist.get_rank(), dist.get_world_size()
    cases: tuple[dict[str, Any], ...] = (
        {"views": 2, "causal": True, "more": (0, 2)},
        {"views": 2},
        {"views": 2, "masked": True, "heads": True},
        {"views": 1, "empty": True},
    )
    for case in cases:
        order = {"causal": bool(case.get("causal"))}
        query, keys, values, masks, *_ = draw(case)
        # The largest row is that of one rank.
        keys[0][..., -1, :] *= 1.7
        whole = tattn.plan(query, keys, values, tol=1e-2, key_masks=masks, method="polynomial", **order)
        rows = shards(case, [t.shape[-2] for t in (query, *keys)], 0)
        own = [query[..., rows[0], :], [k[..., r, :] for k, r in zip(keys, rows[1:], strict=True)]]
        own.append([v[..., r, :] for v, r in zip(values, rows[1:], strict=True)])
        own_masks = None if masks is None else [m if m is None else m[r] for m, r in zip(masks, rows[1:], strict=True)]
        made = group_plan(*own, tol=1e-2, key_masks=own_masks, **order)
        assert made.certified
        for name in ("degree", "bound", "source", "lengths", "coefficients", "error"):
            assert getattr(made, name) == getattr(whole, name), (name, made, whole)
        out = tattn.tensor_attention(query, keys, values, plan=whole, key_masks=masks, **order)[..., rows[0], :]
        for options in ({"tol": 1e-2}, {"plan": made}):
            got, used = tensor_attention(*own, key_masks=own_masks, return_plan=True, **options, **order)
            assert used == made
            same(got, out, case, "output with a plan of the data")
    # Rows beyond the plan on one rank are everyone's error.
    own[1][0] = own[1][0] * (3.0 if rank == size - 1 else 1.0)
    try:
        tensor_attention(*own, plan=made)
    except tattn.PlanError as found:
        assert "plan serves scores up to" in str(found), found
    else:
        raise AssertionError("scores beyond the plan were not refused")


def check_bytes(causal: bool) -> None:
    """What travels does not depend on the number of rows; one sum forward and one backward, or one scan of two exchanges."""
    made: dict[str, Any] = {"n": 9, "dim": 3, "bound": 1.0, "degree": 4, "causal": causal}
    plan = tattn.plan_for(**made)
    seen: list[tuple[str, int]] = []
    plain = {name: getattr(dist, name) for name in ("all_reduce", "all_to_all_single")}

    def counted(name: str) -> Any:
        def call(tensor: Tensor, *rest: Any, **options: Any) -> Any:
            seen.append((name, tensor.numel() * tensor.element_size()))
            return plain[name](tensor, *rest, **options)

        return call

    for name in plain:
        setattr(dist, name, counted(name))
    sent = {}
    try:
        for check_first in (True, False):
            for n in (3, 50, 4000):
                seen.clear()
                rows = (n, n, n, n, n) if causal else (n, n + 1, n + 2, n + 1, n + 2)
                q, a, b, u, v = (torch.zeros(length, 3, device=DEVICE, requires_grad=True) for length in rows)
                out = tensor_attention(q, [a, b], [u, v], plan=plan, check=check_first, causal=causal)
                forward = list(seen)
                seen.clear()
                out.sum().backward()
                sent[check_first, n] = forward, list(seen)
    finally:
        for name, function in plain.items():
            setattr(dist, name, function)
    size = dist.get_world_size()
    # What is given to the sum is what a plan says that a ring of workers sends, but for 2 (p - 1) / p; to each of the two
    # exchanges, (p - 1) / p, and a share of it is whole numbers.
    summaries = 8 * 2 * plan.rank * (3 + 1)
    stated = tattn.plan_for(**made, workers=size).bytes_sent
    assert stated * size == 2 * (size - 1) * summaries
    share = 8 * -(-summaries // (8 * size))
    travels = [("all_to_all_single", share * size)] * 2 if causal else [("all_reduce", summaries)]
    for (check_first, _), (forward, backward) in sent.items():
        # Over gloo, whose sums end the processes where sizes differ, what ranks agree on comes before every sum.
        agreed = [check_first or dist.get_backend() != "nccl", dist.get_backend() != "nccl"]
        for step, first in zip((forward, backward), agreed, strict=True):
            assert step[first:] == travels, step
            assert sum(count for _, count in step[:first]) <= 1024
    assert len({str(v) for (first, _), v in sent.items() if first}) == 1


def check_second_derivatives(case: dict[str, Any]) -> None:
    """By autograd through both sums, against those of the whole call."""
    query, keys, values, _, grad, _ = draw(case)
    options: dict[str, Any] = {"plan": plan_of(case, query), "causal": bool(case.get("causal"))}

    def twice(outs: Tensor, upstream: Tensor, inputs: list[Tensor]) -> list[Tensor]:
        first = torch.autograd.grad(outs, inputs, upstream, create_graph=True)
        return gradients(sum((g * g).sum() for g in first), None, inputs)

    whole = [t.requires_grad_() for t in (query, *keys, *values)]
    expected = twice(tattn.tensor_attention(query, keys, values, **options), grad, whole)
    rows = shards(case, [t.shape[-2] for t in (query, *keys)], 0)
    of_tensors = [rows[0], *rows[1:], *rows[1:]]
    own = [t.detach()[..., r, :].clone().requires_grad_() for t, r in zip(whole, of_tensors, strict=True)]
    out = tensor_attention(own[0], own[1:3], own[3:], **options)
    for got, e, r in zip(twice(out, grad[rows[0]].clone(), own), expected, of_tensors, strict=True):
        same(got, e[..., r, :], "second derivatives", "gradient")


def check_compiled() -> None:
    """One number of processes is enough to compile for."""
    for case in (
        {"views": 2, "masked": True},
        {"views": 2, "heads": True, "dtype": "float32"},
        {"views": 2, "empty": True},
        {"views": 2, "causal": True, "masked": True, "heads": True},
        {"views": 2, "causal": True, "more": (0, 2), "empty": True},
        {"views": 2, "causal": True, "rows": 60, "dtype": "bfloat16"},
    ):
        check(case, compiled=True)
    for case in (
        {"views": 2, "masked": True, "heads": True, "unweighted": True},
        {"views": 2, "causal": True, "rows": 150, "dtype": "float32"},
        {"views": 3, "causal": True, "more": (0, 4, 2), "masked": True, "empty": True},
    ):
        check_weights(case, compiled=True)


def main() -> None:
    backend = "nccl" if DEVICE.type == "cuda" else "gloo"
    if DEVICE.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend, timeout=timedelta(seconds=60))
    for case in CASES:
        check(case)
    for case in (
        {"views": 2},
        {"views": 1, "dtype": "float32"},
        {"views": 2, "masked": True, "heads": True, "unweighted": True},
        {"views": 3, "masked": True, "empty": True},
        {"views": 1, "causal": True, "dtype": "float32"},
        {"views": 2, "causal": True, "masked": True, "heads": True, "unweighted": True},
        {"views": 3, "causal": True, "more": (0, 4, 2), "masked": True, "empty": True},
        {"views": 2, "causal": True, "rows": 150, "decay": 0.97, "dtype": "float32"},
        {"views": 3, "causal": True, "more": (3, 0, 2), "decay": (0.3, 0.0), "heads": True, "masked": True},
        {"views": 2, "causal": True, "channels": "complex", "decay": 1.0, "light": True, "empty": True},
        {"views": 1, "causal": True, "rows": 60, "decay": 0.9, "dtype": "bfloat16"},
    ):
        check_weights(case)
    check_vanishing()
    check_refused_weights()
    check_data_plans()
    for causal in (False, True):
        check_bytes(causal)
    for case in ({"views": 2}, {"views": 2, "causal": True}, {"views": 2, "causal": True, "empty": True}):
        check_second_derivatives(case)
    if dist.get_world_size() == 2:
        check_compiled()
    print(f"rank {dist.get_rank()} of {dist.get_world_size()} has seen {len(CASES)} cases agree")
    leave()


if __name__ == "__main__":
    main()
