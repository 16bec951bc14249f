"""Every error that a caller can cause, raised in one place and before anything is computed."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from math import inf, isfinite, log2, prod
from typing import Any, NamedTuple

import numpy as np

from .backends import Array, Backend, backend_of
from .backends.operations import at_once, of_channels
from .documents import Documents
from .operands import CHANNELS, COMPLEX, REAL, Operands, Order, Upstream
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
# Names of arrays whose channels may be complex.
_OF_CHANNELS = ("query", "keys", "rows")
# Scores that take a few milliseconds, as many as to load what is compiled is worth.
_LONG = 1 << 22
# What computes adds some dimensions of its own, and NumPy broadcasts arrays of at most 32.
_MOST_DIMENSIONS = 24


class PlanError(ValueError):
    """No plan meets what was asked for, or a plan does not fit the call that it is used for."""


class Inputs(NamedTuple):
    """The arrays of a call, checked."""

    backend: Backend
    arrays: tuple[Array | None, ...]  # query, *keys, *values, *masks, *decays; masks (..., n, 1) or None
    views: int
    dim: int
    value_dim: int
    dtype: str
    lengths: tuple[int, ...]  # n, n_1, …, n_m
    leading: tuple[int, ...]
    traced: bool
    order: Order
    channels: str = REAL
    documents: Documents | None = None
    # Of query and views, where a compiler traces them.
    offsets: tuple[Array, ...] = ()

    def problem(self, scale: float) -> Problem:
        """What a plan needs to know of them."""
        lengths, count = (self.lengths, 1) if self.documents is None else self.documents.alike()
        shapes = self.views, self.dim, self.value_dim, self.dtype, lengths, count * prod(self.leading)
        order = self.order._replace(decays=False)
        return Problem(*shapes, scale, order, self.backend.chain, self.channels, self._compiled())

    def _compiled(self) -> bool:
        """Whether compiled loops are there for a causal call that is long enough to ask: they are loaded for the answer."""
        if self.traced or not self.order.causal:
            return False
        if prod([float(n) for n in (*self.lengths, *self.leading)]) < _LONG:
            return False
        rows = [a for a in self.arrays[: 2 * self.views + 1] if a is not None]
        operation = "window_read" if self.order.window else "prefix_read"
        operation = of_channels(operation, self.channels == COMPLEX, self.views)
        if self.backend.for_arrays(rows).loops.kernel(operation, *rows) is None:
            return False
        computed = self.backend.dtype_name(self.backend.compute_dtype(rows[0].dtype))
        windowed = self.order.window is not None
        return not self.order.decays or bool(at_once(self.operands().steepest, computed, windowed))

    def operands(self, scale: float = 1.0) -> Operands:
        """The arrays by their names."""
        found = Operands.of(self.backend, self.arrays, self.views, scale, self.order)[0]
        return found._replace(channels=self.channels)


def checked_inputs(
    query: Any,
    keys: Any,
    values: Any,
    key_masks: Any,
    order: tuple[Any, Any] = (False, None),
    *,
    rowless: bool = False,
) -> Inputs:
    """The arrays of a call, of which `order` is (causal, window); TypeError or ValueError names the argument.

    `values` may be None, and there may be no rows at all if `rowless`.
    """
    backend = checked_array("query", query)
    lengthless = backend.why_lengthless()
    if lengthless:
        raise TypeError(f"query should have a shape of whole numbers, got {lengthless}")
    keys = checked_sequence("keys", keys)
    if len(keys) >= MAX_ORDER:
        raise ValueError(f"keys should be at most {MAX_ORDER - 1} arrays, got {len(keys)}")
    valued = values is not None
    if not valued:
        values = (None,) * len(keys)
    else:
        values = checked_sequence("values", values)
        if len(keys) != len(values):
            raise ValueError(
                f"keys and values should have the same number of arrays, got {len(keys)} keys and {len(values)} values"
            )
    masks = checked_masks(key_masks, keys, "keys")

    named = [("query", query)]
    named += [(f"keys[{i}]", k) for i, k in enumerate(keys)]
    named += [(f"values[{i}]", v) for i, v in enumerate(values) if valued]
    for name, a in named:
        check_library(name, a, backend)
        check_floating(name, a, query, backend)
        check_shape(name, a, rowless)
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
            check_mask(f"key_masks[{i}]", mask, f"keys[{i}]", k, query, backend)
            if not rowless:
                check_not_empty(f"key_masks[{i}]", tuple(mask.shape))
            named.append((f"key_masks[{i}]", mask[..., None]))
            mask = mask[..., None]
        columns.append(mask)
    leading = checked_leading(named)
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
        order=checked_order(*order, lengths),
    )


def checked_channels(channels: Any, dim: int, name: str) -> str:
    """What the channels of query and keys are; ValueError for complex ones of an odd number of parts, which `name` counts."""
    if not isinstance(channels, str) or channels not in CHANNELS:
        raise ValueError(f"channels should be {' or '.join(map(repr, CHANNELS))}, got {described(channels)}")
    if channels == COMPLEX and dim % 2:
        raise ValueError(
            f"{name} should be even for channels='complex', the real parts followed by the imaginary parts, got {dim}"
        )
    return channels


def with_channels(inputs: Inputs, channels: Any) -> Inputs:
    """The inputs with channels of this kind."""
    return inputs._replace(channels=checked_channels(channels, inputs.dim, "query's last dimension"))


def with_documents(inputs: Inputs, offsets: Any) -> Inputs:
    """The inputs with the documents that `offsets` says, if they are given, or with the offsets where a program will read them."""
    if offsets is None:
        return inputs
    names = _sides(inputs.views)
    if isinstance(offsets, (list, tuple)):
        if any(isinstance(x, (int, np.integer)) for x in offsets):
            raise TypeError(
                f"offsets should be an array, or a sequence of arrays, got a {type(offsets).__name__} of numbers"
            )
        if len(offsets) != len(names):
            raise ValueError(
                f"offsets should be one array, or {len(names)} of them, for query and each of the {inputs.views} views, "
                f"got {len(offsets)}"
            )
        arrays = tuple(offsets)
        for i, own in enumerate(arrays):
            _check_offsets(f"offsets[{i}]", own, inputs.backend)
    else:
        _check_offsets("offsets", offsets, inputs.backend)
        for name, n in zip(names, inputs.lengths, strict=True):
            if n != inputs.lengths[0]:
                raise ValueError(
                    f"offsets should be {len(names)} arrays, for query and each view, since {name} has {n} rows and query "
                    f"{inputs.lengths[0]}, got one"
                )
        arrays = (offsets,) * len(names)
    if any(_are_traced(own, inputs.backend) for own in arrays):
        return inputs._replace(offsets=arrays)
    return inputs._replace(documents=documents_of(arrays, inputs.lengths, inputs.order, inputs.backend))


def _sides(views: int) -> list[str]:
    """Names of what has rows."""
    return ["query", *(f"keys[{i}]" for i in range(views))]


def documents_of(offsets: Sequence[Array], lengths: Sequence[int], order: Order, backend: Backend) -> Documents:
    """The documents that offsets of query and every view say, which may be one array; ValueError for what does not fit."""
    names, shared = _sides(len(offsets) - 1), all(own is offsets[0] for own in offsets)
    arrays = [
        _read_offsets("offsets" if shared else f"offsets[{i}]", own, (names[i], n), backend)
        for i, (own, n) in enumerate(zip(offsets, lengths, strict=True))
    ]
    for i, own in enumerate(arrays[1:]):
        if len(own) != len(arrays[0]):
            raise ValueError(
                f"offsets[{i + 1}] should have as many documents as offsets[0], {len(arrays[0]) - 1}, got {len(own) - 1}"
            )
        shorter = np.diff(own) < np.diff(arrays[0])
        if order.causal and shorter.any():
            which = int(np.argmax(shorter))
            raise ValueError(
                f"offsets[{i + 1}] should give a document at least as many rows as offsets[0] where attention is causal, since "
                f"the last rows are aligned, got {np.diff(own)[which]} and {np.diff(arrays[0])[which]} for document {which}"
            )
    return Documents.of(arrays)


def _are_traced(offsets: Any, backend: Backend) -> bool:
    return backend.is_traced([offsets]) or checked_array("offsets", offsets).is_traced([offsets])


def unread_offsets(name: str = "offsets") -> TypeError:
    """What to raise where offsets would have to be read, and cannot."""
    return TypeError(
        f"{name} should be numbers that are known when the call is made, got ones that are traced: leave the call out of "
        "what is compiled, or give offsets that are no argument of it"
    )


def _check_offsets(name: str, offsets: Any, backend: Backend) -> None:
    """TypeError or ValueError for offsets that are no array of whole numbers, or that nobody will be able to read."""
    found = checked_array(name, offsets)
    if _are_traced(offsets, backend) and not (backend.takes_whole() and found.is_array(offsets)):
        raise unread_offsets(name)
    dtype = found.dtype_name(offsets.dtype)
    if not dtype.removeprefix("u").startswith("int"):
        raise TypeError(f"{name} should hold whole numbers, got dtype {dtype}")
    if offsets.ndim != 1 or offsets.shape[0] < 2:
        raise ValueError(
            f"{name} should be an array (documents + 1,) of at least two numbers, got shape {tuple(offsets.shape)}"
        )


def _read_offsets(name: str, offsets: Array, of: tuple[str, int], backend: Backend) -> np.ndarray:
    """Offsets 0 … n on the host, of an array that is named and has n rows."""
    numbers = checked_array(name, offsets).integers(offsets)
    rows, n = of
    if numbers[0] != 0 or numbers[-1] != n:
        raise ValueError(f"{name} should go from 0 to {n}, the rows of {rows}, got {numbers[0]} to {numbers[-1]}")
    falls = np.diff(numbers) < 0
    if falls.any():
        at = int(np.argmax(falls))
        raise ValueError(f"{name} should not descend, got {numbers[at]} before {numbers[at + 1]}")
    return numbers


def check_values(values: Any) -> None:
    """TypeError where there are none: a plan alone can do without."""
    if values is None:
        raise TypeError("values should be a list or tuple of arrays, one for each view, got None")


def checked_options(scale: Any, dim: int, tol: Any, views: int, dtype: str) -> float:
    """The scale as a float; ValueError names the option."""
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
    # As compilers can trace it where numbers are symbols.
    if not 0 < number < inf:
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
    check_library(name, array, backend, like=of)
    check_floating(name, array, like, backend, like=of)
    if tuple(array.shape) != tuple(shape):
        raise ValueError(f"{name} should have the shape of the output, {tuple(shape)}, got {tuple(array.shape)}")
    return array


def checked_gradients(grad_out: Any, grad_lse: Any, out: Array, lse: Array, backend: Backend) -> Upstream:
    """Gradients of an output (..., n, dv) and of its lse, (..., n) or None for zeros, as (..., n, 1)."""
    checked_output("grad_out", grad_out, out.shape, out, backend)
    if grad_lse is None:
        with backend.on_device_of(lse):
            return Upstream(grad_out, backend.xp.zeros_like(lse))
    return Upstream(grad_out, checked_output("grad_lse", grad_lse, lse.shape[:-1], lse, backend)[..., None])


def warn_caller(text: str) -> None:
    """Warn at the first line outside of the package that led here."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


