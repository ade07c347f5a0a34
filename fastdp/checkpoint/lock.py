"""A lock on a checkpoints' folder, which ends with the process that holds it, however that ends."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

NAME = ".lock"
_HELD = (errno.EACCES, errno.EAGAIN, getattr(errno, "EDEADLOCK", errno.EAGAIN))  # Windows has the last one
_held: set[Path] = set()  # POSIX's locks do not tell two holders within a process apart


class FolderLock:
    """Keeps other processes, and other checkpoints of this one, from writing into a folder.

    A forked child does not hold it, so workers that outlive a killed process do not keep the next one out.

    Args:
        folder: a folder that exists.

    Raises:
        RuntimeError: another one holds it; the message names its process.
        OSError: the folder cannot be written to, or its file system has no locks.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        if self._folder in _held:
            raise RuntimeError(
                f"`folder` is in use by another checkpoint of this process: {folder}. Close that one first, or choose "
                "another folder."
            )
        self._file = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            _check_regular(self._file, folder)
            _lock(self._file)
        except OSError as error:
            held = error.errno in _HELD
            reads = held and hasattr(os, "pread")
            holder = os.pread(self._file, 20, 0).decode("ascii", "replace").strip() if reads else "?"
            os.close(self._file)
            if not held:
                raise OSError(
                    error.errno,
                    f"`folder` cannot be locked against other processes: {folder} ({error.strerror or error}). Choose "
                    "a folder on a file system that has locks.",
                ) from error
            raise RuntimeError(
                f"`folder` is in use by another process (number {holder}), which writes checkpoints there: {folder}. "
                "End that one first, or choose another folder."
            ) from None
        _held.add(self._folder)
        with contextlib.suppress(OSError):  # the disk is full: others are told no number then
            os.ftruncate(self._file, 0)
            os.write(self._file, f"{os.getpid()}\n".encode())

    def release(self) -> None:
        """Let others have the folder. May be called again."""
        if self._folder in _held and self._file >= 0:
            _held.discard(self._folder)
            os.close(self._file)
            self._file = -1


def _check_regular(file: int, folder: Path) -> None:
    """Check that the lock is a file, and no pipe.

    Raises:
        OSError: it is something else.
    """
    if not stat.S_ISREG(os.fstat(file).st_mode):
        raise OSError(errno.EINVAL, f"{folder / NAME} is no file: remove it")


def _lock(file: int) -> None:
    """Lock an open file, or fail at once.

    Raises:
        OSError: another process has it locked.
    """
    if sys.platform == "win32":
        os.lseek(file, 1024, os.SEEK_SET)  # not the text that tells who holds it, which others read
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        os.lseek(file, 0, os.SEEK_SET)
    else:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
