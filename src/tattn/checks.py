"""Every error that a caller can cause, raised in one place and before anything is computed."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from math import inf, isfinite, log2, prod
from typing import Any, NamedTuple

import numpy as np

from .backends import Array, Backend, backend_of
from .operands import Order
from .problem import Problem

METHODS = ("auto", "polynomial", "exact")
SERIES = ("minimax", "taylor", "banded")
# No array has as many rows or channels.
LARGEST = (1 << 63) - 1
# Arrays have as many dimensions at most, and norm bands need one for each view.
MAX_ORDER = 64
# Up to this p the powers 2^p, 2^−p and half of them are normal numbers: some libraries take smaller ones for 0.
LARGEST_POWER = {"float64": 1021, "float32": 125, "float16": 125, "bfloat16": 125}
FLOATS = ("float16", "bfloat16", "float32", "float64")
# What computes adds some dimensions of its own, and NumPy broadcasts arrays of at most 32.
_MOST_DIMENSIONS = 24


class PlanError(ValueError):
    """No plan meets what was asked for, or a plan does not fit the call that it is used for."""


class Inputs(NamedTuple):
    """The arrays of a call, checked."""

    backend: Backend
    arrays: tuple[Array | None, ...]  # query, *keys, *values, *masks; masks (..., n, 1) or None
    views: int
    dim: int
    value_dim: int
    dtype: str
    lengths: tuple[int, ...]  # n, n_1, …, n_m
    leading: tuple[int, ...]
    traced: bool
    order: Order

    def problem(self, scale: float) -> Problem:
        """What a plan needs to know of them."""
        batch = prod(self.leading)
        return Problem(
            self.views, self.dim, self.value_dim, self.dtype, self.lengths, batch, scale, self.order, self.backend.chain
        )


def checked_inputs(
    query: Any,
    keys: Any,
    values: Any,
    key_masks: Any,
    causal: Any = False,
    window: Any = None,
    *,
    rowless: bool = False,
) -> Inputs:
    """The arrays of a call; `values` may be None, and rows none at all if `rowless`. TypeError or ValueError names the argument."""
    backend = checked_array("query", query)
    lengthless = backend.why_lengthless()
    if lengthless:
        raise TypeError(f"query should have a shape of whole numbers, got {lengthless}")
    keys = _sequence("keys", keys)
    if len(keys) >= MAX_ORDER:
        raise ValueError(f"keys should be at most {MAX_ORDER - 1} arrays, got {len(keys)}")
    valued = values is not None
    if not valued:
        values = (None,) * len(keys)
    else:
        values = _sequence("values", values)
        if len(keys) != len(values):
            raise ValueError(f"keys and values should be as many, got {len(keys)} keys and {len(values)} values")
    if key_masks is None:
        masks: tuple[Any, ...] = (None,) * len(keys)
    else:
        masks = _sequence("key_masks", key_masks)
        if len(masks) != len(keys):
            raise ValueError(f"key_masks should have one entry for each of the {len(keys)} keys, got {len(masks)}")

    named = [("query", query)]
    named += [(f"keys[{i}]", k) for i, k in enumerate(keys)]
    named += [(f"values[{i}]", v) for i, v in enumerate(values) if valued]
    for name, a in named:
        _same_library(name, a, backend)
        _floating(name, a, query, backend)
        _shape(name, a, rowless)
    dim = query.shape[-1]
    for i, k in enumerate(keys):
        if k.shape[-1] != dim:
            raise ValueError(f"keys[{i}] should have the query's last dimension {dim}, got shape {tuple(k.shape)}")
    for i, (k, v) in enumerate(zip(keys, values, strict=True)):
        if not valued:
            break
        if v.shape[-2] != k.shape[-2]:
            raise ValueError(
                f"values[{i}] should have as many rows as keys[{i}], {k.shape[-2]}, got shape {tuple(v.shape)}"
            )
        if v.shape[-1] != values[0].shape[-1]:
            raise ValueError(
                f"values[{i}] should have the last dimension of values[0], {values[0].shape[-1]}, "
                f"got shape {tuple(v.shape)}"
            )
    columns = []
    for i, (k, mask) in enumerate(zip(keys, masks, strict=True)):
        if mask is not None:
            _mask(f"key_masks[{i}]", mask, f"keys[{i}]", k, query, backend)
            named.append((f"key_masks[{i}]", mask[..., None]))
            mask = mask[..., None]
        columns.append(mask)
    leading = _leading(named)
    arrays = (query, *keys, *values, *columns)
    lengths = tuple(a.shape[-2] for a in (query, *keys))
    return Inputs(
        backend=backend,
        arrays=arrays,
        views=len(keys),
        dim=dim,
        value_dim=values[0].shape[-1] if valued else dim,
        dtype=backend.dtype_name(query.dtype),
        lengths=lengths,
        leading=leading,
        traced=backend.is_traced([a for a in arrays if a is not None]),
        order=checked_order(causal, window, lengths),
    )


def checked_options(scale: Any, dim: int, tol: Any, method: Any, views: int, dtype: str) -> float:
    """The scale as a float; ValueError names the option."""
    checked_method(method)
    positive("tol", tol)
    if scale is None:
        return 1 / dim
    number = positive("scale", scale)
    most = LARGEST_POWER[dtype] * (views + 1) - 1
    if abs(log2(number)) > most:
        raise ValueError(f"scale should be from 2**-{most} to 2**{most} for {dtype} and {views} views, got {scale}")
    return number


def checked_order(causal: Any, window: Any, lengths: Sequence[int]) -> Order:
    """`causal` and `window` for a call with lengths (n, n_1, …, n_m); a window implies causal."""
    causal = true_or_false("causal", causal)
    views = len(lengths) - 1
    if window is not None:
        if not isinstance(window, (list, tuple)):
            raise TypeError(
                f"window should be a list or tuple of {views} whole numbers, one for each view, got {type(window).__name__}"
            )
        if len(window) != views:
            raise ValueError(f"window should have one number for each of the {views} views, got {len(window)}")
        window = tuple(whole(f"window[{i}]", w, 1) for i, w in enumerate(window))
    if not causal and window is None:
        return Order()
    for i, length in enumerate(lengths[1:]):
        if length < lengths[0]:
            raise ValueError(
                f"keys[{i}] should have at least as many rows as query, {lengths[0]}, where attention is causal: the last "
                f"rows are aligned, and with {length} the first {lengths[0] - length} rows of query would see none"
            )
    return Order(True, window)


def checked_lengths(n: Any, order: int) -> tuple[int, ...]:
    """Rows (n, n_1, …) from one number for all or from `order` of them."""
    if not isinstance(n, Sequence):
        return (whole("n", n, 1),) * order
    if len(n) != order:
        raise ValueError(f"n should be a number or {order} of them for order {order}, got {len(n)}")
    return tuple(whole(f"n[{i}]", x, 1) for i, x in enumerate(n))


def positive(name: str, value: Any) -> float:
    """A finite number above 0 as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} should be a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = inf
    if not (isfinite(number) and number > 0):
        raise ValueError(f"{name} should be finite and above 0, got {shown(value)}")
    return number


