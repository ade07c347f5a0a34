"""Limits for archives that may be hostile or cut: what they take on the disk, in memory and in time."""

from __future__ import annotations

import bz2
import contextlib
import errno
import gzip
import lzma
import os
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

RATIO = 200
FREE_NBYTES = 1 << 30
MEMBER_NBYTES = 1 << 12  # what a file or a folder takes on the disk at least
CHUNK_NBYTES = 1 << 20
MOST_HEADER_NBYTES = 1 << 24
# How compressed archives begin, and what opens them.
COMPRESSED: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
    b"]\0\0": lzma.open,
}
_BROKEN = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    RuntimeError,
    LookupError,
    OverflowError,
    MemoryError,
    AttributeError,
    TypeError,
)
# What the file system says to names that are too long or empty, or are those of a file and of a folder.
_BAD_NAMES = {
    errno.ENOENT,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.EINVAL,
    errno.ELOOP,
    errno.EILSEQ,
}


class DamagedArchiveError(ValueError):
    """An archive is cut or damaged: another copy of it may be whole."""


@contextlib.contextmanager
def damage_named(path: str) -> Iterator[None]:
    """Turn what libraries raise about a damaged archive into a DamagedArchiveError that names it."""
    try:
        yield
    except _BROKEN as error:
        raise _damaged(path, error) from error
    except ValueError as error:  # numbers that are none, names with zeros
        if path in str(error):
            raise
        raise _damaged(path, error) from error
    except OSError as error:
        if error.errno is None or error.errno in _BAD_NAMES:
            raise _damaged(path, error) from error
        raise


def _damaged(path: str, error: Exception) -> DamagedArchiveError:
    said = f"{type(error).__name__}: {str(error)[:300]}"
    return DamagedArchiveError(f"the archive {path!r} is cut or damaged ({said}): nothing was unpacked, fetch it anew")


class Budget:
    """What may still be written of an archive.

    Args:
        path: the archive.
        folder: where it is unpacked; its disk must have the space.
        most: bytes; None means 200 times the archive's size, but at least 1 GiB.
    """

    def __init__(self, path: str, folder: str, most: int | None) -> None:
        self._path = path
        self._most = max(RATIO * os.path.getsize(path), FREE_NBYTES) if most is None else most
        self._free = shutil.disk_usage(folder).free
        self._taken = 0

    def begin(self, name: str) -> None:
        """Count a member."""
        self._take(MEMBER_NBYTES, name)

    def copy(self, source: IO[bytes], target: str, size: int) -> None:
        """Write a member's content, which must have the declared size, to a file.

        Raises:
            DamagedArchiveError: it is shorter.
            ValueError: it does not fit.
            OSError: the disk has too little space.
        """
        self._check(size, target)
        done = 0
        with open(target, "wb") as file:
            while chunk := source.read(CHUNK_NBYTES):
                done += len(chunk)
                self._take(len(chunk), target)
                file.write(chunk)
        if done != size:
            name = os.path.basename(target)
            raise DamagedArchiveError(f"the archive {self._path!r} is cut: {name!r} has {done} bytes of {size}")

    def _take(self, nbytes: int, name: str) -> None:
        self._check(nbytes, name)
        self._taken += nbytes

    def _check(self, nbytes: int, name: str) -> None:
        wanted = self._taken + nbytes
        if wanted > self._most:
            raise ValueError(
                f"the archive {self._path!r} must unpack to at most {self._most:,} bytes, got {wanted:,} with "
                f"{os.path.basename(name)!r}: nothing was unpacked. If you trust it, pass a larger max_extracted_nbytes"
            )
        if wanted > self._free:
            raise OSError(errno.ENOSPC, f"no space for {wanted:,} bytes: nothing was unpacked", self._path)


class _ShortReads:
    """A file of which nobody reads much at once: tarfile reads headers of any declared size into memory."""

    def __init__(self, file: Any, path: str) -> None:
        self._file, self._path = file, path
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        """So many bytes, as of any file."""
        if not 0 <= size <= MOST_HEADER_NBYTES:
            raise DamagedArchiveError(f"the archive {self._path!r} is damaged: it declares a header of {size:,} bytes")
        content: bytes = self._file.read(size)
        return content


@contextlib.contextmanager
def opened_tar(path: str) -> Iterator[tarfile.TarFile]:
    """A tar archive, whose compression is found by its first bytes."""
    with _opener(path)(path, "rb") as content:
        short: Any = _ShortReads(content, path)  # tarfile uses no more of a file
        with tarfile.open(fileobj=short, mode="r:") as archive:
            yield archive


def is_tar(path: str) -> bool:
    """Whether a file, unpacked, begins as a tar does.

    Raises:
        DamagedArchiveError: it is compressed, and its beginning cannot be unpacked.
    """
    with damage_named(path):
        with _opener(path)(path, "rb") as file:
            file.read(tarfile.BLOCKSIZE)
        try:
            with opened_tar(path):
                return True
        except tarfile.TarError:
            return False


def _opener(path: str) -> Callable[..., Any]:
    """What opens a file so that it is read unpacked."""
    with open(path, "rb") as file:
        head = file.read(8)
    return next((opener for magic, opener in COMPRESSED.items() if head.startswith(magic)), open)
