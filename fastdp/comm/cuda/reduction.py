"""The all-reduce of one step on GPUs, bucket by bucket while backward goes on.

A replica announces a bucket by recording an event on its compute stream; nobody waits. The worker that completes a
bucket on all replicas issues its collective for all ranks to the communication streams, after the events of all ranks.
It does so in the middle of its own replica's work, because every other thread is just as busy. A lock serializes
collectives, so all ranks run them in the same order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from fastdp.comm.base import Reduction
from fastdp.comm.ready_buckets import ReadyBuckets
from fastdp.runtime.cuda import cupy_api
from fastdp.runtime.cuda.device import CudaDevice
from fastdp.runtime.cuda.streams import CudaEvent, CudaStream
from fastdp.runtime.queue import QueueStream

Issue = Callable[[Sequence[int]], None]


class CudaReduction(Reduction):
    """The reduction of one step.

    Args:
        devices: all devices, in rank order.
        sources: the first `sources` devices have gradients.
        buckets: the number of buckets.
        early: the buckets that may begin early, by number; the others are left to the end.
        issue: issues the collectives of the given buckets on all ranks' communication streams.
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
        """How many buckets began to be reduced before the end."""
        return self._begun

    def ready(self, rank: int, bucket: int) -> None:
        """A replica has enqueued the work that completes a bucket. Called on its worker."""
        if bucket not in self._may:
            return
        stream = self._devices[rank].compute
        assert isinstance(stream, CudaStream)
        event = stream.now()
        # Before the count, so that the worker that completes the bucket finds the events of all ranks.
        self._events[bucket].append(event)
        if self._announced.say(rank, bucket):
            self._begin(bucket)

    def ended(self, rank: int) -> None:
        """Does nothing: buckets that the replica has not announced are left to the end."""

    def abandon(self, error: BaseException | None) -> None:
        """Does nothing: a collective is issued for all ranks together, so no rank is left waiting."""

    def rest(self) -> list[int]:
        """The buckets that have not begun. None begins early from now on. On the worker that issues them."""
        with self._issuing:
            rest, self._left = self._left, []
            return rest

    def _begin(self, bucket: int) -> None:
        """Issue a bucket's collective, which begins when all GPUs have come to it."""
        with self._issuing:
            if bucket not in self._left:
                return
            self._left.remove(bucket)
            streams = [device.communication for device in self._devices]
            begin_together(streams, [event.handle for event in self._events[bucket]])
            self.issue([bucket])
            self._begun += 1


def begin_together(streams: Sequence[QueueStream], events: Sequence[int]) -> None:
    """Let what is issued to these streams from now on begin when all of these events are done.

    One stream waits for all events, and the others for that stream: 2 N calls of CUDA, where all streams that wait for
    all events would take N x N.
    """
    first, *others = streams
    assert isinstance(first, CudaStream)
    with cupy_api.on(first.ordinal):
        for event in events:
            cupy_api.stream_wait_event(first.handle, event)
        gate = first.issued_so_far()
    for stream in others:
        assert isinstance(stream, CudaStream)
        with cupy_api.on(stream.ordinal):
            cupy_api.stream_wait_event(stream.handle, gate.handle)
