"""Lends devices to a thread that would only wait for them: it does their workers' part meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from fastdp.runtime.events import here

if TYPE_CHECKING:
    from fastdp.runtime.queue import QueueDevice


class _Lent(AbstractContextManager[bool]):
    """As `lent`. A class of its own, since a generator would cost each step several times as much."""

    __slots__ = ("_devices", "_others", "_scope", "_was_worker")

    def __init__(self, devices: Sequence[QueueDevice]) -> None:
        self._devices = devices
        self._others: Sequence[QueueDevice] = ()
        self._scope: AbstractContextManager[object] | None = None

    def __enter__(self) -> bool:
        me = threading.get_ident()
        self._others = others = [device for device in self._devices if device.borrower != me]
        self._was_worker = getattr(here, "worker", False)
        try:
            mine = True
            for device in others:
                if not device.take():  # the thread keeps none
                    mine = False
                    _give_back(others)
                    break
            here.worker = self._was_worker or mine
            if mine and others:
                scope = self._devices[0].lent_scope()
                scope.__enter__()
                self._scope = scope
        except BaseException:
            self._end()
            raise
        return mine

    def __exit__(self, *error: object) -> None:
        try:
            if self._scope is not None:
                self._scope.__exit__(*error)  # type: ignore[arg-type]
        finally:
            self._end()

    def _end(self) -> None:
        here.worker = self._was_worker
        _give_back(self._others)


def lent(devices: Sequence[QueueDevice]) -> AbstractContextManager[bool]:
    """Make the calling thread the worker of these devices, or of none of them if a worker is busy or a test delays it.

    Work that the thread enqueues then runs on it, at once if nothing holds it back, and wakes nobody. The context's
    value is whether it is the worker.
    """
    return _Lent(devices)


def _give_back(devices: Sequence[QueueDevice]) -> None:
    """Give back those that the thread has: also one that it was about to note when an interrupt came."""
    me = threading.get_ident()
    for device in devices:
        if device.borrower == me:
            device.give_back()