def checked_method(method: Any, names: Sequence[str] = METHODS) -> str:
    """ValueError if there is no such method."""
    if not isinstance(method, str) or method not in names:
        raise ValueError(f"method should be one of {', '.join(map(repr, names))}, got {described(method)}")
    return method


def checked_series(series: Any) -> str:
    """ValueError if there is no such series."""
    if not isinstance(series, str) or series not in SERIES:
        raise ValueError(f"series should be one of {', '.join(map(repr, SERIES))}, got {described(series)}")
    return series


def factors(name: str, matrices: Any) -> list[tuple[str, Any, int]]:
    """The matrices of a list or tuple as (name, array, number of its own dimensions)."""
    return [(f"{name}[{i}]", a, 2) for i, a in enumerate(checked_sequence(name, matrices, "factor"))]


def checked_factors(named: Sequence[tuple[str, Any, int]]) -> Backend:
    """Backend of the (name, array, number of its own dimensions) of a product; all further dimensions broadcast."""
    like, first, _ = named[0]
    backend = checked_array(like, first)
    for name, a, own in named:
        check_library(name, a, backend, like)
        check_floating(name, a, first, backend, like)
        shape = tuple(a.shape)
        if len(shape) < own:
            dimensions = "dimension" if own == 1 else "dimensions"
            raise ValueError(f"{name} should have at least {own} {dimensions}, got shape {shape}")
        check_not_empty(name, shape)
    checked_broadcast([(name, tuple(a.shape[: a.ndim - own])) for name, a, own in named])
    return backend


