"""Causal attention, tokens, heads and layers beside what they are compared with; compiling in JAX; memory from the system."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

import tattn

from .libraries import Array, Library, Run
from .measure import Measure
from .problem import Problem, draw
from .rivals import einsum_jax

# Rows whose causal outputs the exact method computes.
_FIRST = 256


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("power", [13, 16])
@pytest.mark.parametrize("value_dim", [8, 64])
def test_causal(
    measure: Measure, library: Library, threads: int, quick: bool, value_dim: int, power: int, gradient: bool
) -> None:
    """A row to the rows before it over a row to all rows, which takes turns."""
    _only(library, ("numpy", "torch"), threads)
    if quick and power > 13:
        pytest.skip("left out of a quick run")
    n = 1 << power
    problem = draw(n, 8, value_dim)
    plans = [tattn.plan_for(n=n, dim=8, value_dim=value_dim, bound=1.0, degree=4, causal=c) for c in (True, False)]
    arrays, grad = [library.array(x) for x in problem.arrays], library.array(problem.grad) if gradient else None
    causal, all_rows = (library.attention(arrays, grad, plan=plan, causal=plan.causal) for plan in plans)
    error = causal_error(problem, library.numpy(causal()[0]), plans[0].error)
    shape: dict[str, Any] = {"gradient": gradient, "n": n, "views": 2, "dim": 8, "value_dim": value_dim}
    measure.times("causal", "causal over all rows", causal, all_rows, plan=plans[0], error=error, **shape)


def causal_error(problem: Problem, out: np.ndarray, promised: float) -> float:
    """How far the first rows and the last one are from the definition, relative to Π max|values|; raises beyond what is promised.

    The last row sees all rows, and so its output is known.
    """
    query, *views = (x[:_FIRST].astype(np.float64) for x in problem.arrays)
    first = tattn.tensor_attention(query, views[:2], views[2:], method="exact", causal=True)
    last = problem.expected[0][problem.places[0][-1]]
    size = np.prod([np.abs(v).max(axis=0) for v in problem.arrays[3:]], axis=0)
    error = max(float((np.abs(found) / size).max()) for found in (out[:_FIRST] - first, out[-1] - last))
    if not error <= promised:
        raise AssertionError(f"error {error:.2e} where {promised:.2e} is promised")
    return error


def test_a_million_rows(measure: Measure, library: Library, threads: int, quick: bool) -> None:
    """Causal in float32; its error is the difference from float64 by the same method, in all rows."""
    _only(library, ("numpy",), threads)
    n = 1 << (14 if quick else 20)
    problem = draw(n, 8, 8)
    plans = [
        tattn.plan_for(n=n, dim=8, value_dim=8, bound=1.0, degree=4, causal=True, dtype=dtype)
        for dtype in ("float32", "float64")
    ]
    run = library.attention(problem.arrays, None, plan=plans[0], causal=True)
    wide = library.attention([x.astype(np.float64) for x in problem.arrays], None, plan=plans[1], causal=True)
    error = float(np.abs(run()[0] - wide()[0]).max())
    shape: dict[str, Any] = {"gradient": False, "n": n, "views": 2, "dim": 8, "value_dim": 8}
    measure.times("million", "causal in float32, from float64", run, plan=plans[0], error=error, **shape)


@pytest.mark.parametrize("together", [1, 4096])
def test_tokens(measure: Measure, library: Library, threads: int, together: int) -> None:
    """4,096 tokens of one stream, one or all of them in a call of `step`."""
    _only(library, ("numpy", "torch"), threads)
    n = 4096
    problem = draw(n, 8, 8)
    plan = tattn.plan_for(n=n, dim=8, value_dim=8, bound=1.0, degree=4, causal=True)
    query, *views = (library.array(x) for x in problem.arrays)

    def run() -> list[Array]:
        state, outputs = tattn.DecodingState(plan), []
        for i in range(0, n, together):
            rows = slice(i, i + together)
            out, state = state.step(query[rows], [k[rows] for k in views[:2]], [v[rows] for v in views[2:]])
            outputs.append(out)
        return outputs

    error = causal_error(problem, np.concatenate([library.numpy(x) for x in run()]), plan.error)
    kind = "one token a call" if together == 1 else f"{together:,} tokens a call"
    measure.times("tokens", kind, run, plan=plan, error=error, gradient=False, n=n, views=2, dim=8, value_dim=8)


@pytest.mark.parametrize("causal", [False, True], ids=["all rows", "causal"])
def test_heads(measure: Measure, library: Library, causal: bool) -> None:
    """8 heads of 8,192 rows, forward and gradient, on one thread and on two."""
    if library.name not in ("numpy", "torch") or library.device != "cpu":
        pytest.skip("measured in NumPy and torch on a processor")
    n, heads = 8192, 8
    problem = draw(n * heads, 8, 8)
    arrays = [library.array(x.reshape(heads, n, 8)) for x in (*problem.arrays, problem.grad)]
    plan = tattn.plan_for(n=n, dim=8, value_dim=8, bound=1.0, degree=4, causal=causal)
    run = library.attention(arrays[:-1], arrays[-1], plan=plan, causal=causal)
    shape: dict[str, Any] = {"gradient": True, "n": n, "views": 2, "dim": 8, "value_dim": 8}
    measure.times("heads", f"8 heads, {'causal' if causal else 'all rows'}", run, plan=plan, rounds=7, **shape)


@pytest.mark.parametrize("n", [1024, 2048, 4096, 16384])
@pytest.mark.parametrize("causal", [False, True], ids=["all rows", "causal"])
def test_layers(measure: Measure, library: Library, threads: int, quick: bool, causal: bool, n: int) -> None:
    """`TensorAttention(64, 8)` over `nn.MultiheadAttention(64, 8)`, forward and backward."""
    _only(library, ("torch",), threads)
    if quick and n > 2048:
        pytest.skip("left out of a quick run")
    from .layer import EMBED, HEADS, Causal, Every, steps_of

    ours = tattn.nn.TensorAttention(EMBED, HEADS, causal=causal)
    ordinary = (Causal if causal else Every)(EMBED, HEADS, batch_first=True)
    run, beside = (_without_result(step) for step in steps_of([ours, ordinary], 1, n))
    method = f"layer over ordinary, {'causal' if causal else 'all rows'}"
    shape: dict[str, Any] = {"gradient": True, "n": n, "views": 2, "dim": EMBED // HEADS, "value_dim": EMBED // HEADS}
    measure.times("layers", method, run, beside, plan=ours.plan, rounds=5 if n < 4096 else 2, **shape)


@pytest.mark.parametrize("value_dim", [8, 64])
def test_compiling(measure: Measure, library: Library, threads: int, quick: bool, value_dim: int) -> None:
    """Time until JAX has compiled a gradient of 65,536 rows, over that of einsum over all scores of 512, as many as it can."""
    _only(library, ("jax",), threads)
    if quick and value_dim > 8:
        pytest.skip("left out of a quick run")
    import jax

    n = 1 << 16
    plan = tattn.plan_for(n=n, dim=8, value_dim=value_dim, bound=1.0, degree=4, method="polynomial")
    rows, few = ([library.array(x) for x in draw(count, 8, value_dim).arrays] for count in (n, 512))

    def compiled(function: Callable[..., Any], arrays: list[Array]) -> list[Array]:
        jax.clear_caches()  # type: ignore[no-untyped-call]
        program = jax.jit(jax.grad(lambda *arrays: function(*arrays).sum(), argnums=tuple(range(5))))
        program.lower(*arrays).compile()
        return []

    def ours(*arrays: Array) -> Array:
        return tattn.tensor_attention(arrays[0], arrays[1:3], arrays[3:], plan=plan)

    run, beside = partial(compiled, ours, rows), partial(compiled, einsum_jax, few)
    shape: dict[str, Any] = {"gradient": True, "n": n, "views": 2, "dim": 8, "value_dim": value_dim}
    measure.times("compiling", "gradient over that of einsum", run, beside, plan=plan, rounds=3, **shape)


@pytest.mark.parametrize("dim", [16, 64])
def test_memory_from_the_system(measure: Measure, library: Library, threads: int, dim: int) -> None:
    """Which part of an exact gradient's processor time the system takes, for pages of memory that it gives."""
    _only(library, ("numpy", "torch"), threads)
    problem = draw(512, dim, dim)
    run = library.attention([library.array(x) for x in problem.arrays], library.array(problem.grad), method="exact")
    run()
    before = os.times()
    for _ in range(3):
        run()
    user, system = (late - early for late, early in zip(os.times()[:2], before[:2], strict=True))
    shape: dict[str, Any] = {"gradient": True, "n": 512, "views": 2, "dim": dim, "value_dim": dim}
    measure.times("system", "exact", run, rounds=2, system_share=system / (user + system), **shape)


def _without_result(step: Callable[[], Any]) -> Run:
    """A call whose results nobody looks at."""

    def run() -> list[Array]:
        step()
        return []

    return run


def _only(library: Library, names: tuple[str, ...], threads: int) -> None:
    """Skip other libraries, devices and numbers of threads."""
    if threads > 1 or library.name not in names or library.device != "cpu":
        pytest.skip(f"measured in {' and '.join(names)} on a processor, on one thread")