def whole(name: str, value: Any, least: int, most: float = LARGEST) -> int:
    """A whole number of at least `least` and at most `most`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} should be a whole number, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} should be at least {least}, got {shown(value)}")
    if value > most:
        raise ValueError(f"{name} should be at most {most:,}, got {shown(value)}")
    return int(value)


def shown(number: Any, form: str = "") -> str:
    """A number for an error, one of very many digits by its size alone."""
    if not isinstance(number, int) or abs(number) < 10**20:
        return f"{number:{form}}"
    # Python refuses to write numbers of thousands of digits.
    return f"about {'-' * (number < 0)}10^{(abs(number).bit_length() - 1) * 0.30103:.0f}"


def true_or_false(name: str, value: Any) -> bool:
    """A bool, and nothing that only counts as one."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} should be True or False, got {type(value).__name__}")
    return bool(value)


def checked_flags(**given: Any) -> None:
    """TypeError that names the first which is no bool."""
    for name, value in given.items():
        true_or_false(name, value)


def checked_dtype(dtype: Any) -> str:
    """ValueError if it is not the name of a dtype that is computed in."""
    if not isinstance(dtype, str) or dtype not in FLOATS:
        raise ValueError(f"dtype should be 'float64', 'float32', 'float16' or 'bfloat16', got {described(dtype)}")
    return dtype


