"""The all-reduce of steps that one thread launches on all GPUs: its events and launches are made once.

As in `fastdp.comm.cuda.reduction`, a bucket's collective begins behind the events of all ranks. But no other thread
takes part, so nothing is locked; and what is the same in each step is found once: addresses, arguments, events.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from fastdp.buffers import Bucket, FlatBuffers
from fastdp.comm.base import Reduction
from fastdp.comm.cuda.nccl import NcclCollectives
from fastdp.comm.cuda.peer_kernels import PeerKernels
from fastdp.runtime.cuda import cupy_api
from fastdp.runtime.cuda.device import CudaDevice
from fastdp.runtime.cuda.streams import CudaEvent, CudaStream
from fastdp.runtime.queue import QueueStream


class OneThreadReduction(Reduction):
    """The reduction of one step after the other, in all of which all devices have rows.

    Args:
        devices: all devices, in rank order.
        collectives: by bucket, issues its collective on all ranks' communication streams; None if the bucket must not
            begin before the end of the step.
        issue: issues the collectives of the given buckets, at the end of the step.

    Attributes:
        listeners: by rank, `Context.ready`.
        made_for, memory: what the collectives depend on besides the arguments.
    """

    made_for: object = None
    memory: object = None

    def __init__(
        self,
        devices: Sequence[CudaDevice],
        collectives: Sequence[Callable[[], None] | None],
        issue: Callable[[Sequence[int]], None],
    ) -> None:
        self._devices, self._collectives = list(devices), list(collectives)
        self.issue = issue
        self.listeners = [partial(self.ready, rank) for rank in range(len(devices))]
        self._everyone = (1 << len(devices)) - 1
        self._streams = [_cuda(device.communication) for device in devices]
        self._waiting = [_cuda(device.compute).handle for device in devices]
        self._marks: list[list[CudaEvent]] = [[] for _ in collectives]
        self._ends: list[CudaEvent] = []
        for device in devices:
            with cupy_api.on(device.ordinal):
                self._ends.append(_cuda(device.communication).reusable_event())
                for marks in self._marks:
                    marks.append(_cuda(device.compute).reusable_event())
        self._marks_of = [[event.handle for event in marks] for marks in self._marks]
        with cupy_api.on(devices[0].ordinal):
            self._gate = _cuda(devices[0].communication).reusable_event()
        self.begin()

    def begin(self) -> OneThreadReduction:
        """Begin a step. Returns itself."""
        self._begun = 0
        self._announced = [0] * len(self._collectives)  # the ranks that have completed each bucket, as bits
        self._left = list(range(len(self._collectives)))
        return self

    @property
    def early(self) -> int:
        """How many buckets began to be reduced before the end."""
        return self._begun

    def ready(self, rank: int, bucket: int) -> None:
        """A replica has enqueued the work that completes a bucket. Its device is current, before and after."""
        collective, came = self._collectives[bucket], self._announced[bucket]
        if collective is None or came >> rank & 1:
            return
        handles = self._marks_of[bucket]
        cupy_api.event_record(handles[rank], self._waiting[rank])
        self._announced[bucket] = came = came | 1 << rank
        if came == self._everyone:
            self._left.remove(bucket)
            begin_together(self._streams, handles, self._gate)
            collective()
            cupy_api.switch_to(self._devices[rank].ordinal)
            self._begun += 1

    def ended(self, rank: int) -> None:
        """Does nothing: buckets that the replica has not announced are left to the end."""

    def abandon(self, error: BaseException | None) -> None:
        """Does nothing: a collective is issued for all ranks together, so no rank is left waiting."""

    def rest(self) -> list[int]:
        """The buckets that have not begun. None begins early from now on."""
        rest, self._left = self._left, []
        return rest

    def join(self) -> list[tuple[int, BaseException]]:
        """Let all compute streams wait for their rank's collectives. Returns the rank at which that failed, and why."""
        rank = 0
        try:
            for rank, end in enumerate(self._ends):
                cupy_api.event_record(end.handle, self._streams[rank].handle)
                cupy_api.stream_wait_event(self._waiting[rank], end.handle)
        except cupy_api.CudaError as error:
            return [(rank, error)]
        return []


def bound_collectives(
    devices: Sequence[CudaDevice],
    kernels: PeerKernels | None,
    nccl: NcclCollectives,
    targets: Sequence[FlatBuffers],
    buckets: Sequence[Bucket],
    ways: Sequence[str],
    early: Sequence[bool],
) -> list[Callable[[], None] | None]:
    """The collective of each bucket on all ranks' communication streams, to be issued in many steps.

    They hold as long as the kernels' memory and NCCL's communicators are the same.

    Args:
        ways: the buckets' algorithms.
        early: which buckets may begin before the end of the step; None stands for the others.
    """

    def by_kernels(bucket: Bucket, way: str) -> Callable[[], None]:
        assert kernels is not None
        bound = zip(devices, kernels.bound(targets, bucket, way), strict=True)
        pairs = [(device.ordinal, one) for device, launches in bound for one in launches]

        def launch() -> None:
            for card, one in pairs:
                cupy_api.switch_to(card)
                one()

        return launch

    def of(bucket: Bucket, way: str) -> Callable[[], None]:
        return nccl.bound(targets, bucket) if way == "nccl" else by_kernels(bucket, way)

    planned = zip(buckets, ways, early, strict=True)
    return [of(bucket, way) if may else None for bucket, way, may in planned]


def begin_together(streams: Sequence[CudaStream], events: Sequence[int], gate: CudaEvent) -> None:
    """Let what is issued to these streams from now on begin when all of these events are done.

    One stream waits for all events, and the others for `gate`, an event of that stream.
    """
    first, *others = streams
    for event in events:
        cupy_api.stream_wait_event(first.handle, event)
    gate.again()
    for stream in others:
        cupy_api.stream_wait_event(stream.handle, gate.handle)


def _cuda(stream: QueueStream) -> CudaStream:
    assert isinstance(stream, CudaStream)
    return stream
