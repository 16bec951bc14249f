"""Tasks side by side in threads that end together, and memory that is each thread's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import pairwise
from threading import Event, Lock, Thread, local
from typing import Any

# Python lets one thread at a time start operations, so that more would wait for each other.
MOST_THREADS = 8
# Held by the call that has the threads.
SHARING = Lock()


class Memory(local):
    """Arrays that are written over again, of each thread its own."""


def even_parts(count: int, parts: int) -> Iterable[tuple[int, int]]:
    """Where parts of about equal length begin and end."""
    return pairwise(count * i // parts for i in range(parts + 1))


@cache
def libraries(kind: str) -> Any:
    """The libraries, "blas" or "openmp", that share work of one thread among others, which they count and limit."""
    # Calls on one thread have no need of it.
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api=kind)


def take_threads(kind: str) -> None:
    """Operations of this thread use no other from now on; with OpenMP each thread has a number of its own."""
    for library in libraries(kind).lib_controllers:
        library.set_num_threads(1)


def run_threads(
    tasks: Sequence[Callable[[], Any]],
    stop: Event,
    alone: Callable[[Callable[[], Any]], Any],
    started: Callable[[int], None] = lambda count: None,
) -> list[Any]:
    """Results of ``alone(task)`` for all tasks, each in a thread of its own, or of ``task()`` here where none can be started.

    ``started(count)`` is called once so many threads have been. What one raises, and what interrupts this one, however often, is
    raised when all have ended.
    """
    results: list[Any] = [None] * len(tasks)
    errors: list[BaseException] = []
    # Not by `join`: a thread whose `join` is interrupted counts as ended from then on, until Python 3.13. Nor by what `start`
    # returns: it may be interrupted before or after its thread begins.
    begun, ended, leaving = [False] * len(tasks), [Event() for _ in tasks], Event()

    def work(i: int) -> None:
        # In this order, and `leave` in the other: either this thread does nothing, or it is waited for.
        begun[i] = True
        try:
            if not leaving.is_set():
                results[i] = alone(tasks[i])
        except BaseException as error:
            errors.append(error)
            stop.set()
        finally:
            ended[i].set()

    def leave() -> None:
        stop.set()
        leaving.set()
        for of_thread, end in zip(begun, ended, strict=True):
            if of_thread:
                end.wait()

    try:
        count = 0
        for i in range(len(tasks)):
            thread = Thread(target=work, args=(i,), name=f"tattn-{i}")
            try:
                thread.start()
            except RuntimeError:
                # At the end of the interpreter, or where there may be no more of them.
                break
            count += 1
        started(count)
        for i in range(count, len(tasks)):
            results[i] = tasks[i]()
        for end in ended[:count]:
            end.wait()
    except BaseException:
        _to_the_end(leave)
        raise
    if errors:
        raise errors[0]
    return results


def _to_the_end(action: Callable[[], None]) -> None:
    """Do it, and again from its beginning each time that it is interrupted."""
    while True:
        try:
            return action()
        except BaseException:
            continue
