"""Files that are there whole or not at all, and archives of arrays that are read no further than they say they go.

What is written goes to a file of its own beside its place, and takes that place once the disk has it. What is read may come from
anyone: sizes are known from headers, and none is larger than the file, before a number is read.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import prod
from typing import IO, Any, Literal, NamedTuple
from zipfile import ZIP_STORED, ZipFile

import numpy as np

Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]

# What `numpy.save` writes before an array of numbers or text, and nothing else: no Python is read.
_HEADER = re.compile(
    rb"\{'descr': '([<>](?:f[48]|U\d{1,8}))', 'fortran_order': (True|False), 'shape': \(((?:\d{1,18}, ?)*(?:\d{1,18},?)?)\), \} *\n"
)
_MAGIC = b"\x93NUMPY\x01\x00"
_PIECE = 1 << 20
# Of an archive's entry: sizes that follow behind, and names in UTF-8.
_PLAIN_FLAGS = 0x8 | 0x800


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, which takes the place of `path` in the end; after an error nothing has changed.

    Links are followed and stay. A file that is replaced hands on its mode. What is no file, such as a pipe, is written to as it is.
    """
    # Surrogates stand for bytes that are no text.
    target = os.path.realpath(os.fsdecode(path))
    try:
        mode: int | None = os.stat(target).st_mode
    except FileNotFoundError:
        mode = None
    if mode is not None and not stat.S_ISREG(mode):
        with open(path, "wb") as file:
            yield file
        return
    folder = os.path.dirname(target)
    part = os.path.join(folder, f".tattn-{secrets.token_hex(8)}.part")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        # The umask applies.
        descriptor = os.open(part, flags, 0o666)
    except OSError as found:
        # The name that the caller knows.
        raise type(found)(found.errno, found.strerror, os.fsdecode(path)) from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(descriptor)
        if mode is not None:
            os.chmod(part, stat.S_IMODE(mode))
        os.replace(part, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(part)
        raise
    _settle(folder)


def _settle(folder: str) -> None:
    """Have the disk know which name belongs to which file, where that can be asked for."""
    with suppress(OSError, AttributeError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Header(NamedTuple):
    """An array in an archive, before it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    order: Literal["C", "F"]
    start: int  # where its numbers begin


class Archive:
    """Arrays in a file that `numpy.savez` wrote, by name. Everything but a file that cannot be read is a ValueError.

    Nothing is unpickled, uncompressed or evaluated, and no array is larger than the file.
    """

    def __init__(self, file: IO[bytes]) -> None:
        size = os.fstat(file.fileno()).st_size
        with _unpacking():
            self._zip = ZipFile(file)
        entries = self._zip.infolist()
        self._entries = {entry.filename.removesuffix(".npy"): entry for entry in entries}
        if len(self._entries) != len(entries):
            raise ValueError("two of its entries have one name")
        for entry in entries:
            if entry.compress_type != ZIP_STORED or entry.flag_bits & ~_PLAIN_FLAGS:
                raise ValueError(f"{entry.filename!r} is compressed or encrypted")
            if entry.compress_size != entry.file_size:
                raise ValueError(f"{entry.filename!r} has two sizes")
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError("its entries are larger than the file")

    @property
    def names(self) -> set[str]:
        """What there is."""
        return set(self._entries)

    def header(self, name: str) -> Header:
        """Shape and dtype of an array, all of whose numbers are there."""
        with self._opened(name) as file:
            magic, length = file.read(len(_MAGIC)), int.from_bytes(file.read(2), "little")
            found = _HEADER.fullmatch(file.read(length))
        if magic != _MAGIC or found is None:
            raise ValueError(f"{name} is no array that numpy.save wrote of float32, float64 or text")
        dtype, shape = np.dtype(found[1].decode()), tuple(int(n) for n in found[3].split(b",") if n.strip())
        start = len(_MAGIC) + 2 + length
        if start + prod(shape) * dtype.itemsize != self._entries[name].file_size:
            raise ValueError(f"{name} has more or fewer bytes than its shape {shape} takes")
        return Header(shape, dtype, "F" if found[2] == b"True" else "C", start)

    def array(self, name: str) -> np.ndarray:
        """An array, in the byte order of this machine."""
        header = self.header(name)
        array = np.frombuffer(self._numbers(name, header), header.dtype).reshape(header.shape, order=header.order)
        return array.astype(header.dtype.newbyteorder("="), copy=False)

    def text(self, name: str) -> str:
        """What a single string says."""
        header = self.header(name)
        if header.dtype.kind != "U" or header.shape:
            raise ValueError(f"{name} is no text")
        return self._numbers(name, header).decode("utf-32-be" if header.dtype.byteorder == ">" else "utf-32-le")

    def _numbers(self, name: str, header: Header) -> bytearray:
        """The bytes behind the header; zipfile compares their checksum where it comes to the end."""
        found = bytearray(self._entries[name].file_size - header.start)
        with self._opened(name) as file, memoryview(found) as bytes_found:
            file.read(header.start)
            for start in range(0, len(found), _PIECE):
                piece = bytes_found[start : start + _PIECE]
                piece[:] = file.read(len(piece))
        return found

    @contextmanager
    def _opened(self, name: str) -> Iterator[IO[bytes]]:
        """One entry."""
        if name not in self._entries:
            raise ValueError(f"{name} is missing")
        with _unpacking(), self._zip.open(self._entries[name]) as file:
            yield file


@contextmanager
def _unpacking() -> Iterator[None]:
    """ValueError for whatever else is raised where an archive is damaged: of this no list is documented."""
    try:
        yield
    except (MemoryError, ValueError):
        raise
    except Exception as found:
        # A place before the start or beyond all files cannot be sought; other errors of the system are no damage.
        if isinstance(found, OSError) and found.errno != errno.EINVAL:
            raise
        raise ValueError(f"{found!s:.200}" or type(found).__name__) from None
