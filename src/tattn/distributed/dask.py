"""Attention to Dask arrays: one task a block of rows, and a tree that adds the summaries up.

    blocks of keys and values → a Summary each → sums of `split_every` at a time → one Summary → blocks of queries

Everything is lazy. Blocks come from any source that Dask reads, such as Zarr or ``numpy.memmap``. A task holds a block
of each view and a summary. If a worker is lost, its tasks run again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import dask
import dask.array as da
import numpy as np
from dask.delayed import Delayed
from dask.highlevelgraph import HighLevelGraph

from ..arrays import times_power
from ..backends import Backend, backend_of
from ..bounds.rounding import computed_in
from ..checks import (
    Inputs,
    PlanError,
    checked_broadcast,
    checked_flags,
    checked_inputs,
    checked_of_rows,
    checked_output,
    whole,
)
from ..features.balance import over_largest, raised
from ..plans import Plan
from ..state.summary import Summary, row_gradients
from ..state.summary import summarize as summarize_rows
from ..weights import as_given, check_weights, joined
from .promise import Asked, promised_plan

Pullback = Callable[..., Any]
# Arguments of a number for each row, which may be None.
_OF_ROWS = ("key_masks", "key_weights")


def tensor_attention(
    query: da.Array,
    keys: Sequence[da.Array],
    values: Sequence[da.Array],
    *,
    plan: Plan | None = None,
    bound: float | None = None,
    scale: float | None = None,
    tol: float = 1e-3,
    key_masks: Sequence[da.Array | None] | None = None,
    key_weights: Sequence[da.Array | None] | None = None,
    return_lse: bool = False,
    split_every: int = 8,
) -> Any:
    """`tattn.tensor_attention` of Dask arrays of NumPy blocks, lazily.

    Parameters
    ----------
    query : dask array (..., n, d)
        In blocks of rows; all other dimensions in one block. Blocks may be empty.
    keys : sequence of m dask arrays (..., n_μ, d)
        Also in blocks of rows; views may have different blocks.
    values : sequence of m dask arrays (..., n_μ, dv)
        Rechunked to the blocks of their keys.
    plan : Plan, optional
        Polynomial and not banded, with a promised bound: ``tattn.plan_for(..., bound=...)``.
    bound : float, optional
        Your promise, instead of a plan. One of the two is needed, because no value is read.
    scale, tol
        As in `tattn.tensor_attention`.
    key_masks : boolean dask array (..., n_μ), or sequence of m of them or None, optional
    key_weights : dask array (..., n_μ), or sequence of m of them or None, optional
        As in `tattn.tensor_attention`, where values are not read: what is no weight is NaN.
    return_lse : bool
        Also return log Σ exp of the scores, (..., n).
    split_every : int
        How many summaries a task adds up.

    Returns
    -------
    dask array (..., n, dv), or a tuple of it and lse
        In the query's blocks of rows and dtype.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit, by name, before anything is computed.
    PlanError
        Without plan and bound, if no plan meets `tol`, or for a plan that is exact or banded.

    Notes
    -----
    One task for each block of keys and of queries, and one for every `split_every` summaries. A task sends r (dv + 1)
    numbers for each view, twice, to the next. Its time and memory are those of `tattn.summarize` and
    `tattn.Summary.attend`.
    """
    call = _Call((query, keys, values, key_masks, key_weights), Asked(scale, tol, plan, bound), split_every, return_lse)
    return call.outputs(return_lse)


def tensor_attention_vjp(
    query: da.Array,
    keys: Sequence[da.Array],
    values: Sequence[da.Array],
    *,
    plan: Plan | None = None,
    bound: float | None = None,
    scale: float | None = None,
    tol: float = 1e-3,
    key_masks: Sequence[da.Array | None] | None = None,
    key_weights: Sequence[da.Array | None] | None = None,
    return_lse: bool = False,
    split_every: int = 8,
) -> tuple[Any, Pullback]:
    """Attention of Dask arrays, and a function from the gradient of its output to those of its inputs, lazily.

    Parameters
    ----------
    query, keys, values, plan, bound, scale, tol, key_masks, key_weights, return_lse, split_every
        As in `tensor_attention`.

    Returns
    -------
    out : as from `tensor_attention`
    pullback : callable
        ``pullback(grad_out, grad_lse=None) -> (dquery, dkeys, dvalues)`` of dask arrays, in the blocks of what each is the
        gradient of. With `key_weights` a tuple of their gradients follows, one for each view, None where it has none.

    Raises
    ------
    TypeError, ValueError, PlanError
        As from `tensor_attention`; from the pullback for gradients that do not fit, by name.

    Notes
    -----
    The gradients of the summary are added in a tree, like the summaries. Outputs and gradients that are computed in one
    call, ``dask.compute(out, dquery, ...)``, share the summary. Otherwise it is made again.
    """
    call = _Call((query, keys, values, key_masks, key_weights), Asked(scale, tol, plan, bound), split_every, return_lse)
    return call.outputs(return_lse), call.gradients


class _Call:
    """The arrays of a call in blocks, checked, and its summary as a task."""

    def __init__(self, given: tuple[Any, ...], asked: Asked, every: Any, return_lse: Any) -> None:
        query, keys, values, masks, weights = given
        checked_flags(return_lse=return_lse)
        self.every = whole("split_every", every, 2)
        if isinstance(masks, da.Array) and isinstance(keys, (list, tuple)):
            masks = (masks,) * len(keys)
        if isinstance(weights, da.Array) and isinstance(keys, (list, tuple)):
            weights = (weights,) * len(keys)
        self.inputs = checked_inputs(
            _stand_in("query", query), _stand_ins("keys", keys), _stand_ins("values", values),
            _stand_ins("key_masks", masks), rowless=True,
        )  # fmt: skip
        self.inputs = _with_weights(self.inputs, _stand_ins("key_weights", weights))
        self.plan = _planned(self.inputs, asked)
        self.query, self.keys = query, list(keys)
        self.values = [v.rechunk({v.ndim - 2: k.chunks[-2]}) for v, k in zip(values, self.keys, strict=True)]
        none = [None] * len(self.keys)
        self.weighted = weights is not None
        masks, self.weights = (
            [
                None if x is None else x.rechunk({x.ndim - 1: k.chunks[-2]})
                for x, k in zip(of or none, self.keys, strict=True)
            ]
            for of in (masks, weights)
        )
        # Of every view (keys, values, mask, weights) of each block.
        self.rows, self.powers = [], []
        for k, v, m, w in zip(self.keys, self.values, masks, self.weights, strict=True):
            of_keys, of_values, of_masks, of_weights = (_blocks(x, len(k.chunks[-2])) for x in (k, v, m, w))
            power = None
            if w is not None:
                of_weights = [_task(_joined)(*of) for of in zip(of_weights, of_masks, of_keys, strict=True)]
                top = _tree(_task(_largest), [_task(_largest)([x]) for x in of_weights], self.every)
                power = _task(_power)(top)
                of_weights = [_task(_divided)(x, top) for x in of_weights]
                of_masks = [None] * len(of_masks)
            self.powers.append(power)
            self.rows.append(list(zip(of_keys, of_values, of_masks, of_weights, strict=True)))
        most = max(map(len, self.rows))
        parts = [
            _task(_summarized)(self.plan, *zip(*(r[i] if i < len(r) else (None,) * 4 for r in self.rows), strict=True))
            for i in range(most)
        ]
        self.summary = _tree(_task(_added), parts, self.every)

    def outputs(self, return_lse: bool) -> Any:
        """The output, and lse if asked for."""
        blocks = [
            _task(_attended)(self.summary, q, return_lse, self.powers)
            for q in _blocks(self.query, len(self.query.chunks[-2]))
        ]
        if not return_lse:
            return self._joined(blocks, self.query, self.inputs.value_dim)
        return (
            self._joined([b[0] for b in blocks], self.query, self.inputs.value_dim),
            self._joined([b[1] for b in blocks], self.query, None),
        )

    def gradients(self, grad_out: Any, grad_lse: Any = None) -> tuple[Any, ...]:
        """Gradients of query, keys and values, and of weights if there are any."""
        out, lse = self.outputs(True)
        rows = self.query.chunks[-2]
        upstream: list[list[Any]] = []
        for name, grad, like, axis in (("grad_out", grad_out, out, 2), ("grad_lse", grad_lse, lse, 1)):
            if grad is None and name == "grad_lse":
                upstream.append([None] * len(rows))
                continue
            expected = _stand_in(name, like, axis)
            checked_output(name, _stand_in(name, grad, axis), expected.shape, expected, self.inputs.backend)
            upstream.append(_blocks(grad.rechunk({grad.ndim - axis: rows}), len(rows)))
        pulled = [
            _task(_query_gradients)(self.summary, q, g, g_lse)
            for q, g, g_lse in zip(_blocks(self.query, len(rows)), *upstream, strict=True)
        ]
        dsums = _tree(_task(_sums_added), [p[1] for p in pulled], self.every)
        dkeys, dvalues, dweights = [], [], []
        for view, (of_blocks, k, v) in enumerate(zip(self.rows, self.keys, self.values, strict=True)):
            w, power = self.weights[view], self.powers[view]
            like = None if w is None else w.shape[:-1]
            found = [_task(_row_gradients)(self.plan, view, dsums, block, power, like) for block in of_blocks]
            dkeys.append(_array([p[0] for p in found], k.shape, k.chunks[-2], 2, k.dtype))
            dvalues.append(_array([p[1] for p in found], v.shape, v.chunks[-2], 2, v.dtype))
            dweights.append(None if w is None else _array([p[2] for p in found], w.shape, k.chunks[-2], 1, w.dtype))
        dquery = _array([p[0] for p in pulled], self.query.shape, rows, 2, self.query.dtype)
        grads = dquery, tuple(dkeys), tuple(dvalues)
        return (*grads, tuple(dweights)) if self.weighted else grads

    def _joined(self, blocks: list[Delayed], like: da.Array, columns: int | None) -> da.Array:
        """Blocks (..., rows, columns), or (..., rows) of lse for None, as one array."""
        leading = self.inputs.leading
        rows = like.chunks[-2]
        if columns is None:
            return _array(blocks, (*leading, sum(rows)), rows, 1, np.dtype(computed_in(self.plan.dtype)))
        return _array(blocks, (*leading, sum(rows), columns), rows, 2, like.dtype)


def _with_weights(inputs: Inputs, weights: Any) -> Inputs:
    """The inputs with the dimensions before the rows that weights have; TypeError or ValueError for what are none."""
    keys = inputs.arrays[1 : 1 + inputs.views]
    named = [("the arrays before", inputs.leading)]
    for i, (k, w) in enumerate(zip(keys, checked_of_rows("key_weights", weights, keys, "keys"), strict=True)):
        if w is not None:
            check_weights(f"key_weights[{i}]", w, f"keys[{i}]", k, inputs.backend)
            named.append((f"key_weights[{i}]", tuple(w.shape[:-1])))
    return inputs._replace(leading=checked_broadcast(named))


def _planned(inputs: Inputs, asked: Asked) -> Plan:
    """The plan of a call, which reads no values."""
    if asked.plan is None and asked.bound is None:
        raise PlanError(
            "a call on Dask arrays reads no values, so it needs a plan with a bound that you promise, "
            "plan=tattn.plan_for(..., bound=...), or bound=..."
        )
    made, _ = promised_plan(inputs, asked)
    assert made is not None
    if made.source == "data":
        raise PlanError(
            f"plan rests on the range of other data, which a lazy call does not read: make it a promise of your own, "
            f"bound={made.bound:.4g}"
        )
    return made


def _stand_in(name: str, array: Any, axis: int = 2) -> np.ndarray:
    """An array of the shape and dtype, without memory for it, to check in the place of a dask array."""
    if not isinstance(array, da.Array):
        raise TypeError(f"{name} should be a Dask array, got {type(array).__name__}")
    if type(array._meta) is not np.ndarray:
        raise TypeError(f"{name} should be a Dask array of NumPy blocks, got blocks of {type(array._meta).__name__}")
    if any(n != n for n in array.shape):
        raise ValueError(f"{name} should have blocks of known sizes, got shape {array.shape}: call compute_chunk_sizes")
    for i, chunks in enumerate(array.chunks):
        if i != array.ndim - axis and len(chunks) > 1:
            raise ValueError(
                f"{name} should be in blocks of rows alone, got {len(chunks)} blocks along dimension {i} of shape "
                f"{array.shape}: rechunk({{{i}: -1}})"
            )
    return np.broadcast_to(np.zeros((), array.dtype), array.shape)


def _stand_ins(name: str, arrays: Any) -> Any:
    if not isinstance(arrays, (list, tuple)):
        return None if arrays is None and name in _OF_ROWS else _refused(name, arrays)
    axis = 1 if name in _OF_ROWS else 2
    return [
        None if a is None and name in _OF_ROWS else _stand_in(f"{name}[{i}]", a, axis) for i, a in enumerate(arrays)
    ]


def _refused(name: str, given: Any) -> Any:
    hint = "; a single view goes in a tuple of one" if hasattr(given, "shape") else ""
    raise TypeError(f"{name} should be a list or tuple of arrays, one for each view, got {type(given).__name__}{hint}")


def _task(function: Callable[..., Any]) -> Callable[..., Delayed]:
    """The function as a task, of which equal ones are one."""
    return dask.delayed(function, pure=True)  # type: ignore[no-any-return]


def _blocks(array: da.Array | None, count: int) -> list[Delayed | None]:
    return [None] * count if array is None else list(array.to_delayed().ravel())


def _tree(add: Callable[[list[Delayed]], Delayed], parts: list[Delayed], every: int) -> Delayed:
    """One task of many, by levels of `every`."""
    while len(parts) > 1:
        groups = [parts[i : i + every] for i in range(0, len(parts), every)]
        parts = [add(group) if len(group) > 1 else group[0] for group in groups]
    return parts[0]


def _array(blocks: list[Delayed], shape: tuple[int, ...], rows: tuple[int, ...], axis: int, dtype: Any) -> da.Array:
    """Blocks of rows as one array."""
    at = len(shape) - axis
    name = f"tattn-{dask.base.tokenize(*blocks)}"
    # Not by concatenate, which would leave out empty blocks.
    layer = {(name, *(i if k == at else 0 for k in range(len(shape)))): (_itself, b.key) for i, b in enumerate(blocks)}
    graph = HighLevelGraph.from_collections(name, layer, dependencies=blocks)
    chunks = tuple(rows if k == at else (size,) for k, size in enumerate(shape))
    return da.Array(graph, name, chunks, dtype=dtype, meta=np.empty((0,) * len(shape), dtype))


# What runs on workers.


def _itself(block: np.ndarray) -> np.ndarray:
    return block


def _summarized(plan: Plan, keys: Any, values: Any, masks: Any, weights: Any) -> Summary:
    return summarize_rows(keys, values, plan, key_masks=masks, key_weights=weights)


def _joined(weights: np.ndarray, mask: np.ndarray | None, keys: np.ndarray) -> np.ndarray:
    """Weights (..., n) of a block, 0 where masked and NaN where they are none."""
    column = None if mask is None else mask[..., None]
    return np.asarray(joined(weights[..., None], column, keys, _backend(keys))[..., 0])


def _largest(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The largest number (..., 1) of arrays (..., n), 0 for none; NaN and infinities are left out."""
    tops = [np.max(np.where(np.isfinite(w), w, 0), axis=-1, keepdims=True, initial=0) for w in parts]
    return np.asarray(np.max(np.stack(tops), axis=0))


