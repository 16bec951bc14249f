"""What users would write otherwise, or install: attention of order three for torch and NumPy, and of order two for torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .libraries import Array, Function


def einsum_numpy(q: Array, a: Array, b: Array, u: Array, v: Array, optimize: bool = True) -> Array:
    """All n³ scores, by einsum, which finds the order of its products; NumPy and CuPy."""
    xp = np if isinstance(q, np.ndarray) else __import__("cupy")
    scores = xp.einsum("ic,jc,kc->ijk", q / np.float32(q.shape[1]), a, b, optimize=optimize)
    weights = xp.exp(scores - scores.max(axis=(1, 2), keepdims=True))
    weights /= weights.sum(axis=(1, 2), keepdims=True)
    return xp.einsum("ijk,je,ke->ie", weights, u, v, optimize=optimize)


def einsum_plain(q: Array, a: Array, b: Array, u: Array, v: Array) -> Array:
    """The same without the option that finds an order, which is how einsum is called by default."""
    return einsum_numpy(q, a, b, u, v, optimize=False)


def einsum_torch(q: Array, a: Array, b: Array, u: Array, v: Array) -> Array:
    """All n³ scores, by einsum."""
    import torch

    scores = torch.einsum("ic,jc,kc->ijk", q / q.shape[1], a, b)
    weights = torch.softmax(scores.flatten(1), 1).reshape(scores.shape)
    return torch.einsum("ijk,je,ke->ie", weights, u, v)


def einsum_jax(q: Array, a: Array, b: Array, u: Array, v: Array) -> Array:
    """All n³ scores, by einsum."""
    import jax

    scores = jax.numpy.einsum("ic,jc,kc->ijk", q / q.shape[1], a, b)
    weights = jax.nn.softmax(scores, axis=(1, 2))
    return jax.numpy.einsum("ijk,je,ke->ie", weights, u, v)


def fused_over_pairs(q: Array, a: Array, b: Array, u: Array, v: Array) -> Array:
    """The library's fused attention over n² keys a_j ∘ b_k and values u_j ∘ v_k: the same scores, and no n³ of them stored."""
    keys, values = ((x[:, None] * y[None]).flatten(0, 1) for x, y in ((a, b), (u, v)))
    return fused(q, keys, values)


def fused(q: Array, k: Array, v: Array) -> Array:
    """Ordinary attention by the library's fused kernel, scores scaled as ours."""
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = (x[None, None] for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, scale=1 / q.shape[-1])[0, 0]


def two_simplicial(q: Array, a: Array, b: Array, u: Array, v: Array) -> Array:
    """`naive_two_simplicial_attend` of simplicial-attention."""
    from simplicial_attention import naive_two_simplicial_attend

    query, keys, values = _its_arguments(q, (a, b), (u, v))
    return naive_two_simplicial_attend(query, keys, values)[0, 0]


def nth_order(q: Array, a: Array, b: Array, u: Array, v: Array) -> Array:
    """`nth_order_attend` of simplicial-attention."""
    from simplicial_attention import nth_order_attend

    query, keys, values = _its_arguments(q, (a, b), (u, v))
    return nth_order_attend(query, keys, values)[0, 0]


def _its_arguments(q: Array, keys: Sequence[Array], values: Sequence[Array]) -> tuple[Array, ...]:
    """One problem of one head; it divides scores by √d and we by d, so a √d goes into the query."""
    return (
        (q * q.shape[1] ** -0.5)[None, None],
        tuple(k[None, None] for k in keys),
        tuple(v[None, None] for v in values),
    )


def random_features(dim: int, features: int, device: str) -> Function:
    """`FastAttention` of performer-pytorch: random features in place of the softmax, drawn with a seed."""
    import torch
    from performer_pytorch import FastAttention

    torch.manual_seed(0)
    module = FastAttention(dim_heads=dim, nb_features=features).to(device)

    def attend(q: Array, k: Array, v: Array) -> Array:
        # As above: a √d into the query.
        return module((q * dim**-0.5)[None, None], k[None, None], v[None, None])[0, 0]

    return attend


# How many numbers each holds at the peak, forward and with the gradient: of n³, and of n² times the channels.
ORDER_THREE: dict[str, dict[str, tuple[Function, tuple[float, float], tuple[float, float]]]] = {
    "numpy": {
        "dense einsum": (einsum_numpy, (3, 6), (2, 4)),
        "einsum by default": (einsum_plain, (3, 6), (2, 4)),
    },
    "torch": {
        "dense einsum": (einsum_torch, (3, 6), (2, 6)),
        "SDPA over pair keys": (fused_over_pairs, (0, 0), (3, 8)),
        "naive_two_simplicial_attend": (two_simplicial, (3, 6), (2, 6)),
        "nth_order_attend": (nth_order, (3, 6), (2, 6)),
    },
}
ORDER_THREE["cupy"] = ORDER_THREE["numpy"]
