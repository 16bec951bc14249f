"""Array libraries that the package does not know, and what importing it brings along."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
from cases import write_other_library
from conftest import CPU, package_of

import tattn
from tattn.backends import seen
from tattn.backends.numpy import BACKEND

LIBRARIES = ("array_api_strict", "cupy", "jax", "scipy", "torch")


@pytest.fixture
def site(tmp_path):
    """A folder with a further array library, `otherlib`: array-api-strict under another name."""
    write_other_library(tmp_path)
    return tmp_path


def plug_in(site: Path, value: str) -> None:
    """Install a package into the folder that offers `value` as the backend for arrays of `otherlib`."""
    info = site / "plug-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[tattn.backends]\notherlib = {value}\n", encoding="utf-8")
    source = """
        import otherlib
        from tattn.backends import Backend


        class OtherBackend(Backend):
            name = "Other"

            def run(self, function, call, arrays):
                print("run", function.__name__)
                return super().run(function, call, arrays)


        BACKEND = OtherBackend(otherlib)
    """
    (site / "plug.py").write_text(dedent(source), encoding="utf-8")


def run(code: str, *folders: Path) -> list[str]:
    """Lines that the code prints in a process of its own, with the folders first on its path."""
    paths = [*map(str, folders), str(Path(tattn.__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-W", "error", "-c", dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


CALL = """
import sys
import numpy as np
import otherlib
import tattn

rng = np.random.default_rng(0)
query, *rest = rng.uniform(-1, 1, (5, 40, 3))
# Not the default device: what is created without saying where does not fit.
there, host = otherlib.Device("device1"), otherlib.Device("CPU_DEVICE")


def moved(array):
    return otherlib.asarray(array, device=there)


def gap(array, expected):
    assert type(array).__module__ == "otherlib._array_object", type(array)
    assert array.device == there
    return np.abs(np.from_dlpack(otherlib.asarray(array, device=host)) - expected).max()


arguments = moved(query), [moved(a) for a in rest[:2]], [moved(a) for a in rest[2:]]
promise = tattn.plan(query, rest[:2], bound=1.0)
for options in ({"method": "exact"}, {"method": "polynomial"}, {"plan": promise}):
    expected, pullback = tattn.tensor_attention_vjp(query, rest[:2], rest[2:], **options)
    expected = expected, *pullback(query)[1]
    out, pullback = tattn.tensor_attention_vjp(*arguments, **options)
    dquery, dkeys, dvalues = pullback(arguments[0])
    found = tattn.tensor_attention(*arguments, **options), *dkeys
    print("gap", max(gap(a, e) for a, e in zip(found, expected, strict=True)) < 1e-13)
largest, _ = tattn.measure_error(*arguments, out)
print("measured", largest < 1e-3)
print("estimated", tattn.plan(*arguments, bound="estimated").source)
print("imported", "array_api_strict" in sys.modules)
"""
RIGHT = ["gap True"] * 3 + ["measured True", "estimated estimate", "imported False"]


@pytest.mark.libraries("strict")
def test_a_library_plugged_in_computes_through_its_backend(site):
    plug_in(site, "plug:BACKEND")
    lines = run(CALL, site)
    assert [line for line in lines if not line.startswith("run")] == RIGHT
    assert {"run _survey", "run forward", "run backward"} <= set(lines)


@pytest.mark.libraries("strict")
def test_a_library_that_follows_the_standard_needs_no_plug(site):
    assert run(CALL, site) == RIGHT


CUPY = {
    "__init__.py": (Path(__file__).parent / "guarded.py").read_text(encoding="utf-8")
    + """

def asnumpy(x):
    return x.get()


from cupy import cuda
""",
    "cuda/__init__.py": """
from types import SimpleNamespace

from cupy import Device

runtime = SimpleNamespace(is_hip=False)


def get_current_stream():
    return SimpleNamespace(synchronize=lambda: None, is_capturing=lambda: False)
""",
    "cuda/device.py": "from cupy import Device",
    "linalg.py": "from numpy.linalg import *",
    "fft.py": "from numpy.fft import *",
    "_core/__init__.py": "",
    "_core/_routines_linalg.py": """
COMPUTE_TYPE_DEFAULT, COMPUTE_TYPE_FP16, COMPUTE_TYPE_BF16, COMPUTE_TYPE_TF32 = 1, 3, 6, 7
compute_type = 7


