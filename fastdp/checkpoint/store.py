"""A folder of checkpoints: finds the newest whole one, writes in the background, and keeps as many as are wanted."""

from __future__ import annotations

import importlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastdp.checkpoint import folders
from fastdp.checkpoint.background import Background
from fastdp.checkpoint.lock import FolderLock
from fastdp.comm.processes import Processes, leads, several
from fastdp.warn import warn_user

KEEP = 3
TOGETHER = 600.0  # seconds that processes wait for each other's files


class Store:
    """The checkpoints of one run. Of several processes, process 0 writes and holds the folder; all read.

    Args:
        folder: made where it is missing.
        every_steps: a checkpoint is due after so many steps; None: not by steps.
        every_minutes: a checkpoint is due after so many minutes; None: not by time.
        keep: how many of the newest to keep; None: all.

    Raises:
        ValueError, TypeError: an argument is of no use.
        RuntimeError: another process, or another store of this one, uses the folder.
        OSError: the folder cannot be made or written to; the message names it.
    """

    def __init__(self, folder: Any, every_steps: int | None, every_minutes: float | None, keep: int | None) -> None:
        check_arguments(every_steps, every_minutes, keep)
        if not isinstance(folder, (str, os.PathLike)):
            raise TypeError(f"`folder` must be a path. Received: {folder!r}.")
        self.folder = Path(folder)
        self._every_steps, self._keep = every_steps, keep
        self._every_seconds = None if every_minutes is None else every_minutes * 60
        self.folder.mkdir(parents=True, exist_ok=True)
        self.leads = leads()
        self._lock = FolderLock(self.folder) if self.leads else None
        self._background = Background()
        self._bad: set[int] = set()  # what was not whole
        self._saved_step = 0
        self._saved_at = time.monotonic()
        self._continues = False
        for partial in folders.partial_in(self.folder) if self.leads else ():
            warn_user(f"The checkpoint {partial} is a part of one: the process that wrote it was ended. It is removed.")
            shutil.rmtree(partial)

    def newest(self) -> tuple[int, Path] | None:
        """Step and folder of the newest whole checkpoint; None if there is none. Warns of those that are not whole."""
        self.settle()
        self._continues = True
        found = self._newest() if self.leads else None
        return found if not several() else self._of_all(found)

    def _of_all(self, found: tuple[int, Path] | None) -> tuple[int, Path] | None:
        """What process 0 has found, in every process.

        Raises:
            OSError: this process does not see it.
        """
        every = _processes().gather(found and found[0], "the newest checkpoint", TOGETHER)
        if every[0] is None:
            return None
        place = self.folder / folders.name_of(every[0])
        if not place.is_dir():
            raise OSError(
                f"Process 0 goes on from the checkpoint {place}, which this process does not see. Put the folder on a "
                "file system that all processes share."
            )
        self._saved_step = every[0]
        return every[0], place

    def _newest(self) -> tuple[int, Path] | None:
        """The newest whole checkpoint."""
        for step in folders.steps_in(self.folder):
            place = self.folder / folders.name_of(step)
            wrong = folders.what_is_wrong(place)
            if wrong is None:
                self._saved_step, self._saved_at = step, time.monotonic()
                return step, place
            self._bad.add(step)
            warn_user(f"The checkpoint {place} is not whole: {wrong}. The one before it is used.")
        return None

    def due(self, step: int) -> bool:
        """Whether a checkpoint of this step is to be written."""
        if not self.leads:
            return False
        by_steps = self._every_steps is not None and step - self._saved_step >= self._every_steps
        return by_steps or (
            self._every_seconds is not None and time.monotonic() - self._saved_at >= self._every_seconds
        )

    def save(self, step: int, fill: Callable[[Path], None]) -> None:
        """Write a checkpoint in the background. Waits for the one before it.

        Args:
            step: its number.
            fill: writes its files into the folder that it gets. Runs on another thread.

        Raises:
            OSError: the one before it could not be written; the message names it. Another call tries anew.
            ValueError: the folder has checkpoints of another run.
        """
        self._check_own(step)
        self._saved_step, self._saved_at = step, time.monotonic()
        self._background.start(lambda: self._write(step, fill))

    @property
    def latest(self) -> Path:
        """The place of the checkpoint that was saved last."""
        return self.folder / folders.name_of(self._saved_step)

    def settle(self) -> None:
        """Wait until everything is written.

        Raises:
            OSError: it could not be written; the message names the checkpoint.
        """
        self._background.wait()

    def settle_all(self) -> None:
        """As `settle`, in all processes: none ends before process 0 has written."""
        self.settle()
        if several():
            _processes().gather(None, "the last checkpoint", TOGETHER)

    def close(self) -> None:
        """Wait until everything is written, and let others have the folder. May be called again.

        Raises:
            OSError: as `settle`.
        """
        try:
            self._background.wait()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Let others have the folder, when the owner is gone without a `close`. What is under way is still written."""
        if self._lock is not None:
            self._lock.release()

    def _check_own(self, step: int) -> None:
        """A run that begins from its beginning must not mix its checkpoints with those of an earlier one."""
        if self._continues:
            return
        self._continues = True
        there = folders.steps_in(self.folder)
        if there:
            self._continues = False
            raise ValueError(
                f"`folder` has checkpoints of another run, up to step {there[0]}, and this one is at step {step}: "
                f"{self.folder}. Call restore() to go on from them, remove them, or choose another folder."
            )

    def _write(self, step: int, fill: Callable[[Path], None]) -> None:
        """Write a checkpoint, then remove those that are too many. Runs on the background's thread."""
        place = self.folder / folders.name_of(step)
        try:
            folders.write(self.folder, step, fill)
            self._bad.discard(step)
            self._remove_old(step)
        except OSError as error:
            raise OSError(
                error.errno, f"The checkpoint {place} could not be written: {error.strerror or error}"
            ) from error

    def _remove_old(self, step: int) -> None:
        """Keep the newest ones up to `step`, which is whole. What was not whole counts for nothing."""
        if self._keep is None:
            return
        there = folders.steps_in(self.folder)
        kept = [one for one in there if one <= step and one not in self._bad][: self._keep]
        for one in there:
            if one not in kept and (one < step or one in self._bad):
                folders.remove(self.folder / folders.name_of(one))


def _processes() -> Processes:
    found: Processes = importlib.import_module("fastdp.tensors.process_group").join()
    return found


def check_arguments(every_steps: int | None, every_minutes: float | None, keep: int | None) -> None:
    """Check the arguments that all checkpoints have.

    Raises:
        ValueError, TypeError: one is of no use.
    """
    for name, value, unit in (("every_steps", every_steps, "steps"), ("keep", keep, "checkpoints")):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"`{name}` must be a whole number of {unit}, or None. Received: {value!r}.")
        if value < 1:
            raise ValueError(f"`{name}` must be a number of {unit}, at least 1, or None. Received: {value}.")
    if every_minutes is not None and (isinstance(every_minutes, bool) or not isinstance(every_minutes, (int, float))):
        raise TypeError(f"`every_minutes` must be a number of minutes, or None. Received: {every_minutes!r}.")
    if every_minutes is not None and not every_minutes > 0:
        raise ValueError(f"`every_minutes` must be a number of minutes above 0, or None. Received: {every_minutes}.")
