"""A run that is told to end (SIGTERM, Ctrl-C) finishes its step and saves before it does."""

from __future__ import annotations

import signal
import sys
import threading
from types import CodeType, FrameType
from typing import Any

from fastdp.comm.processes import ending, several

TERMINATED = 128 + signal.SIGTERM  # the status of a shell for a process that the signal has ended
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class EndSignals:
    """Holds SIGTERM and SIGINT back until the run has saved. A second one comes through at once.

    Of several processes that train together, all end behind the same step if one is told to.

    Only the main thread receives signals: on others nothing is held back, and signals do what they did. Nothing is held
    back either where a signal is ignored.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._holds = False
        self._came: int | None = None
        self._within: CodeType | None = None

    @property
    def came(self) -> bool:
        """Whether the run is to save and end."""
        return ending.agreed if several() else self._came is not None

    def hold(self, within: CodeType | None = None) -> None:
        """Begin to hold back.

        Args:
            within: the function that trains. Once it is left, even by an error that nobody tells of, signals come
                through. None: until `release`.
        """
        self._within = within
        if self._holds or threading.current_thread() is not threading.main_thread():
            return
        self._holds = True
        for number in _SIGNALS:
            before = signal.getsignal(number)
            if before == self._note:  # it could not be given back
                continue
            if callable(before) or (before is signal.SIG_DFL and number == signal.SIGTERM):
                self._before[number] = before
                signal.signal(number, self._note)

    def release(self) -> None:
        """Give the signals back to who had them. May be called again.

        From another thread, where handlers cannot be set, and where somebody else has taken a signal since, they pass.
        """
        held, self._holds = self._holds, False
        if not held or threading.current_thread() is not threading.main_thread():
            return
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, handler)

    def deliver(self, saved: str) -> None:
        """Do what the signal did before: end the process with status 143, or raise KeyboardInterrupt.

        A handler of the user's own runs; if it returns, the run goes on.

        Args:
            saved: what has been saved, for the line that tells.
        """
        number, self._came = self._came, None
        if number is None and not ending.agreed:
            return
        number = number or signal.SIGTERM  # another process has been told
        ending.here = ending.agreed = False
        before = self._before.get(number, signal.SIG_DFL)
        self.release()
        print(f"fastdp: {signal.Signals(number).name}: {saved}", file=sys.stderr, flush=True)  # noqa: T201
        if callable(before):
            before(number, None)
            self.hold(self._within)
            return
        raise SystemExit(TERMINATED)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._holds and self._came is None and (self._within is None or _runs(self._within, frame)):
            self._came = number
            ending.here = True
            return
        before = self._before.get(number)
        if callable(before):
            before(number, frame)
        else:
            raise SystemExit(TERMINATED)


def _runs(function: CodeType, frame: FrameType | None) -> bool:
    """Whether a function is among those that run."""
    while frame is not None:
        if frame.f_code is function:
            return True
        frame = frame.f_back
    return False
