"""The array libraries that tests run on, and random calls drawn in NumPy and moved to them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

settings.register_profile("tattn", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("tattn")

LIBRARIES = ("numpy", "strict", "torch", "jax", "cupy", "torch-cuda", "jax-cuda")
CPU = ("numpy", "strict", "torch", "jax")


@dataclass(frozen=True)
class Library:
    """One array library on one device."""

    name: str
    array: Callable[[np.ndarray], Any]
    numpy: Callable[[Any], np.ndarray]
    is_array: Callable[[Any], bool]
    device: Callable[[Any], Any]

    def arrays(self, *given: Any) -> Any:
        """NumPy arrays, or nested sequences of them and None, in this library."""
        moved = [
            None if g is None else list(self.arrays(*g, None)[:-1]) if isinstance(g, (list, tuple)) else self.array(g)
            for g in given
        ]
        return moved[0] if len(moved) == 1 else moved


def _numpy() -> Library:
    def read_only(a: np.ndarray) -> np.ndarray:
        a = np.array(a)
        a.setflags(write=False)
        return a

    return Library("numpy", read_only, np.asarray, lambda x: type(x) is np.ndarray, lambda x: "cpu")


def _strict() -> Library:
    import array_api_strict as xp

    xp.set_array_api_strict_flags(boolean_indexing=False, data_dependent_shapes=False)
    # Not the default device: creating an array without saying where shows.
    device = xp.Device("device1")
    return Library(
        "strict",
        lambda a: xp.asarray(np.array(a), device=device),
        lambda x: np.from_dlpack(xp.asarray(x, device=xp.Device("CPU_DEVICE"))),
        lambda x: isinstance(x, type(xp.ones(1))),
        lambda x: x.device,
    )


def _torch(device: str) -> Library:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    return Library(
        "torch" if device == "cpu" else "torch-cuda",
        lambda a: torch.tensor(np.array(a), device=device),
        lambda x: x.detach().cpu().numpy(),
        lambda x: isinstance(x, torch.Tensor),
        lambda x: x.device,
    )


def _jax(device: str) -> Library:
    import jax

    jax.config.update("jax_enable_x64", True)
    try:
        where = jax.devices(device)[0]
    except RuntimeError:
        pytest.skip("JAX finds no CUDA device")
    return Library(
        "jax" if device == "cpu" else "jax-cuda",
        lambda a: jax.device_put(np.array(a), where),
        np.asarray,
        lambda x: isinstance(x, jax.Array),
        lambda x: x.device,
    )


def _cupy() -> Library:
    import cupy

    if not cupy.cuda.is_available():
        pytest.skip("CuPy finds no CUDA device")
    return Library("cupy", cupy.asarray, cupy.asnumpy, lambda x: isinstance(x, cupy.ndarray), lambda x: x.device)


def make_library(name: str) -> Library:
    """A library by name; skips where the package or the device is missing."""
    package = {"strict": "array_api_strict"}.get(name, name.partition("-")[0])
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    device = "cuda" if name.endswith("-cuda") else "cpu"
    makers = {"numpy": _numpy, "strict": _strict, "cupy": _cupy}
    if name in makers:
        return makers[name]()
    return _torch(device) if package == "torch" else _jax(device)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--library", action="append", default=[], help="only this array library; may be repeated")
    parser.addoption("--every-case", action="store_true", help="JAX takes a grid whole, too")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "library" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--library") or LIBRARIES
        params = [
            pytest.param(n, marks=[] if n in CPU else [pytest.mark.gpu])
            for n in LIBRARIES
            if n in chosen or n not in CPU
        ]
        metafunc.parametrize("library", params, indirect=True, scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With a library chosen other than NumPy, only what depends on the library; NumPy runs the rest for all.

    JAX, which compiles every case anew, takes every third case of a test marked as a grid.
    """
    if not config.getoption("--every-case"):
        left_out = {item for item in items if item.get_closest_marker("grid") and not _is_taken(item)}
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]
    chosen = config.getoption("--library")
    if not chosen or "numpy" in chosen:
        return
    of_libraries = {
        "test_torch",
        "test_distributed",
        "test_jax",
        "test_kernels",
        "test_nn_torch",
        "test_nn_jax",
        "test_checks",
        "test_plugging",
        "test_examples",
    }
    kept = [item for item in items if "library" in getattr(item, "fixturenames", ()) or item.path.stem in of_libraries]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def _is_taken(item: Any) -> bool:
    """Whether a library takes this case of a grid: JAX every third, others all."""
    places: dict[str, int] = dict(item.callspec.indices)
    places.pop("library")
    return not str(item.callspec.params["library"]).startswith("jax") or sum(places.values()) % 3 == 0


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_module() -> Iterator[None]:
    """JAX maps memory for every program that it compiles, and a process may hold only so many maps."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture(autouse=True)
def through_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """The polynomial method computes features at any length; tests/test_scorewise.py is about calls that need none."""
    monkeypatch.setattr("tattn.methods.Polynomial.by_scores", lambda *_: False)


@pytest.fixture
def bands_at_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands are weighed by their operations alone, so that calls too short for them take some."""
    monkeypatch.setattr("tattn.planning.choice._BANDS_CALL", 0.0)
    monkeypatch.setattr("tattn.planning.choice._BANDS_ROW", 0.0)


@pytest.fixture
def scorewise(through_features: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every polynomial is computed score by score; the list tells of calls that were."""
    from tattn.engines import scorewise as engine

    monkeypatch.setattr("tattn.methods.Polynomial.by_scores", lambda *_: True)
    taken: list[str] = []
    forward = engine.forward

    def recorded(*given: Any) -> Any:
        taken.append("scores")
        return forward(*given)

    monkeypatch.setattr(engine, "forward", recorded)
    return taken


@pytest.fixture(scope="session")
def library(request: pytest.FixtureRequest) -> Library:
    return make_library(request.param)
