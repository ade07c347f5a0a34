"""Lets the workers of idle devices take pieces of another worker's work in host memory."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from fastdp.errors import DeviceTimeoutError
from fastdp.runtime.queue import QueueDevice

Part = Callable[[], object]
WorkStealing = Callable[[Sequence[Part]], None]


def shared_with(helpers: Sequence[QueueDevice], timeout: float) -> WorkStealing:
    """`share(parts)` runs every part, on the calling worker and on those of `helpers` that are free; returns when all
    have run. Parts run in any order and at the same time, so they must not depend on each other. Each worker begins
    with the same parts every time, whose memory its core's caches may still hold, and then takes from the others.

    The helpers get the work on their `copy_out` streams, which nothing else uses on host memory: so it is not held up
    by what their other streams wait for. A helper that comes late finds nothing left, and nobody waits for it.

    Args:
        helpers: devices whose workers may take part; not the calling worker's.
        timeout: seconds to wait for parts that helpers have taken.

    Raises:
        BaseException: what a part raised; parts that nobody has taken yet are then left out.
        DeviceTimeoutError: a helper did not end its part in time.
    """

    def share(parts: Sequence[Part]) -> None:
        takers = 1 + min(len(helpers), len(parts) - 1)
        each = -(-len(parts) // takers)
        queues = [deque(parts[number * each : (number + 1) * each]) for number in range(takers)]
        errors: list[BaseException] = []
        taken = 0
        changed = threading.Condition()

        def drain(number: int) -> None:
            nonlocal taken
            while True:
                with changed:
                    own = queues[number]
                    fullest = max(queues, key=len)
                    if not fullest or errors:
                        return
                    part = own.popleft() if own else fullest.pop()
                    taken += 1
                error: BaseException | None = None
                try:
                    part()
                # Handed on to the worker whose work it is: here it would end another device's stream.
                except BaseException as failure:  # noqa: BLE001
                    error = failure
                with changed:
                    taken -= 1
                    errors.extend([error] if error is not None else [])
                    changed.notify()

        for number, helper in enumerate(helpers[: takers - 1], 1):
            helper.copy_out.enqueue(partial(drain, number))
        drain(0)
        with changed:
            if not changed.wait_for(lambda: taken == 0, timeout):
                raise DeviceTimeoutError(f"A part of an update took longer than timeout={timeout} seconds.")
        if errors:
            raise errors[0]

    return share
