"""A call in numbers: its shapes, what is known of its scores, what is promised of the answer, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from .backends.operations import CHAIN
from .operands import COMPLEX, EVERY_ROW, REAL, Order


@dataclass(frozen=True)
class Problem:
    """A call in numbers: lengths (n, n_1, …, n_m), and the batch, the number of such problems side by side.

    `chain`: terms in the longest chain of additions of the operations that compute it (`tattn.backends.operations`);
    `channels`: "real", or "complex" where `dim` numbers are half as many complex ones; `compiled`: whether compiled loops
    compute its prefixes, which only its cost depends on.
    """

    views: int
    dim: int
    value_dim: int
    dtype: str
    lengths: tuple[int, ...]
    batch: int
    scale: float
    order: Order = EVERY_ROW
    chain: int = CHAIN
    channels: str = REAL
    compiled: bool = field(default=False, compare=False)

    @property
    def paired(self) -> bool:
        """Whether channels are complex."""
        return self.channels == COMPLEX

    @property
    def rows(self) -> int:
        """Rows of query and views, of all problems."""
        return sum(self.lengths) * self.batch

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the computation."""
        return 8 if self.dtype == "float64" else 4


class ScoreRange(NamedTuple):
    """Largest |score| possible, smallest mean score of a query row, where they come from, and the sizes of channels if known.

    The size of a channel is scale · max|q_c| · Π_μ max|keys_μ,c|, one for each complex one. Sources are those of `Plan.source`.
    """

    bound: float
    lowest_mean: float
    source: str
    sizes: tuple[float, ...] = ()


class Guarantee(NamedTuple):
    """Error of output and of gradients, as `Plan` has them, and whether they are bounds."""

    error: float
    grad_error: float
    certified: bool


class Cost(NamedTuple):
    """Operations and bytes of a forward call, about."""

    flops: float
    bytes: float

    @classmethod
    def unknown(cls) -> Cost:
        """Of what was not looked at."""
        return cls(float("inf"), float("inf"))
