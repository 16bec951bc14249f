"""Processor time of calls that take turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def seconds(functions: list[Callable[[], Any]], repeats: int) -> list[float]:
    """Least processor time of each, run in turns."""
    times: list[list[float]] = []
    for _ in range(repeats):
        times.append([])
        for function in functions:
            start = time.process_time()
            function()
            times[-1].append(time.process_time() - start)
    return [min(t) for t in zip(*times, strict=True)]