def checked_length(name: str, array: Any, axis: int, length: int, of: str) -> None:
    """ValueError unless the array has so many rows (axis −2) or columns (axis −1), as many as `of` says."""
    if array.shape[axis] != length:
        what = "columns" if axis == -1 else "rows"
        raise ValueError(f"{name} should have {length} {what}, as many as {of}, got shape {tuple(array.shape)}")


def described(value: Any) -> str:
    """The value, or what it is if that may be long."""
    return repr(value) if value is None or isinstance(value, (str, bool, int, float)) else type(value).__name__


def checked_sequence(name: str, given: Any, each: str = "view") -> tuple[Any, ...]:
    """The items of a list or tuple, one for each view, or what `each` says."""
    if not isinstance(given, (list, tuple)):
        hint = f"; a single {each} goes in a tuple of one" if backend_of(given) is not None else ""
        raise TypeError(
            f"{name} should be a list or tuple of arrays, one for each {each}, got {type(given).__name__}{hint}"
        )
    if not given:
        raise ValueError(f"{name} should hold at least one array, got none")
    return tuple(given)


def checked_masks(key_masks: Any, keys: Sequence[Any], of: str) -> tuple[Any, ...]:
    """The mask of each view, or None; one array serves all of them. `of` says in words what there should be one for each of."""
    return checked_of_rows("key_masks", key_masks, keys, of)


