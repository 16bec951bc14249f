"""Higher-order (tensor) attention: linear in the sequence length, with a bound on its error, on any array library."""

from __future__ import annotations

from . import distributed, nn, paper, scores
from .attention import tensor_attention, tensor_attention_vjp
from .backends.compiled import warm_up
from .checks import PlanError
from .methods import Banded, Exact, Polynomial
from .planning import plan, plan_for
from .planning.measure import measure_error
from .planning.tolerance import best_tol
from .plans import Plan
from .positions import rotary
from .state.decoding import DecodingState
from .state.summary import Summary, summarize, summarize_vjp

__version__ = "0.1.0"

__all__ = [
    "Banded",
    "DecodingState",
    "Exact",
    "Plan",
    "PlanError",
    "Polynomial",
    "Summary",
    "__version__",
    "best_tol",
    "distributed",
    "measure_error",
    "nn",
    "paper",
    "plan",
    "plan_for",
    "rotary",
    "scores",
    "summarize",
    "summarize_vjp",
    "tensor_attention",
    "tensor_attention_vjp",
    "warm_up",
]
