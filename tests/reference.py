"""The definition in dense NumPy, forward and gradient, to measure everything against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from math import prod
from typing import Any, NamedTuple

import numpy as np

from tattn.methods import Polynomial
from tattn.stored import plan_of_facts

LETTERS = "abcd"


class Dense(NamedTuple):
    """Output, lse and the gradients for the upstream gradients given."""

    out: np.ndarray
    lse: np.ndarray
    dquery: np.ndarray
    dkeys: list[np.ndarray]
    dvalues: list[np.ndarray]
    ddecay: Sequence[np.ndarray] = ()


def dense(
    query: np.ndarray,
    keys: Sequence[np.ndarray],
    values: Sequence[np.ndarray],
    *,
    scale: float | None = None,
    masks: Sequence[np.ndarray | None] | None = None,
    causal: bool = False,
    window: Sequence[int] | None = None,
    decay: Sequence[np.ndarray] | None = None,
    grad_out: np.ndarray | None = None,
    grad_lse: np.ndarray | None = None,
    function: Callable[[np.ndarray], np.ndarray] = np.exp,
    derivative: Callable[[np.ndarray], np.ndarray] = np.exp,
    precision: type[np.floating] = np.float64,
    channels: str = "real",
) -> Dense:
    """Tensor attention with `function` in place of exp; O(Π lengths) memory."""
    q = np.asarray(query, precision)
    ks, vs = [np.asarray(k, precision) for k in keys], [np.asarray(v, precision) for v in values]
    scale = precision(1 / q.shape[-1] if scale is None else scale)
    m = len(ks)
    views = LETTERS[:m]
    if channels == "complex":
        q, *ks = (as_complex(x) for x in (q, *ks))
    scores = scale * np.einsum(f"...xz,{','.join(f'...{c}z' for c in views)}->...x{views}", q, *ks).real
    present, shares, steps = np.ones((1,) * (m + 1), bool), [], []
    for i, mask in enumerate(masks or ()):
        if mask is not None:
            shape = (*mask.shape[:-1], 1, *(mask.shape[-1] if j == i else 1 for j in range(m)))
            present = present & np.asarray(mask).reshape(shape)
    if causal or window is not None:
        n = q.shape[-2]
        for i, k in enumerate(ks):
            behind = np.arange(n)[:, None] + k.shape[-2] - n - np.arange(k.shape[-2])
            seen = (behind >= 0) & (behind < (np.inf if window is None else window[i]))
            present = present & seen.reshape(n, *(k.shape[-2] if j == i else 1 for j in range(m)))
            if decay is not None:
                factor = np.asarray(decay[i], precision)[..., None, None]
                own, step = factor ** np.maximum(behind, 0), np.maximum(behind, 0) * factor ** np.maximum(behind - 1, 0)
                shape = (*own.shape[:-1], *(own.shape[-1] if j == i else 1 for j in range(m)))
                shares.append(own.reshape(shape))
                steps.append(step.reshape(shape))
    share = prod(shares, start=np.ones((1,) * (m + 1), precision))
    axes = tuple(range(-m, 0))
    # exp is shifted by the largest score; a polynomial is taken as it is.
    masked = np.where(present, scores, -np.inf)
    top = masked.max(axis=axes, keepdims=True) if function is np.exp else np.zeros_like(masked[(..., *(slice(1),) * m)])
    top = np.where(np.isfinite(top), top, 0.0)
    weights = np.where(present, share * function(scores - top), 0.0)
    slopes = np.where(present, share * derivative(scores - top), 0.0)
    total = weights.sum(axis=axes, keepdims=True)
    empty = total == 0
    total = np.where(empty, 1.0, total)
    f, f_slope = weights / total, slopes / total
    pairs = f"{','.join(f'...{c}e' for c in views)}"
    out = np.einsum(f"...x{views},{pairs}->...xe", f, *vs)
    with np.errstate(divide="ignore"):
        lse = np.where(empty, -np.inf, np.log(total) + top).reshape(total.shape[:-m])
    leading = np.broadcast_shapes(*(a.shape[:-2] for a in (q, *ks, *vs)), out.shape[:-2])
    out = np.broadcast_to(out, (*leading, *out.shape[-2:]))
    lse = np.broadcast_to(lse, (*leading, lse.shape[-1]))
    g = np.zeros_like(out) if grad_out is None else np.asarray(grad_out, precision)
    g_lse = np.zeros_like(lse) if grad_lse is None else np.asarray(grad_lse, precision)
    w = np.einsum(f"...xe,{pairs}->...x{views}", g, *vs)
    r = (g * out).sum(-1) - g_lse
    p = f_slope * (w - r.reshape(*r.shape, *(1,) * m))

    def gradient(
        letters: str, target: np.ndarray, weight: np.ndarray, factors: list[np.ndarray], names: str
    ) -> np.ndarray:
        other = ",".join(f"...{c}{letters[1]}" for c in names)
        # Of complex numbers ∂/∂re + i ∂/∂im.
        full = np.einsum(f"...x{views},{other}->...{letters}", weight, *(f.conj() for f in factors))
        extra = full.ndim - target.ndim
        full = full.sum(axis=tuple(range(extra)))
        axes = tuple(i for i, s in enumerate(target.shape[:-2]) if s == 1 and full.shape[i] != 1)
        full = full.sum(axis=axes, keepdims=True)
        return np.concatenate([full.real, full.imag], axis=-1) if np.iscomplexobj(target) else full

    dquery = scale * gradient("xz", q, p, ks, views)
    dkeys, dvalues = [], []
    for i, c in enumerate(views):
        rest = views[:i] + views[i + 1 :]
        dkeys.append(scale * gradient(f"{c}z", ks[i], p, [q, *ks[:i], *ks[i + 1 :]], "x" + rest))
        dvalues.append(gradient(f"{c}e", vs[i], f, [g, *vs[:i], *vs[i + 1 :]], "x" + rest))
    ddecay = []
    for i, step in enumerate(steps):
        others = prod([*shares[:i], *shares[i + 1 :]], start=step)
        own = (
            np.where(present & ~empty, others * function(scores - top), 0.0)
            / total
            * (w - r.reshape(*r.shape, *(1,) * m))
        )
        own = own.sum(axis=tuple(range(-m - 1, 0)))
        shape = np.shape(decay[i])
        own = own.sum(axis=tuple(range(own.ndim - len(shape))))
        ddecay.append(own.sum(axis=tuple(j for j, s in enumerate(shape) if s == 1 != own.shape[j]), keepdims=True))
    return Dense(out, lse, dquery, dkeys, dvalues, ddecay)


def as_complex(x: np.ndarray) -> np.ndarray:
    """Rows (re_1 …, im_1 …) as complex numbers."""
    half = x.shape[-1] // 2
    return x[..., :half] + 1j * x[..., half:]


def sizes_of(x: np.ndarray, channels: str) -> np.ndarray:
    """|x| of every channel, or of every complex one, for both of its parts."""
    if channels == "real":
        return np.abs(x)
    size = np.abs(as_complex(x))
    return np.concatenate([size, size], axis=-1)


def value_sizes(values: Sequence[np.ndarray], masks: Sequence[np.ndarray | None] | None = None) -> np.ndarray:
    """Π_μ max_j |values_μ[j, e]| (..., 1, dv)."""
    size = np.ones(1)
    for i, v in enumerate(values):
        mask = None if masks is None else masks[i]
        v = np.abs(np.asarray(v, np.float64))
        size = size * (v if mask is None else np.where(mask[..., None], v, 0)).max(axis=-2, keepdims=True)
    return size


def changed(plan: Any, **facts: Any) -> Any:
    """The plan with some of its attributes changed."""
    return plan_of_facts(plan.facts() | facts)


class ByFeatures(Polynomial):
    """The polynomial method through features, however short the call."""

    def by_scores(self, *_: Any) -> bool:
        return False


class ByScores(Polynomial):
    """The polynomial method score by score, however long the call."""

    def by_scores(self, *_: Any) -> bool:
        return True


def through_features(plan: Any) -> Any:
    """The plan, of whose polynomial features are computed; others as they are."""
    return _of_kind(plan, ByFeatures)


def score_by_score(plan: Any) -> Any:
    """The plan, whose polynomial is computed of every score."""
    return _of_kind(plan, ByScores)


def _of_kind(plan: Any, kind: type[Polynomial]) -> Any:
    method = plan.algorithm
    if not isinstance(method, Polynomial):
        return plan
    return replace(plan, algorithm=kind(**{field.name: getattr(method, field.name) for field in fields(method)}))