def checked_of_rows(name: str, given: Any, keys: Sequence[Any], of: str) -> tuple[Any, ...]:
    """What each view has for its rows, or None; one array serves all views. `of` as in `checked_masks`."""
    if given is None:
        return (None,) * len(keys)
    if not isinstance(given, (list, tuple)) and backend_of(given) is not None:
        most, what = max(getattr(k, "ndim", 0) for k in keys) - 1, name.removeprefix("key_")
        if getattr(given, "ndim", 0) > most > 0:
            raise ValueError(
                f"{name} should be a list or tuple of {what}, or one array (..., n) for all views of at most {most} dimensions, "
                f"got an array of shape {tuple(given.shape)}"
            )
        return (given,) * len(keys)
    arrays = checked_sequence(name, given)
    if len(arrays) != len(keys):
        raise ValueError(f"{name} should have one entry for each of the {len(keys)} {of}, got {len(arrays)}")
    return arrays


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


def check_library(name: str, array: Any, backend: Backend, like: str = "query") -> None:
    """TypeError unless the array is of this backend, as `like` is."""
    other = checked_array(name, array)
    if other is not backend:
        raise TypeError(f"{name} should be an array of {backend.name}, like {like}, got one of {other.name}")


def check_floating(name: str, array: Any, query: Any, backend: Backend, like: str = "the query") -> None:
    """TypeError unless the dtype is one that is computed in, and the query's; its device too."""
    dtype = backend.dtype_name(array.dtype)
    if dtype not in FLOATS:
        paired = "complex" in dtype and name.startswith(_OF_CHANNELS)
        hint = ": give real parts followed by imaginary parts, and channels='complex'" if paired else ""
        raise TypeError(f"{name} should have a dtype of {', '.join(FLOATS)}, got {dtype}{hint}")
    if array.dtype != query.dtype:
        raise TypeError(f"{name} should have {like}'s dtype {backend.dtype_name(query.dtype)}, got {dtype}")
    check_device(name, array, query, backend, like)


def check_device(name: str, array: Any, query: Any, backend: Backend, like: str = "the query") -> None:
    """ValueError unless both arrays are on one device, where that is known."""
    device, expected = backend.place(array), backend.place(query)
    if device != expected and device is not None and expected is not None:
        raise ValueError(
            f"{name} should be on {like}'{'' if like.endswith('s') else 's'} device {expected}, got {device}"
        )


def check_shape(name: str, array: Any, rowless: bool = False) -> None:
    """ValueError unless there are rows and channels, none of length 0; of `rowless` arrays rows may be."""
    shape = tuple(array.shape)
    if len(shape) < 2:
        raise ValueError(f"{name} should have at least two dimensions (..., rows, channels), got shape {shape}")
    if not rowless:
        check_not_empty(name, shape)
    elif 0 in (*shape[:-2], shape[-1]):
        raise ValueError(f"{name} should have no dimension of length 0 but for its rows, got shape {shape}")


def check_not_empty(name: str, shape: tuple[int, ...]) -> None:
    """ValueError where a dimension has length 0."""
    if 0 in shape:
        raise ValueError(f"{name} should have no dimension of length 0, got shape {shape}")


def check_mask(name: str, mask: Any, key_name: str, key: Any, query: Any, backend: Backend) -> None:
    """TypeError or ValueError unless the mask is boolean (..., n), for the rows of the `key`."""
    check_library(name, mask, backend)
    dtype = backend.dtype_name(mask.dtype)
    if dtype != "bool":
        raise TypeError(f"{name} should be boolean, True where to attend, got dtype {dtype}")
    check_row_entries(name, mask, key_name, key)
    check_device(name, mask, query, backend)


def check_row_entries(name: str, array: Any, key_name: str, key: Any) -> None:
    """ValueError unless the array is (..., n), for the rows of the `key`."""
    if array.ndim < 1 or array.shape[-1] != key.shape[-2]:
        raise ValueError(
            f"{name} should have shape (..., {key.shape[-2]}), one entry for each row of {key_name}, "
            f"got shape {tuple(array.shape)}"
        )


def checked_leading(named: Sequence[tuple[str, Any]]) -> tuple[int, ...]:
    """Leading dimensions of all arrays together; the error names the one that does not broadcast."""
    return checked_broadcast([(name, tuple(a.shape[:-2])) for name, a in named])


def checked_broadcast(named: Sequence[tuple[str, tuple[int, ...]]]) -> tuple[int, ...]:
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
