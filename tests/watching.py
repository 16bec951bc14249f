"""What is called meanwhile, seen from outside: nothing is exchanged for it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import unwrap
from types import CodeType
from typing import Any


@dataclass
class Seen:
    """One call: the function's name, its arguments by name, and what it returned once it has."""

    name: str
    given: dict[str, Any]
    result: Any = None


@contextmanager
def calls_of(*functions: Callable[..., Any] | CodeType) -> Iterator[list[Seen]]:
    """The calls of Python functions, or of what runs a code, by this thread and by those that it starts, in order."""
    codes = {f if isinstance(f, CodeType) else unwrap(f).__code__ for f in functions}
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


def code_within(function: Callable[..., Any], name: str) -> CodeType:
    """The code of a function that another makes."""
    return next(c for c in function.__code__.co_consts if isinstance(c, CodeType) and c.co_name == name)