def get_compute_type(dtype):
    return compute_type


def set_compute_type(dtype, chosen):
    global compute_type
    compute_type = chosen
""",
}

ON_CUPY = """
import cupy
import numpy as np
from cupy._core import _routines_linalg as products
import tattn
from tattn.backends import cupy as backend
from tattn.conformance import check


def there(x):
    return cupy.ndarray(x, 1)


seen = set()
multiply = cupy.matmul
cupy.matmul = lambda *x, **out: (seen.add(products.compute_type), multiply(*x, **out))[1]
print(check(there), check(there, dtype="float64"))
print("products", seen, products.compute_type)
q, a, b, u, v = np.random.default_rng(0).uniform(-1, 1, (5, 60, 3))
for options in ({"series": "banded"}, {"bound": 1.0, "method": "polynomial"}):
    plan = tattn.plan_for(n=60, dim=3, tol=1e-2, dtype="float64", **options)
    for _ in range(2):
        cupy.reads = cupy.uploads = 0
        out, pullback = tattn.tensor_attention_vjp(there(q), [there(a), there(b)], [there(u), there(v)], plan=plan)
        pullback(there(u), return_error=True)
    print("reads", cupy.reads, "uploads", cupy.uploads)
tables = backend.BACKEND.tables
print("tables", len(tables._held) > 3, {table.device.id for table, _ in tables._held.values()})
"""


def test_cupy_without_a_device(tmp_path):
    """Its own backend and array-api-compat's namespace, on a stand-in: arrays of another device than the current one."""
    for name, text in CUPY.items():
        (tmp_path / "cupy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cupy" / name).write_text(text, encoding="utf-8")
    expected = ["[] []", "products {1} 7", *["reads 0 uploads 0"] * 2, "tables True {1}"]
    assert run(ON_CUPY, tmp_path) == expected


REFUSED = """
import numpy as np
import otherlib
import tattn

ones = np.ones((3, 2))
other = otherlib.asarray(ones)
for query, key in ((other, ones), (ones, other), (other, otherlib.astype(other, otherlib.int64))):
    try:
        tattn.tensor_attention(query, [key], [query])
    except TypeError as error:
        print(error)
"""


@pytest.mark.libraries("strict")
def test_arrays_of_a_library_plugged_in_are_checked(site):
    plug_in(site, "plug:BACKEND")
    assert run(REFUSED, site) == [
        "keys[0] should be an array of Other, like query, got one of NumPy",
        "keys[0] should be an array of NumPy, like query, got one of Other",
        "keys[0] should have a dtype of float16, bfloat16, float32, float64, got int64",
    ]


NO_BACKENDS = [("plug:OtherBackend", "type"), ("plug:otherlib", "module"), ("plug:BACKEND.name", "str")]


@pytest.mark.parametrize(("value", "given"), NO_BACKENDS)
@pytest.mark.libraries("strict")
def test_a_plug_that_is_no_backend(site, value, given):
    plug_in(site, value)
    code = """
        import otherlib
        import tattn

        ones = otherlib.ones((3, 2))
        for _ in range(2):
            try:
                tattn.tensor_attention(ones, [ones], [ones])
            except TypeError as error:
                print(error)
    """
    message = f"entry point '{value}' of group 'tattn.backends' should be a tattn.backends.Backend, got "
    assert run(code, site) == [message + given] * 2


@pytest.mark.libraries("strict")
def test_a_plug_is_loaded_only_for_its_arrays(site):
    plug_in(site, "plug:BACKEND")
    code = """
        import sys
        import numpy as np
        import tattn

        tattn.tensor_attention(np.ones((3, 2)), [np.ones((3, 2))], [np.ones((3, 2))])
        print("plug" in sys.modules)
    """
    assert run(code, site) == ["False"]


def test_importing_brings_no_array_library_but_numpy():
    code = f"""
        import sys
        import tattn

        print(sorted(sys.modules.keys() & set({LIBRARIES!r})), "numpy" in sys.modules)
    """
    assert run(code) == ["[] True"]


@pytest.mark.libraries("torch")
def test_layers_bring_their_library_when_asked_for():
    pytest.importorskip("torch")
    code = """
        import sys
        from tattn.nn import AttentionConfig

        AttentionConfig(8, 2).plan()
        print("torch" in sys.modules, "jax" in sys.modules)
        from tattn.nn import TensorAttention

        print("torch" in sys.modules, "jax" in sys.modules)
    """
    assert run(code) == ["False False", "True False"]


