"""Lets one engine at a time run a step; a step that takes too long holds up only those who need its devices."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from fastdp.runtime import forks
from fastdp.runtime.queue import QueueDevice

PATIENCE = 5.0  # seconds that a step on other devices is waited for


@dataclass(slots=True)
class _Holder:
    """A thread that runs a step. `devices`: that it uses; None for all. `depth`: how often it has taken the lock."""

    devices: frozenset[int] | None
    since: float
    depth: int = 1

    def keeps(self, devices: frozenset[int] | None) -> bool:
        """Whether it uses one of these devices."""
        return self.devices is None or devices is None or not self.devices.isdisjoint(devices)


class StepLock:
    """A lock that a thread may take several times. Another one gets it behind it, or beside it.

    Behind it, as a rule: a step at a time keeps the cores for its own replicas. Beside it where the holder is not done
    after `PATIENCE` seconds and uses other devices: it may hang. A thread's own devices are always waited for, and so
    is a thread that must be alone (`devices=None`).

    No lock of Python's own is held while a thread waits, so an interrupt leaves none taken.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders: dict[int, _Holder] = {}  # by thread
        self._gates: list[threading.Lock] = []  # each is released when something has changed
        forks.watch(self)

    def acquire(self, devices: Sequence[QueueDevice] | None, timeout: float) -> bool:
        """Take the lock. Returns whether the thread has it: not if others had it for `timeout` seconds.

        Args:
            devices: that the thread will use; None for all, and whatever else a process has once.
            timeout: seconds.
        """
        me, needed = threading.get_ident(), _numbers(devices)
        deadline = None
        while True:
            with self._lock:
                seconds = self._wait(me, needed) if self._holders else 0
                if seconds <= 0:
                    self._take(me, needed)
                    return True
                gate = threading.Lock()
                gate.acquire()
                self._gates.append(gate)
            deadline = time.monotonic() + timeout if deadline is None else deadline
            left = min(seconds, deadline - time.monotonic(), threading.TIMEOUT_MAX)
            if left <= 0:
                return False
            gate.acquire(timeout=left)

    def release(self) -> None:
        """Give the lock back, as often as it was taken."""
        with self._lock:
            mine = self._holders[threading.get_ident()]
            mine.depth -= 1
            if not mine.depth:
                del self._holders[threading.get_ident()]
            gates, self._gates = self._gates, []
        for gate in gates:
            gate.release()

    def is_held_by_others(self) -> bool:
        """Whether a step of another thread runs."""
        return bool(self._holders.keys() - {threading.get_ident()})

    @property
    def patience(self) -> float:
        """How many seconds to wait for a step that may hang: none for one that has taken too long already."""
        now, me = time.monotonic(), threading.get_ident()
        left = [one.since + PATIENCE - now for ident, one in list(self._holders.items()) if ident != me]
        return max(0.0, min(left)) if left else PATIENCE

    def after_fork(self) -> None:
        """A forked child has only the thread that forked."""
        mine = self._holders.get(threading.get_ident())
        self._lock, self._gates = threading.Lock(), []
        self._holders = {} if mine is None else {threading.get_ident(): mine}

    def _wait(self, me: int, devices: frozenset[int] | None) -> float:
        """How many seconds to wait for others: 0 for none, infinite where only the others' end counts."""
        now, found = time.monotonic(), 0.0
        for ident, one in self._holders.items():
            if ident != me:
                found = max(found, float("inf") if one.keeps(devices) else one.since + PATIENCE - now)
        return found

    def _take(self, me: int, devices: frozenset[int] | None) -> None:
        mine = self._holders.get(me)
        if mine is None:
            self._holders[me] = _Holder(devices, time.monotonic())
            return
        mine.depth += 1
        mine.devices = None if mine.devices is None or devices is None else mine.devices | devices


def _numbers(devices: Sequence[QueueDevice] | None) -> frozenset[int] | None:
    """The devices by their `id`; a device that runs shards for all of its parts."""
    return None if devices is None else frozenset(id(device.part_of or device) for device in devices)
