"""What is called meanwhile, seen from outside: nothing is exchanged for it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import unwrap
from typing import Any


@dataclass
class Seen:
    """One call: the function's name, its arguments by name, and what it returned once it has."""

    name: str
    given: dict[str, Any]
    result: Any = None


@contextmanager
def calls_of(*functions: Callable[..., Any]) -> Iterator[list[Seen]]:
    """The calls of Python functions by this thread and by those that it starts, in order."""
    codes = {unwrap(f).__code__ for f in functions}
    seen: list[Seen] = []
    open_calls: dict[Any, Seen] = {}

    def notice(frame: Any, event: str, result: Any) -> None:
        if frame.f_code not in codes:
            return
        if event == "call":
            open_calls[frame] = Seen(frame.f_code.co_name, dict(frame.f_locals))
            seen.append(open_calls[frame])
        elif event == "return":
            open_calls.pop(frame).result = result

    before, of_threads = sys.getprofile(), threading.getprofile()
    sys.setprofile(notice)
    threading.setprofile(notice)
    try:
        yield seen
    finally:
        sys.setprofile(before)
        threading.setprofile(of_threads)
