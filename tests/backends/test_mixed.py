"""Outputs by compiled loops and gradients by array operations, and the other way round: one takes what the other leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from reference import through_features
from watching import calls_of, code_within

import tattn
from tattn.backends import compiled
from tattn.backends.compiled.operations.rows import over_rows

pytest.importorskip("numba")

pytestmark = pytest.mark.libraries("numpy", "torch")

N, DIM, VALUE_DIM = 72, 4, 3
# One is shorter than what loops take, and one has no rows.
OFFSETS = np.asarray([0, 9, 9, 41, N])
WINDOWS = (20, 33, 51)
# What a call is asked for, and the loops that compute it.
CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "all rows": ({}, "rows"),
    "masks": ({"masked": True}, "rows"),
    "weights": ({"weighted": True}, "rows"),
    "complex": ({"channels": "complex"}, "rows"),
    "bands": ({"series": "banded", "bands": 2}, "rows"),
    "causal": ({"causal": True}, "causal"),
    "causal masks": ({"causal": True, "masked": True}, "causal"),
    "causal weights": ({"causal": True, "weighted": True}, "causal"),
    "causal decay": ({"causal": True, "decaying": True}, "causal"),
    "causal complex": ({"causal": True, "channels": "complex"}, "causal"),
    "windows": ({"window": WINDOWS[:1] * 3}, "windows"),
    "unequal windows": ({"window": WINDOWS, "masked": True}, "windows"),
    "windows with decay": ({"window": WINDOWS, "decaying": True}, "windows"),
    "documents": ({"offsets": OFFSETS}, "documents"),
    "masks of documents": ({"offsets": OFFSETS, "masked": True}, "documents"),
    "weights of documents": ({"offsets": OFFSETS, "weighted": True}, "rows"),
    "causal documents": ({"offsets": OFFSETS, "causal": True}, "causal"),
    "masks of causal documents": ({"offsets": OFFSETS, "masked": True, "causal": True}, "causal"),
    "causal documents with decay": ({"offsets": OFFSETS, "causal": True, "decaying": True}, "causal"),
    "windows in documents": ({"offsets": OFFSETS, "window": WINDOWS}, "windows"),
    "exact": ({"method": "exact"}, "tuples"),
    "large scores": ({"method": "exact", "scale": 30.0, "masked": True}, "tuples"),
    "exact with weights": ({"method": "exact", "weighted": True}, "tuples"),
    "exact complex": ({"method": "exact", "channels": "complex"}, "tuples"),
    "exact documents": ({"method": "exact", "offsets": OFFSETS}, "tuples"),
}
# The names of what runs loops.
LOOPS = {
    "rows": {"over_rows"},
    "documents": {"read_documents", "pull_documents"},
    "tuples": {"attend_tuples", "pull_tuples"},
    "causal": {"read", "pull"},
    "windows": {"read_windows", "pull_windows"},
    "prompt": {"read"},
    "besides prompt": {"over_rows"},
    "tokens": {"step", "complex_step"},
    # What all rows of a block see is one sum, and a document may be shorter than its window.
    "besides windows": {"over_rows", "read", "pull"},
}
EVERY = (
    over_rows,
    compiled.read_documents,
    compiled.pull_documents,
    compiled.attend_tuples,
    compiled.pull_tuples,
    code_within(compiled.prefix_read, "read"),
    code_within(compiled.prefix_pull, "pull"),
    code_within(compiled.window_read, "read_windows"),
    code_within(compiled.window_pull, "pull_windows"),
    compiled.step,
    compiled.complex_step,
)
ROWS = "query", "keys", "values"


def call_of(views: int, dtype: str, asked: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What gradients are asked of, and the other arguments."""
    rng, options = np.random.default_rng(views), dict(asked)
    n = 12 if views == 3 and options.get("method") == "exact" and "offsets" not in options else N
    shapes = {"query": (2, n, DIM), "keys": (2, n, DIM), "values": (n, VALUE_DIM)}
    rows: dict[str, Any] = {name: [rng.uniform(-1, 1, shape) for _ in range(views)] for name, shape in shapes.items()}
    rows["query"] = rows["query"][0]
    if options.pop("decaying", False):
        rows["decay"] = [np.asarray([0.9, 0.7]) ** (1 + view) for view in range(views)]
    if options.pop("weighted", False):
        rows["key_weights"] = [rng.uniform(0.1, 2, (2, n)) for _ in range(views)]
    if options.pop("masked", False):
        options["key_masks"] = [rng.random(n) < 0.7, *[None] * (views - 1)]
    if "window" in options:
        options["window"] = options["window"][:views]
    facts = {name: options.pop(name) for name in ("method", "series", "bands") if name in options}
    facts |= {name: options[name] for name in ("channels", "scale", "causal", "window") if name in options}
    facts |= {} if "bands" in facts else {"bound": 1.0}
    facts |= {} if facts.get("method") == "exact" else {"degree": 3}
    plan = tattn.plan_for(n=n, dim=DIM, value_dim=VALUE_DIM, order=views + 1, dtype=dtype, **facts)
    moved = {name: _each(lambda x: x.astype(dtype), x) for name, x in rows.items()}
    return moved, {**options, "plan": through_features(plan), "return_lse": True}


