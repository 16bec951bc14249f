"""The array libraries that are measured: how each moves arrays, waits, compiles, differentiates and tells its memory."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

import tattn
from evidence.apart import reset_peak, resident_bytes

Array = Any
Function = Callable[..., Array]
# Computes and returns a list of arrays: the output, and the gradients if they were asked for.
Run = Callable[[], Sequence[Array]]

NAMES = ("numpy", "torch", "jax", "cupy")


def attention(*arrays: Array, **options: Any) -> Array:
    """Tensor attention of query, keys and values in one row of arguments."""
    views = len(arrays) // 2
    return tattn.tensor_attention(arrays[0], arrays[1 : views + 1], arrays[views + 1 :], **options)


class Library:
    """NumPy; the others say what they do differently."""

    name = "numpy"
    # Whether a first call compiles.
    compiles = False

    def __init__(self, device: str, threads: int) -> None:
        if device != "cpu":
            pytest.skip("NumPy computes on the CPU alone")
        self.device = device

    def array(self, given: np.ndarray) -> Array:
        """A NumPy array, on the device."""
        return given

    def numpy(self, array: Array) -> np.ndarray:
        """An array of the library in NumPy."""
        return np.asarray(array)

    def wait(self, result: Sequence[Array]) -> None:
        """Until all of it has been computed."""

    def forward(self, function: Function, arrays: Sequence[Array]) -> Run:
        """The function of these arrays, as it is run when no gradient is needed."""
        return lambda: [function(*arrays)]

    def gradient(self, function: Function, arrays: Sequence[Array], grad: Array) -> Run:
        """The function and the gradients of all arrays, by the library's own differentiation."""
        raise NotImplementedError(f"{self.name} does not differentiate")

    def attention(self, arrays: Sequence[Array], grad: Array | None, **options: Any) -> Run:
        """Our attention: output, and gradients if `grad` is there."""
        if grad is None:
            return self.forward(lambda *given: attention(*given, **options), arrays)
        views = len(arrays) // 2

        def run() -> Sequence[Array]:
            out, pullback = tattn.tensor_attention_vjp(arrays[0], arrays[1 : views + 1], arrays[views + 1 :], **options)
            d_query, d_keys, d_values = pullback(grad)
            return [out, d_query, *d_keys, *d_values]

        return run

    def product(self, left: Array, right: Array) -> Run:
        """Matrix product."""
        return self.forward(lambda x, y: x @ y, (left, right))

    def begin_peak(self) -> None:
        """Give back what earlier calls left, and watch the memory from here on."""
        gc.collect()
        _return_free_pages()
        reset_peak()
        self._before = resident_bytes("VmRSS")

    def peak(self) -> int | None:
        """Bytes held at the peak since `begin_peak` beyond those held then; None where the system does not say."""
        return resident_bytes("VmHWM") - self._before if self._before else None

    def device_name(self) -> str:
        """The accelerator, if one is used."""
        return ""


class Torch(Library):
    """By autograd; on CUDA devices, too."""

    name = "torch"

    def __init__(self, device: str, threads: int) -> None:
        import torch

        self.torch = torch
        if device == "cuda" and not torch.cuda.is_available():
            pytest.skip("torch finds no CUDA device")
        torch.set_num_threads(threads)
        self.device = device

    def array(self, given: np.ndarray) -> Array:
        return self.torch.tensor(given, device=self.device)

    def numpy(self, array: Array) -> np.ndarray:
        moved: np.ndarray = array.detach().cpu().numpy()
        return moved

    def wait(self, result: Sequence[Array]) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def gradient(self, function: Function, arrays: Sequence[Array], grad: Array) -> Run:
        leaves = [a.detach().requires_grad_() for a in arrays]

        def run() -> Sequence[Array]:
            out = function(*leaves)
            return [out.detach(), *self.torch.autograd.grad(out, leaves, grad)]

        return run

    def attention(self, arrays: Sequence[Array], grad: Array | None, **options: Any) -> Run:
        if grad is None:
            return super().attention(arrays, grad, **options)
        return self.gradient(lambda *given: attention(*given, **options), arrays, grad)

    def begin_peak(self) -> None:
        if self.device == "cpu":
            return super().begin_peak()
        self.torch.cuda.empty_cache()
        self.torch.cuda.reset_peak_memory_stats()
        self._before = self.torch.cuda.memory_allocated()
        return None

    def peak(self) -> int | None:
        if self.device == "cpu":
            return super().peak()
        return int(self.torch.cuda.max_memory_allocated()) - self._before

    def device_name(self) -> str:
        return str(self.torch.cuda.get_device_name()) if self.device == "cuda" else ""


