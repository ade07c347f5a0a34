"""The all-reduce of one step in host memory, in pieces that any free thread sums while backward goes on."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np

from fastdp.buffers import Bucket, FlatBuffers
from fastdp.comm.base import Reduction
from fastdp.comm.ready_buckets import ReadyBuckets
from fastdp.comm.transport import SIXTEEN_BITS, Add, Transport, narrowed, sent, widened
from fastdp.comm.tree import sum_in_tree
from fastdp.errors import DeviceTimeoutError
from fastdp.runtime.events import here
from fastdp.runtime.host.resources import CORES
from fastdp.runtime.queue import QueueDevice, QueueEvent
from fastdp.tracing.spans import now, span

# 256 KiB of fp32, so that sums stay in a core's cache from the reads of the sources to the writes.
TILE = 1 << 16


Piece = tuple[slice, "int | None"]  # where a piece lies, and the rank that alone gets its sum


class HostReduction(Reduction):
    """The reduction of one step's buckets, in pieces that free threads take. Each piece is summed once.

    Until all replicas are done, the free threads are the thread that waits for the step (`serve`) and workers whose
    replica is done. No worker interrupts its replica's backward pass to sum, or waits for a sum there: computing
    workers keep their cores busy, and waiting for a worker that waits for other replicas would deadlock. At the end all
    workers together sum the rest.

    Args:
        devices: all devices.
        sources, targets, buckets: as in `HostCommunicator.all_reduce`.
        scatters: each target gets its own part of each bucket alone.
        transport: how gradients travel.
        branches: by source, those that are added to the first of them, in its memory; targets get nothing. Sums that
            are rounded to 16 bits are made elsewhere, of all sources at once.

    `over` completes when nobody works on the reduction any more, with the error if it failed. `nbytes` are read by it.
    """

    def __init__(
        self,
        devices: Sequence[QueueDevice],
        sources: Sequence[FlatBuffers],
        targets: Sequence[FlatBuffers],
        buckets: Sequence[Bucket],
        *,
        scatters: bool = False,
        transport: Transport | None = None,
        branches: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        self._branches, self._rounds = branches, transport is not None
        self.over = QueueEvent()
        self._devices = devices
        self._add = sent(sum_for(devices), transport)
        self._sources, self._targets, self._buckets = sources, targets, buckets
        # The sum is written in place unless that overwrites a gradient that is still to be read. A single replica's
        # gradient is the sum; if no other buffer needs it, there is nothing to do.
        in_place = all(source is not targets[0] for source in sources[1:])
        self._sum_lies_in = sources[0] if len(sources) == 1 else targets[0] if in_place else None
        trivial = branches is None and len(sources) == 1 and all(target is sources[0] for target in targets)
        ranks = len(targets) if scatters else 0
        self._pieces: list[list[Piece]] = [[] if trivial else _cut(bucket, ranks)[::-1] for bucket in buckets]
        self._left_in = [len(pieces) for pieces in self._pieces]
        self._left = self.pieces = sum(self._left_in)
        self.nbytes = sum(bucket.nbytes for bucket in buckets) * len(sources) if self.pieces else 0
        self._lock = threading.Lock()
        self._waits = getattr(here, "wait", None) is None  # whether the calling thread has nothing else to do
        # Threads that work on a piece.
        self._takers: set[int] = set()
        self._closed = False
        self._error: BaseException | None = None
        self._announced = ReadyBuckets(len(sources), len(buckets))
        self._calls: queue.SimpleQueue[int | None] = queue.SimpleQueue()

    @property
    def buckets(self) -> Sequence[Bucket]:
        """What is summed."""
        return self._buckets

    @property
    def early(self) -> int:
        """How many buckets were complete before all replicas were done."""
        return self._announced.early

    @property
    def position(self) -> str:
        """The buckets that are not reduced, and on which devices they are not complete."""
        late = self._announced.incomplete()
        parts = []
        for number, (pieces, ranks) in enumerate(zip(self._pieces, late, strict=True)):
            names = [self._devices[rank].name for rank in ranks]
            if pieces:
                parts.append(f"{number} (waits for {names})" if names else f"{number}")
        return f" The all-reduce has these buckets left of {len(self._buckets)}: {', '.join(parts)}." if parts else ""

    # While replicas work.

    def ready(self, rank: int, bucket: int) -> None:
        """A replica has completed a bucket. Called on its worker."""
        if self._announced.say(rank, bucket):
            self._start([bucket])

    def ended(self, rank: int) -> None:
        """A replica has completed all of its gradients. Called on its worker."""
        if len(self._buckets) > 1:  # a single bucket is hardly complete before the last replica is done
            complete = self._announced.end(rank)
            if complete:
                self._start(complete)

    def abandon(self, error: BaseException | None) -> None:
        """Does nothing: no thread waits in the middle of a sum."""

    def serve(self, until: QueueEvent, timeout: float) -> None:
        """Reduce buckets on the calling thread as they become complete, until the event is done.

        Raises:
            DeviceTimeoutError: the event was not done within `timeout` seconds.
        """
        # A single bucket is hardly complete before the last replica is done. A thread in a worker's place is idle to
        # `_start` as workers are.
        if len(self._buckets) < 2 or not self._waits:
            super().serve(until, timeout)
            return
        deadline = time.monotonic() + timeout
        if not until.notify(partial(self._calls.put, None)):
            return
        while True:
            try:
                bucket = self._calls.get(timeout=min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX))
            except queue.Empty:
                raise DeviceTimeoutError(f"A device was not done with its work in timeout={timeout} seconds.") from None
            if bucket is None:
                return
            try:
                self.work([bucket])
            except BaseException as error:  # an interrupt, which may have come before the piece was put back
                self._put_back(error)
                raise

    def _start(self, buckets: Sequence[int]) -> None:
        """Let free threads reduce these complete buckets, as far as there are free cores."""
        for bucket in buckets:
            if not self._left_in[bucket] and self.summed is not None:  # there is nothing to add
                self.summed(bucket)
            self._calls.put(bucket)
        free = CORES - self._announced.working - self._waits
        for device in self._devices:
            if free > 0 and device.idle:
                device.communication.enqueue(partial(self._work_early, device, buckets))
                free -= 1

    # Pieces.

    def sum_rest(self) -> None:
        """Sum all pieces, and hand out no more."""
        self.work_all()
        self.close(None)

    def work_all(self) -> None:
        """Sum pieces of all buckets until none is left. On any thread."""
        self.work(range(len(self._buckets)))

    def _work_early(self, device: QueueDevice, buckets: Sequence[int]) -> None:
        """Sum pieces of these buckets on the worker of a device whose replica is done."""
        with span("reduce", device.communication):
            self.work(buckets)

    def work(self, buckets: Iterable[int]) -> None:
        """Sum pieces of these buckets until none is left. On any thread."""
        with np.errstate(over="ignore", invalid="ignore"):
            for number in buckets:
                piece = self._take(number)
                if piece is None:
                    continue
                if now.recorder is None:
                    self._work_on(number, piece)
                else:
                    with span("all-reduce", bucket=number, nbytes=self._buckets[number].nbytes):
                        self._work_on(number, piece)

    def _work_on(self, number: int, piece: Piece | None) -> None:
        """Sum pieces of a bucket, beginning with the one that was taken, until none is left."""
        bucket = self._buckets[number]
        while piece is not None:
            error: BaseException | None = None
            try:
                self._sum(bucket.dtype, *piece)
            except BaseException as failure:
                error = failure
                raise
            finally:
                self._put_back(error)
            if self.summed is not None:
                self._count(number)
            piece = self._take(number)

    def _count(self, number: int) -> None:
        """Count a piece of a bucket, and tell when that was the last."""
        with self._lock:
            self._left_in[number] -= 1
            last = not self._left_in[number]
        if last and self.summed is not None:
            self.summed(number)

    def _sum(self, dtype: str, span: slice, owner: int | None) -> None:
        """Sum one piece, and write it to all targets, or to the one that owns it."""
        if self._branches is not None:
            for first, last in () if self._rounds or dtype in SIXTEEN_BITS else self._branches:
                values = [source.buffers[dtype][span] for source in self._sources[first:last]]
                self._add(values, dtype, values[0])
            return
        place, targets = self._sum_lies_in, self._targets
        if owner is not None:
            targets = [targets[owner]]
            place = None if any(source is targets[0] for source in self._sources[1:]) else targets[0]
        out = place.buffers[dtype][span] if place is not None else None
        total = self._add([source.buffers[dtype][span] for source in self._sources], dtype, out)
        if len(self._sources) == 1 and place is not self._sources[0]:
            place = None  # a single vector is returned itself
        for target in targets:
            if target is not place:
                target.buffers[dtype][span] = total

    def close(self, error: BaseException | None) -> None:
        """Hand out no more pieces: all are done, or the step has failed."""
        with self._lock:
            self._closed = True
            self._error = self._error if self._error is not None else error
            if self._error is None and self._left > len(self._takers):
                self._error = RuntimeError("Gradients were left without being reduced. This is a bug in fastdp.")
            over = not self._takers
        if over:
            self.over.complete(self._error)

    def _take(self, bucket: int) -> Piece | None:
        """Take a piece of a bucket; None if none is left."""
        with self._lock:
            if self._closed or not self._pieces[bucket]:
                return None
            self._takers.add(threading.get_ident())
            return self._pieces[bucket].pop()

    def _put_back(self, error: BaseException | None) -> None:
        """Note that this thread's piece is done, or has failed with an error."""
        with self._lock:
            if threading.get_ident() not in self._takers:
                return
            self._takers.remove(threading.get_ident())
            self._left -= 1
            self._error = self._error if self._error is not None else error
            over = self._closed and not self._takers
        if over:
            self.over.complete(self._error)


