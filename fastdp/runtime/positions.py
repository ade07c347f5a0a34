"""Where devices and threads are, in words: what a message says when something takes too long."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Sequence

from fastdp.runtime.queue import QueueDevice

_FRAMES = 12  # of each thread, the innermost ones


def positions(devices: Sequence[QueueDevice]) -> str:
    """A line for each device: what its streams do or wait for. Read without locks, as the devices may hang."""
    return "\n".join(f"  {device.name}: {device.position()}" for device in devices)


def busy(devices: Sequence[QueueDevice]) -> list[str]:
    """The names of the devices that are at work themselves, while others wait for them; all with work if none is."""
    working = [device.name for device in devices if device.runs]
    return working or [device.name for device in devices if not device.at_rest]


def stacks() -> str:
    """The Python stack of every thread, innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        calls = traceback.extract_stack(frame)[-_FRAMES:]
        lines = [f"    {call.filename}:{call.lineno} in {call.name}" for call in calls]
        parts.append("\n".join([f"  thread {names.get(ident, ident)}:", *lines]))
    return "\n".join(parts)


def report(devices: Sequence[QueueDevice] = ()) -> str:
    """Where the devices are, and all threads, for the end of a message."""
    where = f"\nThe devices:\n{positions(devices)}" if devices else ""
    return f"{where}\nThe threads, each with its innermost call last:\n{stacks()}"