class Jax(Library):
    """Under jit."""

    name = "jax"
    compiles = True

    def __init__(self, device: str, threads: int) -> None:
        if device == "cpu" and hasattr(os, "sched_setaffinity"):
            # The only limit that XLA's threads on the CPU keep to, and only if it is set before JAX starts them.
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        import jax

        self.jax = jax
        try:
            self.where = jax.devices(device)[0]
        except RuntimeError:
            pytest.skip(f"JAX finds no {device} device")
        self.device = device

    def array(self, given: np.ndarray) -> Array:
        return self.jax.device_put(given, self.where)

    def wait(self, result: Sequence[Array]) -> None:
        for array in result:
            array.block_until_ready()

    def forward(self, function: Function, arrays: Sequence[Array]) -> Run:
        compiled = self.jax.jit(function)
        return lambda: [compiled(*arrays)]

    def gradient(self, function: Function, arrays: Sequence[Array], grad: Array) -> Run:
        def both(arrays: Sequence[Array], grad: Array) -> Sequence[Array]:
            out, pullback = self.jax.vjp(function, *arrays)
            return [out, *pullback(grad)]

        compiled = self.jax.jit(both)
        return lambda: compiled(tuple(arrays), grad)

    def attention(self, arrays: Sequence[Array], grad: Array | None, **options: Any) -> Run:
        def function(*given: Array) -> Array:
            return attention(*given, **options)

        return self.forward(function, arrays) if grad is None else self.gradient(function, arrays, grad)

    def product(self, left: Array, right: Array) -> Run:
        # In float32, as ours is.
        return self.forward(lambda x, y: self.jax.numpy.matmul(x, y, precision="highest"), (left, right))

    def begin_peak(self) -> None:
        """Nothing: XLA keeps memory that it was given before, and tells the peak of the whole process alone."""

    def peak(self) -> int | None:
        return None

    def device_name(self) -> str:
        return str(self.where.device_kind) if self.device == "cuda" else ""


class Cupy(Library):
    """As NumPy, on a CUDA device."""

    name = "cupy"

    def __init__(self, device: str, threads: int) -> None:
        cupy = pytest.importorskip("cupy")
        if device != "cuda" or not cupy.cuda.is_available():
            pytest.skip("CuPy finds no CUDA device" if device == "cuda" else "CuPy computes on CUDA devices alone")
        self.cupy, self.device = cupy, device

    def array(self, given: np.ndarray) -> Array:
        return self.cupy.asarray(given)

    def numpy(self, array: Array) -> np.ndarray:
        moved: np.ndarray = self.cupy.asnumpy(array)
        return moved

    def wait(self, result: Sequence[Array]) -> None:
        self.cupy.cuda.Device().synchronize()

    def begin_peak(self) -> None:
        self.pool = self.cupy.get_default_memory_pool()
        self.pool.free_all_blocks()
        self._before = self.pool.total_bytes()

    def peak(self) -> int | None:
        # The pool keeps what it was given.
        return int(self.pool.total_bytes()) - self._before

    def device_name(self) -> str:
        return str(self.cupy.cuda.runtime.getDeviceProperties(0)["name"].decode())


def make_library(name: str, device: str, threads: int) -> Library:
    """A library on a device; skips, with the reason, where one of them is missing."""
    if name in ("torch", "jax"):
        pytest.importorskip(name)
    return {"numpy": Library, "torch": Torch, "jax": Jax, "cupy": Cupy}[name](device, threads)


def _return_free_pages() -> None:
    """Let the allocator of C return what it holds and does not use, where it can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
