"""Every argument of every public function: what has no place there is refused before anything is computed, in words of our own."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator
from math import inf, nan
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import tattn
from tattn import paper as training
from tattn import scores
from tattn.paper import products

Q, A, B, U, V = np.random.default_rng(0).uniform(-1, 1, (5, 6, 4))
MASK, WEIGHTS = np.ones(6, bool), np.full(6, 0.5)
SOURCE = str(Path(tattn.__file__).parent)
PLAN = tattn.plan_for(n=6, dim=4, bound=3.0, degree=3, dtype="float64")
BANDED = tattn.plan_for(n=6, dim=4, series="banded", bands=2, dtype="float64")
SUMMARY = tattn.summarize([A, B], [U, V], PLAN)
PROBLEM = training.TrainingProblem(*np.ones((6, 6, 4)), *np.full((5, 4, 4), 0.1))

# What hardly any argument takes.
STRANGE: dict[str, Any] = {
    "None": None, "str": "x", "empty str": "", "bytes": b"x", "bool": True, "NaN": nan, "infinity": inf, "negative": -1,
    "fraction": -0.5, "complex": 1j, "no list": [], "list": [1.5, "x"], "dict": {"x": 1}, "set": {1}, "object": object(),
    "class": int, "complex array": Q.astype(complex), "array of objects": Q.astype(object), "NumPy scalar": np.float64(nan),
    "generator": (x for x in (A, B)),
}  # fmt: skip
# Flags, which take a bool alone; others have their defaults, None among them.
FLAGS = {
    "return_lse", "return_error", "return_plan", "causal", "gradients", "learn_bound", "bias", "check", "progress",
}  # fmt: skip


class Case(NamedTuple):
    """A call that fits, by its arguments, and what of `STRANGE` fits as well."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    fits: frozenset[tuple[str, str]] = frozenset()


def case(function: Callable[..., Any], *fits: tuple[str, str], **arguments: Any) -> Case:
    return Case(function, arguments, frozenset(fits))


def other_arrays(good: np.ndarray) -> dict[str, Any]:
    """Arrays that do not fit where this one does."""
    return {
        "byte order": good.astype(good.dtype.newbyteorder()), "40 dimensions": good.reshape((1,) * 40 + good.shape),
        "64 dimensions": good.reshape((1,) * (64 - good.ndim) + good.shape), "complex": good.astype(complex),
        "no rows": good[:0], "no channels": good[..., :0], "scalar": good[(0,) * good.ndim], "masked": np.ma.array(good),
        "nested list": good.tolist(), "dates": np.zeros(good.shape, "M8[s]"),
    }  # fmt: skip


