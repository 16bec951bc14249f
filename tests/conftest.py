"""The array libraries that tests run on, and random calls drawn in NumPy and moved to them."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
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

    @property
    def backend(self) -> Any:
        """What computes on its arrays, on their device."""
        from tattn.backends import backend_of

        array = self.array(np.zeros(1))
        return backend_of(array).for_arrays([array])

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


def package_of(name: str) -> str:
    """What has to be installed for a library."""
    return {"strict": "array_api_strict"}.get(name, name.partition("-")[0])


def pairs(names: Iterable[str]) -> list[Any]:
    """Any two of several libraries, in either order, to be tested with the later one."""
    names = list(names)
    two = [(a, b) for a in names for b in names if a != b]
    return [pytest.param(p, marks=pytest.mark.libraries(max(p, key=CPU.index)), id="-".join(p)) for p in two]


def make_library(name: str) -> Library:
    """A library by name; skips where the package or the device is missing."""
    package = package_of(name)
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    device = "cuda" if name.endswith("-cuda") else "cpu"
    makers = {"numpy": _numpy, "strict": _strict, "cupy": _cupy}
    if name in makers:
        return makers[name]()
    return _torch(device) if package == "torch" else _jax(device)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--library", action="append", default=[], help="only this array library; may be repeated")
    parser.addoption("--thorough", dest="take", action="store_const", const="all", help="all draws and all cases")
    parser.addoption("--rest", dest="take", action="store_const", const="rest", help="only what else needs --thorough")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with the fixture `library` runs on those chosen of its mark `libraries`, or of all; on GPUs if asked for."""
    if "library" in metafunc.fixturenames:
        mark = metafunc.definition.get_closest_marker("libraries")
        about = [n for n in LIBRARIES if not mark or n.partition("-")[0] in mark.args]
        chosen = metafunc.config.getoption("--library") or about
        params = [
            pytest.param(n, marks=[] if n in CPU else [pytest.mark.gpu])
            for n in about
            if n in chosen and (n in CPU or asks_for_gpu(metafunc.config))
        ]
        metafunc.parametrize("library", params, indirect=True, scope="session")


def asks_for_gpu(config: pytest.Config) -> bool:
    return "gpu" in config.option.markexpr


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what other libraries run, and what waits for --thorough; what is about no library runs with NumPy."""
    chosen, take = {*map(package_of, config.getoption("--library"))}, config.getoption("take")
    before: Counter[tuple[Any, ...]] = Counter()
    kept, left_out = [], []
    for item in items:
        libraries, packages = libraries_of(item), {*map(package_of, libraries_of(item))}
        function = (item.parent, getattr(item, "originalname", item.name), *libraries)
        waits = not take_now(item, before[function])
        before[function] += 1
        for_all = "draws" in getattr(item, "fixturenames", ())
        wanted = for_all or waits == (take == "rest") or take == "all"
        wanted &= not chosen or not packages.isdisjoint(chosen)
        wanted &= not item.get_closest_marker("gpu") or asks_for_gpu(config)
        (kept if wanted else left_out).append(item)
        for package in packages:
            if find_spec(package) is None:
                item.add_marker(pytest.mark.skip(reason=f"{package} is not installed"))
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


def libraries_of(item: Any) -> frozenset[str]:
    """The libraries that a test is about."""
    library = getattr(getattr(item, "callspec", None), "params", {}).get("library")
    if isinstance(library, str):
        return frozenset([library])
    # If none of those chosen is one of the mark, pytest makes a case without a parameter.
    mark = item.get_closest_marker("libraries")
    return frozenset(mark.args if mark else ["numpy"])


def take_now(item: pytest.Item, before: int) -> bool:
    """Whether a test does not wait for --thorough: of a grid few cases do not, along the diagonals.

    One in five, and of those that JAX compiles one in ten.
    """
    packages = {*map(package_of, libraries_of(item))}
    grid = item.get_closest_marker("grid")
    if any(not mark.args or packages & {*map(package_of, mark.args)} for mark in item.iter_markers("thorough")):
        return False
    every = 10 if "jax" in packages else 5
    return (
        not (grid and packages & {*map(package_of, grid.args or ["jax", "torch", "strict"])})
        or (before + before // every) % every == 0
    )


@pytest.fixture
def draws(request: pytest.FixtureRequest) -> Callable[[int], range]:
    """Seeds of so many random draws: the first tenth of them, the others with --rest, all with --thorough."""
    take = request.config.getoption("take")

    def seeds(count: int) -> range:
        first = -(-count // 10)
        return range(first if take == "rest" else 0, count if take else first)

    return seeds


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_module() -> Iterator[None]:
    """JAX maps memory for every program that it compiles, and a process may hold only so many maps."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture
def bands_at_any_length() -> Iterator[None]:
    """Bands are weighed by their operations alone, so that calls too short for them take some."""
    from tattn.planning.settings import using

    with using(bands_call=0.0, bands_row=0.0):
        yield


@pytest.fixture(scope="session")
def library(request: pytest.FixtureRequest) -> Library:
    return make_library(request.param)