def checked_kind(name: str, value: Any, kind: type, what: str) -> None:
    """TypeError unless the value is of this class, which `what` says."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} should be {what}, got {type(value).__name__}")


def checked_finite(largest: Sequence[float], views: int) -> None:
    """ValueError if the largest entry of query, keys or values is not a finite number."""
    names = ["query", *(f"keys[{i}]" for i in range(views)), *(f"values[{i}]" for i in range(views))]
    checked_entries(dict(zip(names, largest, strict=True)))


def checked_entries(largest: Mapping[str, float]) -> None:
    """ValueError that names the first array whose largest entry is not a finite number."""
    for name, value in largest.items():
        if not isfinite(value):
            raise ValueError(
                f"{name} should hold finite numbers, got {'NaN' if value != value else 'infinity'} among them"
            )


def checked_output(
    name: str, array: Any, shape: Sequence[int], like: Array, backend: Backend, of: str = "the output"
) -> Array:
    """An output or its gradient: the library, dtype and device of `like`, which `of` names, and the shape of the output."""
    _same_library(name, array, backend, like=of)
    _floating(name, array, like, backend, like=of)
    if tuple(array.shape) != tuple(shape):
        raise ValueError(f"{name} should have the shape of the output, {tuple(shape)}, got {tuple(array.shape)}")
    return array


def warn_caller(text: str) -> None:
    """Warn at the first line outside of the package that led here."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


class Views(NamedTuple):
    """Rows of some views, checked: (keys, values, mask (..., n, 1) or None), or None for a view without new rows."""

    backend: Backend
    views: tuple[tuple[Array, Array, Array | None] | None, ...]
    value_dim: int


def checked_views(
    keys: Any, values: Any, key_masks: Any, *, views: int, dim: int, dtype: str, sums: Sequence[Array] = ()
) -> Views:
    """Rows for a summary of so many views; lengths of 0 are allowed. `sums` are those they will be added to, if any."""
    keys, values = _sequence("keys", keys), _sequence("values", values)
    masks = (None,) * views if key_masks is None else _sequence("key_masks", key_masks)
    for name, given in (("keys", keys), ("values", values), ("key_masks", masks)):
        if len(given) != views:
            raise ValueError(f"{name} should have one entry for each of the plan's {views} views, got {len(given)}")
    if sums:
        like, first, value_dim = "the summary", sums[0], sums[0].shape[-1] - 1
    else:
        found = next(((f"keys[{i}]", k) for i, k in enumerate(keys) if k is not None), None)
        if found is None:
            raise ValueError("keys should hold at least one array, got None alone")
        (like, first), value_dim = found, None
    backend = checked_array(like, first)
    named = [(f"sums[{i}] of the summary", s) for i, s in enumerate(sums)]
    rows: list[tuple[Array, Array, Array | None] | None] = []
    for i, (k, v, mask) in enumerate(zip(keys, values, masks, strict=True)):
        if k is None:
            for name, other in (("values", v), ("key_masks", mask)):
                if other is not None:
                    raise ValueError(f"{name}[{i}] should be None, as keys[{i}] is, got {type(other).__name__}")
            rows.append(None)
            continue
        for name, a in ((f"keys[{i}]", k), (f"values[{i}]", v)):
            _planned(name, a, dtype, first, backend, like)
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
            _mask(f"key_masks[{i}]", mask, f"keys[{i}]", k, first, backend)
            mask = mask[..., None]
            named.append((f"key_masks[{i}]", mask))
        rows.append((k, v, mask))
    _leading(named)
    return Views(backend, tuple(rows), value_dim or 0)


