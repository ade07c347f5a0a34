"""Says when a step that could not be captured is worth another try: when something that it reads has changed."""

from __future__ import annotations

from contextlib import suppress

from fastdp.capture.guard import settings
from fastdp.capture.pure_step import PureFunction
from fastdp.capture.watch import Watch
from fastdp.errors import NotCapturable

# Steps until the present values are compared: such steps run eagerly, and a comparison takes as long as a small one.
FIRST, MOST = 16, 256


class SecondTry:
    """Watches what a step reads that runs eagerly because it could not be captured.

    Args:
        step: the step.

    What changes all the time, such as a counter, is no reason to try again. A model that was given up because it
    changed is tried once it has stopped.
    """

    def __init__(self, step: PureFunction) -> None:
        self._step = step
        self._watch: Watch | None = None
        self._settings = settings()
        self._steps, self._at, self._every = 0, FIRST, FIRST
        self._restless: set[str] = set()
        self._latest: set[str] = set()

    def is_due(self, *, changed: bool) -> bool:
        """Whether the step may be captured now. Called before each step that runs eagerly since it was refused.

        Args:
            changed: it was refused because the model changed.
        """
        if self._watch is None:
            self._record()
        self._steps += 1
        if self._steps < self._at:
            return False
        self._every = min(2 * self._every, MOST)
        self._at = self._steps + self._every
        names = self._changes()
        if not names:
            self._latest = set()
            return changed
        self._restless |= names & self._latest
        self._latest = names
        self._record()
        return bool(names - self._restless)

    def _changes(self) -> set[str]:
        assert self._watch is not None
        names = self._watch.changes() if self._watch.changed() else set()
        return names if settings() == self._settings else {*names, "the settings of torch"}

    def _record(self) -> None:
        """Take the present values for the expected ones, as far as they can be compared."""
        self._watch, self._settings = Watch(), settings()
        with suppress(NotCapturable):
            self._step.watch(self._watch)