def _power(top: np.ndarray) -> np.ndarray:
    """log2 of what weights are divided by, (..., 1, 1)."""
    return np.asarray(over_largest(top[..., None], _backend(top))[1])


def _divided(weights: np.ndarray, top: np.ndarray) -> np.ndarray:
    """Weights (..., n) over a power of two of the largest (..., 1) of all blocks."""
    rows = np.concatenate([weights, top], axis=-1)[..., None]
    return np.asarray(over_largest(rows, _backend(weights))[0][..., :-1, 0])


def _backend(array: np.ndarray) -> Backend:
    found = backend_of(array)
    assert found is not None
    return found


def _added(parts: Sequence[Summary]) -> Summary:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _attended(summary: Summary, query: np.ndarray, return_lse: bool, powers: Sequence[np.ndarray | None]) -> Any:
    found = summary.attend(query, return_lse=return_lse)
    some = [p for p in powers if p is not None]
    return (found[0], raised(found[1][..., None], some)[..., 0]) if return_lse and some else found


def _query_gradients(
    summary: Summary, query: np.ndarray, grad_out: np.ndarray, grad_lse: np.ndarray | None
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Gradient of a block of queries, and what its rows add to the gradient of the sums, in float64."""
    _, pullback = summary.attend_vjp(query, return_lse=True)
    dquery, dsums = pullback(grad_out, grad_lse)
    return dquery, tuple(g.astype(np.float64) for g in dsums)


def _sums_added(parts: Sequence[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    return tuple(np.sum(np.stack(of_view), axis=0) for of_view in zip(*parts, strict=True))


def _row_gradients(
    plan: Plan, view: int, dsums: Sequence[np.ndarray], block: Sequence[Any], power: np.ndarray | None, like: Any
) -> tuple[np.ndarray, ...]:
    """(dkeys, dvalues) of a block of one view, and the gradient of its weights (*like, n) if it has any."""
    keys, values, mask, weights = block
    backend, rows = _backend(keys), mask if weights is None else weights
    column = None if rows is None else rows[..., None]
    dsum = dsums[view].astype(computed_in(plan.dtype))
    dkeys, dvalues, *of_weights = row_gradients((keys, values, column), dsum, plan, backend)
    if power is None:
        return dkeys, dvalues
    given = np.empty((*like, keys.shape[-2], 1), keys.dtype)
    return dkeys, dvalues, as_given(times_power(of_weights[0], -power, backend), given, backend)