def checked_reader(query: Any, sums: Sequence[Array], dim: int, dtype: str) -> Backend:
    """The backend of a query that reads a summary with these sums; it may have no rows."""
    backend = checked_array("sums[0] of the summary", sums[0])
    _planned("query", query, dtype, sums[0], backend, "the summary")
    if query.shape[-1] != dim:
        raise ValueError(f"query should have the plan's dim {dim} for its last, got shape {tuple(query.shape)}")
    _leading([*((f"sums[{i}] of the summary", s) for i, s in enumerate(sums)), ("query", query)])
    return backend


def checked_token(query: Any, keys: Any) -> None:
    """One row in query and in every view."""
    for name, a in (("query", query), *((f"keys[{i}]", k) for i, k in enumerate(_sequence("keys", keys)))):
        checked_array(name, a)
        if a.ndim < 2 or a.shape[-2] != 1:
            raise ValueError(
                f"{name} should have shape (..., 1, channels), one row for the token, got {tuple(a.shape)}"
            )


def checked_sums(name: str, sums: Any, *, views: int, rank: int, dtype: str, like: Sequence[Array] = ()) -> Backend:
    """The backend of a summary's sums (..., rank, dv + 1), or of arrays that should have the shapes of those in `like`."""
    sums = _sequence(name, sums)
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
    _leading([(f"{name}[{i}]", s) for i, s in enumerate(sums)])
    return backend


def checked_addends(left: Sequence[Array], right: Sequence[Array], backend: Backend) -> None:
    """Sums of two summaries of one plan add up: library, device, dv, and leading dimensions that broadcast."""
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        name = f"sums[{i}] of the summary added"
        _same_library(name, b, backend, like="those of the first")
        _device(name, b, a, backend, "the first's")
        if a.shape[-1] != b.shape[-1]:
            raise ValueError(
                f"{name} should be for values of dv {a.shape[-1] - 1}, as the first, got {b.shape[-1] - 1}"
            )
        _leading([(f"sums[{i}]", a), (name, b)])


# Which lengths agree in the training problem: rows (-2) or columns (-1) of one matrix with those of another before it.
_AGREEING = (
    ("a4", -2, "a2", -2), ("a5", -2, "a3", -2), ("e", -2, "a1", -2),
    ("x1", -2, "a1", -1), ("x2", -2, "a2", -1), ("x3", -2, "a3", -1), ("y1", -2, "a4", -1), ("y2", -2, "a5", -1),
    ("x2", -1, "x1", -1), ("x3", -1, "x1", -1), ("y2", -1, "y1", -1), ("e", -1, "y1", -1),
)  # fmt: skip
_AXES = {-2: "rows", -1: "columns"}


def checked_problem(matrices: Mapping[str, Any]) -> Backend:
    """The backend of a training problem's matrices by name, a1 first; TypeError or ValueError names the matrix."""
    first = matrices["a1"]
    backend = checked_array("a1", first)
    for name, matrix in matrices.items():
        _same_library(name, matrix, backend, like="a1")
        _floating(name, matrix, first, backend, like="a1")
        _shape(name, matrix)
    for name, axis, other, other_axis in _AGREEING:
        expected = matrices[other].shape[other_axis]
        if matrices[name].shape[axis] != expected:
            raise ValueError(
                f"{name} should have as many {_AXES[axis]} as {other} has {_AXES[other_axis]}, {expected}, "
                f"got shape {tuple(matrices[name].shape)}"
            )
    _leading(list(matrices.items()))
    return backend


def checked_upstream(upstream: Any, matrices: Mapping[str, Any], backend: Backend) -> None:
    """The gradient of a training problem's output: (..., n, dv), with leading dimensions that broadcast."""
    first, rows = matrices["a1"], tuple(matrices["e"].shape[-2:])
    _same_library("upstream", upstream, backend, like="a1")
    _floating("upstream", upstream, first, backend, like="a1")
    _shape("upstream", upstream)
    if tuple(upstream.shape[-2:]) != rows:
        raise ValueError(f"upstream should have shape (..., {rows[0]}, {rows[1]}), got {tuple(upstream.shape)}")
    _leading([*matrices.items(), ("upstream", upstream)])


