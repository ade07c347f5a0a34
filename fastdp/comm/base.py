"""The interface of a communicator, and of the all-reduce of one step, on any kind of device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from fastdp.buffers import Bucket, FlatBuffers
from fastdp.runtime.queue import QueueEvent


class Reduction(Protocol):
    """The all-reduce of one step, whose buckets may begin while replicas are still in their backward.

    `early` is how many buckets were complete on all replicas before the last of them was done.
    """

    @property
    def early(self) -> int:
        """As above."""

    def ready(self, rank: int, bucket: int) -> None:
        """A replica has its gradients of a bucket, and leaves them alone from now on. On its worker."""

    def ended(self, rank: int) -> None:
        """A replica has all of its gradients. On its worker."""

    def abandon(self, error: BaseException | None) -> None:
        """Nobody waits for the step any more, which failed with this. On the host thread."""

    def serve(self, until: QueueEvent, timeout: float) -> None:
        """Wait until the event is done, on the thread that waits for the step, and make itself useful meanwhile.

        Raises:
            DeviceTimeoutError: not done within `timeout` seconds.
        """


class Communicator(Protocol):
    """Collectives over some devices, ordered after their compute streams; compute enqueued later waits."""

    def prepare(self, buckets: Sequence[Bucket]) -> None:
        """Have the memory that these buckets need. Between steps."""

    def begin(
        self,
        sources: Sequence[FlatBuffers],
        targets: Sequence[FlatBuffers],
        buckets: Sequence[Bucket],
        *,
        warm: bool = True,
    ) -> Any:
        """The reduction of a step whose replicas are about to run. Arguments as of `all_reduce`.

        Args:
            warm: such steps have run before, and allocate nothing any more.
        """

    def finish(self, reduction: Any, once: Callable[[], object] | None = None, readers: int | None = None) -> None:
        """Reduce the rest, after the compute streams of all devices.

        Args:
            reduction: of `begin`.
            once: as of `all_reduce`.
            readers: how many devices, the first ones, need to wait for the sums; None for all.
        """

    def all_reduce(
        self,
        sources: Sequence[FlatBuffers],
        targets: Sequence[FlatBuffers],
        buckets: Sequence[Bucket],
        once: Callable[[], object] | None = None,
    ) -> None:
        """Sum the buckets of `sources` into each of `targets`; all get the same bits. Begin and finish in one."""

    def reduce_scatter(
        self,
        sources: Sequence[FlatBuffers],
        targets: Sequence[FlatBuffers],
        buckets: Sequence[Bucket],
        once: Callable[[], object] | None = None,
    ) -> None:
        """Sum the buckets of `sources` into `targets`, in each its own rank's part alone; the rest is undefined."""

    def all_gather(self, buffers: Sequence[FlatBuffers], buckets: Sequence[Bucket]) -> None:
        """Copy each rank's own part of the buckets to all others' buffers."""

    def broadcast(self, buffers: Sequence[FlatBuffers], readers: int | None = None) -> None:
        """Copy the first device's buffers to all others.

        Args:
            buffers: one per device.
            readers: as given to `finish` right before, where only these devices have computed since.
        """

    def once(self, work: Callable[[], object]) -> None:
        """Run `work()` on the first device's worker, between what was enqueued and what comes."""

    def check(self) -> None:
        """Raise RuntimeError if a collective failed without a word. When the step is over."""

    def recover(self) -> None:
        """Go on after a step that failed. When all devices are idle."""
