"""One training run with the exact gradient, and again with approximate ones: losses and the distance of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from tattn.attention import tensor_attention
from tattn.paper import TrainingProblem, exact_gradient, loss, loss_gradient, weight_gradients
from tattn.planning import plan

from .plots import panels, style
from .tables import Table, column, distinct, markdown, short, where

_DIM, _RATE = 3, 0.05
# Tolerance of the gradients of Y1 and Y2 beside Algorithm 1, of its ε.
_OF_EPS = 1e-3
# name: (gradient, tolerance); eps of Algorithm 1 is absolute, tol of the adjoint relative to max|u| max|v|.
RUNS = {
    "exact": ("exact", 0.0),
    "Algorithm 1, ε = 1": ("algorithm1", 1.0),
    "Algorithm 1, ε = 0.01": ("algorithm1", 1e-2),
    "adjoint, tol = 0.01": ("adjoint", 1e-2),
    "adjoint, tol = 0.0001": ("adjoint", 1e-4),
}
Weights = Sequence[np.ndarray]


def measure(quick: bool, watch: Callable[..., Iterable[Any]]) -> dict[str, Table]:
    """Loss, range, degree and distance to the exact run at every step."""
    n, steps = (16, 10) if quick else (64, 400)
    matrices, start = _drawn(n)
    trajectories: dict[str, list[Weights]] = {}
    rows = []
    for name, (gradient, tol) in RUNS.items():
        weights: Weights = list(start)
        trajectory: list[Weights] = []
        for step in watch(range(steps + 1)):
            problem = TrainingProblem(*matrices, *weights)
            trajectory.append(weights)
            found, degree, bound, promised = _gradients(problem, weights, gradient, tol)
            away = _distance(weights, trajectories["exact"][step]) if trajectories else 0.0
            rows.append(
                {
                    "run": name,
                    "step": step,
                    "loss": float(loss(problem, method="exact")),
                    "degree": degree,
                    "range": bound,
                    "promised": promised,
                    "distance": away,
                    "moved": _distance(weights, start),
                    "n": n,
                    "dim": _DIM,
                    "rate": _RATE,
                }
            )
            weights = [x - _RATE * g for x, g in zip(weights, found, strict=True)]
        trajectories[name] = trajectory
    return {"learning": rows}


def _drawn(n: int) -> tuple[Weights, Weights]:
    """A1 … A5 and E, which other weights made; and the weights to start from."""
    rng = np.random.default_rng(0)
    a = rng.uniform(-1, 1, (5, n, _DIM))
    # What is attended to is what is read.
    a[3:] = a[1:3]
    teacher, start = 2 * rng.uniform(-1, 1, (5, _DIM, _DIM)), rng.uniform(-1, 1, (5, _DIM, _DIM))
    q, b, c, u, v = (x @ w for x, w in zip(a, teacher, strict=True))
    e = tensor_attention(q, [b, c], [u, v], method="exact")
    return [*a, e], list(start)


def _gradients(
    problem: TrainingProblem, weights: Weights, gradient: str, tol: float
) -> tuple[list[np.ndarray], int, float, float | str]:
    """Gradients of the five weights, the degree, the range and the error promised for dLoss/dX."""
    if gradient == "adjoint":
        planned = plan(*_products(problem), tol=tol, method="polynomial", scale=problem.scale)
        found = weight_gradients(problem, method="polynomial", tol=tol)
        return list(found), planned.degree, planned.bound, ""
    if gradient == "exact":
        dx, degree, promised = exact_gradient(problem), 0, 0.0
        bound = plan(*_products(problem), scale=problem.scale, method="exact").bound
        values = weight_gradients(problem, method="exact")
    else:
        result = loss_gradient(problem, eps=tol, method="polynomial")
        dx, degree, promised, bound = result.gradient, result.plan.degree, result.error, result.plan.bound
        values = weight_gradients(problem, method="polynomial", tol=_OF_EPS * tol)
    return [*inside(dx, *weights[:3]), values.y1, values.y2], degree, bound, promised


def _products(problem: TrainingProblem) -> tuple[np.ndarray, list[np.ndarray]]:
    """Query and keys."""
    return problem.a1 @ problem.x1, [problem.a2 @ problem.x2, problem.a3 @ problem.x3]


def inside(dx: np.ndarray, x1: np.ndarray, x2: np.ndarray, x3: np.ndarray) -> list[np.ndarray]:
    """Gradients of X1, X2, X3 from that of X = X1 (X2 ⊘ X3)ᵀ, by the chain rule."""
    tensor = dx.reshape(len(x1), len(x2), len(x3))
    return [
        np.einsum("lxy,xc,yc->lc", tensor, x2, x3),
        np.einsum("lxy,lc,yc->xc", tensor, x1, x3),
        np.einsum("lxy,lc,xc->yc", tensor, x1, x2),
    ]


def _distance(left: Weights, right: Weights) -> float:
    """Norm of the difference of all weights together."""
    return float(np.sqrt(sum(((x - y) ** 2).sum() for x, y in zip(left, right, strict=True))))


def plots(tables: dict[str, Table]) -> dict[str, Any]:
    """Losses on top of each other, distances, degrees."""
    rows = tables["learning"]
    figure, ((losses, distances, degrees),) = panels(3, height=4.0)
    for i, (name,) in enumerate(distinct(rows, "run")):
        mine = where(rows, run=name)
        every = max(1, len(mine) // 8)
        look = style(i, label=name, markevery=(i * every // 5, every))
        # The first is drawn wide, so that it shows below those that coincide with it.
        losses.semilogy(
            column(mine, "step"), column(mine, "loss"), **look | ({"linewidth": 5, "alpha": 0.4} if i == 0 else {})
        )
        if i:
            later = mine[1:]
            away = [x or float("nan") for x in column(later, "distance")]
            distances.semilogy(column(later, "step"), away, **look)
            degrees.step(column(mine, "step"), column(mine, "degree"), **look)
    exact = where(rows, run="exact")
    distances.semilogy(
        column(exact, "step")[1:], column(exact, "moved")[1:], color="#000000", linestyle=":", label="moved"
    )
    ranges = degrees.twinx()
    ranges.plot(column(exact, "step"), column(exact, "range"), color="#000000", linestyle=":")
    ranges.set(ylabel="certified range R (···)", ylim=(0, None))
    losses.set(xlabel="step", ylabel="loss", title="loss")
    distances.set(
        xlabel="step", ylabel="distance of all weights (norm)", title="from the exact run (···: moved in all)"
    )
    degrees.set(xlabel="step", ylabel="degree", title="degree and range", ylim=(0, None))
    losses.legend(fontsize="x-small")
    return {"learning": figure}


def words(tables: dict[str, Table]) -> str:
    """What the table says."""
    rows = tables["learning"]
    exact = where(rows, run="exact")
    first, last = exact[0], exact[-1]
    lines = []
    for (name,) in distinct(rows, "run"):
        mine = where(rows, run=name)
        end = mine[-1]
        approximate = name != "exact"
        lines.append(
            [
                name,
                f"{end['loss']:.6f}",
                f"{max(abs(x['loss'] / y['loss'] - 1) for x, y in zip(mine, exact, strict=True)):.1e}"
                if approximate
                else "–",
                short(max(column(mine, "distance"))) if approximate else "–",
                short(max(x["distance"] for x in mine) / last["moved"]) if approximate else "–",
                f"{mine[0]['degree']}–{max(column(mine, 'degree'))}" if approximate else "–",
            ]
        )
    heads = [
        "gradient",
        "last loss",
        "largest relative difference of losses",
        "largest distance",
        "of what was moved",
        "degrees",
    ]
    steps = f"n = {last['n']}, d = {last['dim']}, {last['step']} steps of {last['rate']:g}"
    reach = max(column(exact, "range"))
    return f"""\
Descent on X1, X2, X3, Y1 and Y2 in the objective of Definition 2.8, float64, {steps}. E is what other weights, twice as
large, make of the same A1 … A5. The weights of every run are compared, step by step, with those of the run with the exact
gradient (Theorem 3.3); the losses are exact in all. *Algorithm 1* computes dLoss/dX within an absolute ε, and the chain
rule for X = X1 (X2 ⊘ X3)ᵀ takes it to X1, X2 and X3; Y1 and Y2 come from the adjoint at a tolerance of {_OF_EPS:g} ε.
*Adjoint*: all five by `weight_gradients`. Descent on X itself would leave the matrices of the form
X1 (X2 ⊘ X3)ᵀ, so it is not shown.

![Losses, distances of the weights and degrees](learning.png)

{markdown(lines, heads)}

The loss falls from {short(first["loss"])} to {short(last["loss"])}, and the weights move by {short(last["moved"])} in all (norm).
Learning does not keep the assumption by itself: the certified range grows from {first["range"]:.2f} to {reach:.2f}, and the degree
with it. What is certified is each gradient; that trajectories stay together is measured, not promised.

Table: [every step](learning.csv)."""
