"""Scores other than one product of rows: each as wider rows, whose product over all views is that score.

A score that is a sum of products of entries of the query and of the keys is Σ_c q_ic a_jc b_kc of rows with more channels. So every
method, bound and summary of the library holds for it as it stands. Each function takes rows and returns ``(query, keys)`` for
`tattn.tensor_attention`. The score is then ``scale`` times the formula. Give ``scale``: its default, 1 / d, counts the channels of
what is returned. Gradients are those of the library's own operations.

More channels take a higher rank, C(d + g, g) of the d channels returned. Channels of ones, and channels that one array holds
twice, make monomials of that array equal. But two monomials are one feature of the score only if they are equal in all arrays,
and that happens only for determinants, and rarely. In NumPy, and in torch on a processor, long calls over all rows find channels
that are equal, or one, and sum up only the monomials that are different in each array (`engines.distinct`). Plans do not count with
it. For rows of 6 channels at degree 4:

=============================  ========  ======  ========  ===========================
form                           channels  rank    distinct  distinct in q, a and b
=============================  ========  ======  ========  ===========================
determinant                    12        1,820   1,794     210, 210, 210
strassen                       18        7,315   7,315     210, 210, 210
strassen with query2, keys2    18        7,315   7,315     1,820, 1,820, 1,820
tree of two keys               12        1,820   1,820     210, 210, 210
tree with keys2                12        1,820   1,820     210, 1,820, 210
pair_bias of rank 2, q and b   8         495     495       495, 210, 495
=============================  ========  ======  ========  ===========================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .arrays import broadcast_leading, with_leading
from .backends import Array, Backend
from .checks import checked_factors, checked_length, described, factors, whole

# The six products of a determinant: the channels of query and keys, and the sign.
_TERMS = ((0, 1, 2, 1.0), (1, 2, 0, 1.0), (2, 0, 1, 1.0), (0, 2, 1, -1.0), (2, 1, 0, -1.0), (1, 0, 2, -1.0))


def determinant(query: Array, keys: Sequence[Array]) -> tuple[Array, tuple[Array, ...]]:
    """Σ_l det[q_l, a_l, b_l] over chunks l of three channels: it does not change when all rows are rotated alike.

    The signed determinant of 2-simplicial attention, arXiv 2507.02754. A determinant is a sum of five products too, but the bound
    of the score is then larger by more than half, and a plan takes a higher rank.

    Parameters
    ----------
    query : array (..., n, d)
        d a multiple of 3.
    keys : two arrays (..., n_1, d) and (..., n_2, d)

    Returns
    -------
    query : array (..., n, 2 d)
    keys : tuple of two arrays (..., n_μ, 2 d)

    Raises
    ------
    TypeError, ValueError
        For arrays that do not fit, by name.

    Examples
    --------
    >>> import numpy as np
    >>> q, a, b = np.random.default_rng(0).normal(size=(3, 1, 3))
    >>> query, keys = determinant(q, [a, b])
    >>> bool(np.isclose((query * keys[0] * keys[1]).sum(), np.linalg.det(np.concatenate([q, a, b]))))
    True
    """
    backend, rows = _rows(query, keys, 2)
    if query.shape[-1] % 3:
        raise ValueError(f"query should have a multiple of 3 channels, got shape {tuple(query.shape)}")
    xp = backend.xp
    found = []
    for place, (_, x) in enumerate(rows):
        parts = [x[..., term[place] :: 3] * (1.0 if place else term[3]) for term in _TERMS]
        found.append(xp.concat(parts, axis=-1))
    return found[0], tuple(found[1:])


def strassen(
    query: Array, keys: Sequence[Array], query2: Array | None = None, keys2: Sequence[Array] | None = None
) -> tuple[Array, tuple[Array, ...]]:
    """⟨q, a⟩ + ⟨q′, b⟩ + ⟨a′, b′⟩: all pairs of the three rows. Strassen attention, arXiv 2501.19215.

    Parameters
    ----------
    query : array (..., n, d)
    keys : two arrays (..., n_1, d) and (..., n_2, d)
    query2 : array (..., n, d), optional
        q′; the query if None.
    keys2 : two arrays (..., n_1, d) and (..., n_2, d), optional
        a′ and b′; the keys if None.

    Returns
    -------
    query : array (..., n, 3 d)
    keys : tuple of two arrays (..., n_μ, 3 d)

    Raises
    ------
    TypeError, ValueError
        For arrays that do not fit, by name.

    Examples
    --------
    >>> import numpy as np
    >>> q, a, b = np.random.default_rng(0).normal(size=(3, 1, 4))
    >>> query, keys = strassen(q, [a, b])
    >>> bool(np.isclose((query * keys[0] * keys[1]).sum(), (q * a + q * b + a * b).sum()))
    True
    """
    backend, rows = _rows(query, keys, 2)
    (of_query, a, b), second = rows, rows[0] if query2 is None else ("query2", query2)
    pair = _others("keys2", keys2, rows[1:])
    return _linked([_Link(0, 1, of_query, a), _Link(0, 2, second, b), _Link(1, 2, *pair)], rows, backend)


def tree(query: Array, keys: Sequence[Array], keys2: Sequence[Array] | None = None) -> tuple[Array, tuple[Array, ...]]:
    """⟨q, a⟩ + ⟨a′, b⟩ + ⟨b′, c⟩ + …: the query with the first key, and every key with the next. Poly-attention, arXiv 2602.02422.

    Parameters
    ----------
    query : array (..., n, d)
    keys : m arrays (..., n_μ, d)
    keys2 : m arrays (..., n_μ, d), optional
        a′, b′, … (the last is not used); the keys if None.

    Returns
    -------
    query : array (..., n, m d)
    keys : tuple of m arrays (..., n_μ, m d)

    Raises
    ------
    TypeError, ValueError
        For arrays that do not fit, by name.

    Examples
    --------
    >>> import numpy as np
    >>> q, a, b = np.random.default_rng(0).normal(size=(3, 1, 4))
    >>> query, keys = tree(q, [a, b])
    >>> bool(np.isclose((query * keys[0] * keys[1]).sum(), (q * a + a * b).sum()))
    True
    """
    backend, rows = _rows(query, keys)
    starts = [rows[0], *_others("keys2", keys2, rows[1:])]
    links = [_Link(i, i + 1, x, y) for i, (x, y) in enumerate(zip(starts, rows[1:], strict=False))]
    return _linked(links, rows, backend)


def pair_bias(
    query: Array, keys: Sequence[Array], left: Array, right: Array, between: tuple[int, int] = (0, 1)
) -> tuple[Array, tuple[Array, ...]]:
    """Σ_c q_ic a_jc b_kc … + ⟨x, y⟩: the score with the inner product of two further rows added to it, for any two of its places.

    A bias of rank k that two of the rows share, such as a relative one from features of positions.

    Parameters
    ----------
    query : array (..., n, d)
    keys : m arrays (..., n_μ, d)
    left, right : arrays (..., n_i, k) and (..., n_j, k)
        x and y, a row for each row of the places i and j.
    between : tuple of two ints
        The places i and j: 0 the query, 1 … m the views.

    Returns
    -------
    query : array (..., n, d + k)
    keys : tuple of m arrays (..., n_μ, d + k)

    Raises
    ------
    TypeError, ValueError
        For arrays and places that do not fit, by name.

    Examples
    --------
    >>> import numpy as np
    >>> q, a, b, x, y = np.random.default_rng(0).normal(size=(5, 1, 4))
    >>> query, keys = pair_bias(q, [a, b], x, y, between=(0, 2))
    >>> bool(np.isclose((query * keys[0] * keys[1]).sum(), (q * a * b + x * y).sum()))
    True
    """
    backend, rows = _rows(query, keys)
    if not isinstance(between, tuple) or len(between) != 2:
        raise TypeError(f"between should be a tuple of two places, such as (0, 1), got {described(between)}")
    first, second = (whole(f"between[{i}]", place, 0, len(keys)) for i, place in enumerate(between))
    if first == second:
        raise ValueError(f"between should be two different places, got {between}")
    return _linked([_Link(first, second, ("left", left), ("right", right))], rows, backend, beside=True)


Named = tuple[str, Array]


class _Link(NamedTuple):
    """Rows x of one place and y of another, whose inner product is a summand of the score."""

    first: int
    second: int
    x: Named
    y: Named


def _rows(query: Any, keys: Any, views: int | None = None) -> tuple[Backend, list[Named]]:
    """The rows of all places by name: as many columns in each, and so many views if that matters."""
    named = [("query", query), *((name, key) for name, key, _ in factors("keys", keys))]
    backend = checked_factors([(name, a, 2) for name, a in named])
    if views is not None and len(keys) != views:
        raise ValueError(f"keys should be {views} arrays, got {len(keys)}")
    for name, a in named[1:]:
        checked_length(name, a, -1, query.shape[-1], "query")
    return backend, named


def _others(name: str, given: Any, instead: Sequence[Named]) -> list[Named]:
    """The arrays of an argument by name, as many as those that are taken if it is None."""
    if given is None:
        return list(instead)
    named = [(of, a) for of, a, _ in factors(name, given)]
    if len(named) != len(instead):
        raise ValueError(f"{name} should be {len(instead)} arrays, as many as keys, got {len(named)}")
    checked_factors([(of, a, 2) for of, a in (*instead, *named)])
    return named


def _linked(
    links: Sequence[_Link], rows: Sequence[Named], backend: Backend, beside: bool = False
) -> tuple[Array, tuple[Array, ...]]:
    """Rows of all places whose product is the sum of the links, or that of the rows and the links if `beside`."""
    checked_factors([(name, a, 2) for name, a in (*rows, *(side for link in links for side in (link.x, link.y)))])
    for first, second, (left, x), (right, y) in links:
        for (name, a), place in (((left, x), first), ((right, y), second)):
            checked_length(name, a, -2, rows[place][1].shape[-2], rows[place][0])
        checked_length(right, y, -1, x.shape[-1], left)
    xp = backend.xp
    found = []
    for place, (_, own) in enumerate(rows):
        parts = [own] if beside else []
        for first, second, (_, x), (_, y) in links:
            ones = xp.ones((own.shape[-2], x.shape[-1]), dtype=own.dtype, device=backend.device(own))
            parts.append({first: x, second: y}.get(place, ones))
        leading = broadcast_leading(*parts)
        found.append(xp.concat([with_leading(part, leading, backend) for part in parts], axis=-1))
    return found[0], tuple(found[1:])