def checked_layer_call(
    x: Any,
    contexts: Any,
    key_masks: Any,
    embed_dim: int,
    context_dims: Sequence[int],
    *,
    like: Array,
    backend: Backend,
    dtypes: Sequence[str] = FLOATS,
) -> tuple[tuple[Array, ...], tuple[Array | None, ...] | None]:
    """Contexts and masks of a layer's call, one for each view; library and device are those of the weights, `like`.

    `dtypes` are those that go with the weights.
    """
    views = len(context_dims)
    named = [("x", x, embed_dim)]
    if contexts is not None:
        given = _sequence("contexts", contexts)
        if len(given) != views:
            raise ValueError(f"contexts should be {views}, one for each view, got {len(given)}")
        named += [(f"contexts[{i}]", c, width) for i, (c, width) in enumerate(zip(given, context_dims, strict=True))]
    elif set(context_dims) != {embed_dim}:
        raise ValueError(f"contexts should be given, with {', '.join(map(str, context_dims))} channels, got None")
    for name, a, width in named:
        _same_library(name, a, backend, like="the weights")
        dtype = backend.dtype_name(a.dtype)
        if dtype not in FLOATS:
            raise TypeError(f"{name} should have a dtype of {', '.join(FLOATS)}, got {dtype}")
        if dtype not in dtypes:
            raise TypeError(f"{name} should have the weights' dtype {backend.dtype_name(like.dtype)}, got {dtype}")
        _device(name, a, like, backend, like="the weights")
        _shape(name, a)
        if a.shape[-1] != width:
            raise ValueError(f"{name} should have {width} channels, got shape {tuple(a.shape)}")
    attended = (x,) * views if contexts is None else tuple(contexts)
    leading = [(name, a) for name, a, _ in named]
    masks: tuple[Any, ...] | None = None
    if key_masks is not None:
        alone = not isinstance(key_masks, (list, tuple)) and backend_of(key_masks) is not None
        if alone and contexts is not None:
            raise TypeError("key_masks should be a list or tuple of arrays, one for each context, got a single one")
        masks = (key_masks,) * views if alone else _sequence("key_masks", key_masks)
        if len(masks) != views:
            raise ValueError(f"key_masks should have one entry for each of the {views} views, got {len(masks)}")
        for i, (mask, a) in enumerate(zip(masks, attended, strict=True)):
            if mask is not None:
                name = "key_masks" if alone else f"key_masks[{i}]"
                _mask(name, mask, "x" if contexts is None else f"contexts[{i}]", a, like, backend)
                leading.append((name, mask[..., None]))
    _leading(leading)
    return attended, masks


def checked_parameters(params: Any, shapes: Mapping[str, tuple[int, ...]], backend: Backend) -> None:
    """A dict of floating arrays of a library with just these names and shapes."""
    if not isinstance(params, dict):
        raise TypeError(f"params should be a dict of arrays, got {type(params).__name__}")
    for name, shape in shapes.items():
        if name not in params:
            raise ValueError(f"params should have {name!r}, got {', '.join(map(repr, params))}")
        found = checked_array(f"params[{name!r}]", params[name])
        if found is not backend:
            raise TypeError(f"params[{name!r}] should be an array of {backend.name}, got one of {found.name}")
        dtype = backend.dtype_name(params[name].dtype)
        if dtype not in FLOATS:
            raise TypeError(f"params[{name!r}] should have a dtype of {', '.join(FLOATS)}, got {dtype}")
        if tuple(params[name].shape) != shape:
            raise ValueError(f"params[{name!r}] should have shape {shape}, got {tuple(params[name].shape)}")
    for name in params:
        if name not in shapes:
            raise ValueError(f"params should have nothing but {', '.join(map(repr, shapes))}, got {name!r}")


def checked_method(method: Any) -> str:
    """ValueError if there is no such method."""
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method should be one of {', '.join(map(repr, METHODS))}, got {described(method)}")
    return method


