"""The threads that read batches ahead, for tests that wait for them to end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from fastdp.data.ring import NAME

LIMIT = 30.0


def alive() -> list[threading.Thread]:
    """The threads that read ahead now."""
    return [thread for thread in threading.enumerate() if thread.name == NAME and thread.is_alive()]


def wait_until(found: Callable[[], bool]) -> None:
    """Wait until it is so, or fail."""
    end = time.monotonic() + LIMIT
    while not found():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.002)