def begun(library: Any, rows: dict[str, Any], options: dict[str, Any]) -> tuple[list[Any], Callable[..., list[Any]]]:
    """Outputs, and what makes gradients of those of the outputs, as often as it is called."""
    rows = {name: _each(library.array, x) for name, x in rows.items()}
    options = {name: _each(library.array, x) if name == "key_masks" else x for name, x in options.items()}
    if library.name != "torch":
        outputs, pullback = tattn.tensor_attention_vjp(**rows, **options)
        return list(outputs), lambda *upstream: _flat(pullback(*upstream))
    import torch

    inputs = [x.requires_grad_() for x in _flat(rows.values())]
    outputs = tattn.tensor_attention(**rows, **options)
    return list(outputs), lambda *upstream: list(torch.autograd.grad(outputs, inputs, upstream, retain_graph=True))


@contextmanager
def computing(loops: str, switched: bool) -> Iterator[None]:
    """Loops of this kind compute, and none if they are switched off."""
    with pytest.MonkeyPatch.context() as patch, calls_of(*EVERY) as seen:
        patch.setenv(compiled.SWITCH, "1" if switched else "0")
        yield
    names = {call.name for call in seen}
    assert bool(names & LOOPS[loops]) == switched
    assert names <= LOOPS[loops] | LOOPS.get(f"besides {loops}", set())
    assert switched or not names


def every_kernel(library: Any) -> Any:
    """The library's backend, whose loops take calls of all sizes."""
    given: tuple[Any, ...] = (lambda *arrays: True,)
    if library.name == "torch":
        from tattn.backends.torch import _numbers_of, _plain, torch

        given = _plain, _numbers_of, torch.from_numpy
    backend = library.backend
    always = {"pays": lambda *size: True, "tuples_pay": lambda call: True}
    return backend.using(kernels=compiled.kernels_for(backend, *given, **always))


@pytest.mark.grid("numpy", "torch")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("views", [2, 1, 3])
@pytest.mark.parametrize("kind", list(CALLS))
def test_what_one_leaves_the_other_takes(library: Any, kind: str, views: int, dtype: str) -> None:
    asked, loops = CALLS[kind]
    # Documents of three views are taken out of their places.
    loops = "rows" if loops == "documents" and views == 3 else loops
    rows, options = call_of(views, dtype, asked)
    found: dict[tuple[bool, bool], list[np.ndarray]] = {}
    with every_kernel(library):
        for forward in (False, True):
            with computing(loops, forward):
                outputs, pullback = begun(library, rows, options)
            upstream = [library.array(np.random.default_rng(i).normal(size=tuple(x.shape)).astype(dtype))
                        for i, x in enumerate(outputs)]  # fmt: skip
            for backward in (False, True):
                with computing(loops, backward):
                    gradients = pullback(*upstream)
                found[forward, backward] = [library.numpy(x) for x in (*outputs, *gradients)]
    tolerance = 1e-11 if dtype == "float64" else 2e-4
    for way, numbers in found.items():
        for x, y in zip(numbers, found[False, False], strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
            # Rows that see nothing have lse = −∞.
            size = np.max(np.abs(y), initial=0, where=np.isfinite(y))
            np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * size, err_msg=str(way))


@pytest.mark.grid("numpy", "torch")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("views", [2, 1])
@pytest.mark.parametrize("channels", ["real", "complex"])
@pytest.mark.parametrize("decaying", [False, True])
def test_streams_that_one_begins_the_other_continues(library, decaying, channels, views, dtype) -> None:
    """After a prompt, and from token to token."""
    rows, options = call_of(views, dtype, {"causal": True, "channels": channels, "decaying": decaying})
    plan = options["plan"]
    # All of a stream's arrays have its dimensions.
    rows["values"] = [np.stack([v] * 2) for v in rows["values"]]
    ways = [(forward,) * 9 for forward in (False, True)] + [
        (forward, *(not forward,) * 4, *(forward,) * 4) for forward in (False, True)
    ]
    found = []
    with every_kernel(library):
        for way in ways:
            state, outputs = tattn.DecodingState(plan), []
            for place, switched in zip((slice(0, 60), *(slice(i, i + 1) for i in range(60, 68))), way, strict=True):
                given = {name: _each(lambda x, at=place: library.array(x[..., at, :]), rows[name]) for name in ROWS}
                decay = _each(library.array, rows.get("decay"))
                with computing("prompt" if place.stop == 60 else "tokens", switched):
                    (out, lse), state = state.step(**given, decay=decay, return_lse=True)
                outputs += [out, lse]
            found.append([library.numpy(x) for x in (*outputs, *state.summary.sums)])
    tolerance = 1e-11 if dtype == "float64" else 2e-4
    for way, numbers in zip(ways, found, strict=True):
        for x, y in zip(numbers, found[0], strict=True):
            np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * np.abs(y).max(), err_msg=str(way))


def _each(function: Callable[[Any], Any], x: Any) -> Any:
    if x is None:
        return None
    return [_each(function, a) for a in x] if isinstance(x, (list, tuple)) else function(x)


def _flat(x: Any) -> list[Any]:
    return [a for of_one in x for a in _flat(of_one)] if isinstance(x, (list, tuple, type({}.values()))) else [x]
