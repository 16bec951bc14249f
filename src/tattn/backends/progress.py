"""How far a long call has come, told to who asked for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Lock, get_ident
from typing import Any

# Told (done, total), rows of a pass over them.
Progress = Callable[[int, int], object]
# Whom to tell about the loops that a thread runs. Mostly empty, and then nobody asks which thread it is.
TOLD: dict[int, Pass] = {}


class Pass:
    """One pass over rows after another: counts those that are done, whichever thread did them."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._lock = progress, Lock()
        self._done = self._total = 0

    def of(self, body: Callable[..., Any], total: int) -> Callable[..., Any]:
        """The body of a pass over so many rows, which tells of every block; of loops within it nothing is told."""
        self._done, self._total = 0, total

        def told(carry: Any, *rows: Any) -> Any:
            here = get_ident()
            before = TOLD.pop(here, None)
            try:
                result = body(carry, *rows)
            finally:
                if before is not None:
                    TOLD[here] = before
            with self._lock:
                self._done += next(r.shape[-2] for r in rows if r is not None)
                self._progress(self._done, self._total)
            return result

        return told


def telling(progress: Progress | None) -> AbstractContextManager[None]:
    """Tell of the passes over rows that this thread begins, if there is whom to tell."""
    return nullcontext() if progress is None else _telling(progress)


@contextmanager
def _telling(progress: Progress) -> Iterator[None]:
    """`telling` where somebody listens."""
    here = get_ident()
    before = TOLD.get(here)
    TOLD[here] = Pass(progress)
    try:
        yield
    finally:
        TOLD.pop(here, None)
        if before is not None:
            TOLD[here] = before
        finish(progress)


def told(body: Callable[..., Any], rows: int) -> Callable[..., Any]:
    """The body of a pass over so many rows, which tells how far it has come where somebody asked for that."""
    found = TOLD.get(get_ident()) if TOLD else None
    return body if found is None else found.of(body, rows)


def reporter(progress: Any) -> Progress | None:
    """What to tell, from what a caller gave: a callable, True for a bar by tqdm, False or None for nothing."""
    if progress is None or progress is False:
        return None
    if progress is not True:
        if not callable(progress):
            raise TypeError(f"progress should be True or callable, got {type(progress).__name__}")
        return progress  # type: ignore[no-any-return]
    return Bar()


class Bar:
    """A bar by tqdm, which begins with the first rows that are told and again with each pass over them."""

    def __init__(self) -> None:
        try:
            from tqdm import tqdm
        except ImportError:
            raise ImportError("progress=True shows a bar by tqdm, which is not installed: pip install tqdm") from None
        self._new = tqdm
        self._bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = self._new(unit=" rows", unit_scale=True)
        if done <= self._bar.n:
            # Another pass.
            self._bar.reset()
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """End the line of the bar; what is told after that begins another."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
            self._bar = None


def finish(progress: Progress | None) -> None:
    """No more passes are told of, for now."""
    if isinstance(progress, Bar):
        progress.close()
