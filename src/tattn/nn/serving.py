"""What a causal layer keeps of the rows so far, to go on from there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..checks import checked_kind
from ..plans import Plan
from ..state.decoding import DecodingState
from ..state.summary import Summary
from .config import AttentionConfig


@dataclass(frozen=True, eq=False)
class ServingState:
    """The rows that a causal layer has seen, as `TensorAttention.prefill` and `step` return them. Immutable.

    With the polynomial method these are sums of a fixed size, rank · (value_dim + 1) numbers twice for each view and
    head of keys, however many rows there were. With the exact method they are keys, values and masks, or weights, of all
    rows; with a window by either method of the last `window`.

    Attributes
    ----------
    config : AttentionConfig
        Of the layer.
    length : int
        Rows so far.
    batch : tuple of int
        The dimensions of x before its rows.
    """

    config: AttentionConfig
    length: int
    batch: tuple[int, ...]
    decoding: DecodingState | None = None
    rows: tuple[Tensor, ...] = ()
    owner: Any = None

    def tensors(self) -> tuple[Tensor, ...]:
        """Its numbers: sums and rests of all views, or keys, values and masks, (..., key heads, 1, ·, ·)."""
        if self.decoding is None or self.decoding.summary is None:
            return self.rows
        return (*self.decoding.summary.sums, *self.decoding.summary.rests)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(t.nbytes for t in self.tensors())

    def to(self, device: Any) -> ServingState:
        """The same on another device."""
        return self._with(tuple(t.to(device) for t in self.tensors()))

    def reorder(self, index: Tensor) -> ServingState:
        """Streams of the batch in another order, or some of them again, as a search by beams wants.

        Parameters
        ----------
        index : Tensor of whole numbers (k,)
            For each stream from now on, which one of the first dimension of the batch it goes on from.

        Raises
        ------
        TypeError, ValueError
            For a state without a batch, or what is no index of it.
        """
        checked_kind("index", index, Tensor, "a Tensor of whole numbers")
        if not self.batch:
            raise ValueError("reorder needs a batch, got a state of a single stream")
        if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
            raise ValueError(f"index should be whole numbers of shape (k,), got {index.dtype} of {tuple(index.shape)}")
        state = self._with(tuple(t.index_select(0, index.to(t.device)) for t in self.tensors()))
        return replace(state, batch=(len(index), *self.batch[1:]))

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors by name, for ``torch.save``; `TensorAttention.restored` makes a state of them."""
        found = {f"tensor_{i}": t for i, t in enumerate(self.tensors())}
        return {"length": torch.tensor(self.length), **found}

    def _with(self, tensors: tuple[Tensor, ...]) -> ServingState:
        if self.decoding is None:
            return replace(self, rows=tensors)
        return replace(self, decoding=_decoding(self.decoding.plan, tensors))


def restored_state(
    config: AttentionConfig, plan: Plan | None, saved: Mapping[str, Tensor], dtype: torch.dtype
) -> ServingState:
    """The state that `ServingState.state_dict` saved; ValueError if it is of another layer."""
    checked_kind("saved", saved, Mapping, "what ServingState.state_dict returned")
    views = config.views
    count = 2 * views if plan is not None else 3 * views
    if set(saved) != {"length", *(f"tensor_{i}" for i in range(count))}:
        raise ValueError(
            f"saved should hold length and {count} tensors for this layer, got {', '.join(map(str, saved))}"
        )
    tensors = tuple(saved[f"tensor_{i}"] for i in range(count))
    heads, columns = config.num_key_heads, config.value_dim + 1
    for i, tensor in enumerate(tensors):
        if plan is not None:
            wanted: tuple[Any, ...] = (heads, 1, plan.rank, columns)
        elif i < 2 * views:
            wanted = (heads, 1, tensor.shape[-2], config.head_dim if i < views else config.value_dim)
        else:
            wanted = (1, 1, tensor.shape[-1])
        if tuple(tensor.shape[-len(wanted) :]) != wanted:
            raise ValueError(
                f"saved[tensor_{i}] should have shape (*batch, {wanted}) for this layer, got {tuple(tensor.shape)}"
            )
        wanted_dtype = dtype if plan is not None or i < 2 * views else torch.bool
        # Rows that weigh something have weights in the place of masks.
        if tensor.dtype not in (wanted_dtype, dtype):
            raise TypeError(f"saved[tensor_{i}] should have the layer's dtype {wanted_dtype}, got {tensor.dtype}")
    batch = tuple(tensors[0].shape[:-4])
    if plan is not None:
        return ServingState(config, int(saved["length"]), batch, _decoding(plan, tensors))
    return ServingState(config, int(saved["length"]), batch, rows=tensors)


def _decoding(plan: Plan, tensors: tuple[Tensor, ...]) -> DecodingState:
    """A state of `tattn` of sums and rests."""
    half = len(tensors) // 2
    return DecodingState(plan, Summary(plan, tensors[:half], tensors[half:]))


def check_state(state: Any, config: AttentionConfig, owner: object, x: Tensor, dtype: torch.dtype) -> None:
    """TypeError or ValueError unless rows `x` may go on from a state."""
    checked_kind("state", state, ServingState, "what prefill or step of this layer returned")
    if state.config != config or (state.owner is not None and state.owner is not owner):
        whose = (
            "the same sizes and options" if state.config != config else "prefill, step or restored of this very layer"
        )
        raise ValueError(f"state should be of this layer: it needs {whose}, got one of another")
    found = state.tensors()[0]
    if found.dtype != dtype:
        raise TypeError(f"state should have the layer's dtype {dtype}, got {found.dtype}")
    if found.device != x.device:
        raise ValueError(f"state should be on the device of x, {x.device}, got {found.device}: state.to(x.device)")
    if tuple(x.shape[:-2]) != state.batch:
        raise ValueError(f"state should be of the batch of x, {tuple(x.shape[:-2])}, got {state.batch}")
