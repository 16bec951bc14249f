"""A stand-in for a library on accelerators: NumPy behind arrays that live on one of two devices and are read on purpose only.

As in CuPy, what is created lands on the current device, whatever it is made from, and operations want their arrays there. Python
cannot convert an array by itself: to a number, a truth value, a NumPy array, or by going over it. What has to wait for the device
is counted in `reads`, what is copied to it in `uploads`. The names are those of NumPy before the array API standard.
"""

import numpy as np

reads = uploads = 0
_current = [0]


class Device:
    """A device, and a context that makes it the current one."""

    def __init__(self, number=None):
        self.id = _current[-1] if number is None else int(number)

    def __int__(self):
        return self.id

    def __enter__(self):
        _current.append(self.id)

    def __exit__(self, *_):
        _current.pop()

    def __eq__(self, other):
        return isinstance(other, Device) and self.id == other.id

    __hash__ = None

    def __repr__(self):
        return f"<device {self.id}>"

    def synchronize(self):
        global reads
        reads += 1


def _refused(self, *_, **__):
    raise TypeError("an array is not converted by itself: use get()")


class ndarray:
    """Values on a device."""

    __array_ufunc__ = None
    __bool__ = __float__ = __int__ = __index__ = __complex__ = __array__ = __iter__ = _refused

    def __init__(self, values, number=None):
        self._values = np.asarray(values)
        self.device = Device(number)

    dtype, shape, ndim, size, itemsize, nbytes = (
        property(lambda self, name=name: getattr(self._values, name))
        for name in ("dtype", "shape", "ndim", "size", "itemsize", "nbytes")
    )
    T = property(lambda self: ndarray(self._values.T, self.device))

    def get(self):
        """The values on the host, which have to be waited for."""
        global reads
        reads += 1
        return self._values.copy()

    def __getitem__(self, key):
        return ndarray(self._values[_place(key)], self.device)

    def __setitem__(self, key, value):
        self._values[_place(key)] = _plain(value)

    def astype(self, dtype, copy=True):
        return ndarray(_plain(self).astype(dtype, copy=copy))

    def copy(self):
        return ndarray(_plain(self).copy())

    def reshape(self, *shape):
        return ndarray(self._values.reshape(*shape), self.device)


def _plain(x):
    """The values behind arrays, all of which have to be on the current device."""
    if isinstance(x, ndarray):
        if x.device != Device():
            raise ValueError(f"an array is on {x.device}, and the current one is {Device()}")
        return x._values
    if isinstance(x, (list, tuple)):
        return type(x)(_plain(y) for y in x)
    if isinstance(x, np.ndarray):
        raise TypeError("a NumPy array is not on any device: use asarray()")
    return x


def _place(key):
    """An index without arrays; how long the result of one by truth values is takes a look."""
    global reads
    keys = key if isinstance(key, tuple) else (key,)
    reads += len([k for k in keys if isinstance(k, ndarray) and k.dtype == bool])
    return tuple(_plain(k) for k in keys)


def _wrapped(function):
    """The function of NumPy for these arrays."""

    def of_arrays(*args, **kwargs):
        result = function(*map(_plain, args), **{name: _plain(x) for name, x in kwargs.items()})
        if kwargs.get("out") is not None:
            return kwargs["out"]
        if isinstance(result, (list, tuple)) and isinstance(result[0], np.ndarray):
            return [ndarray(x) for x in result]
        return ndarray(result) if isinstance(result, (np.ndarray, np.generic)) else result

    return of_arrays


def _operator(name):
    function = getattr(np.ndarray, name)

    def of_arrays(self, *others):
        values = [_plain(self), *map(_plain, others)]
        with np.errstate(all="ignore"):
            result = function(*values)
        if result is NotImplemented:
            return result
        return self if name.startswith("__i") and name != "__invert__" else ndarray(result)

    return of_arrays


_BINARY = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul"]
_OTHERS = ["lt", "le", "eq", "ne", "gt", "ge", "neg", "abs", "invert"]
for _name in (*_BINARY, *(f"r{n}" for n in _BINARY), *(f"i{n}" for n in _BINARY), *_OTHERS):
    setattr(ndarray, f"__{_name}__", _operator(f"__{_name}__"))


def asarray(numbers, dtype=None):
    """What is not on the device yet is copied there."""
    global uploads
    if isinstance(numbers, ndarray):
        return ndarray(np.asarray(_plain(numbers), dtype))
    uploads += not isinstance(numbers, (bool, int, float))
    return ndarray(np.array(numbers, dtype))


array = asarray


@_wrapped
def cumulative_sum(x, *, axis, dtype, include_initial):
    """As the compatible namespaces have it."""
    found = np.cumsum(x, axis=axis, dtype=dtype)
    return np.concatenate([np.zeros_like(found.take([0], axis)), found], axis) if include_initial else found


# Those of the standard that NumPy had under another name, or not at all.
_MISSING = {
    "acos",
    "acosh",
    "asin",
    "asinh",
    "atan",
    "atanh",
    "atan2",
    "astype",
    "concat",
    "isdtype",
    "permute_dims",
    "pow",
}
_MISSING |= {"matrix_transpose", "unstack", "vecdot", "unique_values", "cumulative_sum", "asarray", "array", "ndarray"}
for _name in set(np.__all__) - _MISSING:
    _value = getattr(np, _name)
    _is_class = isinstance(_value, type) or not callable(_value)
    globals()[_name] = _value if _is_class else _wrapped(_value)
