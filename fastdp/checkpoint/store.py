"""A folder of checkpoints: finds the newest whole one, writes in the background, and keeps as many as are wanted."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fastdp.checkpoint import damage, folders
from fastdp.checkpoint.background import Background
from fastdp.checkpoint.lock import FolderLock
from fastdp.comm.processes import Processes, leads, several
from fastdp.warn import warn_user

KEEP = 3
TOGETHER = 600.0  # seconds that processes wait for each other's files
T = TypeVar("T")


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
        check_arguments(folder, every_steps, every_minutes, keep)
        self.folder = Path(folder)
        self._every_steps, self._keep = every_steps, keep
        self._every_seconds = None if every_minutes is None else every_minutes * 60
        self.folder.mkdir(parents=True, exist_ok=True)
        self.leads = leads()
        self._lock = FolderLock(self.folder) if self.leads else None
        self._background = Background()
        self._bad: set[int] = set()  # what was not whole, or could not be loaded
        self._saved_step = 0
        self._saved_at = time.monotonic()
        self._continues = False
        try:
            self._remove_partial()
        except BaseException:
            self.abandon()
            raise

    def _remove_partial(self) -> None:
        for partial in folders.partial_in(self.folder) if self.leads else ():
            folders.remove_rest(partial)
            warn_user(f"The checkpoint {partial} was a part of one, whose writer was ended. It is removed.")

    def restore(self, load: Callable[[Path], T], undo: Callable[[], None]) -> T | None:
        """Load the newest checkpoint that can be loaded, in all processes the same. Warns of those that cannot.

        Args:
            load: loads the checkpoint in a folder.
            undo: makes everything what it was, after a `load` that has failed here or in another process.

        Returns:
            What `load` has returned; None if there is no checkpoint.

        Raises:
            ValueError, TypeError, RuntimeError: none can be loaded: what `load` has raised for the newest of them.
            OSError: as `newest`.
        """
        failures: dict[int, BaseException] = {}
        found = self.newest()
        while found is not None:
            step, place = found
            loaded, failure = self._tried(place, load, undo)
            if failure is None:
                for wrong, error in failures.items():
                    self._bad.add(wrong)
                    left = self.folder / folders.name_of(wrong)
                    warn_user(f"The checkpoint {left} is left out, and {place.name} is used: {error}")
                return loaded
            failures[step] = failure
            found = self.newest(before=step)
        if failures:
            self._continues, self._saved_step = False, 0
            raise next(iter(failures.values()))
        return None

    def _tried(
        self, place: Path, load: Callable[[Path], T], undo: Callable[[], None]
    ) -> tuple[T | None, BaseException | None]:
        """What `load` returns, or why this checkpoint cannot be used. Other errors than those of content are raised."""
        loaded: T | None = None
        failure: BaseException | None = None
        try:
            loaded = load(place)
        except BaseException as error:
            undo()
            if not damage.of_content(error):
                raise
            failure = error
        if several():
            every = _processes().gather(failure and str(failure), "loading the checkpoint", TOGETHER)
            rank, said = next(((rank, said) for rank, said in enumerate(every) if said is not None), (0, None))
            if failure is None and said is not None:
                undo()
                failure = ValueError(f"Process {rank} cannot load the checkpoint {place}: {said}")
        return loaded, failure

    def newest(self, before: int | None = None) -> tuple[int, Path] | None:
        """Step and folder of the newest whole checkpoint; None if there is none. Warns of those that are not whole.

        Args:
            before: only earlier ones than that of this step.

        Raises:
            OSError: rights, memory or a server are missing to read it. No older one is used then.
        """
        self.settle()
        self._continues = True
        found = self._newest(before) if self.leads else None
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

    def _newest(self, before: int | None) -> tuple[int, Path] | None:
        """The newest whole checkpoint."""
        for step in folders.steps_in(self.folder):
            if before is not None and step >= before:
                continue
            place = self.folder / folders.name_of(step)
            wrong = folders.what_is_wrong(place)
            if wrong is None:
                self._saved_step, self._saved_at = step, time.monotonic()
                return step, place
            self._bad.add(step)
            warn_user(f"The checkpoint {place} is not whole: {wrong}. The one before it is used.")
        return None

    def due(self, step: int) -> bool:
        """Whether to write a checkpoint of this step; also where the one before could not be, which `save` tells."""
        if not self.leads:
            return False
        by_steps = self._every_steps is not None and step - self._saved_step >= self._every_steps
        return (
            self._background.failed
            or by_steps
            or (self._every_seconds is not None and time.monotonic() - self._saved_at >= self._every_seconds)
        )

    def save(self, step: int, fill: Callable[[Path], None], *, last: bool = False) -> None:
        """Write a checkpoint in the background. Waits for the one before it.

        Args:
            step: its number.
            fill: writes its files into the folder that it gets. Runs on another thread.
            last: the run ends: if the one before could not be written, that is a warning, and this one is written.

        Raises:
            OSError: the one before it could not be written; the message names it. Another call tries anew.
            ValueError: the folder has checkpoints of another run.
        """
        self._check_own(step)
        try:
            self._background.wait()
        except OSError as error:
            if not last:
                raise
            warn_user(str(error))
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
        except (OSError, RuntimeError) as error:  # RuntimeError: torch's and h5py's, of a full disk
            raise _unwritten(place, error) from error
        self._bad.discard(step)
        try:
            self._remove_old(step)
        except OSError as error:
            warn_user(f"The checkpoint {place} is written, and an older one could not be removed: {error}")

    def _remove_old(self, step: int) -> None:
        """Keep the newest ones up to `step`, which is whole. What was not whole counts for nothing."""
        if self._keep is None:
            return
        there = folders.steps_in(self.folder)
        kept = [one for one in there if one <= step and one not in self._bad][: self._keep]
        for one in there:
            if one not in kept and (one < step or one in self._bad):
                folders.remove(self.folder / folders.name_of(one))


def _unwritten(place: Path, error: OSError | RuntimeError) -> OSError:
    """The error of a checkpoint that could not be written, by the system's reason where a library has another one."""
    reason: BaseException | None = error
    while reason is not None and not isinstance(reason, OSError):
        reason = reason.__context__
    number = None if reason is None else reason.errno
    told = f"The checkpoint {place} could not be written: {(reason and reason.strerror) or error}"
    return OSError(told) if number is None else OSError(number, told)


def _processes() -> Processes:
    found: Processes = importlib.import_module("fastdp.tensors.process_group").join()
    return found


def check_arguments(folder: Any, every_steps: int | None, every_minutes: float | None, keep: int | None) -> None:
    """Check the arguments that all checkpoints have.

    Raises:
        ValueError, TypeError: one is of no use.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"`folder` must be a path. Received: {folder!r}.")
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
