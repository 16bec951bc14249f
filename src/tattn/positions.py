"""Rotary positions: rows of complex channels turned by angles that grow with their position."""

from __future__ import annotations

from fractions import Fraction
from math import pi
from typing import Any

from .backends import Array, Backend
from .checks import (
    check_device,
    check_floating,
    check_library,
    check_shape,
    checked_array,
    checked_broadcast,
    checked_channels,
)
from .operands import COMPLEX


def _in_two(digits: int) -> tuple[float, float]:
    """1 / (2 π) as a number of so many digits and what it lacks."""
    turn = Fraction("0.15915494309189533576888376337251436203445964574")
    high = Fraction(round(turn * 2 ** (digits + 2)), 2 ** (digits + 2))
    return float(high), float(turn - high)


_OF_ONE = {"float32": _in_two(24), "float64": _in_two(53)}
# What splits a number into halves of its digits.
_SPLIT = {"float32": 2.0**12 + 1, "float64": 2.0**27 + 1}
_KINDS = (
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
)


def rotary(rows: Array, positions: Array, frequencies: Array) -> Array:
    r"""Rows of complex channels, each turned by its position times a frequency: :math:`z_c\, e^{i f_c p}`.

    With the query turned by the frequencies of every view, and the keys of a view by minus its own, the score of
    ``channels="complex"`` depends on differences of positions alone:

    .. math::

        \mathrm{Re}\, q_c\, e^{i(\alpha_c + \beta_c) p_i}\; a_c\, e^{-i \alpha_c p_j}\; b_c\, e^{-i \beta_c p_k}
        = \mathrm{Re}\, q_c a_c b_c\, e^{i \alpha_c (p_i - p_j) + i \beta_c (p_i - p_k)}.

    Parameters
    ----------
    rows : array (..., n, 2 h)
        The real parts of h channels, then their imaginary parts. float64, float32, float16 or bfloat16.
    positions : array (..., n)
        Whole numbers or floats, of the library and device of the rows. In float32, and for narrower rows, whole numbers are exact
        up to 2^24.
    frequencies : array (..., h)
        Floats, radians for a step of one position; negative ones turn the other way. The leading dimensions of all three
        broadcast.

    Returns
    -------
    array (..., n, 2 h)
        In the dtype of the rows. Differentiable with respect to rows, frequencies and positions where the library has gradients;
        the transpose is the same with ``-frequencies``.

    Raises
    ------
    TypeError, ValueError
        For arrays that do not fit, by name.

    Notes
    -----
    O(n h) time. Whole turns are taken off before the sine and cosine, with twice the digits: a result is off by a few units in
    the last place for every position whose float is exact, 10^6 in float32 as well, under compilers that keep the order of
    operations. Frequencies are rounded to the dtype of the computation. A sum of two may round again, so turn the query by the
    frequencies of one view after those of the other where positions are large.

    The pairs of RoPE, "RoFormer", arXiv 2104.09864.

    Examples
    --------
    >>> import numpy as np, tattn
    >>> query, *keys = np.random.default_rng(0).uniform(-1, 1, (3, 50, 8))
    >>> alpha, beta = 100.0 ** -np.linspace(0, 1, 4), 30.0 ** -np.linspace(0, 1, 4)
    >>> def attend(positions):
    ...     turned = tattn.rotary(tattn.rotary(query, positions, alpha), positions, beta)
    ...     views = [tattn.rotary(k, positions, -f) for k, f in zip(keys, (alpha, beta))]
    ...     return tattn.tensor_attention(turned, views, keys, channels="complex")
    >>> np.allclose(attend(np.arange(50)), attend(np.arange(50) + 12345), rtol=0, atol=1e-12)
    True
    """
    backend = checked_array("rows", rows)
    check_floating("rows", rows, rows, backend)
    check_shape("rows", rows, rowless=True)
    half = rows.shape[-1] // 2
    checked_channels(COMPLEX, rows.shape[-1], "rows' last dimension")
    for name, array, length, of in (
        ("positions", positions, rows.shape[-2], "rows"),
        ("frequencies", frequencies, half, "pairs"),
    ):
        _checked(name, array, rows, backend)
        if array.ndim < 1 or array.shape[-1] != length:
            raise ValueError(
                f"{name} should have shape (..., {length}), one for each of the {of}, got {tuple(array.shape)}"
            )
    others = (("positions", positions), ("frequencies", frequencies))
    checked_broadcast([("rows", tuple(rows.shape[:-2])), *((name, tuple(x.shape[:-1])) for name, x in others)])
    with backend.on_device_of(rows):
        return turn(rows, positions, frequencies, backend)


def _checked(name: str, array: Any, rows: Array, backend: Backend) -> None:
    """TypeError or ValueError unless these are numbers of the library and device of the rows; whole numbers are positions only."""
    check_library(name, array, backend, "rows")
    dtype = backend.dtype_name(array.dtype)
    kinds = _KINDS if name == "positions" else _KINDS[:4]
    if dtype not in kinds:
        raise TypeError(f"{name} should have a dtype of {', '.join(kinds)}, got {dtype}")
    check_device(name, array, rows, backend, "rows")


def turn(rows: Array, positions: Array, frequencies: Array, backend: Backend) -> Array:
    """`rotary` of arrays that fit."""
    xp = backend.xp
    dtype = backend.compute_dtype(rows.dtype)
    turns = _turns(
        backend.cast(positions, dtype)[..., :, None], backend.cast(frequencies, dtype)[..., None, :], backend
    )
    angle = turns * (2 * pi)
    cos, sin = xp.cos(angle), xp.sin(angle)
    wide, half = backend.cast(rows, dtype), rows.shape[-1] // 2
    re, im = wide[..., :half], wide[..., half:]
    return backend.cast(xp.concat([re * cos - im * sin, re * sin + im * cos], axis=-1), rows.dtype)


def _turns(p: Array, f: Array, backend: Backend) -> Array:
    """Turns p f / 2 π from −1/2 to 1/2, less whole ones: (..., n, 1) and (..., 1, h) → (..., n, h)."""
    xp = backend.xp
    # The number of turns of one step as a sum of two, and its product with the position as another.
    kind = backend.dtype_name(f.dtype)
    high, low = _OF_ONE[kind]
    step, rest = _product(f, xp.full_like(f, high), kind)
    rest = rest + f * low
    turns, lost = _product(p, step, kind)
    return (turns - xp.round(turns)) + (lost + p * rest)


def _product(x: Array, y: Array, kind: str) -> tuple[Array, Array]:
    """Product x y as a number and what rounding took from it (Dekker): exact without fused operations."""

    def halves(z: Array) -> tuple[Array, Array]:
        large = z * _SPLIT[kind]
        high = large - (large - z)
        return high, z - high

    (a, b), (c, d) = halves(x), halves(y)
    product = x * y
    return product, ((a * c - product) + a * d + b * c) + b * d
