"""Tasks side by side in threads that end together, and memory that is each thread's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Event, Lock, Thread, local
from typing import Any

# Python lets one thread at a time start operations, so that more would wait for each other.
MOST_THREADS = 8
# Held by the call that has the threads.
SHARING = Lock()


class Memory(local):
    """Arrays that are written over again, of each thread its own."""


def run_threads(
    tasks: Sequence[Callable[[], Any]],
    stop: Event,
    alone: Callable[[Callable[[], Any]], Any],
    started: Callable[[int], None] = lambda count: None,
) -> list[Any]:
    """Results of ``alone(task)`` for all tasks, each in a thread of its own, or of ``task()`` here where none can be started.

    ``started(count)`` is called once so many threads have been. What one raises is raised when all have ended.
    """
    results: list[Any] = [None] * len(tasks)
    errors: list[BaseException] = []

    def work(i: int) -> None:
        try:
            results[i] = alone(tasks[i])
        except BaseException as error:
            errors.append(error)
            stop.set()

    threads: list[Thread] = []
    try:
        for i in range(len(tasks)):
            thread = Thread(target=work, args=(i,), name=f"tattn-{i}")
            try:
                thread.start()
            except RuntimeError:
                # At the end of the interpreter, or where there may be no more of them.
                break
            threads.append(thread)
        started(len(threads))
        for i in range(len(threads), len(tasks)):
            results[i] = tasks[i]()
    except BaseException:
        stop.set()
        raise
    finally:
        _join(threads, stop)
    if errors:
        raise errors[0]
    return results


def _join(threads: Sequence[Thread], stop: Event) -> None:
    """Wait for all threads, which end early if that is interrupted."""
    try:
        for thread in threads:
            thread.join()
    except BaseException:
        stop.set()
        for thread in threads:
            thread.join()
        raise
