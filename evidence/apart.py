"""Time and memory of one computation, in a process of its own with one thread.

    python -m evidence.apart < specification.json

Memory is what is held at the peak beyond inputs and outputs, counted twice: by tracemalloc, to which NumPy reports its
arrays, and by the resident set of the process where Linux tells its peak (which sees the BLAS, too, and pages that
an earlier call left behind). The time is that of the processor, which other work on the machine disturbs least; with one
thread it is the time of the clock on an idle machine. The best of a few calls counts, of which none is traced.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tattn.attention import tensor_attention_vjp
from tattn.paper import TrainingProblem, exact_gradient, loss_gradient
from tattn.planning import plan
from tattn.planning.measure import measure_error
from tattn.plans import Plan

from .tables import Row

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
# Rows up to which the answer is compared with the exact one.
_COMPARED = 256


def measured_apart(specification: Row) -> Row:
    """`measured` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "evidence.apart"],
        input=json.dumps(specification),
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, **ONE_THREAD},
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{specification} failed:\n{done.stderr}")
    found: Row = json.loads(done.stdout)
    return found


def measured(task: str, method: str, n: int, dim: int, entries: float, eps: float, budget: float) -> Row:
    """Time and memory of forward and gradient, or of dLoss/dX, for entries within ±`entries`; float64, dv = d."""
    prepare = _attention if task == "attention" else _gradient
    # The first call loads what later ones share.
    prepare(method, 16, dim, entries, eps)[0]()
    call, error_of = prepare(method, n, dim, entries, eps)
    reset_peak()
    before = resident_bytes("VmRSS")
    times: list[float] = []
    outputs = None
    while not times or (len(times) < 5 and sum(times) < budget):
        outputs = None
        start = time.process_time()
        outputs, planned = call()
        times.append(time.process_time() - start)
        if len(times) == 1:
            resident = resident_bytes("VmHWM") - before - _bytes(outputs)
    tracemalloc.start()
    outputs, planned = call()
    traced = tracemalloc.get_traced_memory()[1] - _bytes(outputs)
    tracemalloc.stop()
    return {
        "degree": planned.degree if planned else 0,
        "rank": planned.rank if planned else 0,
        "bound": planned.bound if planned else 0.0,
        "seconds": min(times),
        "runs": len(times),
        "traced_bytes": max(0, traced),
        "resident_bytes": max(0, resident) if before else "",
        **error_of(outputs, planned),
    }


Call = Callable[[], tuple[list[np.ndarray], Plan | None]]


def _attention(method: str, n: int, dim: int, entries: float, eps: float) -> tuple[Call, Callable[..., Row]]:
    """Attention and its gradient; eps is relative to max|u| max|v|."""
    q, a, b, u, v, g = np.random.default_rng(0).uniform(-entries, entries, (6, n, dim))

    def call() -> tuple[list[np.ndarray], Plan | None]:
        if method == "stored":
            return stored(q, a, b, u, v, g), None
        # Planning is part of what a caller waits for.
        planned = plan(q, [a, b], [u, v], tol=eps, method=method)
        out, pullback = tensor_attention_vjp(q, [a, b], [u, v], plan=planned)
        dq, dkeys, dvalues = pullback(g)
        return [out, dq, *dkeys, *dvalues], planned

    def error(outputs: list[np.ndarray], planned: Plan | None) -> Row:
        compared = measure_error(q, [a, b], [u, v], outputs[0])[0] if n <= _COMPARED else ""
        return {"certified": planned.error if planned else "", "error": compared}

    return call, error


def _gradient(method: str, n: int, dim: int, entries: float, eps: float) -> tuple[Call, Callable[..., Row]]:
    """dLoss/dX for products A1 X1, … whose largest entries are ±`entries`; eps is absolute."""
    rng = np.random.default_rng(0)
    a = rng.uniform(-1, 1, (6, n, dim))
    x = rng.uniform(-1, 1, (5, dim, dim))
    x *= entries / np.abs(a[:5] @ x).max(axis=(1, 2), keepdims=True)
    problem = TrainingProblem(*a, *x)

    def call() -> tuple[list[np.ndarray], Plan | None]:
        if method == "exact":
            return [exact_gradient(problem)], None
        result = loss_gradient(problem, eps=eps, method=method)
        promised.append(result.error)
        return [result.gradient], result.plan

    promised: list[float] = []

    def error(outputs: list[np.ndarray], planned: Plan | None) -> Row:
        compared: float | str = ""
        if n <= _COMPARED:
            compared = float(np.abs(outputs[0] - exact_gradient(problem)).max())
        return {"certified": promised[-1] if promised else "", "error": compared}

    return call, error


def stored(
    q: np.ndarray, a: np.ndarray, b: np.ndarray, u: np.ndarray, v: np.ndarray, g: np.ndarray
) -> list[np.ndarray]:
    """Output and gradients by the definition, with all scores stored: what the other methods are spared."""
    scale = 1 / q.shape[1]
    keys, values = _pairs(a, b), _pairs(u, v)
    f = q @ keys.T * scale
    f -= f.max(axis=1, keepdims=True)
    np.exp(f, out=f)
    f /= f.sum(axis=1, keepdims=True)
    out = f @ values
    p = f * (g @ values.T - (g * out).sum(axis=1, keepdims=True)) * scale
    dkeys, dvalues = ((x.T @ y).reshape(len(a), len(b), -1) for x, y in ((p, q), (f, g)))
    d_keys = [np.einsum("jkc,kc->jc", dkeys, b), np.einsum("jkc,jc->kc", dkeys, a)]
    return [out, p @ keys, *d_keys, np.einsum("jke,ke->je", dvalues, v), np.einsum("jke,je->ke", dvalues, u)]


def _pairs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The column-wise Kronecker product, (n², d)."""
    pairs: np.ndarray = a[:, None] * b[None]
    return pairs.reshape(-1, a.shape[1])


def _bytes(arrays: list[np.ndarray] | None) -> int:
    return sum(a.nbytes for a in arrays or ())


def resident_bytes(name: str) -> int:
    """Bytes resident now (VmRSS) or at the peak (VmHWM); 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), 0)


def reset_peak() -> None:
    """Let the peak of the resident set begin anew, where the system can."""
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5", encoding="ascii")


if __name__ == "__main__":
    print(json.dumps(measured(**json.load(sys.stdin))))
