"""What every command line here does about terminals, pipes and disks: say in one line what is wrong, and say it early."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

Main = Callable[..., int]


def command(name: str) -> Callable[[Main], Main]:
    """A decorator for the `main` of a command line of this name, which returns the exit status.

    What is refused or missing is told in one line, with status 2. Output that cannot be written ends the command with status 1,
    and without a word where nobody reads on.
    """

    def decorate(main: Main) -> Main:
        @wraps(main)
        def run(*arguments: Any) -> int:
            with _legible():
                try:
                    try:
                        return main(*arguments)
                    finally:
                        # Here and not at exit, where it would be too late to say anything.
                        if sys.stdout is not None:
                            sys.stdout.flush()
                except BrokenPipeError:
                    status = 1
                except (ImportError, OSError, ValueError) as error:
                    status = 1 if isinstance(error, OSError) else 2
                    with suppress(OSError):
                        print(f"{name}: {error}", file=sys.stderr, flush=True)
                _let_go(sys.stdout)
                _let_go(sys.stderr)
                return status

        return run

    return decorate


@contextmanager
def _legible() -> Iterator[None]:
    """Have a question mark stand for what the terminal, or the file, cannot show."""
    stream = sys.stdout
    if not isinstance(stream, io.TextIOWrapper):
        yield
        return
    errors = stream.errors
    stream.reconfigure(errors="replace")
    try:
        yield
    finally:
        with suppress(OSError, ValueError):
            stream.reconfigure(errors=errors)


def _let_go(stream: Any) -> None:
    """Drop what a stream could not write, which Python would try once more at exit."""
    try:
        if stream is not None:
            stream.flush()
    except OSError:
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def writable_folder(name: str, path: str | os.PathLike[str]) -> Path:
    """The folder, made if need be; ValueError that names the option unless files can be put into it."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"{name} should be a folder that can be written to, got {os.fspath(path)!r}: {error.strerror}"
        ) from None
    return folder


def writable_file(name: str, path: str | os.PathLike[str]) -> Path:
    """The path; ValueError that names the option unless a file can be put there."""
    file = Path(path)
    try:
        # What is there is not touched before there is something to put in its place.
        if file.exists():
            file.open("ab").close()
        else:
            TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise ValueError(
            f"{name} should be a file that can be written, got {os.fspath(path)!r}: {error.strerror}"
        ) from None
    return file
