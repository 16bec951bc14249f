"""How a library that does not follow the array API standard plugs in: its functions by the standard's names, and a `Backend`."""

import guarded

from tattn.backends import Backend


class Namespace:
    """What the library calls otherwise, or lets be said otherwise; all other names are its own."""

    concat = staticmethod(guarded.concatenate)

    def __getattr__(self, name):
        return getattr(guarded, name)

    # Creation takes a device.

    def asarray(self, numbers, *, dtype=None, device=None):
        with guarded.Device(device):
            return guarded.asarray(numbers, dtype)

    def zeros(self, shape, *, dtype=None, device=None):
        with guarded.Device(device):
            return guarded.zeros(shape, dtype)

    def ones(self, shape, *, dtype=None, device=None):
        with guarded.Device(device):
            return guarded.ones(shape, dtype)

    def empty(self, shape, *, dtype=None, device=None):
        with guarded.Device(device):
            return guarded.empty(shape, dtype)

    def full(self, shape, value, *, dtype=None, device=None):
        with guarded.Device(device):
            return guarded.full(shape, value, dtype)

    def arange(self, stop, *, dtype=None, device=None):
        with guarded.Device(device):
            return guarded.arange(stop, dtype=dtype)

    # Functions that are methods there, or have another order.

    def astype(self, x, dtype):
        return x.astype(dtype, copy=False)

    def permute_dims(self, x, axes):
        return guarded.transpose(x, axes)

    def matrix_transpose(self, x):
        return guarded.swapaxes(x, -1, -2)

    def sort(self, x, *, axis=-1, descending=False, stable=True):
        found = guarded.sort(x, axis=axis, kind="stable" if stable else None)
        return guarded.flip(found, axis=axis) if descending else found

    def argsort(self, x, *, axis=-1, stable=True):
        return guarded.argsort(x, axis=axis, kind="stable" if stable else None)


class GuardedBackend(Backend):
    name = "guarded"
    # Blocks are written into buffers, through views.
    writable = True

    def on_device_of(self, array):
        return guarded.Device(array.device)

    def run(self, function, call, arrays):
        with self.on_device_of(next(a for a in arrays if a is not None)):
            return function(call, self, tuple(arrays))

    def device(self, array):
        return array.device

    def to_numpy(self, array):
        return array.get()


BACKEND = GuardedBackend(Namespace())
