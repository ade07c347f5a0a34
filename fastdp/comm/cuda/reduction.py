"""The all-reduce of one step on GPUs, bucket by bucket while backward goes on.

A replica announces a bucket at the place that its compute stream has come to: an event is recorded there, and nobody
waits. The worker that completes a bucket issues its collective, for all ranks in one go, to the communication
streams, behind the events of all ranks. It is in the middle of its own replica's work then, and so is everyone else: no
other thread would be sure to have time. A lock keeps collectives apart, so all ranks have them in one order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from fastdp.comm.base import Reduction
from fastdp.comm.ready_buckets import ReadyBuckets
from fastdp.runtime.cuda import cupy_api
from fastdp.runtime.cuda.device import CudaDevice
from fastdp.runtime.cuda.streams import CudaEvent, CudaStream

Issue = Callable[[Sequence[int]], None]


class CudaReduction(Reduction):
    """The reduction of one step.

    Args:
        devices: all of them, in the order of the ranks.
        sources: how many of them, the first ones, have gradients.
        buckets: how many there are.
        early: numbers of the buckets that may begin early; the others are left to the end.
        issue: issues the collectives of these buckets on all ranks' communication streams.
    """

    def __init__(
        self, devices: Sequence[CudaDevice], sources: int, buckets: int, early: Sequence[int], issue: Issue
    ) -> None:
        self._begun = 0
        self._devices = devices
        self._may = frozenset(early)
        self.issue = issue
        self._announced = ReadyBuckets(sources, buckets)
        self._left = list(range(buckets))
        self._events: list[list[CudaEvent]] = [[] for _ in range(buckets)]
        self._issuing = threading.Lock()

    @property
    def early(self) -> int:
        """How many buckets began before the end."""
        return self._begun

    def ready(self, rank: int, bucket: int) -> None:
        """A replica has issued the work of a bucket's gradients. On its worker."""
        if bucket not in self._may:
            return
        stream = self._devices[rank].compute
        assert isinstance(stream, CudaStream)
        event = stream.now()
        # Before the count: whoever completes the bucket finds the events of all.
        self._events[bucket].append(event)
        if self._announced.say(rank, bucket):
            self._begin(bucket)

    def ended(self, rank: int) -> None:
        """Nothing: what the replica has not announced is left to the end."""

    def abandon(self, error: BaseException | None) -> None:
        """Nothing: all ranks' parts of a collective are issued together, and none is left alone."""

    def rest(self) -> list[int]:
        """The buckets that have not begun; none begins from now on. On the worker that issues them."""
        with self._issuing:
            rest, self._left = self._left, []
            return rest

    def _begin(self, bucket: int) -> None:
        """Issue a bucket's collective behind the gradients of all ranks."""
        with self._issuing:
            if bucket not in self._left:
                return
            self._left.remove(bucket)
            for device in self._devices:
                stream = device.communication
                assert isinstance(stream, CudaStream)
                with cupy_api.on(device.ordinal):
                    for event in self._events[bucket]:
                        cupy_api.stream_wait_event(stream.handle, event.handle)
            self.issue([bucket])
            self._begun += 1
