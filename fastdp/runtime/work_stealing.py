"""Lets the workers of idle devices take pieces of another worker's work in host memory."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from fastdp.errors import DeviceTimeoutError
from fastdp.runtime.queue import QueueDevice
from fastdp.tracing.spans import span

Part = Callable[[], object]
WorkStealing = Callable[[Sequence[Part]], None]


def shared_with(helpers: Sequence[QueueDevice], timeout: float) -> WorkStealing:
    """Returns `share(parts)`, which runs every part on the calling worker and on the free workers among `helpers`.

    `share` returns when all parts have run. Parts run concurrently and in any order, so they must not depend on each
    other. Each worker starts with the same parts every time, whose memory may still be in its core's caches, and then
    steals from the others.

    The helpers get the work on their `copy_out` streams, which host devices use for nothing else, so waits on other
    streams do not delay it. A helper that starts late finds no parts left, and `share` does not wait for it.

    Args:
        helpers: devices whose workers may take part, without the calling worker's device.
        timeout: seconds to wait for parts that helpers have taken.

    Raises:
        BaseException: raised by a part; parts that no worker has taken yet are then skipped.
        DeviceTimeoutError: a helper did not finish its part in time.
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
                # Passed to the calling worker. Raised here, it would fail a stream of the helper's device.
                except BaseException as failure:  # noqa: BLE001
                    error = failure
                with changed:
                    taken -= 1
                    errors.extend([error] if error is not None else [])
                    changed.notify()

        def traced(helper: QueueDevice, number: int) -> None:
            with span("parts of an update", helper.copy_out):
                drain(number)

        for number, helper in enumerate(helpers[: takers - 1], 1):
            helper.copy_out.enqueue(partial(traced, helper, number))
        drain(0)
        with changed:
            if not changed.wait_for(lambda: taken == 0, timeout):
                raise DeviceTimeoutError(f"A part of an update took longer than timeout={timeout} seconds.")
        if errors:
            raise errors[0]

    return share