@pytest.mark.parametrize("ours", [pytest.param(name, marks=pytest.mark.libraries(name)) for name in CPU])
def test_a_call_brings_no_other_array_library(ours):
    ours = package_of(ours)
    # JAX brings scipy along.
    others = set(LIBRARIES) - {ours} - ({"scipy"} if ours == "jax" else set())
    namespace = {"jax": "jax.numpy"}.get(ours, ours)
    code = f"""
        import sys
        import {namespace} as xp

        before = set(sys.modules)
        import tattn

        array = xp.ones((3, 2), dtype=xp.float32)
        tattn.tensor_attention(array, [array, array], [array, array])
        print(sorted((sys.modules.keys() - before) & {others!r}))
    """
    assert run(code) == ["[]"]


def test_a_command_that_plans_brings_no_array_library():
    code = f"""
        import sys
        from tattn.__main__ import main

        main(["plan", "--n=1000", "--dim=4", "--bound=1"])
        print(sorted(sys.modules.keys() & set({LIBRARIES!r})))
    """
    assert run(code)[-1] == "[]"


def test_every_backend_is_looked_for():
    files = {file.stem for file in Path(seen.__file__).parent.glob("*.py")}
    shared = {"__init__", "base", "operations", "progress", "seen", "tables", "threads"}
    assert files - set(seen.LIBRARIES) == shared | {"jax_host"}
    assert set(seen.LIBRARIES) <= files


# With libraries that are installed and without.
@pytest.mark.libraries("numpy", "strict")
@pytest.mark.parametrize("module", seen.LIBRARIES)
def test_what_is_seen_of_a_library(module):
    found = seen.library(module)
    assert found.installed == (find_spec(module) is not None)
    if not found.installed:
        assert str(found) == f"{module}: not installed"
        return
    if module == "cupy" and found.problem:
        pytest.skip(found.problem)
    assert found.problem == ""
    assert found.version == metadata.version(metadata.packages_distributions()[module][0])
    assert str(found).startswith(f"{module} {found.version}: {found.devices[0]}")
    if module in ("numpy", "torch"):
        assert found.devices[0] == "cpu"
        assert found.threads >= 1


def test_libraries_that_cannot_be_used_say_why_and_the_others_are_reported(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13:\\n no such file')\n", encoding="utf-8")
    # A folder that is no package.
    (tmp_path / "cupy").mkdir()
    plug_in(tmp_path, "plug:BACKEND")
    (tmp_path / "otherlib.py").write_text("ones = 1 / 0\n", encoding="utf-8")
    code = """
        from tattn.__main__ import main

        assert main(["info"]) == 0
    """
    lines = run(code, tmp_path)
    assert lines[0].startswith(f"tattn {tattn.__version__}, Python {platform.python_version()}, ")
    told = {line.split()[0].rstrip(":"): line for line in lines[2:]}
    assert set(told) == {*seen.LIBRARIES, "otherlib", "kernels"}
    assert told["numpy"].startswith(f"numpy {np.__version__}: cpu; ")
    assert told["torch"].endswith(": cannot be used: OSError: libcudart.so.13: no such file")
    assert "cupy: cannot be used: ImportError: " in told["cupy"]
    assert told["otherlib"] == "otherlib: cannot be used: ZeroDivisionError: division by zero"


@pytest.mark.libraries("strict")
def test_a_library_plugged_in_is_seen(site):
    plug_in(site, "plug:BACKEND")
    code = """
        from tattn.__main__ import main

        main(["info", "--json"])
    """
    found = json.loads(run(code, site)[-1])
    assert (found["tattn"], found["cores"] >= 1) == (tattn.__version__, True)
    other = found["libraries"][-1]
    assert (other["module"], other["installed"], other["problem"]) == ("otherlib", True, "")
    assert "CPU_DEVICE" in other["devices"][0]


def test_a_library_whose_products_are_wrong_cannot_be_used():
    with BACKEND.using(to_numpy=lambda product: product + 0.5):
        found = seen.library("numpy")
    assert found.problem == "ArithmeticError: the product of two matrices of ones is wrong"
