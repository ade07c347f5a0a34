"""A lock on a checkpoints' folder, which ends with the process that holds it, however that ends."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

NAME = ".lock"
_held: set[Path] = set()  # POSIX's locks do not tell two holders within a process apart


class FolderLock:
    """Keeps other processes, and other checkpoints of this one, from writing into a folder.

    A forked child does not hold it, so workers that outlive a killed process do not keep the next one out.

    Args:
        folder: a folder that exists.

    Raises:
        RuntimeError: another one holds it; the message names its process.
        OSError: the folder cannot be written to.
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
            _lock(self._file)
        except OSError:
            holder = os.pread(self._file, 20, 0).decode("ascii", "replace").strip() if hasattr(os, "pread") else "?"
            os.close(self._file)
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
