"""Arguments that do not fit: the error says which, what was expected and given, and nothing is computed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from math import comb, inf, nan
from typing import Any

import numpy as np
import pytest
from cases import refuse
from conftest import make_library, pairs
from reference import changed
from watching import calls_of

import tattn
from tattn.bounds import score_range
from tattn.engines import features, scorewise, tuples
from tattn.planning import sampling
from tattn.planning.settings import MAX_RANK

# Query, keys and values that fit.
Q, A, B, U, V = np.random.default_rng(0).uniform(-1, 1, (5, 6, 4))
ROWS, DIM = Q.shape
MASK = np.ones(ROWS, bool)
SWAPPED = Q.astype(Q.dtype.newbyteorder(">" if sys.byteorder == "little" else "<"))
ARRAYS = {"query": Q, "keys": [A, B], "values": [U, V]}


def measure_error(**arguments: Any) -> Any:
    return tattn.measure_error(**{"out": Q, **arguments})


ATTENTION = [tattn.tensor_attention, tattn.tensor_attention_vjp]
PLANNED = [*ATTENTION, tattn.plan]
ALL = [*PLANNED, measure_error]


def by_name(function: Any) -> str:
    return function.__name__


def by_type(given: Any) -> str:
    return type(given).__name__


def case(label: str, error: type, name: str, expected: str, given: str, **changes: Any) -> Any:
    """An argument that does not fit; `expected` and `given` are regular expressions."""
    message = rf"^{re.escape(name)} should .*{expected}.*, got .*{given}"
    return pytest.param(changes, error, message, id=f"{name}-{label}")


COMPUTE = [function for module in (tuples, features, scorewise) for function in (module.forward, module.backward)]
READ = [score_range.ranges, sampling.estimate, sampling.Sample.of.__func__]


@pytest.fixture
def no_forward():
    """No output is computed."""
    with calls_of(*COMPUTE) as calls:
        yield
    assert not calls


@pytest.fixture
def nothing_read():
    """No output is computed and no value is looked at."""
    with calls_of(*COMPUTE, *READ) as calls:
        yield
    assert not calls


@pytest.mark.parametrize("function", ALL, ids=by_name)
def test_arguments_that_fit_are_accepted(function):
    function(**ARRAYS, key_masks=[MASK, None], scale=0.5)


@pytest.mark.parametrize("function", ALL, ids=by_name)
def test_what_reads_values_is_noticed(function):
    with calls_of(*COMPUTE, *READ) as calls:
        function(**ARRAYS)
    assert calls


@pytest.mark.parametrize("method", ["exact", "polynomial"])
@pytest.mark.parametrize("function", ATTENTION, ids=by_name)
def test_what_computes_is_noticed(function, method):
    with calls_of(*COMPUTE) as calls:
        function(**ARRAYS, method=method)
    assert calls


ARRAY_CASES = [
    case("list", TypeError, "query", "an array", "list", query=Q.tolist()),
    case("None", TypeError, "query", "an array", "NoneType", query=None),
    case("str", TypeError, "query", "an array", "str", query="query"),
    case("NumPy scalar", TypeError, "query", "an array", "NumPy scalar", query=np.float64(1)),
    case("list", TypeError, "keys[1]", "an array", "list", keys=[A, B.tolist()]),
    case("list", TypeError, "values[0]", "an array", "list", values=[U.tolist(), V]),
    case("None", TypeError, "keys[0]", "an array", "NoneType", keys=[None, B]),
    case("None", TypeError, "values[0]", "an array", "NoneType", values=[None, V]),
    case("None", TypeError, "values[1]", "an array", "NoneType", values=[U, None]),
    case("byte order", TypeError, "query", "an array", r"another byte order .*'>f8'.*astype\('float64'\)", query=SWAPPED),
    case("byte order", TypeError, "keys[1]", "an array", "another byte order", keys=[A, SWAPPED]),
    case("byte order", TypeError, "values[0]", "an array", "another byte order", values=[SWAPPED, V]),
    case("matrix", TypeError, "query", "an array", r"np\.matrix", query=Q.view(np.matrix)),
    case("matrix", TypeError, "keys[0]", "an array", r"np\.matrix", keys=[A.view(np.matrix), B]),
    case("matrix", TypeError, "values[1]", "an array", r"np\.matrix", values=[U, V.view(np.matrix)]),
    case("masked", TypeError, "query", "an array", "masked array", query=np.ma.array(Q)),
    case("masked", TypeError, "keys[1]", "an array", "masked array.*key_masks", keys=[A, np.ma.array(B)]),
    case("masked", TypeError, "values[0]", "an array", "masked array", values=[np.ma.array(U), V]),
    # How many views.
    case("bare array", TypeError, "keys", "list or tuple of arrays", "ndarray", keys=A),
    case("stacked", TypeError, "keys", "list or tuple of arrays", "ndarray", keys=np.stack([A, B])),
    case("bare array", TypeError, "values", "list or tuple of arrays", "ndarray", values=U),
    case("generator", TypeError, "keys", "list or tuple", "generator", keys=(k for k in (A, B))),
    case("None", TypeError, "keys", "list or tuple", "None", keys=None),
    case("none", ValueError, "keys", "at least one array", "none", keys=[]),
    case("none", ValueError, "values", "at least one array", "none", values=[]),
    case("fewer", ValueError, "keys and values", "the same number of arrays", "2 keys and 1 values", values=[U]),
    case("more", ValueError, "keys and values", "the same number of arrays", "2 keys and 3 values", values=[U] * 3),
    # Dtypes.
    case("int", TypeError, "query", "dtype of .*float32, float64", "int64", query=Q.astype(np.int64)),
    case("complex", TypeError, "query", "dtype of .*float64", "complex128", query=Q.astype(complex)),
    case("bool", TypeError, "query", "dtype of .*float64", "bool", query=Q > 0),
    case("object", TypeError, "query", "dtype of .*float64", "object", query=Q.astype(object)),
    case("int", TypeError, "keys[0]", "dtype of .*float64", "int32", keys=[A.astype(np.int32), B]),
    case("complex", TypeError, "values[1]", "dtype of .*float64", "complex64", values=[U, V.astype("c8")]),
    case("mixed", TypeError, "keys[0]", "query's dtype float64", "float32", keys=[A.astype("f4"), B]),
    case("mixed", TypeError, "keys[1]", "query's dtype float64", "float16", keys=[A, B.astype("f2")]),
    case("mixed", TypeError, "values[1]", "query's dtype float64", "float32", values=[U, V.astype("f4")]),
    # Shapes.
    case("rank 0", ValueError, "query", "at least two dimensions", r"\(\)", query=np.array(1.0)),
    case("rank 1", ValueError, "query", "at least two dimensions", r"\(4,\)", query=Q[0]),
    case("rank 1", ValueError, "keys[1]", "at least two dimensions", r"\(4,\)", keys=[A, B[0]]),
    case("rank 1", ValueError, "values[0]", "at least two dimensions", r"\(4,\)", values=[U[0], V]),
    case("many", ValueError, "query", "at most 24 dimensions", "42", query=Q[(None,) * 40]),
    case("many", ValueError, "keys[1]", "at most 24 dimensions", "25", keys=[A, B[(None,) * 23]]),
    case("many", ValueError, "values[0]", "at most 24 dimensions", "64", values=[U[(None,) * 62], V]),
    case("many", ValueError, "key_masks[0]", "at most 24 dimensions", "64", key_masks=[MASK[(None,) * 63], None]),
    case("no rows", ValueError, "query", "no dimension of length 0", r"\(0, 4\)", query=Q[:0]),
    case("no channels", ValueError, "query", "no dimension of length 0", r"\(6, 0\)", query=Q[:, :0]),
    case("no rows", ValueError, "keys[0]", "no dimension of length 0", r"\(0, 4\)", keys=[A[:0], B]),
    case("no channels", ValueError, "values[1]", "of length 0", r"\(6, 0\)", values=[U, V[:, :0]]),
    case("d", ValueError, "keys[0]", "last dimension 4", r"\(6, 3\)", keys=[A[:, :3], B]),
    case("d", ValueError, "keys[1]", "last dimension 4", r"\(6, 1\)", keys=[A, B[:, :1]]),
    case("dv", ValueError, "values[1]", r"values\[0\], 4", r"\(6, 2\)", values=[U, V[:, :2]]),
    case("length", ValueError, "values[0]", r"rows as keys\[0\], 6", r"\(5, 4\)", values=[U[:5], V]),
    case("length", ValueError, "values[1]", r"rows as keys\[1\], 5", r"\(6, 4\)", keys=[A, B[:5]]),
    case("length 1", ValueError, "values[1]", r"rows as keys\[1\], 6", r"\(1, 4\)", values=[U, V[:1]]),
    case(
        "leading", ValueError, "keys[1]", r"broadcast with \(2,\)", r"\(3,\)",
        query=np.stack([Q] * 2), keys=[A, np.stack([B] * 3)],
    ),
    case(
        "leading", ValueError, "values[0]", r"broadcast with \(2, 3\)", r"\(3, 2\)",
        query=np.ones((2, 1, ROWS, DIM)), keys=[np.ones((3, ROWS, DIM)), B],
        values=[np.ones((3, 2, ROWS, DIM)), V],
    ),
    # Masks.
    case("stacked", ValueError, "key_masks", "list or tuple of masks", r"shape \(2, 6\)", key_masks=np.stack([MASK] * 2)),
    case("fewer", ValueError, "key_masks", "each of the 2 keys", "1", key_masks=[MASK]),
    case("list", TypeError, "key_masks[0]", "an array", "list", key_masks=[[True] * ROWS, None]),
    case("masked", TypeError, "key_masks[1]", "an array", "masked", key_masks=[None, np.ma.array(MASK)]),
    case("int", TypeError, "key_masks[1]", "boolean", "int64", key_masks=[None, np.ones(ROWS, np.int64)]),
    case("float", TypeError, "key_masks[0]", "boolean", "float64", key_masks=[np.zeros(ROWS), None]),
    case("length", ValueError, "key_masks[0]", r"\(\.\.\., 6\)", r"\(5,\)", key_masks=[MASK[:5], None]),
    case("length 1", ValueError, "key_masks[0]", r"\(\.\.\., 6\)", r"\(1,\)", key_masks=[MASK[:1], None]),
    case("column", ValueError, "key_masks[0]", r"\.\.\., 6", r"\(6, 1\)", key_masks=[MASK[:, None], None]),
    case("rank 0", ValueError, "key_masks[1]", r"\(\.\.\., 6\)", r"\(\)", key_masks=[None, np.array(True)]),
    case(
        "leading", ValueError, "key_masks[1]", r"broadcast with \(2,\)", r"\(3,\)",
        key_masks=[np.ones((2, ROWS), bool), np.ones((3, ROWS), bool)],
    ),
]  # fmt: skip

NUMBERS = [
    ("zero", ValueError, "finite and above 0", "0", 0),
    ("negative", ValueError, "finite and above 0", r"-0\.5", -0.5),
    ("NaN", ValueError, "finite and above 0", "nan", nan),
    ("infinity", ValueError, "finite and above 0", "inf", inf),
    ("NumPy NaN", ValueError, "finite and above 0", "nan", np.float32(nan)),
    ("bool", TypeError, "a number", "bool", True),
    ("NumPy bool", TypeError, "a number", "bool", np.True_),
    ("str", TypeError, "a number", "str", "0.5"),
    ("complex", TypeError, "a number", "complex", 0.5j),
    ("array", TypeError, "a number", "ndarray", np.array([0.5, 0.5])),
]


def numbers(name: str) -> list[Any]:
    """Cases for an argument that should be a finite number above 0."""
    return [case(label, error, name, *rest, **{name: value}) for label, error, *rest, value in NUMBERS]


SCALES = [
    case("huge", ValueError, "scale", r"2\*\*-374 to 2\*\*374 for float32 and 2 views", r"1e\+120", scale=1e120),
    case("tiny", ValueError, "scale", r"2\*\*-374 to 2\*\*374 for float32 and 2 views", "1e-120", scale=1e-120),
]


@pytest.mark.parametrize(("changes", "error", "message"), SCALES)
def test_scales_that_float32_cannot_hold(changes, error, message, nothing_read):
    narrow = {"query": Q.astype("f4"), "keys": [A.astype("f4"), B.astype("f4")]}
    values = [U.astype("f4"), V.astype("f4")]
    for function in (tattn.tensor_attention, tattn.tensor_attention_vjp, tattn.plan):
        refuse(function, error, message, **narrow, values=values, **changes)
    refuse(tattn.plan_for, error, message, n=10, dim=4, bound=1.0, **changes)


@pytest.mark.parametrize(("changes", "error", "message"), [*ARRAY_CASES, *numbers("scale")])
@pytest.mark.parametrize("function", ALL, ids=by_name)
def test_arrays_and_scale(function, changes, error, message, nothing_read):
    refuse(function, error, message, **{**ARRAYS, **changes})


@pytest.mark.parametrize("function", [f for f in ALL if f is not tattn.tensor_attention], ids=by_name)
def test_empty_batches_are_for_attention_alone(function, nothing_read):
    message = r"^query should .*of length 0.*, got .*\(0, 6, 4\)"
    refuse(function, ValueError, message, **{**ARRAYS, "query": np.zeros((0, ROWS, DIM))})


@pytest.mark.parametrize("function", [*ATTENTION, measure_error], ids=by_name)
def test_only_plan_can_do_without_values(function, nothing_read):
    message = "^values should be a list or tuple of arrays.*, got None"
    refuse(function, TypeError, message, **{**ARRAYS, "values": None})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        *numbers("tol"),
        case("None", TypeError, "tol", "a number", "NoneType", tol=None),
        case("unknown", ValueError, "method", "'auto', 'polynomial', 'exact'", "'fast'", method="fast"),
        case("None", ValueError, "method", "'auto', 'polynomial', 'exact'", "None", method=None),
    ],
)
@pytest.mark.parametrize("function", PLANNED, ids=by_name)
def test_tol_and_method(function, changes, error, message, nothing_read):
    refuse(function, error, message, **ARRAYS, **changes)


@pytest.mark.parametrize("given", ["no", None, 1, 0.0, np.array(True), [True]], ids=by_type)
@pytest.mark.parametrize("name", ["return_lse", "return_error", "return_plan"])
@pytest.mark.parametrize("function", ATTENTION, ids=by_name)
def test_flags(function, name, given, nothing_read):
    refuse(function, TypeError, f"^{name} should be True or False, got {by_type(given)}$", **ARRAYS, **{name: given})


@pytest.mark.parametrize("order", [{}, {"causal": True}, {"window": (3, 2)}], ids=str)
@pytest.mark.parametrize("options", [{"method": "exact"}, {"degree": 2}], ids=str)
@pytest.mark.grid
def test_as_many_dimensions_as_are_allowed(library, options, order):
    """24 in all: what computes has room for those that it adds."""
    plan = tattn.plan(**ARRAYS, **options, **order, bound=4.0)
    expected = tattn.tensor_attention(**ARRAYS, **order, plan=plan)
    query, keys, values = library.arrays(np.stack([Q] * 3)[(None,) * 21], [A[(None,) * 22], B], [U, V])
    (out, error), pullback = tattn.tensor_attention_vjp(query, keys, values, **order, plan=plan, return_error=True)
    leading = (1,) * 21 + (3,)
    assert out.shape == (*leading, ROWS, DIM)
    assert error.shape == (*leading, ROWS)
    np.testing.assert_allclose(library.numpy(out)[(0,) * 21], np.stack([expected] * 3), rtol=1e-12, atol=1e-12)
    grads, bounds = pullback(out, return_error=True)
    assert grads[0].shape == bounds[0].shape == query.shape
    assert tattn.measure_error(query, keys, values, out, **order)[0] <= plan.error


@pytest.mark.parametrize("scalar", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("method", ["exact", "polynomial"])
def test_scale_and_tol_may_be_numpy_scalars(method, scalar):
    number = scalar(0.5)
    plain = tattn.tensor_attention(**ARRAYS, scale=0.5, tol=0.5, method=method)
    assert (tattn.tensor_attention(**ARRAYS, scale=number, tol=number, method=method) == plain).all()
    assert tattn.plan(**ARRAYS, scale=number, tol=number) == tattn.plan(**ARRAYS, scale=0.5, tol=0.5)


@pytest.mark.parametrize("whole", [int, np.int32, np.uint8])
def test_scale_and_tol_may_be_whole(whole):
    one = whole(1)
    assert tattn.plan(**ARRAYS, scale=one, tol=one) == tattn.plan(**ARRAYS, scale=1.0, tol=1.0)


# Several libraries, dtypes of theirs, devices.


TITLES = {"numpy": "NumPy", "torch": "torch", "jax": "JAX", "strict": "array-api-strict"}


@pytest.mark.parametrize("argument", ["keys[1]", "values[0]", "key_masks[0]"])
@pytest.mark.parametrize("pair", pairs(TITLES))
def test_mixed_libraries(pair, argument, nothing_read):
    ours, theirs = map(make_library, pair)
    query, keys, values, masks = ours.arrays(Q, [A, B], [U, V], [MASK, MASK])
    named = {"keys": keys, "values": values, "key_masks": masks}
    name, place = argument[:-3], int(argument[-2])
    named[name][place] = theirs.array(ours.numpy(named[name][place]))
    message = rf"^{re.escape(argument)} should be .*{TITLES[ours.name]}.* query, got .*{TITLES[theirs.name]}"
    refuse(tattn.tensor_attention, TypeError, message, query, **named)


@pytest.mark.parametrize("dtype", ["int32", "complex128", "bool"])
def test_dtypes_of_every_library(library, dtype, nothing_read):
    query, keys, values = library.arrays(Q, [A, B], [U, V.astype(dtype)])
    message = rf"^values\[1\] should have a dtype of .*float64, got {dtype}"
    refuse(tattn.tensor_attention, TypeError, message, query, keys, values)


def test_mixed_dtypes_of_every_library(library, nothing_read):
    query, keys, values = library.arrays(Q, [A.astype("f4"), B], [U, V])
    message = r"^keys\[0\] should have the query's dtype float64, got float32"
    refuse(tattn.tensor_attention, TypeError, message, query, keys, values)


@pytest.mark.parametrize("argument", ["query", "keys[0]"])
@pytest.mark.libraries("torch")
def test_sparse_tensors(argument, nothing_read):
    torch = make_library("torch")
    query, keys, values = torch.arrays(Q, [A, B], [U, V])
    if argument == "query":
        query = query.to_sparse()
    else:
        keys[0] = keys[0].to_sparse()
    message = rf"^{re.escape(argument)} should be an array, got .*sparse"
    refuse(tattn.tensor_attention, TypeError, message, query, keys, values)


@pytest.mark.parametrize("argument", ["keys[1]", "values[0]", "key_masks[0]"])
@pytest.mark.libraries("strict")
def test_mixed_devices(argument, nothing_read):
    xp = pytest.importorskip("array_api_strict")
    here, there = xp.Device("CPU_DEVICE"), xp.Device("device1")
    query = xp.asarray(Q, device=here)
    named = {"keys": [A, B], "values": [U, V], "key_masks": [MASK, MASK]}
    named = {name: [xp.asarray(a, device=here) for a in arrays] for name, arrays in named.items()}
    name, place = argument[:-3], int(argument[-2])
    named[name][place] = xp.asarray(named[name][place], device=there)
    message = rf"^{re.escape(argument)} should be on the query's device .*CPU_DEVICE.*, got .*device1"
    refuse(tattn.tensor_attention, ValueError, message, query, **named)


@pytest.mark.parametrize("theirs", [pytest.param(name, marks=pytest.mark.libraries(name)) for name in ("torch", "jax")])
def test_summaries_of_another_library(theirs):
    """On a device of the same name."""
    other = make_library(theirs)
    plan = tattn.plan_for(**NUMBERS_ALONE, degree=2, dtype="float64")
    summary, to_rows = tattn.summarize_vjp([A, B], [U, V], plan)
    message = rf" should be an array of NumPy, like the summary, got one of {TITLES[theirs]}"
    sums = other.arrays(list(summary.sums))
    refuse(summary.attend, TypeError, f"^query{message}", other.array(Q))
    refuse(summary.attend_vjp, TypeError, f"^query{message}", other.array(Q))
    refuse(to_rows, TypeError, rf"^dsums\[0\]{message}", sums)
    refuse(tattn.Summary(plan, summary.sums, tuple(sums)).attend, TypeError, rf"^rests\[0\]{message}", Q)
    refuse(summary.update, TypeError, rf"^keys\[1\]{message}", [A, other.array(B)], [U, V])
    state = tattn.DecodingState(plan, summary)
    refuse(
        state.step, TypeError, rf"^keys\[0\]{message}", other.array(Q[:1]), other.arrays([A[:1], B[:1]]), [U[:1], V[:1]]
    )


@pytest.mark.libraries("torch")
def test_devices_of_traced_tensors(nothing_read):
    """Of which all is known but the values."""
    torch = make_library("torch")
    query, keys, values = torch.arrays(Q, [A, B], [U, V])
    keys[1] = keys[1].to("meta")
    refuse(
        tattn.tensor_attention,
        ValueError,
        r"^keys\[1\] should be on the query's device cpu, got meta",
        query,
        keys,
        values,
    )


TWO_JAX_DEVICES = """
import jax, numpy as np, tattn
first, second = jax.devices()
array = np.ones((3, 2), np.float32)
query, here, there = (jax.device_put(array, d) for d in (first, first, second))
try:
    tattn.tensor_attention(query, [here, there], [here, here])
