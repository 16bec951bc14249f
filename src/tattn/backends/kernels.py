"""What compiled code may replace: named operations, whose array form in `engines` stays the reference and needs nothing.

=============  =====================================================================================================
operation      what it computes
=============  =====================================================================================================
moments        ``(k, v, mask, unit, degree, grading)``, keys (..., n, d), values (..., n, dv), units and masks as in
               `engines.features` → Φ(k · unit)ᵀ [v, 1], (..., r, dv + 1)
prefix_read    ``(block, sums)``, a `Prefix` and compensated sums of every view → the sums with its rows, and numerators
               (..., n, dv + 1) of causal attention
prefix_pull    ``(block, starts, behind, upstream)``, the sums (..., dv + 1, r) before it, compensated sums of the gradients
               behind it, and gradients (..., n, dv + 1) of the numerators → the sums behind with its rows, and gradients of
               q, all keys and all shares
=============  =====================================================================================================

A backend offers a kernel in `Backend.kernels`. It says for which arrays it is there, and how long its chains of additions are: a
plan states the rounding of those, so a plan for arrays of that backend counts with them, and a call whose plan counts with
shorter ones does without the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

OPERATIONS = ("moments", "prefix_read", "prefix_pull")
# Terms in a chain of additions of the array form.
CHAIN = 128


class Kernel(NamedTuple):
    """One operation in compiled code: ``function`` takes what the operation does, for arrays where ``takes`` is true of them.

    ``takes`` gets what `moments` does, or the query, keys and values of a causal call.
    """

    operation: str
    function: Callable[..., Any]
    takes: Callable[..., bool]
    chain: int = CHAIN


class Prefix(NamedTuple):
    """A block of rows of causal attention, in the dtype of the computation.

    Weights w (r,); which monomials are a channel times others, `features.monomials.Run` as rows (count, 4) of integers; query and
    keys in units (..., n, d); values and ones times shares (..., n, dv + 1).
    """

    w: Any
    runs: Any
    q: Any
    keys: Sequence[Any]
    shares: Sequence[Any]
