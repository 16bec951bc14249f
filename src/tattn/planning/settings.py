"""What a choice is weighed by; nothing that is computed depends on it but by the method that is chosen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

MAX_RANK = 1 << 18


@dataclass(frozen=True)
class Settings:
    """Round numbers, most of them measured.

    Parameters
    ----------
    max_rank : int
        The largest rank that a plan accepts.
    banded : tuple of (int, int)
        Degrees and moments that are tried in norm bands, the cheapest first.
    bands : int or None
        Bands of every view in these trials; by the number of rows if None.
    bands_row, bands_call : float
        Overhead of the banded method in equivalent operations, on one thread: 0.3 µs a row to sort, gather and certify it,
        and 30 ms a call with its trial on samples.
    most_recomputed : float
        Rows, as a share, that "auto" recomputes exactly before it takes the exact method for all.
    long : float
        Seconds that nobody waits for without being told.
    short : float
        Fewer operations than this take no such time anywhere, so that no speed has to be known.
    speed : float or None
        Operations a second of exact attention by one thread; measured where it is needed if None.
    """

    max_rank: int = MAX_RANK
    banded: tuple[tuple[int, int], ...] = ((2, 2), (3, 2), (4, 2), (4, 4), (5, 4))
    bands: int | None = None
    bands_row: float = 1e4
    bands_call: float = 1e9
    most_recomputed: float = 0.05
    long: float = 30.0
    short: float = 1e11
    speed: float | None = None


_now = Settings()


def settings() -> Settings:
    """Those that hold now."""
    return _now


@contextmanager
def using(**changed: Any) -> Iterator[None]:
    """Other settings for a while, in all threads, for tests and measurements."""
    global _now
    before, _now = _now, replace(_now, **changed)
    try:
        yield
    finally:
        _now = before
