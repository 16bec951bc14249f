"""The arrays of a call by their names, and what is computed of them.

They are one flat sequence only where a library binds gradients or compiles: `Operands.of` reads it and `Operands.flat` writes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from .arrays import are_weights, broadcast_leading, prod_of
from .backends import Array, Backend

# What the channels of query and keys are: numbers, or the real parts of complex ones followed by their imaginary parts.
REAL, COMPLEX = "real", "complex"
CHANNELS = (REAL, COMPLEX)


class Order(NamedTuple):
    """Which rows of the views a query row sees by their order: all, or row i those up to i, or the last so many of them.

    `decays`: whether those further before it weigh less. Plans do not say it.
    """

    causal: bool = False
    window: tuple[int, ...] | None = None
    decays: bool = False


EVERY_ROW = Order()


class View(NamedTuple):
    """One view: keys (..., n, d), values (..., n, dv), and a mask (..., n, 1), True where to attend, or None.

    A mask of floating numbers has the weight of every row, 0 where masked: then the masks of all views do.
    """

    keys: Array
    values: Array
    mask: Array | None = None

    @property
    def leading(self) -> tuple[int, ...]:
        """The leading dimensions that its arrays have together."""
        return broadcast_leading(*self)

    def rows(self, start: int, stop: int) -> View:
        """Some of its rows, one after another."""
        return View(*(None if x is None else x[..., start:stop, :] for x in self))


class Operands(NamedTuple):
    """What attention is computed of: query (..., n, d) and views, the factor of the scores, and what a row sees.

    `extra` are arrays that a method takes besides; `channels` is one of `CHANNELS`. `wanted` says of query, keys, values and masks
    whether their gradients are asked for, () of all; a method may leave the others 0. `decays` are factors (..., 1, 1) of each view
    if the order has some, and then all views have weights.
    """

    backend: Backend
    query: Array
    views: tuple[View, ...]
    scale: float
    order: Order = EVERY_ROW
    extra: tuple[Array, ...] = ()
    channels: str = REAL
    wanted: tuple[bool, ...] = ()
    decays: tuple[Array, ...] = ()

    @classmethod
    def of(
        cls,
        backend: Backend,
        arrays: Sequence[Array | None],
        views: int,
        scale: float,
        order: Order = EVERY_ROW,
        extra: int = 0,
    ) -> tuple[Operands, tuple[Array, ...]]:
        """Operands out of query, keys, values, masks, decays and so many `extra` arrays; and what follows those."""
        query, *rest = arrays
        keys, values, masks, decays = (rest[i * views : (i + 1) * views] for i in range(4))
        if not order.decays:
            decays = []
        behind = tuple(rest[(3 + order.decays) * views :])
        found = tuple(View(*view) for view in zip(keys, values, masks, strict=True))
        return cls(backend, query, found, scale, order, behind[:extra], decays=tuple(decays)), behind[extra:]

    def with_arrays(self, arrays: Sequence[Array | None]) -> tuple[Operands, tuple[Array, ...]]:
        """The same of other arrays, one after another; and what follows them."""
        found, behind = Operands.of(self.backend, arrays, len(self.views), self.scale, self.order, len(self.extra))
        return found._replace(channels=self.channels), behind

    def flat(self) -> tuple[Array | None, ...]:
        """Query, keys, values, masks, decays, and what there is besides."""
        return (self.query, *self.keys, *self.values, *self.masks, *self.decays, *self.extra)

    @property
    def keys(self) -> tuple[Array, ...]:
        """The keys of every view."""
        return tuple(v.keys for v in self.views)

    @property
    def values(self) -> tuple[Array, ...]:
        """The values of every view."""
        return tuple(v.values for v in self.views)

    @property
    def masks(self) -> tuple[Array | None, ...]:
        """The masks of every view."""
        return tuple(v.mask for v in self.views)

    def wants(self, number: int) -> bool:
        """Whether a gradient of keys, values or weights of this view is asked for."""
        return not self.wanted or any(self.wanted[1 + number :: len(self.views)])

    @property
    def weights(self) -> tuple[Array, ...]:
        """The weights of the rows of every view; () if they have none."""
        return self.masks if are_weights(self.views[0].mask, self.backend) else ()

    @property
    def steepest(self) -> float:
        """The least product of all views' factors by which keys decay, which are read."""
        (factor,) = self.backend.values_of((prod_of(self.decays),))
        return float(self.backend.xp.min(factor))

    @property
    def targets(self) -> tuple[Array, ...]:
        """What gradients are of: query, keys, values, and weights and decays if there are."""
        return (self.query, *self.keys, *self.values, *self.weights, *self.decays)

    @property
    def paired(self) -> bool:
        """Whether channels are complex."""
        return self.channels == COMPLEX

    @property
    def leading(self) -> tuple[int, ...]:
        """The leading dimensions that all arrays have together."""
        return broadcast_leading(self.query, *self.keys, *self.values, *self.masks)

    @property
    def dtype(self) -> Any:
        """The dtype of the computation."""
        return self.backend.compute_dtype(self.query.dtype)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Rows of the query and of every view, (n, n_1, …)."""
        return tuple(a.shape[-2] for a in (self.query, *self.keys))


class Attended(NamedTuple):
    """Output (..., n, dv), log-sum-exp (..., n, 1), and what the adjoint and the certificate need besides.

    The first of `kept` has a row for each of the query's. The adjoint has no need of `lse`, which is None for it.
    """

    out: Array
    lse: Array | None
    kept: tuple[Array, ...]


class Upstream(NamedTuple):
    """Gradients of the output (..., n, dv) and of the log-sum-exp (..., n, 1)."""

    out: Array
    lse: Array


class Gradients(NamedTuple):
    """Gradients of the query, and of keys, values, weights and decays of every view, or bounds of their errors.

    No `weights`, no `decays`: ().
    """

    query: Array
    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    weights: tuple[Array, ...] = ()
    decays: tuple[Array, ...] = ()

    @classmethod
    def of(cls, flat: Sequence[Array], views: int) -> Gradients:
        """From one after another."""
        query, *rest = flat
        return cls(query, *(tuple(rest[start : start + views]) for start in range(0, len(rest), views)))

    @classmethod
    def of_views(cls, query: Array, views: Iterable[Sequence[Array]]) -> Gradients:
        """From those of keys, values and, if there are, weights of each view."""
        return cls(query, *zip(*views, strict=True))

    def flat(self) -> tuple[Array, ...]:
        """One after another."""
        return (self.query, *self.keys, *self.values, *self.weights, *self.decays)