def strange(good: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Labels and what does not fit in the place of an argument."""
    yield from STRANGE.items()
    arrays = good if isinstance(good, (list, tuple)) else [good]
    for i, array in enumerate(arrays):
        if not isinstance(array, np.ndarray):
            continue
        others = {**STRANGE, **other_arrays(array)}
        if array.dtype == bool:
            # Byte order says nothing of bytes.
            del others["byte order"]
        if name in ("key_masks", "key_weights"):
            # A view may have none.
            del others["None"]
        for label, other in others.items():
            if arrays is good:
                label, other = f"[{i}] {label}", [*good[:i], other, *good[i + 1 :]]
            yield label, other
    if arrays is good:
        yield "one fewer", list(good)[:-1]
        yield "one more", [*good, good[0]]


OPTIONS = {
    "scale": 0.5, "tol": 1e-2, "key_masks": [MASK, MASK], "key_weights": [WEIGHTS, None], "causal": False, "window": None,
    "channels": "complex", "max_flops": 1e9,
}  # fmt: skip
OFFSETS = np.array([0, 2, 2, len(Q)])
CALL = {"query": Q, "keys": [A, B], "values": [U, V]}
ASKED = {"return_lse": True, "return_error": False, "return_plan": False, "progress": None}
CHOICE = {"method": "polynomial", "degree": 3, "bound": 2.0, "series": "minimax", "gradients": True}
NUMBERS = {
    "n": 6,
    "dim": 4,
    "order": 3,
    "tol": 1e-2,
    "dtype": "float64",
    "scale": 0.5,
    "value_dim": 4,
    "causal": False,
    "channels": "complex",
}


def core_cases() -> dict[str, Case]:
    pullback = tattn.tensor_attention_vjp(Q, [A, B], [U, V], plan=PLAN, return_lse=True)[1]
    to_rows = tattn.summarize_vjp([A, B], [U, V], PLAN)[1]
    to_summary = SUMMARY.attend_vjp(Q, return_lse=True)[1]
    state = tattn.DecodingState(PLAN)
    token = {"query": Q[:1], "keys": [A[:1], B[:1]], "values": [U[:1], V[:1]]}

    def stepped(**of_state: Any) -> Any:
        return tattn.DecodingState(**of_state).step(**token)

    def attended(**of_summary: Any) -> Any:
        return tattn.Summary(**of_summary).attend(Q)

    return {
        "tensor_attention": case(
            tattn.tensor_attention, ("progress", "class"), **CALL, **OPTIONS, **ASKED, method="exact", plan=None, offsets=None
        ),
        "tensor_attention_vjp": case(
            tattn.tensor_attention_vjp, ("progress", "class"), **CALL, **OPTIONS, **ASKED, method="auto", plan=None,
            offsets=OFFSETS,
        ),
        "tensor_attention, decay": case(tattn.tensor_attention, **CALL, causal=True, decay=[0.5, None]),
        "tensor_attention_vjp, decay": case(tattn.tensor_attention_vjp, **CALL, causal=True, decay=[0.5, None]),
        "tensor_attention, offsets": case(tattn.tensor_attention, **CALL, offsets=[OFFSETS, OFFSETS, OFFSETS]),
        "pullback": case(pullback, grad_out=Q, grad_lse=Q[:, 0], return_error=False),
        "plan": case(tattn.plan, **CALL, **OPTIONS, **CHOICE, bands=None, moment=None),
        "plan, of data": case(tattn.plan, **CALL, method="auto", degree=None, bound=None, bands=None, moment=None),
        "plan, exact": case(tattn.plan, **CALL, method="exact", degree=None, bound=None, bands=None, moment=None),
        "plan, estimated": case(tattn.plan, **CALL, method="polynomial", degree=3, bound="estimated", series="minimax"),
        "plan, banded": case(tattn.plan, **CALL, **(CHOICE | {"bound": None, "series": "banded"}), bands=2, moment=2),
        "plan_for": case(
            tattn.plan_for, **NUMBERS, bound=1.0, method="polynomial", degree=4, series="minimax", bands=None, moment=None,
            window=None, workers=3, bandwidth=1e9, flops=1e9, max_flops=1e9,
        ),
        "plan_for, banded": case(
            tattn.plan_for, **NUMBERS, bound=None, method="auto", degree=3, series="banded", bands=3, moment=2
        ),
        "plan_for, windows": case(tattn.plan_for, n=(6, 7, 8), dim=4, bound=1.0, causal=True, window=(3, 3)),
        "Plan.by_scores": case(PLAN.by_scores, lengths=(6, 6, 6), value_dim=4),
        "Plan.by_scores, banded": case(BANDED.by_scores, lengths=(6, 6, 6), value_dim=4),
        "measure_error": case(
            tattn.measure_error, **CALL, out=Q, rows=3, seed=0, scale=0.5, key_masks=[MASK, MASK], key_weights=[WEIGHTS, None],
            causal=False, window=None, channels="complex",
        ),
        "best_tol": case(
            tattn.best_tol, **CALL, max_rank=100, max_flops=1e9, scale=0.5, key_masks=[MASK, MASK], key_weights=[WEIGHTS, None],
            causal=False, channels="complex",
        ),
        "summarize": case(
            tattn.summarize, ("progress", "class"), ("decay", "None"), keys=[A, B], values=[U, V], plan=PLAN,
            key_masks=[MASK, MASK],
            key_weights=[WEIGHTS, None], decay=[0.5, None], progress=None
        ),
        "summarize_vjp": case(tattn.summarize_vjp, keys=[A, B], values=[U, V], plan=PLAN, key_masks=[MASK, MASK],
            key_weights=[WEIGHTS, None]),
        "summarize_vjp, pullback": case(to_rows, dsums=list(SUMMARY.sums)),
        "Summary": case(attended, plan=PLAN, sums=SUMMARY.sums, rests=SUMMARY.rests),
        "Summary.counts": case(
            lambda **given: tattn.Summary(**given).counts, plan=PLAN, sums=SUMMARY.sums, rests=SUMMARY.rests
        ),
        "Summary.update": case(
            SUMMARY.update, ("progress", "class"), ("decay", "None"), keys=[A, B], values=[U, V], key_masks=[MASK, MASK],
            key_weights=[WEIGHTS, None], decay=[0.5, None], progress=None
        ),
        "Summary.attend": case(SUMMARY.attend, ("query", "no rows"), query=Q, return_lse=False),
        "Summary.attend_vjp": case(SUMMARY.attend_vjp, ("query", "no rows"), query=Q, return_lse=False),
        "Summary.attend_vjp, pullback": case(to_summary, grad_out=Q, grad_lse=Q[:, 0]),
        "rotary": case(
            tattn.rotary, ("rows", "no rows"), rows=Q, positions=np.arange(6), frequencies=np.ones(2),
        ),
        "warm_up": case(
            tattn.warm_up,
            *((name, kind) for name in ("dtypes", "channels") for kind in ("no list", "one fewer", "one more")),
            dtypes=("float32",), channels=("real",),
        ),
        "DecodingState": case(stepped, plan=PLAN, summary=SUMMARY),
        "DecodingState.step": case(state.step, ("decay", "None"), **token, key_masks=[MASK[:1], MASK[:1]],
            key_weights=[WEIGHTS[:1], None], decay=[0.5, None], return_lse=False),
    }  # fmt: skip


def training_cases() -> dict[str, Case]:
    matrices = {name: getattr(PROBLEM, name) for name in inspect.signature(training.TrainingProblem).parameters}
    how = {"method": "exact", "tol": 1e-3}
    return {
        "TrainingProblem": case(training.TrainingProblem, **matrices),
        "loss": case(training.loss, problem=PROBLEM, **how),
        "loss_gradient": case(training.loss_gradient, problem=PROBLEM, eps=0.1, method="exact", upstream=Q),
        "loss_gradient_factors": case(training.loss_gradient_factors, problem=PROBLEM, eps=1e6, upstream=Q / 1e3),
        "exact_gradient": case(training.exact_gradient, problem=PROBLEM, upstream=Q),
        "weight_gradients": case(training.weight_gradients, problem=PROBLEM, **how, upstream=Q),
    }


def product_cases() -> dict[str, Case]:
    def of_all(function: Any, **arguments: Any) -> Case:
        return case(lambda **given: function(*given.values()), **arguments)

    two = {"matrices[0]": A, "matrices[1]": B}
    return {
        **{f.__name__: of_all(f, **two) for f in (products.kronecker, products.khatri_rao, products.face_splitting)},
        "third_mode": of_all(products.third_mode, **two),
        "multilinear": of_all(products.multilinear, core=np.ones((4, 4)), **two),
        "vec": case(products.vec, array=A, order=2),
        "matrix": case(products.matrix, tensor=A, order=2),
        "tensor": case(products.tensor, matrix=A, shape=(6, 2, 2)),
        "khatri_rao_gram": case(products.khatri_rao_gram, left=[A, B], right=[U, V]),
        "apply_kronecker": case(products.apply_kronecker, matrices=[A, B], x=np.ones((16, 2))),
    }


def score_cases() -> dict[str, Case]:
    rows = {"query": Q, "keys": [A, B]}
    return {
        "determinant": case(scores.determinant, query=Q[:, :3], keys=[A[:, :3], B[:, :3]]),
        "strassen": case(scores.strassen, **rows, query2=Q, keys2=[A, B]),
        "tree": case(scores.tree, **rows, keys2=[A, B]),
        "pair_bias": case(scores.pair_bias, ("keys", "one more"), **rows, left=Q, right=B, between=(0, 2)),
    }


CORE, TRAINING, PRODUCTS, SCORES = core_cases(), training_cases(), product_cases(), score_cases()
CONFIG = {
    "embed_dim": 8, "num_heads": 2, "order": 3, "head_dim": 4, "value_dim": 4, "num_key_heads": 2, "context_dims": (8, 8),
    "bound": 1.0, "learn_bound": False, "tol": 1e-2, "degree": None, "method": "polynomial", "max_rank": 1 << 15, "eps": 1e-3,
    "bias": True, "causal": False, "decay": None,
}  # fmt: skip


def check(a: Case) -> None:
    """Whatever does not fit in the place of an argument is refused in one line that names an argument."""
    a.function(**a.arguments)
    for name, good in a.arguments.items():
        for label, given in strange(good, name):
            if (
                (name, label) in a.fits
                or (label == "bool" and name in FLAGS)
                or (label == "None" and optional(a, name))
            ):
                continue
            where = f"{name}: {label}"
            try:
                a.function(**{**a.arguments, name: given})
            except Exception as error:
                last, text = traceback.extract_tb(error.__traceback__)[-1], str(error)
                assert type(error) in (TypeError, ValueError, tattn.PlanError), f"{where}: {error!r}"
                assert last.filename.startswith(SOURCE), f"{where}: {last.filename}, line {last.lineno}: {error!r}"
                assert (last.line or "").startswith("raise"), f"{where}: {last.filename}, line {last.lineno}: {error!r}"
                assert any(other in text for other in a.arguments) and "\n" not in text, f"{where}: {text}"
            else:
                pytest.fail(f"{where} was accepted")


def optional(a: Case, name: str) -> bool:
    """Whether None stands for what is not given."""
    found = inspect.signature(a.function).parameters.get(name)
    return a.arguments[name] is None or (found is not None and found.default is None) or name == "summary"


@pytest.mark.parametrize("name", [*CORE, *TRAINING, *PRODUCTS, *SCORES])
def test_what_does_not_fit(name: str) -> None:
    check((CORE | TRAINING | PRODUCTS | SCORES)[name])


@pytest.mark.parametrize(
    ("module", "cases"),
    [(tattn, CORE), (training, TRAINING), (products, PRODUCTS), (scores, SCORES)],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_all_arguments_are_tried(module: Any, cases: dict[str, Case]) -> None:
    """Of all functions that a module defines for others."""
    own = [name for name, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__]
    for name in getattr(module, "__all__", own):
        function = getattr(module, name)
        if inspect.isfunction(function) and not name.startswith("_"):
            tried = {
                argument.partition("[")[0]
                for label, a in cases.items()
                if label.split(",")[0] == name
                for argument in a.arguments
            }
            expected = set(inspect.signature(function).parameters)
            assert expected <= tried, f"{name}: {expected - tried}"


@pytest.mark.libraries("torch")
def test_layers() -> None:
    torch = pytest.importorskip("torch")
    check(case(tattn.nn.AttentionConfig, ("bound", "None"), **CONFIG))
    check(case(tattn.nn.AttentionConfig(8, 2).plan, n=100, dtype="float32"))
    made = {**CONFIG, "device": "cpu", "dtype": torch.float32}
    check(case(tattn.nn.TensorAttention, ("bound", "None"), **made))
    for dtype in (torch.complex64, torch.int64, torch.bool, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match=r"^dtype should be 'float64', .*, got '"):
            tattn.nn.TensorAttention(8, 2, dtype=dtype)
    layer = tattn.nn.TensorAttention(8, 2)
    check(case(layer.plan_for, n=100))
    x, mask = torch.ones(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
    of_rows = {"key_masks": [mask, mask], "key_weights": [mask.float(), None], "offsets": None}
    check(case(layer.forward, x=x, contexts=[x, x], **of_rows, return_error=False))
    of_rows = {"key_masks": mask, "key_weights": mask.float(), "offsets": torch.tensor([0, 2, 5])}
    check(case(layer.forward, x=x, contexts=None, **of_rows, return_error=False))


@pytest.mark.libraries("jax")
def test_layers_of_jax() -> None:
    jax = pytest.importorskip("jax")
    from tattn.nn.jax import apply, init

    config = tattn.nn.AttentionConfig(8, 2)
    key, x = jax.random.key(0), jax.numpy.ones((2, 5, 8))
    check(case(init, ("dtype", "class"), key=key, config=config, dtype=None))
    assert init(jax.random.PRNGKey(0), config).keys() == init(key, config).keys()
    params = init(key, config)
    options = {"config": config, "key_masks": None, "key_weights": None, "offsets": None, "return_error": False}
    check(case(apply, params=params, x=x, contexts=[x, x], **options))
    for weight, error in (
        (params["q_proj.weight"].astype("int32"), r"should have a dtype of .*, got int32"),
        (params["q_proj.weight"] > 0, r"should have a dtype of .*, got bool"),
        (np.asarray(params["q_proj.weight"]), "should be an array of JAX, got one of NumPy"),
        (None, "should be an array .*, got NoneType"),
    ):
        with pytest.raises(TypeError, match=rf"^params\['q_proj.weight'\] {error}"):
            apply({**params, "q_proj.weight": weight}, x, config=config)


def test_rows_of_dask() -> None:
    da = pytest.importorskip("dask.array")
    from tattn.distributed import dask

    q, a, b, u, v, g = (da.from_array(x, chunks=(3, 4)) for x in (Q, A, B, U, V, Q))
    mask = da.from_array(MASK, chunks=3)
    call = {"query": q, "keys": [a, b], "values": [u, v]}
    options = {"plan": None, "bound": 2.0, "scale": 0.25, "tol": 1e-3, "key_masks": [mask, mask], "split_every": 8}
    for function in (dask.tensor_attention, dask.tensor_attention_vjp):
        check(case(function, **call, **options, return_lse=False))
    check(case(dask.tensor_attention_vjp(**call, plan=PLAN)[1], grad_out=g, grad_lse=g[:, 0]))
