"""Whether an array library, or the backend that is plugged in for it, does what the package asks of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from .attention import tensor_attention_vjp
from .backends import Array, Backend, backend_of
from .backends.base import lacks
from .planning import plan_for
from .state.summary import summarize

_ROWS, _DIM = 40, 3
# What is asked of `plan_for`, by name.
_PLANS: dict[str, dict[str, Any]] = {
    "exact": {"method": "exact", "bound": 1.0},
    "polynomial": {"method": "polynomial", "bound": 1.0},
    "norm bands": {"series": "banded"},
    "causal exact": {"method": "exact", "bound": 1.0, "causal": True},
    "causal polynomial": {"method": "polynomial", "bound": 1.0, "causal": True},
    "window": {"bound": 1.0, "window": (4, 6)},
}


def check(make_array: Callable[[np.ndarray], Array], *, dtype: str = "float32") -> list[str]:
    """Return what an array library, or the backend plugged in for it, computes wrongly: an empty list if nothing.

    The backend is found as a call finds it, by the type of the array. Every method is computed forward and backward, with
    bounds and masks, and compared with NumPy. It takes some seconds.

    Parameters
    ----------
    make_array : callable
        Makes an array of the library from a NumPy array of numbers or booleans, in the same dtype, on the device to
        test.
    dtype : {"float32", "float64"}
        Dtype to compute in.

    Returns
    -------
    list of str
        What failed, and how, one line for each.

    Raises
    ------
    ValueError
        If `dtype` is neither.

    Examples
    --------
    >>> import numpy as np
    >>> from tattn.conformance import check
    >>> check(np.asarray)
    []
    """
    if dtype not in ("float32", "float64"):
        raise ValueError(f"dtype should be 'float32' or 'float64', got {dtype!r}")
    array = make_array(np.ones((2, 3), dtype))
    backend = backend_of(array)
    if backend is None:
        module = type(array).__module__.partition(".")[0]
        return [
            f"no backend: the array is none of the standard, and 'tattn.backends' has no entry point named {module!r}"
        ]
    lacking = lacks(backend, array)
    if lacking:
        return [f"the standard asks for {', '.join(lacking)}"]
    refused = backend.why_refused(array)
    if refused:
        return [f"refused: {refused}"]
    failed = []
    for name, part in (*_parts(backend, make_array, dtype), *_calls(backend, make_array, dtype)):
        try:
            part()
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}")
    return failed


def _parts(
    backend: Backend, make_array: Callable[[np.ndarray], Array], dtype: str
) -> Iterator[tuple[str, Callable[[], None]]]:
    """What calls rest on, by name."""
    xp = backend.xp
    numbers = np.arange(24.0).reshape(2, 4, 3).astype(dtype)

    def names() -> None:
        _same(backend.dtype_name(make_array(numbers).dtype), dtype)
        _same(backend.dtype_name(make_array(numbers > 3).dtype), "bool")

    def reading() -> None:
        array = make_array(numbers)
        _same(backend.to_numpy(array), numbers)
        for found in backend.read([array, array]):
            _same(found, numbers)

    def places() -> None:
        array = make_array(numbers)
        with backend.on_device_of(array):
            made = xp.zeros((2, 2), dtype=array.dtype, device=backend.device(array))
        _same(backend.device(made) == backend.device(array), True)

    def tables() -> None:
        array = make_array(numbers)
        with backend.on_device_of(array):
            for _ in range(2):
                # The second time it may be one that was kept.
                _same(backend.to_numpy(backend.table(_odd, 9, like=array, dtype=array.dtype)), _odd(9))
            index = backend.table(_odd, 2, like=array)
            _same(backend.to_numpy(xp.take(array, index, axis=-2)), numbers[:, [1, 3]])

    def powers() -> None:
        power = np.asarray([-126.0, -3, 0, 5, 127], dtype)
        array = make_array(power)
        with backend.on_device_of(array):
            _same(backend.to_numpy(backend.power_of_two(array)), np.ldexp(1.0, power.astype(int)).astype(dtype))

    def writing() -> None:
        array = make_array(numbers)
        with backend.on_device_of(array):
            whole = xp.zeros(numbers.shape, dtype=array.dtype, device=backend.device(array))
            whole[..., 1:3, :] = array[..., 1:3, :]
            backend.multiply_into(whole[..., 3:, :], array[..., 3:, :], array[..., 3:, :])
        expected = numbers * (np.arange(4) > 0)[:, None]
        expected[:, 3:] *= numbers[:, 3:]
        _same(backend.to_numpy(whole), expected)

    yield "dtype_name", names
    yield "to_numpy and read", reading
    yield "device", places
    yield "table", tables
    yield "power_of_two", powers
    if backend.writable:
        yield "writable", writing


def _calls(
    backend: Backend, make_array: Callable[[np.ndarray], Array], dtype: str
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls by every method, compared with those of NumPy."""
    rng = np.random.default_rng(0)
    query, *rest = rng.uniform(-1, 1, (6, _ROWS, _DIM)).astype(dtype)
    mask = rng.uniform(size=_ROWS) < 0.8

    def results(options: dict[str, Any], of: Callable[[np.ndarray], Array]) -> list[Array]:
        q, a, b, u, v, g = (of(x) for x in (query, *rest))
        plan = plan_for(n=_ROWS, dim=_DIM, tol=1e-2, dtype=dtype, **options)
        given: dict[str, Any] = {"causal": plan.causal, "window": plan.window, "key_masks": [of(mask), None]}
        given |= {"return_lse": True, "return_error": True}
        found, pullback = tensor_attention_vjp(q, [a, b], [u, v], plan=plan, **given)
        (dq, dkeys, dvalues), bounds = pullback(g, return_error=True)
        return [*found[:2], dq, *dkeys, *dvalues, found[2], bounds[0], *bounds[1], *bounds[2]]

    def summary(of: Callable[[np.ndarray], Array]) -> list[Array]:
        q, a, b, u, v, _ = (of(x) for x in (query, *rest))
        plan = plan_for(n=_ROWS, dim=_DIM, tol=1e-2, dtype=dtype, bound=1.0, method="polynomial")
        return [summarize([a, b], [u, v], plan).update([a, None], [u, None]).attend(q)]

    def compared(found: Callable[[Any], list[Array]]) -> None:
        for array, expected in zip(found(make_array), found(np.asarray), strict=True):
            if backend_of(array) is not backend:
                raise AssertionError(f"the answer is an array of {type(array).__module__}")
            _near(backend.to_numpy(array), expected)

    for name, options in _PLANS.items():
        yield name, partial(compared, partial(results, options))
    yield "summary", partial(compared, summary)


def _odd(count: int) -> np.ndarray:
    """The first odd numbers."""
    return 2 * np.arange(count) + 1


def _same(found: Any, expected: Any) -> None:
    if not np.array_equal(found, expected):
        raise AssertionError(f"should be {expected}, got {found}")


def _near(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal but for rounding, in parts of the largest."""
    size = np.abs(expected[np.isfinite(expected)]).max(initial=0.0)
    tolerance = 1e-3 if expected.dtype == np.float32 else 1e-10
    with np.errstate(invalid="ignore"):
        far = ~((found == expected) | (np.abs(found - expected) <= tolerance * size))
    if found.shape != expected.shape or far.any():
        gap = f"off by up to {np.abs(found - expected)[far].max():.2g}, where the largest is {size:.2g}"
        raise AssertionError(
            gap if found.shape == expected.shape else f"shape {found.shape}, expected {expected.shape}"
        )
