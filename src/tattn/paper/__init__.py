"""The paper's training problem (Definitions 2.8 and 2.9), its loss and its gradients; dLoss/dX by Algorithm 1."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import prod
from typing import NamedTuple

from ..arrays import broadcast_leading, sum_to_leading, with_leading
from ..attention import tensor_attention, tensor_attention_vjp
from ..backends import Array, Backend
from ..bounds.rounding import UNIT
from ..checks import PlanError, checked_entries, checked_inputs, checked_kind, checked_method, positive
from ..plans import Plan
from . import algorithm1, closed_form, products
from .checks import checked_problem, checked_upstream
from .errors import SizesCall, sizes
from .planning import PRODUCTS, GradientChoice

__all__ = [
    "GradientFactors",
    "LossGradient",
    "TrainingProblem",
    "WeightGradients",
    "exact_gradient",
    "loss",
    "loss_gradient",
    "loss_gradient_factors",
    "products",
    "weight_gradients",
]


@dataclass(frozen=True, eq=False)
class TrainingProblem:
    r"""Find X1, X2, X3, Y1, Y2 that bring tensor attention of A1 … A5 close to E (Definition 2.8).

    .. math::

        \mathrm{Loss} = \tfrac12 \big\| D^{-1} \exp\big(A_1 X (A_2 \otimes A_3)^\top / d\big) (A_4 \otimes A_5) Y - E
        \big\|_F^2, \qquad X = X_1 (X_2 \oslash X_3)^\top, \quad Y = Y_1 \oslash Y_2,

    This is attention of the query A1 X1 to the keys A2 X2 and A3 X3 with the values A4 Y1 and A5 Y2. In the paper all
    lengths are n and all numbers of channels are d. Here three modalities may have three lengths and three numbers of
    channels.

    Parameters
    ----------
    a1 : array (..., n, d1)
        float64, float32, float16 or bfloat16, of any supported library; the others are of the same library, dtype and
        device. The two narrow types compute in float32. The batch dimensions of all arrays broadcast: many problems, or
        heads.
    a2, a4 : arrays (..., n2, d2) and (..., n2, d4)
    a3, a5 : arrays (..., n3, d3) and (..., n3, d5)
    e : array (..., n, dv)
    x1, x2, x3 : arrays (..., d1, d), (..., d2, d), (..., d3, d)
    y1, y2 : arrays (..., d4, dv) and (..., d5, dv)

    Raises
    ------
    TypeError, ValueError
        For matrices that do not fit, by name.

    Examples
    --------
    >>> import numpy as np
    >>> from tattn.paper import TrainingProblem, loss
    >>> rng = np.random.default_rng(0)
    >>> a, weights = rng.uniform(-1, 1, (6, 50, 4)), rng.uniform(-0.5, 0.5, (5, 4, 4))
    >>> problem = TrainingProblem(*a, *weights)
    >>> float(loss(problem)) > 0
    True
    """

    a1: Array
    a2: Array
    a3: Array
    a4: Array
    a5: Array
    e: Array
    x1: Array
    x2: Array
    x3: Array
    y1: Array
    y2: Array

    def __post_init__(self) -> None:
        checked_problem(self._matrices())

    @property
    def scale(self) -> float:
        """1/d, the factor of the scores."""
        return 1 / int(self.x1.shape[-1])

    def _matrices(self) -> dict[str, Array]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, eq=False)
class LossGradient:
    """The gradient of the loss for X, and what is promised about it.

    Attributes
    ----------
    gradient : array (..., d1, d2 · d3)
        In the dtype of the computation.
    error : float
        Largest distance of an entry of `gradient` from the true one; rounding included, by the model of docs/errors.md.
    plan : Plan
        Method, degree and range. Its operations and bytes are those of this gradient; its `error` is that of the output.
    """

    gradient: Array
    error: float
    plan: Plan


@dataclass(frozen=True, eq=False)
class GradientFactors:
    """The gradient of the loss for X in CP form, T1 ⊙ T2 ⊙ T3: as a matrix, T1 (T2 ⊘ T3)ᵀ.

    Attributes
    ----------
    t1, t2, t3 : arrays (..., d1, K), (..., d2, K), (..., d3, K)
        K = r (dv + 1) columns for rank r; batch dimensions broadcast.
    error, plan
        As in `LossGradient`.
    """

    t1: Array
    t2: Array
    t3: Array
    error: float
    plan: Plan


class WeightGradients(NamedTuple):
    """Gradients of the loss for the five weights, each in the shape and dtype of its weight."""

    x1: Array
    x2: Array
    x3: Array
    y1: Array
    y2: Array


def loss(problem: TrainingProblem, *, method: str = "auto", tol: float = 1e-3) -> Array:
    """½ ‖output − E‖_F² of every problem, (...); differentiable in torch and JAX, like `tensor_attention`.

    Parameters
    ----------
    problem : TrainingProblem
    method, tol
        As in `tensor_attention`.

    Raises
    ------
    PlanError, ValueError
        As from `tensor_attention`.
    """
    backend, _ = _checked(problem)
    q, a, b, u, v, *_, e = _operands(problem, problem.e, backend)
    out = tensor_attention(q, (a, b), (u, v), scale=problem.scale, method=method, tol=tol)
    with backend.on_device_of(out):
        residual = out - e
        return 0.5 * backend.xp.sum(residual * residual, axis=(-2, -1))


def loss_gradient(
    problem: TrainingProblem, *, eps: float, method: str = "auto", upstream: Array | None = None
) -> LossGradient:
    r"""dLoss/dX for X = X1 (X2 ⊘ X3)ᵀ within `eps` in every entry: ATAttLGC (Definition 2.9), by Algorithm 1.

    .. math::

        \frac{d\,\mathrm{Loss}}{dX} = \frac1d A_1^\top p\, (A_2 \otimes A_3), \qquad
        p = f \circ w - \mathrm{diag}(r)\, f, \quad w = c\, \big((A_4 Y_1) \oslash (A_5 Y_2)\big)^\top.

    Parameters
    ----------
    problem : TrainingProblem
        Its values are read. No further derivative is recorded.
    eps : float
        The largest error allowed, absolute.
    method : {"auto", "polynomial", "exact"}
        "auto" takes the cheaper of those that reach `eps`.
    upstream : array (..., n, dv), optional
        The gradient of another loss with respect to the output, in place of c = output − E, for one module of many.

    Returns
    -------
    LossGradient
        One gradient for every problem; sum over problems that share X.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit, by name, NaN and infinities among them.
    PlanError
        If `eps` cannot be reached. By the polynomial: with the entries and scores that were found and the cost of the
        exact method. By the dtype: with the `eps` that it can reach.

    Notes
    -----
    Theorem 4.2 (F.8): O((n + n2 + n3) r d²) time for rank r = C(d + g, g). O(r d²) memory beyond arrays of the size of
    the inputs. Exact: O(n n2 n3 d) time.

    Examples
    --------
    >>> import numpy as np
    >>> from tattn.paper import TrainingProblem, loss_gradient
    >>> rng = np.random.default_rng(0)
    >>> a, weights = rng.uniform(-1, 1, (6, 500, 4)), rng.uniform(-0.5, 0.5, (5, 4, 4))
    >>> result = loss_gradient(TrainingProblem(*a, *weights), eps=1e-2)
    >>> result.gradient.shape, result.plan.method, result.error <= 1e-2
    ((4, 16), 'polynomial', True)
    """
    backend, arrays, error, plan = _chosen(problem, eps, method, upstream)
    return LossGradient(_run_gradient(plan, upstream is not None, backend, arrays), error, plan)


def loss_gradient_factors(problem: TrainingProblem, *, eps: float, upstream: Array | None = None) -> GradientFactors:
    """Algorithm 1 without its last step: the gradient in CP form, for inputs so wide that (d1, d2 · d3) is too large.

    It has (d1 + d2 + d3) r (dv + 1) numbers. This is less than d1 d2 d3 only if inputs have many more channels than a
    head.

    Parameters
    ----------
    problem, eps, upstream
        As in `loss_gradient`. The matrix that the factors represent is within `eps`.

    Returns
    -------
    GradientFactors

    Raises
    ------
    TypeError, ValueError, PlanError
        As from `loss_gradient` with ``method="polynomial"``.

    Examples
    --------
    >>> import numpy as np
    >>> from tattn.paper import TrainingProblem, loss_gradient_factors
    >>> rng = np.random.default_rng(0)
    >>> a, e = rng.uniform(-1, 1, (5, 20, 300)), rng.uniform(-1, 1, (20, 2))
    >>> result = loss_gradient_factors(TrainingProblem(*a, e, *rng.normal(size=(5, 300, 2)) / 30), eps=1e-2)
    >>> result.t1.shape[0], result.t1.size < 300**3 / 100
    (300, True)
    """
    backend, arrays, error, plan = _chosen(problem, eps, "polynomial", upstream)
    call = algorithm1.Algorithm1Call(plan.coefficients, plan.scale, upstream is not None)
    t1, t2, t3 = (backend.xp.matrix_transpose(t) for t in backend.run(algorithm1.factors, call, arrays))
    return GradientFactors(t1, t2, t3, error, plan)


def exact_gradient(problem: TrainingProblem, *, upstream: Array | None = None) -> Array:
    """dLoss/dX by its closed form (Theorem 3.3, E.7), (..., d1, d2 · d3): O(n n2 n3 d) time, streamed.

    Parameters
    ----------
    problem, upstream
        As in `loss_gradient`.

    Returns
    -------
    array (..., d1, d2 · d3)
        In the dtype of the computation.

    Raises
    ------
    TypeError, ValueError
        For an `upstream` that does not fit, by name.
    """
    backend, target = _target(problem, upstream)
    arrays: Arrays = backend.values_of(_operands(problem, target, backend))
    call = closed_form.ClosedFormCall(problem.scale, upstream is not None)
    result: Array = backend.run(closed_form.gradient, call, _core(arrays))[0]
    return result


def weight_gradients(
    problem: TrainingProblem, *, method: str = "auto", tol: float = 1e-3, upstream: Array | None = None
) -> WeightGradients:
    """Gradients of the loss for X1, X2, X3, Y1 and Y2, summed over the problems that share a weight.

    Parameters
    ----------
    problem, upstream
        As in `loss_gradient`.
    method, tol
        As in `tensor_attention_vjp`. Its bounds apply to the gradients of the products A1 X1, …. The polynomial method
        takes O((n + n2 + n3) r d) time.

    Returns
    -------
    WeightGradients

    Raises
    ------
    TypeError, ValueError, PlanError
        For arguments that do not fit, and as from `tensor_attention_vjp`.

    Examples
    --------
    >>> import numpy as np
    >>> from tattn.paper import TrainingProblem, weight_gradients
    >>> rng = np.random.default_rng(0)
    >>> a, weights = rng.uniform(-1, 1, (6, 500, 4)), rng.uniform(-0.5, 0.5, (5, 4, 4))
    >>> weight_gradients(TrainingProblem(*a, *weights)).x1.shape
    (4, 4)
    """
    backend, target = _target(problem, upstream)
    arrays: Arrays = backend.values_of(_operands(problem, target, backend))
    q, a, b, u, v = arrays[:5]
    out, pullback = tensor_attention_vjp(q, (a, b), (u, v), scale=problem.scale, method=method, tol=tol)
    with backend.on_device_of(out):
        c = arrays[-1] if upstream is not None else out - arrays[-1]
        c = with_leading(c, broadcast_leading(out, c), backend)
        c = sum_to_leading(c, out.shape[:-2], backend)
    dq, dkeys, dvalues = pullback(c)
    weights = arrays[10:15]
    found = backend.run(_inside, None, (*arrays[5:10], *weights, dq, *dkeys, *dvalues))
    with backend.on_device_of(out):
        return WeightGradients(*(backend.cast(g, problem.x1.dtype) for g in found))


# Arrays are handed on as the five products, A1 … A5, the five weights and the target, E or the upstream gradient.
Arrays = tuple[Array, ...]


def _operands(problem: TrainingProblem, target: Array, backend: Backend) -> Arrays:
    """The sixteen arrays, in the dtype of the computation."""
    dtype = backend.compute_dtype(problem.a1.dtype)
    with backend.on_device_of(target):
        *given, last = (
            backend.cast(x, dtype)
            for x in (
                *(problem.a1, problem.a2, problem.a3, problem.a4, problem.a5),
                *(problem.x1, problem.x2, problem.x3, problem.y1, problem.y2),
                target,
            )
        )
    return (*backend.run(_products, None, given), *given, last)


def _products(_: None, backend: Backend, arrays: Arrays) -> Arrays:
    """A1 X1, A2 X2, A3 X3, A4 Y1, A5 Y2."""
    return tuple(left @ right for left, right in zip(arrays[:5], arrays[5:], strict=True))


def _inside(_: None, backend: Backend, arrays: Arrays) -> Arrays:
    """Gradients Aᵀ G of the weights, in their shapes, from A1 … A5, the weights and the gradients G of the products."""
    xp = backend.xp
    return tuple(
        sum_to_leading(xp.matrix_transpose(a) @ g, x.shape[:-2], backend)
        for a, x, g in zip(arrays[:5], arrays[5:10], arrays[10:], strict=True)
    )


def _largest(_: None, backend: Backend, arrays: Arrays) -> Arrays:
    """The largest |entry| of each array."""
    return tuple(backend.xp.max(backend.xp.abs(a)) for a in arrays)


def _core(arrays: Arrays) -> Arrays:
    """What the gradient depends on: the products, A1, A2, A3 and the target."""
    return (*arrays[:8], arrays[-1])


def _checked(problem: TrainingProblem) -> tuple[Backend, dict[str, Array]]:
    """The backend and the matrices by name."""
    checked_kind("problem", problem, TrainingProblem, "a tattn.paper.TrainingProblem")
    matrices = problem._matrices()
    return checked_problem(matrices), matrices


def _target(problem: TrainingProblem, upstream: Array | None) -> tuple[Backend, Array]:
    """The backend, and E or the upstream gradient."""
    backend, matrices = _checked(problem)
    if upstream is None:
        return backend, problem.e
    checked_upstream(upstream, matrices, backend)
    return backend, upstream


def _run_gradient(plan: Plan, upstream: bool, backend: Backend, arrays: Arrays) -> Array:
    """The gradient by the plan's method."""
    if plan.method == "exact":
        result: Array = backend.run(closed_form.gradient, closed_form.ClosedFormCall(plan.scale, upstream), arrays)[0]
    else:
        call = algorithm1.Algorithm1Call(plan.coefficients, plan.scale, upstream)
        result = backend.run(algorithm1.gradient, call, arrays)[0]
    return result


