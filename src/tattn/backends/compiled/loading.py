"""numba, imported by the first call that can use it, or why it cannot be used."""

from __future__ import annotations

import os
from functools import cache
from types import SimpleNamespace
from typing import Any

# Switches kernels off where it is "0".
SWITCH = "TATTN_KERNELS"
# (major, minor) of numba: older ones know no NumPy 2.
_OLDEST = (0, 61)
# Address space that numba and the libraries which it loads should be allowed, in bytes.
_ROOM = 2 << 30
# What operations raised for a dtype when they were tried.
failed: dict[tuple[str, str], str] = {}


def why_not() -> str:
    """Why there are no kernels; empty if there are."""
    if os.environ.get(SWITCH) == "0":
        return f"turned off by {SWITCH}=0"
    return loaded()[1] or next(iter(failed.values()), "")


@cache
def loaded() -> tuple[Any, str]:
    """The compiled loops with the version of numba, or why they cannot be used."""
    problem = _too_little_room()
    if problem:
        return None, problem
    try:
        import numba

        version = str(numba.__version__)
        if tuple(map(int, version.split(".")[:2])) < _OLDEST:
            return None, f"numba should be {'.'.join(map(str, _OLDEST))} or newer, got {version}"
        from . import causal, decoding, rows, windows
    except ModuleNotFoundError as error:
        return None, "numba is not installed" if error.name == "numba" else told(error)
    except Exception as error:
        # A library that cannot be used may raise anything.
        return None, told(error)
    return SimpleNamespace(causal=causal, decoding=decoding, rows=rows, windows=windows, version=version), ""


def loops_over_tuples() -> Any:
    """Those, which take more of numba than the others do."""
    from . import tuples

    return tuples


def _too_little_room() -> str:
    """Why numba should not be imported: where too little address space is allowed, libraries that it loads ask for it for ever."""
    try:
        import resource
    except ImportError:
        return ""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY or limit >= _ROOM:
        return ""
    return f"numba should be allowed {_ROOM >> 20:,} MiB of address space, got a limit of {limit >> 20:,} MiB"


def told(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