except ValueError as error:
    print(error)
"""


@pytest.mark.libraries("jax")
def test_mixed_devices_of_jax():
    pytest.importorskip("jax")
    # How many devices a CPU counts as is settled when JAX starts.
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", TWO_JAX_DEVICES]
    done = subprocess.run(command, env={**os.environ, **flags}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.match(r"keys\[1\] should be on the query's device .*:0.*, got .*:1", done.stdout)


@pytest.mark.gpu
@pytest.mark.libraries("torch")
def test_mixed_devices_of_torch(nothing_read):
    cpu, cuda = make_library("torch"), make_library("torch-cuda")
    query, keys, values = cpu.arrays(Q, [A, B], [U, V])
    keys[1] = cuda.array(B)
    message = r"^keys\[1\] should be on the query's device cpu, got cuda"
    refuse(tattn.tensor_attention, ValueError, message, query, keys, values)


# NaN and infinities.


def with_entry(argument: str, entry: float) -> dict[str, Any]:
    """The arrays of a call, with one entry replaced."""
    name, _, place = argument.rstrip("]").partition("[")
    changed = ARRAYS[name].copy()
    if place:
        changed[int(place)] = changed[int(place)].copy()
    (changed[int(place)] if place else changed)[2, 1] = entry
    return {**ARRAYS, name: changed}


ARGUMENTS = ["query", "keys[0]", "keys[1]", "values[0]", "values[1]"]


@pytest.mark.parametrize(("entry", "word"), [(nan, "NaN"), (inf, "infinity"), (-inf, "infinity")])
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_entries_that_are_not_finite(library, argument, entry, word, no_forward):
    arrays = with_entry(argument, entry)
    query, keys, values = library.arrays(*arrays.values())
    message = rf"^{re.escape(argument)} should hold finite numbers, got {word}"
    refuse(tattn.tensor_attention, ValueError, message, query, keys, values)


@pytest.mark.parametrize("method", ["exact", "polynomial"])
@pytest.mark.parametrize("argument", ARGUMENTS)
@pytest.mark.parametrize("function", PLANNED, ids=by_name)
def test_nan_whatever_the_method(function, argument, method, no_forward):
    message = rf"^{re.escape(argument)} should hold finite numbers, got NaN"
    refuse(function, ValueError, message, **with_entry(argument, nan), method=method)


PLANS_OF_DATA = [{"method": "exact"}, {"method": "polynomial"}, {"degree": 3, "bound": "estimated"}]


@pytest.mark.parametrize("options", PLANS_OF_DATA, ids=str)
def test_nan_met_by_a_plan_made_before(options, request):
    plan = tattn.plan(**ARRAYS, **options)
    request.getfixturevalue("no_forward")
    message = r"^keys\[1\] should hold finite numbers, got NaN"
    refuse(tattn.tensor_attention, ValueError, message, **with_entry("keys[1]", nan), plan=plan)


@pytest.mark.parametrize("method", ["exact", "polynomial"])
def test_rows_that_are_masked_out_may_hold_anything(library, method):
    query, keys, values = library.arrays(*with_entry("keys[0]", nan).values())
    masks = [library.array(np.arange(ROWS) != 2), None]
    out = tattn.tensor_attention(query, keys, values, key_masks=masks, method=method)
    assert np.isfinite(library.numpy(out)).all()


@pytest.mark.parametrize("method", ["exact", "polynomial"])
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_a_promised_bound_lets_nan_through_to_the_output(library, argument, method):
    arrays = with_entry(argument, nan)
    query, keys, values = library.arrays(*arrays.values())
    plan = tattn.plan(query, keys, values, bound=1.0, method=method)
    out = library.numpy(tattn.tensor_attention(query, keys, values, plan=plan))
    assert np.isnan(out[2 if argument == "query" else slice(None), 1]).all()


@pytest.mark.parametrize("method", ["exact", "polynomial"])
def test_a_promised_bound_reads_no_values(method):
    with calls_of(*READ) as calls:
        plan = tattn.plan(**ARRAYS, bound=1.0, method=method)
        tattn.tensor_attention(**ARRAYS, plan=plan)
    assert plan.source == "promise"
    assert not calls


# Plans that cannot be made.

# What stands against the polynomial: no degree is known, its rank is too large, it rounds too much.
OUT_OF_REACH = [
    ({"bound": 100.0, "dim": 4}, r"scores may reach [\d.]+, which takes a degree above 40 and a rank above [\d,]+\."),
    ({"bound": 12.0, "dim": 8}, r"scores may reach [\d.]+, which takes degree \d+ and rank [\d,]{7,} at dim 8"),
    ({"bound": 6.0, "dim": 8}, r"scores may reach [\d.]+, which takes degree \d+ and rank .* at dim 8, .*float32"),
]
INSTEAD = r"cannot meet tol=0\.001: %s.* Use method='exact' \(.*flop\), .*larger tol, .*degree=.*estimated"


@pytest.mark.parametrize(("numbers", "reason"), OUT_OF_REACH, ids=["degree", "rank", "rounding"])
def test_polynomial_that_cannot_meet_tol_from_numbers(numbers, reason):
    refuse(tattn.plan_for, tattn.PlanError, INSTEAD % reason, n=1000, method="polynomial", **numbers)


@pytest.mark.parametrize(("numbers", "reason"), OUT_OF_REACH, ids=["degree", "rank", "rounding"])
@pytest.mark.parametrize("function", PLANNED, ids=by_name)
def test_polynomial_that_cannot_meet_tol_on_data(function, numbers, reason, no_forward):
    ones = np.ones((5, numbers["dim"]), np.float32)
    # A hair below, since ranges are rounded up.
    scale = 0.999 * numbers["bound"] / numbers["dim"]
    arrays = {"query": -ones, "keys": [ones, ones], "values": [ones, ones], "scale": scale}
    refuse(function, tattn.PlanError, INSTEAD % reason, **arrays, method="polynomial")


def test_polynomial_that_is_estimated_not_to_meet_tol(no_forward):
    query, *keys = (np.tile(array, 2) for array in (Q, A, B))
    options = {"method": "polynomial", "bound": "estimated", "scale": 50}
    message = r"not to meet tol=0\.001: .* reach [\d.]+, .*degree \d+, rank [\d,]+, .* Use method='exact' .*"
    refuse(tattn.plan, tattn.PlanError, message, query, keys, **options)


OPTIONS = [
    case("zero", ValueError, "degree", "at least 1", "0", degree=0),
    case("float", TypeError, "degree", "a whole number", "float", degree=2.0),
    case("bool", TypeError, "degree", "a whole number", "bool", degree=True),
    case("unknown", ValueError, "series", "'minimax', 'taylor'", "'chebyshev'", series="chebyshev"),
    case("None", ValueError, "series", "'minimax', 'taylor'", "None", series=None),
]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        *OPTIONS,
        *numbers("bound")[:-2],
        case("array", TypeError, "bound", "a number", "ndarray", bound=np.array([1.0, 1.0])),
        case("unknown", TypeError, "bound", "a number", "str", bound="data"),
    ],
)
def test_options_of_plan(changes, error, message, no_forward):
    refuse(tattn.plan, error, message, **ARRAYS, **changes)


@pytest.mark.parametrize("changes", [{"degree": 0}, {"series": "chebyshev"}], ids=str)
def test_options_of_an_estimated_plan(changes, no_forward):
    (name,) = changes
    refuse(tattn.plan, ValueError, f"^{name} should be .*, got", **ARRAYS, **changes, bound="estimated")


@pytest.mark.parametrize("series", ["minimax", "taylor"])
@pytest.mark.parametrize(("name", "given"), [("bands", "x"), ("bands", 4), ("moment", 2), ("moment", nan)])
def test_what_belongs_to_bands_alone(name, given, series, nothing_read):
    message = f"^{name} should come with series 'banded', got it with series '{series}'"
    refuse(tattn.plan, ValueError, message, **ARRAYS, series=series, **{name: given})
    refuse(tattn.plan_for, ValueError, message, **NUMBERS_ALONE, series=series, **{name: given})


def test_what_belongs_to_a_polynomial_alone(no_forward):
    message = "^series belongs to the polynomial method, got 'taylor' with method 'exact'"
    refuse(tattn.plan, ValueError, message, **ARRAYS, series="taylor", method="exact")
    refuse(tattn.plan_for, ValueError, message, **NUMBERS_ALONE, series="taylor", method="exact")
    message = "^bound='estimated' .* cannot be combined with method 'exact'"
    refuse(tattn.plan, ValueError, message, **ARRAYS, bound="estimated", method="exact")


NUMBERS_ALONE = {"n": 1000, "dim": 4, "bound": 1.0}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        *OPTIONS,
        *numbers("bound"),
        *numbers("scale"),
        *numbers("tol"),
        case("None", TypeError, "bound", "a number", "NoneType", bound=None),
        case("zero", ValueError, "n", "at least 1", "0", n=0),
        case("float", TypeError, "n", "a whole number", "float", n=1e6),
        case("too few", ValueError, "n", "3 of them for order 3", "2", n=(1000, 1000)),
        case("too many", ValueError, "n", "2 of them for order 2", "3", n=[10, 10, 10], order=2),
        case("zero", ValueError, "n[1]", "at least 1", "0", n=(10, 0, 10)),
        case("float", TypeError, "n[2]", "a whole number", "float", n=(10, 10, 10.0)),
        case("zero", ValueError, "dim", "at least 1", "0", dim=0),
        case("float", TypeError, "dim", "a whole number", "float", dim=4.0),
        case("one", ValueError, "order", "at least 2", "1", order=1),
        case("float", TypeError, "order", "a whole number", "float", order=3.0),
        case("zero", ValueError, "value_dim", "at least 1", "0", value_dim=0),
        case("float", TypeError, "value_dim", "a whole number", "float", value_dim=0.5),
        case("int", ValueError, "dtype", "'float64', .*'float16' or 'bfloat16'", "'int8'", dtype="int8"),
        case("None", ValueError, "dtype", "'float64', .*'float16' or 'bfloat16'", "None", dtype=None),
        case("unknown", ValueError, "method", "'auto', 'polynomial', 'exact'", "'fast'", method="fast"),
    ],
)
def test_options_of_plan_for(changes, error, message):
    refuse(tattn.plan_for, error, message, **{**NUMBERS_ALONE, **changes})


@pytest.mark.parametrize(
    ("name", "message"),
    [("n", "missing .*'n'"), ("dim", "missing .*'dim'"), ("bound", "^bound should be a number, got None")],
)
def test_plan_for_needs_its_numbers(name, message):
    given = {key: number for key, number in NUMBERS_ALONE.items() if key != name}
    refuse(tattn.plan_for, TypeError, message, **given)


def test_a_degree_for_the_exact_method(nothing_read):
    message = "^degree belongs to the polynomial method.*'exact'"
    refuse(tattn.plan, ValueError, message, **ARRAYS, degree=2, method="exact", bound=1.0)
    refuse(tattn.plan_for, ValueError, message, **NUMBERS_ALONE, degree=2, method="exact")


@pytest.mark.parametrize("bound", [None, 1.0, "estimated"])
def test_a_rank_too_large_names_rank_and_bytes(bound, no_forward):
    array = np.ones((5, 64), np.float32)
    rank, limit = comb(74, 10), MAX_RANK
    message = rf"degree 10 at dim 64 has rank {rank:,} and would take [\d.]+ [TP]B .*rank of {limit:,}"
    refuse(tattn.plan, ValueError, message, array, [array, array], degree=10, bound=bound)
    refuse(tattn.plan_for, ValueError, message, n=5, dim=64, bound=1.0, degree=10)


# Plans that contradict themselves.

SMALL_CHANNELS = np.random.default_rng(0).uniform(-1, 1, (3, 400, 8)) * np.exp(-np.arange(8.0))
SOUND = {
    "polynomial": tattn.plan_for(n=9, dim=3, bound=1.0, degree=3, dtype="float64"),
    "exact": tattn.plan_for(n=9, dim=3, bound=1.0, method="exact", dtype="float64"),
    "banded": tattn.plan_for(n=9, dim=3, series="banded", degree=3, bands=2, dtype="float64"),
    "windows": tattn.plan_for(n=9, dim=3, bound=1.0, window=(2, 3)),
    "pruned": tattn.plan(*SMALL_CHANNELS[:1], list(SMALL_CHANNELS[1:]), method="polynomial", scale=1.0),
}


@pytest.mark.parametrize(
    ("plan", "changes"),
    [
        ("polynomial", {"method": "bogus"}), ("polynomial", {"method": None}), ("polynomial", {"method": "exact"}),
        ("polynomial", {"series": "chebyshev"}), ("polynomial", {"series": None}), ("polynomial", {"series": "banded"}),
        ("polynomial", {"source": "rumour"}), ("polynomial", {"source": "answer"}), ("polynomial", {"dtype": "int8"}),
        ("polynomial", {"dtype": np.float32}), ("polynomial", {"degree": 4}), ("polynomial", {"degree": 3.0}),
        ("polynomial", {"degree": True}), ("polynomial", {"degree": 1 << 70}), ("polynomial", {"rank": 19}),
        ("polynomial", {"rank": "20"}), ("polynomial", {"dim": 4}), ("polynomial", {"dim": 0}), ("polynomial", {"order": 1}),
        ("polynomial", {"scale": 0.0}), ("polynomial", {"scale": nan}), ("polynomial", {"scale": inf}),
        ("polynomial", {"scale": "1"}), ("polynomial", {"bound": nan}), ("polynomial", {"bound": -1.0}),
        ("polynomial", {"bound": None}), ("polynomial", {"error": nan}), ("polynomial", {"error": -1e-9}),
        ("polynomial", {"error": inf}), ("polynomial", {"grad_error": nan}), ("polynomial", {"lowest_mean": nan}),
        ("polynomial", {"certified": 1}), ("polynomial", {"source": "estimate"}), ("polynomial", {"causal": "yes"}),
        ("polynomial", {"coefficients": ()}), ("polynomial", {"coefficients": (1.0, 1.0, 1.0, "x")}),
        ("polynomial", {"coefficients": (1.0, 1.0, nan, 0.1)}), ("polynomial", {"coefficients": (1.0, 1.0, "x", 0.1)}),
        ("polynomial", {"bands": 2}), ("polynomial", {"moment": 2}), ("polynomial", {"window": (2, 2)}),
        ("polynomial", {"grading": (1, 2)}), ("polynomial", {"grading": (1, 1, 0)}), ("polynomial", {"grading": (1, 1, 10**9)}),
        ("polynomial", {"grading": (1, 1, 2)}), ("polynomial", {"sizes": (1.0,)}),
        ("exact", {"method": "polynomial"}), ("exact", {"degree": 2}), ("exact", {"rank": 4}), ("exact", {"series": "minimax"}),
        ("exact", {"coefficients": (1.0,)}), ("exact", {"bands": 1}), ("exact", {"window": (2, 2)}),
        ("banded", {"bands": 0}), ("banded", {"moment": 3}), ("banded", {"moment": 4}), ("banded", {"source": "promise"}),
        ("banded", {"causal": True}), ("banded", {"coefficients": (1.0,) * 4}), ("banded", {"rank": 10}),
        ("windows", {"causal": False}), ("windows", {"window": (2,)}), ("windows", {"window": (2, 3, 4)}),
        ("windows", {"window": (2, "x")}),
        ("pruned", {"grading": ()}), ("pruned", {"sizes": ()}), ("pruned", {"sizes": ("x",) * len(SOUND["pruned"].sizes)}),
        ("pruned", {"rank": SOUND["pruned"].rank + 1}),
    ],
    ids=str,
)  # fmt: skip
def test_a_plan_that_contradicts_itself(plan, changes):
    with pytest.raises(ValueError, match=r"^plan's \w+ should be .*, got ") as caught:
        changed(SOUND[plan], **changes)
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)


def test_sound_plans_may_be_changed_where_nothing_contradicts():
    assert SOUND["pruned"].grading
    assert SOUND["pruned"].sizes
    for plan in SOUND.values():
        assert changed(plan, reason="mine", lengths=(2, 2, 2)) != plan
    changed(SOUND["polynomial"], dtype="float16", scale=2, coefficients=(1, 1.0, 0.5, np.float64(0.1)))


# Plans that do not fit the call.


@pytest.mark.parametrize("given", [{}, "auto", tattn.plan], ids=by_type)
@pytest.mark.parametrize("function", ATTENTION, ids=by_name)
def test_something_else_for_a_plan(function, given, nothing_read):
    message = rf"^plan should be a tattn\.Plan, got {by_type(given)}"
    refuse(function, TypeError, message, **ARRAYS, plan=given)


@pytest.mark.parametrize(
    ("changes", "name", "theirs", "ours"),
    [
        ({"dim": 5}, "dim", "5", "4"),
        ({"order": 2}, "order", "2", "3"),
        ({"order": 4}, "order", "4", "3"),
        ({"dtype": "float32"}, "dtype", "float32", "float64"),
        ({"scale": 0.5}, "scale", "0.5", "0.25"),
    ],
)
@pytest.mark.parametrize("method", ["exact", "polynomial"])
@pytest.mark.parametrize("function", ATTENTION, ids=by_name)
def test_a_plan_made_for_another_call(function, method, changes, name, theirs, ours, nothing_read):
    plan = tattn.plan_for(**{**NUMBERS_ALONE, "dtype": "float64", "method": method, "scale": 0.25, **changes})
    message = rf"^plan was made for {name} {theirs}, the call has {name} {ours}$"
    refuse(function, tattn.PlanError, message, **ARRAYS, scale=0.25, plan=plan)


def test_a_plan_brings_its_scale():
    plan = tattn.plan_for(**NUMBERS_ALONE, dtype="float64", scale=0.125, method="exact")
    expected = tattn.tensor_attention(**ARRAYS, scale=0.125, method="exact")
    assert (tattn.tensor_attention(**ARRAYS, plan=plan) == expected).all()


@pytest.mark.parametrize(("planned", "asked"), [("exact", "polynomial"), ("polynomial", "exact")])
def test_a_plan_with_another_method(planned, asked, nothing_read):
    plan = tattn.plan_for(**NUMBERS_ALONE, dtype="float64", method=planned)
    message = f"^plan has method '{planned}', the call asks for method '{asked}'"
    refuse(tattn.tensor_attention, tattn.PlanError, message, **ARRAYS, plan=plan, method=asked)


@pytest.mark.parametrize("function", ATTENTION, ids=by_name)
def test_a_plan_for_smaller_scores(function, no_forward):
    plan = tattn.plan(**ARRAYS, method="polynomial")
    louder = {**ARRAYS, "keys": [A, 2 * B]}
    reach = tattn.plan(**louder, method="polynomial").bound
    assert plan.certified
    with pytest.raises(tattn.PlanError) as caught:
        function(**louder, plan=plan)
    message = r"^plan serves scores up to ([\d.]+), the data's may reach ([\d.]+): make a plan for this data"
    numbers = re.match(message, str(caught.value)).groups()
    # Ranges are rounded up to the next of a 4 % grid for plans.
    assert [float(x) for x in numbers] == pytest.approx([plan.bound, reach], rel=0.045)


def test_a_plan_for_larger_scores():
    plan = tattn.plan(**ARRAYS, method="polynomial")
    tattn.tensor_attention(**{**ARRAYS, "query": 0.9 * Q}, plan=plan)


def test_a_plan_for_scores_of_larger_mean(no_forward):
    sizes = {"query": abs(Q), "keys": [abs(A), abs(B)], "values": [U, V]}
    plan = tattn.plan(**sizes, method="polynomial")
    message = r"^plan's rounding counts on mean scores of at least [\d.]+, the data's reach down to -[\d.]+"
    sizes["keys"][0] = -abs(A)
    refuse(tattn.tensor_attention, tattn.PlanError, message, **sizes, plan=plan)


# Traced calls: values cannot be read.


def jax_transformations() -> dict[str, Any]:
    import jax

    return {
        "jit": lambda f: jax.jit(f),
        "grad": lambda f: jax.grad(lambda x: f(x).sum()),
        "vmap": lambda f: lambda x: jax.vmap(f)(x[None]),
        "checkpoint": lambda f: jax.jit(jax.checkpoint(f)),
    }


def torch_transformations() -> dict[str, Any]:
    import torch

    return {
        "vmap": lambda f: lambda x: torch.func.vmap(f)(x[None]),
        "grad": lambda f: torch.func.grad(lambda x: f(x).sum()),
        "compile": lambda f: torch.compile(f, backend="aot_eager"),
        "meta": lambda f: lambda x: f(x.to("meta")),
    }


TRACED = [
    *(("jax", name) for name in ("jit", "grad", "vmap", "checkpoint")),
    *(("torch", name) for name in ("vmap", "grad", "compile", "meta")),
]


@pytest.fixture(params=[pytest.param(of, marks=pytest.mark.libraries(of[0]), id=" ".join(of)) for of in TRACED])
def traced(request):
    """Calls that a transformation of a library traces: function of what to do with the arrays of a call."""
    package, name = request.param
    library = make_library(package)
    transform = {"jax": jax_transformations, "torch": torch_transformations}[package]()[name]
    query, keys, values = library.arrays(*ARRAYS.values())
    if name == "meta":
        keys, values = [k.to("meta") for k in keys], [v.to("meta") for v in values]
    return lambda do: transform(lambda x: do(x, keys, values))(query)


NEEDS_PLAN = r"^the call is traced and its values cannot be read, so it needs a plan .*plan_for\(.*, bound="


def test_a_traced_call_without_a_plan(traced, nothing_read):
    refuse(traced, tattn.PlanError, NEEDS_PLAN, tattn.tensor_attention)
    refuse(traced, tattn.PlanError, NEEDS_PLAN, lambda *arrays: tattn.tensor_attention_vjp(*arrays)[0])


@pytest.mark.parametrize("bound", [None, "estimated"])
def test_a_data_plan_in_a_traced_call(traced, bound, request):
    plan = tattn.plan(**ARRAYS, method="polynomial", bound=bound)
    request.getfixturevalue("nothing_read")
    message = rf"^plan rests on .*, which a traced call cannot check: .* promise .*bound={plan.bound:.4g}\)"
    refuse(traced, tattn.PlanError, message, lambda *arrays: tattn.tensor_attention(*arrays, plan=plan))


@pytest.mark.parametrize("bound", [None, "estimated"])
def test_planning_in_a_traced_call(traced, bound, nothing_read):
    message = "^the arrays are traced and their range cannot be read: give a bound that you promise, bound="
    refuse(traced, tattn.PlanError, message, lambda *arrays: tattn.plan(*arrays, bound=bound))


def test_measuring_in_a_traced_call(traced, nothing_read):
    refuse(traced, tattn.PlanError, "traced", lambda *arrays: tattn.measure_error(*arrays, arrays[0]))


@pytest.mark.libraries("torch")
def test_a_compiled_whole_graph_without_a_plan(nothing_read):
    torch = pytest.importorskip("torch")
    query, keys, values = make_library("torch").arrays(*ARRAYS.values())
    attend = torch.compile(lambda x: tattn.tensor_attention(x, keys, values), backend="eager", fullgraph=True)
    # The compiler wraps what it saw raised.
    with pytest.raises(RuntimeError, match=r"PlanError\(.the call is traced .* needs a plan"):
        attend(query)


# Gradients and answers to check.


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((U.tolist(),), TypeError, "^grad_out should be an array .*, got list"),
        ((U[:3],), ValueError, r"^grad_out should have the shape of the output, \(6, 4\), got \(3, 4\)"),
        ((U[:1],), ValueError, r"^grad_out should have the shape of the output, \(6, 4\), got \(1, 4\)"),
        ((U[None],), ValueError, r"^grad_out should have the shape of .*, \(6, 4\), got \(1, 6, 4\)"),
        ((U.astype("f4"),), TypeError, "^grad_out should have .* dtype .*float64, got float32"),
        ((U.astype(int),), TypeError, "^grad_out should have a dtype of .*float64, got int64"),
        ((U.astype(complex),), TypeError, "^grad_out should have a dtype of .*float64, got complex128"),
        ((np.ma.array(U),), TypeError, "^grad_out should be an array, got a masked array"),
        ((U, U[:, :1]), ValueError, r"^grad_lse should have the shape of .*, \(6,\), got \(6, 1\)"),
        ((U, U[:5, 0]), ValueError, r"^grad_lse should have the shape of .*, \(6,\), got \(5,\)"),
        ((U, U[:, 0].astype("f4")), TypeError, "^grad_lse should have .* dtype .*float64, got float32"),
        ((U, 1.0), TypeError, "^grad_lse should be an array .*, got float"),
    ],
)
@pytest.mark.parametrize("method", ["exact", "polynomial"])
def test_gradients_given_to_a_pullback(method, given, error, message, request):
    _, pullback = tattn.tensor_attention_vjp(**ARRAYS, method=method, return_lse=True)
    request.getfixturevalue("nothing_read")
    refuse(pullback, error, message, *given)


@pytest.mark.libraries("torch")
def test_gradients_of_another_library():
    torch = make_library("torch")
    _, pullback = tattn.tensor_attention_vjp(**ARRAYS)
    refuse(pullback, TypeError, "^grad_out should be .*NumPy.*, got .*torch", torch.array(U))


def test_gradients_of_narrow_outputs():
    arrays = {"query": Q.astype("f2"), "keys": [A.astype("f2")], "values": [U.astype("f2")]}
    (out, lse), pullback = tattn.tensor_attention_vjp(**arrays, return_lse=True)
    assert (out.dtype, lse.dtype) == (np.float16, np.float32)
    message = "should have the output's dtype"
    refuse(pullback, TypeError, f"^grad_out {message} float16, got float32", out.astype("f4"), lse)
    refuse(pullback, TypeError, f"^grad_lse {message} float32, got float16", out, lse.astype("f2"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        case("rows", ValueError, "out", r"shape of the output, \(6, 4\)", r"\(3, 4\)", out=U[:3]),
        case("channels", ValueError, "out", r"shape of the output, \(6, 4\)", r"\(6, 3\)", out=U[:, :3]),
        case("leading", ValueError, "out", r"shape of the output, \(6, 4\)", r"\(1, 6, 4\)", out=U[None]),
        case("list", TypeError, "out", "an array", "list", out=U.tolist()),
        case("int", TypeError, "out", "dtype of .*float64", "int64", out=U.astype(np.int64)),
        case("complex", TypeError, "out", "dtype of .*float64", "complex128", out=U.astype(complex)),
        case("mixed", TypeError, "out", "dtype float64", "float32", out=U.astype("f4")),
        case("zero", ValueError, "rows", "at least 1", "0", rows=0),
        case("float", TypeError, "rows", "a whole number", "float", rows=2.0),
        case("negative", ValueError, "seed", "at least 0", "-1", seed=-1),
        case("float", TypeError, "seed", "a whole number", "float", seed=0.5),
    ],
)
def test_answers_to_check(changes, error, message, nothing_read):
    refuse(measure_error, error, message, **ARRAYS, **changes)


@pytest.mark.parametrize(("entry", "word"), [(nan, "NaN"), (inf, "infinity"), (-inf, "infinity")])
@pytest.mark.parametrize("row", range(ROWS))
def test_answers_that_are_not_finite(library, row, entry, word):
    """Whether the row is drawn or not."""
    query, keys, values, out = library.arrays(Q, [A, B], [U, V], np.where(np.arange(ROWS)[:, None] == row, entry, U))
    refuse(
        tattn.measure_error,
        ValueError,
        f"^out should hold finite numbers, got {word}",
        query,
        keys,
        values,
        out,
        rows=3,
    )


@pytest.mark.libraries("torch")
def test_answers_of_another_library(nothing_read):
    out = make_library("torch").array(U)
    refuse(measure_error, TypeError, "^out should be .*NumPy.*, got .*torch", **ARRAYS, out=out)
