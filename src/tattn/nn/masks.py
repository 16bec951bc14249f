"""Masks of other libraries as `key_masks`: True where to attend."""

from __future__ import annotations

from typing import Any

from ..backends import Array, Backend
from ..checks import checked_array


def from_attention_mask(mask: Array) -> Array:
    """The ``attention_mask`` of Hugging Face's tokenizers, 1 = attend and 0 = padding, as a mask for `key_masks`.

    Parameters
    ----------
    mask : array of whole numbers or booleans (..., n)
        Of any supported library.

    Returns
    -------
    boolean array (..., n), True where to attend

    Raises
    ------
    TypeError
        For masks of floating numbers, which are added to scores.
    ValueError
        For numbers besides 0 and 1, such as those of packed documents, where values can be read.

    Examples
    --------
    >>> import numpy as np, tattn
    >>> tattn.nn.from_attention_mask(np.array([[1, 1, 0]]))
    array([[ True,  True, False]])
    """
    backend, dtype = _checked(mask)
    if dtype == "bool":
        return mask
    if not dtype.lstrip("u").startswith("int"):
        raise TypeError(f"mask should hold whole numbers, 1 = attend and 0 = not, got dtype {dtype}")
    attend = mask == 1
    if not backend.is_traced([mask]) and not bool(backend.xp.all(attend | (mask == 0))):
        raise ValueError("mask should hold 1 = attend and 0 = not, got other numbers among them")
    return attend


def from_key_padding_mask(mask: Array) -> Array:
    """The ``key_padding_mask`` of ``torch.nn.MultiheadAttention``, True = leave out, as a mask for `key_masks`.

    Parameters
    ----------
    mask : boolean array (..., n)
        Of any supported library.

    Returns
    -------
    boolean array (..., n), True where to attend

    Raises
    ------
    TypeError
        For masks that are not boolean.

    Examples
    --------
    >>> import numpy as np, tattn
    >>> tattn.nn.from_key_padding_mask(np.array([[False, False, True]]))
    array([[ True,  True, False]])
    """
    _, dtype = _checked(mask)
    if dtype != "bool":
        raise TypeError(f"mask should be boolean, True = leave out, got dtype {dtype}")
    return ~mask


def _checked(mask: Any) -> tuple[Backend, str]:
    backend = checked_array("mask", mask)
    return backend, backend.dtype_name(mask.dtype)
