"""What compiled code may replace: named operations, whose array form in `engines` stays the reference and needs nothing.

=============  =====================================================================================================
operation      what it computes, for keys k (..., n, d), values v (..., n, dv), units and masks as in `engines.features`
=============  =====================================================================================================
moments        ``(k, v, mask, unit, degree, grading)`` → Φ(k · unit)ᵀ [v, 1], (..., r, dv + 1)
prefix_read    ``(setting, sums, rows)`` → numerators (..., n, dv + 1) of causal attention
prefix_pull    ``(setting, sums, rows, upstream)`` → gradients of the rows and of the sums of causal attention
=============  =====================================================================================================

A backend offers a kernel in `Backend.kernels`. It says for which arrays it is there, and how long its chains of additions are: a
plan states the rounding of those, so a plan for arrays of that backend counts with them, and a call whose plan counts with
shorter ones does without the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

OPERATIONS = ("moments", "prefix_read", "prefix_pull")
# Terms in a chain of additions of the array form.
CHAIN = 128


class Kernel(NamedTuple):
    """One operation in compiled code: ``function`` takes what the operation does, where ``takes`` of the same is true."""

    operation: str
    function: Callable[..., Any]
    takes: Callable[..., bool]
    chain: int