def _chosen(
    problem: TrainingProblem, eps: float, method: str, upstream: Array | None
) -> tuple[Backend, Arrays, float, Plan]:
    """The backend, the arrays of the gradient, its certified error and its plan."""
    eps, method = positive("eps", eps), checked_method(method)
    backend, target = _target(problem, upstream)
    if backend.is_traced([*problem._matrices().values(), target]):
        raise PlanError(
            "the call is traced and its values cannot be read to certify eps: call it outside, or use exact_gradient"
        )
    arrays: Arrays = backend.values_of(_operands(problem, target, backend))
    largest = [float(x) for x in backend.read(backend.run(_largest, None, arrays))]
    names = ("a1", "a2", "a3", "a4", "a5", "x1", "x2", "x3", "y1", "y2", "e" if upstream is None else "upstream")
    checked_entries(dict(zip((*names, *PRODUCTS), largest[5:] + largest[:5], strict=True)))
    q, a, b, u, v = arrays[:5]
    inputs = checked_inputs(q, (a, b), (u, v), None)
    found = sizes(SizesCall(problem.scale, upstream is not None, UNIT[inputs.dtype]), backend, arrays)
    widths = tuple(int(x.shape[-1]) for x in arrays[5:8])
    choice = GradientChoice(inputs, problem.scale, eps, found, widths, prod(broadcast_leading(*arrays)), largest[:5])
    error, plan = choice.plan(method)
    return backend, _core(arrays), error, plan
