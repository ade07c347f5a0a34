"""The communicator of virtual devices: buffers are reduced in pieces, each by one thread for all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from fastdp.buffers import Bucket, FlatBuffers, storage_dtype
from fastdp.comm.base import Communicator
from fastdp.comm.host.reduction import TILE, HostReduction
from fastdp.comm.transport import Transport
from fastdp.runtime.host.resources import CORES

# Copying this much takes about as long as waking a thread.
SMALL_NBYTES = 1 << 19
# One thread sums this much, read from all sources, in about the time in which another one is woken.
SUMMED_NBYTES = 1 << 21
# One thread copies this much in about the time in which it has one thread woken, and that one the next.
REFRESH_NBYTES = 1 << 21


class HostCommunicator(Communicator):
    """Collectives over devices in host memory.

    Each piece of a bucket is summed once, in rank order or in the tree of the shards, and written to all targets, so
    all replicas hold the same bits. Sources may be targets. fp16 and bf16 are summed in fp32 and rounded once.
    Infinities and NaNs raise no warning.
    """

    @property
    def sums_early(self) -> bool:  # type: ignore[override]
        """Whether there are cores that no replica uses. Otherwise sums during backward only hold a replica up."""
        return len(self._devices) < CORES

    def send_by(self, transport: Transport | None) -> None:
        """As in `Communicator`."""
        self.transport = transport

    def all_reduce_by(self, way: str, buffers: Sequence[FlatBuffers], bucket: Bucket) -> None:
        """All-reduce one bucket in place; there is one way."""
        self.all_reduce(buffers, buffers, [bucket])

    def begin(
        self,
        sources: Sequence[FlatBuffers],
        targets: Sequence[FlatBuffers],
        buckets: Sequence[Bucket],
        *,
        warm: bool = True,
        scatters: bool = False,
        branches: Sequence[tuple[int, int]] | None = None,
    ) -> HostReduction:
        """A reduction whose buckets may be announced one by one. `warm` has no effect. `branches` as in
        `HostReduction`."""
        refuse_unknown(buckets)
        return HostReduction(
            self._devices, sources, targets, buckets, scatters=scatters, transport=self.transport, branches=branches
        )

    def finish(
        self, reduction: HostReduction, once: Callable[[], object] | None = None, readers: int | None = None
    ) -> None:
        """Reduce the rest on as many threads as pays."""
        if len(self._devices) == 1 and not reduction.pieces:
            if once is not None:
                self.once(once)
            return

        def work(rank: int) -> None:
            if once is not None and rank == 0:
                once()
            reduction.work_all()

        # Waking more threads than there are cores, or for little work, would only cost time.
        helpers = min(len(self._devices), CORES, reduction.nbytes // SUMMED_NBYTES)
        end = self._after_compute("reduce", range(max(1, helpers)), work)
        if not end.notify(lambda: reduction.close(end.error)):
            reduction.close(end.error)
        for device in self._devices[:readers]:
            device.compute.wait(reduction.over)

    def leaves(self, reduction: HostReduction) -> bool:
        """As in `Communicator`: where workers would have to be woken again, and none sums meanwhile."""
        alone = len(reduction.buckets) < 2 or not self.sums_early
        return alone and reduction.nbytes <= SUMMED_NBYTES

    def all_gather(self, buffers: Sequence[FlatBuffers], buckets: Sequence[Bucket]) -> None:
        """Gather by copies; each rank's worker makes its own. One worker copies little alone."""
        if sum(bucket.nbytes for bucket in buckets) * len(buffers) > SMALL_NBYTES:
            self._gather_by_copies(buffers, buckets)
            return
        ranks = range(len(buffers))

        def copy(_: int) -> None:
            for bucket in buckets:
                for owner in ranks:
                    part = bucket.part(owner, len(ranks))
                    for rank in ranks if part.stop > part.start else ():
                        if rank != owner:
                            buffers[rank].copy_part(buffers[owner], part)

        if len(ranks) > 1 and buckets:
            self._each("all-gather", [0], copy)

    def broadcast(self, buffers: Sequence[FlatBuffers], readers: int | None = None) -> None:
        """Copy in pieces; each is read once and written to all.

        As many workers copy as there are cores. The first device's worker copies small buffers alone, since waking a
        thread costs more than copying a few pages.
        """
        first, others = buffers[0], buffers[1:]
        if not others:
            return
        pieces = [(dtype, at) for dtype, buffer in first.buffers.items() for at in range(0, buffer.size, TILE)]

        def copy(rank: int) -> None:
            while pieces:
                try:
                    dtype, at = pieces.pop()
                except IndexError:  # another worker took the last one
                    return
                span = slice(at, at + TILE)
                for other in others:
                    other.buffers[dtype][span] = first.buffers[dtype][span]

        little = first.nbytes * len(others) <= SMALL_NBYTES
        ranks = range(1 if little else min(len(buffers), CORES, max(1, len(pieces))))
        self._each("broadcast", ranks, copy, readers)

    def refresh(self, buffers: Sequence[FlatBuffers]) -> None:
        """Copy little at once on the calling thread: the workers, which it wakes next, then need not wait for each
        other."""
        first, *others = buffers
        if first.nbytes * len(others) <= REFRESH_NBYTES and all(device.at_rest for device in self._devices):
            for other in others:
                other.copy_from(first)
        else:
            self.broadcast(buffers)

    def once(self, work: Callable[[], object]) -> None:
        """Run `work()`. With one device there is nothing to wait for, so it goes straight to the compute stream."""
        if len(self._devices) == 1:
            self._devices[0].compute.enqueue(work)
        else:
            self._each("once", [0], lambda rank: work())


def refuse_unknown(buckets: Sequence[Bucket]) -> None:
    """Raise TypeError for a dtype that is stored as bytes and cannot be summed (float8)."""
    for dtype in {bucket.dtype for bucket in buckets}:
        if not _can_be_added(dtype):
            raise TypeError(f"Gradients of dtype {dtype} cannot be all-reduced. Use float32, bfloat16 or float16.")


@functools.cache
def _can_be_added(dtype: str) -> bool:
    return dtype == "bfloat16" or storage_dtype(dtype).name == dtype
