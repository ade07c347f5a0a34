"""The base classes of a communicator, and of the all-reduce of one step, on any kind of device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from fastdp.buffers import Bucket, FlatBuffers
from fastdp.runtime.queue import QueueDevice, QueueEvent, joined


class Reduction(ABC):
    """The all-reduce of one step, whose buckets may begin while replicas are still in their backward."""

    @property
    @abstractmethod
    def early(self) -> int:
        """How many buckets were complete on all replicas before the last of them was done."""

    @abstractmethod
    def ready(self, rank: int, bucket: int) -> None:
        """A replica has its gradients of a bucket, and leaves them alone from now on. On its worker."""

    @abstractmethod
    def ended(self, rank: int) -> None:
        """A replica has all of its gradients. On its worker."""

    @abstractmethod
    def abandon(self, error: BaseException | None) -> None:
        """Nobody waits for the step any more, which failed with this. On the host thread."""

    def serve(self, until: QueueEvent, timeout: float) -> None:
        """Wait until the event is done, on the thread that waits for the step, and make itself useful meanwhile.

        Raises:
            DeviceTimeoutError: not done within `timeout` seconds.
        """
        until.finish(timeout)


class Communicator(ABC):
    """Collectives over the given devices, in their order.

    Work goes to the devices' communication streams, is ordered after their compute streams, and compute that is
    enqueued later waits for it.
    """

    _devices: Sequence[QueueDevice]

    def __init__(self, devices: Sequence[QueueDevice]) -> None:
        self._devices = list(devices)

    def prepare(self, buckets: Sequence[Bucket]) -> None:
        """Have the memory that all-reduces of these buckets need. Between steps: it may allocate, and wait."""
        return

    @abstractmethod
    def begin(
        self,
        sources: Sequence[FlatBuffers],
        targets: Sequence[FlatBuffers],
        buckets: Sequence[Bucket],
        *,
        warm: bool = True,
    ) -> Any:
        """The reduction of a step whose replicas are about to run: a `Reduction` that `finish` ends.

        Arguments and errors as of `all_reduce`.

        Args:
            warm: such steps have run before, and allocate nothing any more.
        """

    @abstractmethod
    def finish(self, reduction: Any, once: Callable[[], object] | None = None, readers: int | None = None) -> None:
        """Reduce the rest when all replicas are done.

        Args:
            reduction: of `begin`.
            once: as of `all_reduce`.
            readers: how many devices, the first ones, have their compute wait for the sums; None for all. The others'
                must wait for something that comes after, before they compute again.
        """

    def all_reduce(
        self,
        sources: Sequence[FlatBuffers],
        targets: Sequence[FlatBuffers],
        buckets: Sequence[Bucket],
        once: Callable[[], object] | None = None,
    ) -> None:
        """Sum the given buckets of `sources` into each of `targets`; all get the same bits. Begin and finish in one.

        Args:
            sources: what to add up; one per device, or fewer where some have nothing to add.
            targets: where the sums go; one per device, or fewer where the others do not need them.
            buckets: which parts of them.
            once: run on the first device in the same pass, ordered as by `once()`.

        Raises:
            TypeError: a dtype that is stored but cannot be added here (float8).
        """
        self.finish(self.begin(sources, targets, buckets), once)

    @abstractmethod
    def reduce_scatter(
        self,
        sources: Sequence[FlatBuffers],
        targets: Sequence[FlatBuffers],
        buckets: Sequence[Bucket],
        once: Callable[[], object] | None = None,
    ) -> None:
        """Sum the given buckets of `sources` into `targets`, in each its own rank's part alone (`Bucket.part`).

        What lies outside its own part is undefined afterwards. There is a target for each device. Other arguments and
        errors as of `all_reduce`.
        """

    @abstractmethod
    def all_gather(self, buffers: Sequence[FlatBuffers], buckets: Sequence[Bucket]) -> None:
        """Copy each rank's own part of the given buckets (`Bucket.part`) from its buffers to all others'. Any dtype."""

    @abstractmethod
    def broadcast(self, buffers: Sequence[FlatBuffers], readers: int | None = None) -> None:
        """Copy the first device's buffers to all others.

        Args:
            buffers: one per device.
            readers: as given to `finish` right before, where only these devices have computed since.
        """

    @abstractmethod
    def once(self, work: Callable[[], object]) -> None:
        """Run `work()` on the first device's worker, after all that was enqueued and before all that comes."""

    def check(self) -> None:
        """Raise RuntimeError if a collective failed without a word. When the step is over."""
        return

    def recover(self) -> None:
        """Go on after a step that failed. When all devices are idle."""
        return

    # Order.

    def _each(self, ranks: Sequence[int], work: Callable[[int], object], computing: int | None = None) -> None:
        """Run `work(rank)` on these communication streams, ordered against the compute streams of all devices.

        `computing`: how many devices, the first ones, have any compute to wait for.
        """
        done = self._after_compute(ranks, work, computing)
        for device in self._devices:
            device.compute.wait(done)

    def _after_compute(
        self, ranks: Sequence[int], work: Callable[[int], object], computing: int | None = None
    ) -> QueueEvent:
        """Run `work(rank)` on these communication streams after all compute so far; gives the event of their end."""
        before = joined([device.compute.record() for device in self._devices[:computing]])
        after = []
        for rank in ranks:
            stream = self._devices[rank].communication
            stream.wait(before)
            stream.enqueue(partial(work, rank))
            after.append(stream.record())
        return joined(after)

    def _gather_by_copies(self, buffers: Sequence[FlatBuffers], buckets: Sequence[Bucket]) -> None:
        """`all_gather` by copies: each rank pulls from all others."""
        ranks = len(self._devices)

        def pull(rank: int) -> None:
            # Ranks start at different peers, so that no link is used by all at once.
            for peer in (*range(rank + 1, ranks), *range(rank)):
                for bucket in buckets:
                    buffers[rank].copy_part(buffers[peer], bucket.part(peer, ranks))

        if ranks > 1 and buckets:
            self._each(range(ranks), pull)