def checked_series(series: Any) -> str:
    """ValueError if there is no such series."""
    if not isinstance(series, str) or series not in SERIES:
        raise ValueError(f"series should be one of {', '.join(map(repr, SERIES))}, got {described(series)}")
    return series


def factors(name: str, matrices: Any) -> list[tuple[str, Any, int]]:
    """The matrices of a list or tuple as (name, array, number of its own dimensions)."""
    return [(f"{name}[{i}]", a, 2) for i, a in enumerate(_sequence(name, matrices, "factor"))]


def checked_factors(named: Sequence[tuple[str, Any, int]]) -> Backend:
    """Backend of the (name, array, number of its own dimensions) of a product; all further dimensions broadcast."""
    like, first, _ = named[0]
    backend = checked_array(like, first)
    for name, a, own in named:
        _same_library(name, a, backend, like)
        _floating(name, a, first, backend, like)
        shape = tuple(a.shape)
        if len(shape) < own:
            dimensions = "dimension" if own == 1 else "dimensions"
            raise ValueError(f"{name} should have at least {own} {dimensions}, got shape {shape}")
        _not_empty(name, shape)
    _together([(name, tuple(a.shape[: a.ndim - own])) for name, a, own in named])
    return backend


def checked_length(name: str, array: Any, axis: int, length: int, of: str) -> None:
    """ValueError unless the array has so many rows (axis −2) or columns (axis −1), as many as `of` says."""
    if array.shape[axis] != length:
        what = "columns" if axis == -1 else "rows"
        raise ValueError(f"{name} should have {length} {what}, as many as {of}, got shape {tuple(array.shape)}")


def checked_alike(matrices: Any, axis: int) -> Backend:
    """Backend of matrices with the same number of rows (axis −2) or columns (axis −1)."""
    named = factors("matrices", matrices)
    backend = checked_factors(named)
    for name, a, _ in named:
        checked_length(name, a, axis, matrices[0].shape[axis], "matrices[0]")
    return backend


def checked_pairs(left: Any, right: Any) -> Backend:
    """Backend of two lists of matrices: as many, the rows alike in each pair, the columns alike in each list."""
    named = factors("left", left), factors("right", right)
    if len(left) != len(right):
        raise ValueError(f"left and right should be as many, got {len(left)} left and {len(right)} right")
    backend = checked_factors([*named[0], *named[1]])
    for side in named:
        for name, a, _ in side:
            checked_length(name, a, -1, side[0][1].shape[-1], side[0][0])
    for (name, a, _), (other, b, _) in zip(*named, strict=True):
        checked_length(other, b, -2, a.shape[-2], name)
    return backend


def checked_shape(shape: Any) -> tuple[int, ...]:
    """A shape of at least one dimension, none of length 0."""
    if not isinstance(shape, (list, tuple)):
        raise TypeError(f"shape should be a list or tuple of whole numbers, got {type(shape).__name__}")
    if not shape:
        raise ValueError("shape should hold at least one whole number, got none")
    return tuple(whole(f"shape[{i}]", size, 1) for i, size in enumerate(shape))


def described(value: Any) -> str:
    """The value, or what it is if that may be long."""
    return repr(value) if value is None or isinstance(value, (str, bool, int, float)) else type(value).__name__


def _sequence(name: str, given: Any, each: str = "view") -> tuple[Any, ...]:
    if not isinstance(given, (list, tuple)):
        hint = f"; a single {each} goes in a tuple of one" if backend_of(given) is not None else ""
        raise TypeError(
            f"{name} should be a list or tuple of arrays, one for each {each}, got {type(given).__name__}{hint}"
        )
    if not given:
        raise ValueError(f"{name} should hold at least one array, got none")
    return tuple(given)


def checked_array(name: str, array: Any) -> Backend:
    """The backend of an array; TypeError for what is none, or cannot be served."""
    backend = backend_of(array)
    if backend is None:
        raise TypeError(
            f"{name} should be an array (NumPy, torch, JAX, CuPy or any library of the array API standard), "
            f"got {type(array).__name__}"
        )
    refused = backend.why_refused(array)
    if refused:
        raise TypeError(f"{name} should be an array, got {refused}")
    checked_dimensions(name, array.ndim)
    return backend