def _cut(bucket: Bucket, ranks: int) -> list[Piece]:
    """A bucket in pieces, each in one rank's part of it; `ranks` is 0 if there are no parts."""
    parts = [(bucket.part(rank, ranks), rank) for rank in range(ranks)] if ranks else [(bucket, None)]
    return [
        (slice(start, min(start + TILE, part.stop)), owner)
        for part, owner in parts
        for start in range(part.start, part.stop, TILE)
    ]


def sum_for(devices: Sequence[QueueDevice]) -> Add:
    """The function that adds up the vectors of these devices: `sum_in_order`, or `sum_by_shards` if they run shards."""
    return sum_by_shards if any(one.part_of is not None for one in devices) else sum_in_order


def sum_by_shards(values: Sequence[np.ndarray], dtype: str, out: np.ndarray | None = None) -> np.ndarray:
    """As `sum_in_order`, in the tree of the shards."""
    if len(values) == 1 or dtype not in SIXTEEN_BITS:
        return sum_in_tree(values, out)
    total = narrowed(sum_in_tree([widened(value, dtype) for value in values]), dtype)
    if out is None:
        return total
    out[...] = total
    return out


def sum_in_order(values: Sequence[np.ndarray], dtype: str, out: np.ndarray | None = None) -> np.ndarray:
    """The sum of equally long vectors in their order. A single vector is returned itself.

    `out` receives the sum of several vectors. It may be the first vector, and shares no memory with the others.
    """
    if len(values) == 1:
        return values[0]
    if dtype in SIXTEEN_BITS:
        wide = widened(values[0], dtype)
        for value in values[1:]:
            wide += widened(value, dtype)
        total = narrowed(wide, dtype)
        if out is None:
            return total
        out[...] = total
        return out
    total = np.add(values[0], values[1], out=out)
    for value in values[2:]:
        np.add(total, value, out=total)
    return total