def checked_dimensions(name: str, count: int) -> None:
    """ValueError for an array of more dimensions than all libraries can do with."""
    if count > _MOST_DIMENSIONS:
        raise ValueError(f"{name} should have at most {_MOST_DIMENSIONS} dimensions, got {count}")


def _same_library(name: str, array: Any, backend: Backend, like: str = "query") -> None:
    other = checked_array(name, array)
    if other is not backend:
        raise TypeError(f"{name} should be an array of {backend.name}, like {like}, got one of {other.name}")


def _floating(name: str, array: Any, query: Any, backend: Backend, like: str = "the query") -> None:
    dtype = backend.dtype_name(array.dtype)
    if dtype not in FLOATS:
        raise TypeError(f"{name} should have a dtype of {', '.join(FLOATS)}, got {dtype}")
    if array.dtype != query.dtype:
        raise TypeError(f"{name} should have {like}'s dtype {backend.dtype_name(query.dtype)}, got {dtype}")
    _device(name, array, query, backend, like)


def _device(name: str, array: Any, query: Any, backend: Backend, like: str = "the query") -> None:
    device, expected = backend.place(array), backend.place(query)
    if device != expected and device is not None and expected is not None:
        raise ValueError(
            f"{name} should be on {like}'{'' if like.endswith('s') else 's'} device {expected}, got {device}"
        )


def _shape(name: str, array: Any, rowless: bool = False) -> None:
    shape = tuple(array.shape)
    if len(shape) < 2:
        raise ValueError(f"{name} should have at least two dimensions (..., rows, channels), got shape {shape}")
    if not rowless:
        _not_empty(name, shape)
    elif 0 in (*shape[:-2], shape[-1]):
        raise ValueError(f"{name} should have no dimension of length 0 but for its rows, got shape {shape}")


def _not_empty(name: str, shape: tuple[int, ...]) -> None:
    if 0 in shape:
        raise ValueError(f"{name} should have no dimension of length 0, got shape {shape}")


def _planned(name: str, array: Any, dtype: str, like: Any, backend: Backend, of: str) -> None:
    """An array (..., n, k) of the library and device of `like`, of this dtype; n may be 0."""
    _same_library(name, array, backend, of)
    given = backend.dtype_name(array.dtype)
    if given != dtype:
        raise TypeError(f"{name} should have the plan's dtype {dtype}, got {given}")
    _device(name, array, like, backend, of)
    _shape(name, array, rowless=True)


def _mask(name: str, mask: Any, key_name: str, key: Any, query: Any, backend: Backend) -> None:
    _same_library(name, mask, backend)
    dtype = backend.dtype_name(mask.dtype)
    if dtype != "bool":
        raise TypeError(f"{name} should be boolean, True where to attend, got dtype {dtype}")
    if mask.ndim < 1 or mask.shape[-1] != key.shape[-2]:
        raise ValueError(
            f"{name} should have shape (..., {key.shape[-2]}), one entry for each row of {key_name}, "
            f"got shape {tuple(mask.shape)}"
        )
    _device(name, mask, query, backend)


def _leading(named: Sequence[tuple[str, Any]]) -> tuple[int, ...]:
    """Leading dimensions of all arrays together; the error names the one that does not broadcast."""
    return _together([(name, tuple(a.shape[:-2])) for name, a in named])


def _together(named: Sequence[tuple[str, tuple[int, ...]]]) -> tuple[int, ...]:
    """The shapes broadcast; the error names the first that does not."""
    leading: tuple[int, ...] = ()
    for name, own in named:
        if own == leading:
            continue
        try:
            leading = np.broadcast_shapes(leading, own)
        except ValueError:
            raise ValueError(
                f"{name} should have leading dimensions that broadcast with {leading}, those of the arrays before it, "
                f"got {own}"
            ) from None
    return leading
