"""The base classes of a communicator, and of the all-reduce of one step, on any kind of device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from fastdp.buffers import Bucket, FlatBuffers
from fastdp.comm.algorithm import Choice
from fastdp.comm.transport import Transport
from fastdp.runtime.queue import QueueDevice, QueueEvent, joined
from fastdp.tracing.spans import now, span


class Reduction(ABC):
    """The all-reduce of one step. A bucket may be reduced while replicas are still in their backward pass.

    `summed`, if not None, is called with the number of each bucket whose sum is there, on any thread.
    """

    summed: Callable[[int], None] | None = None

    @property
    @abstractmethod
    def early(self) -> int:
        """How many buckets were complete on all replicas before the last replica was done."""

    @abstractmethod
    def ready(self, rank: int, bucket: int) -> None:
        """A replica has completed a bucket, and does not touch it any more. Called on its worker."""

    @abstractmethod
    def ended(self, rank: int) -> None:
        """A replica has completed all of its gradients. Called on its worker."""

    @abstractmethod
    def abandon(self, error: BaseException | None) -> None:
        """The step failed with this error, and nobody waits for it any more. Called on the host thread."""

    @property
    def position(self) -> str:
        """Which buckets are not reduced yet, in words that begin with a space; empty where that is not known."""
        return ""

    def sum_rest(self) -> None:
        """Sum what is left on the calling thread, after a step whose replicas are done: see `Communicator.leaves`."""
        raise NotImplementedError

    def all_done(self) -> None:
        """All replicas are done. Called on the thread that then reduces the rest."""
        return

    def serve(self, until: QueueEvent, timeout: float) -> None:
        """Wait until the event is done, on the thread that waits for the step, and help to reduce meanwhile.

        Raises:
            DeviceTimeoutError: the event was not done within `timeout` seconds.
        """
        until.finish(timeout)


class Communicator(ABC):
    """Collectives over the given devices, in their order.

    Work runs on the devices' communication streams. It comes after the work already on their compute streams, and
    compute work that is enqueued later waits for it.

    """

    _devices: Sequence[QueueDevice]
    sums_early = True  # whether it pays to sum buckets while replicas are still at work

    def __init__(self, devices: Sequence[QueueDevice], choice: Choice | None = None) -> None:
        self._devices = list(devices)
        self.choice = choice or Choice(kernels=False, nccl=False, apart=False)

    transport: Transport | None = None  # how gradients travel; None: as they are

    def send_by(self, transport: Transport | None) -> None:
        """Let gradients of float32 and float64 travel as 16-bit floats from now on.

        Raises:
            NotImplementedError: these devices cannot do so.
        """
        if transport is not None and len(self._devices) > 1:
            raise NotImplementedError(
                "`grad_dtype` is for virtual devices and processes, so far. Received: "
                f"grad_dtype={transport.dtype!r} for {[device.name for device in self._devices]}. Leave it out, or "
                "keep the weights in 16 bits: the gradients are then, too."
            )

    def prepare(self, buckets: Sequence[Bucket]) -> None:
        """Allocate the memory that all-reduces of these buckets need. Between steps only, since it may wait."""
        return

    # Algorithms.

    def how(self, bucket: Bucket) -> str:
        """How a bucket is all-reduced: "one-shot", "two-shot", "nccl", or "host" if nothing else supports it."""
        return self.choice.how(bucket.dtype, bucket.nbytes)

    @abstractmethod
    def all_reduce_by(self, way: str, buffers: Sequence[FlatBuffers], bucket: Bucket) -> None:
        """All-reduce one bucket in place by one of `choice.ways`, whatever its size. Between steps only."""

    def libraries(self) -> dict[str, int]:
        """The versions on which the algorithms' times depend."""
        return {}

    # One step.

    @abstractmethod
    def begin(
        self,
        sources: Sequence[FlatBuffers],
        targets: Sequence[FlatBuffers],
        buckets: Sequence[Bucket],
        *,
        warm: bool = True,
        scatters: bool = False,
        branches: Sequence[tuple[int, int]] | None = None,
    ) -> Any:
        """Begin the reduction of a step whose replicas are about to run. Returns a `Reduction` for `finish`.

        Other arguments and errors as in `all_reduce`.

        Args:
            warm: such steps have run before, and allocate nothing any more.
            scatters: each target gets its own rank's part of each bucket alone, as by `reduce_scatter`.
            branches: of the tree over the shards of several processes, by source: only these are summed, each in its
                first source's memory. For devices in host memory.
        """

    @abstractmethod
    def finish(self, reduction: Any, once: Callable[[], object] | None = None, readers: int | None = None) -> None:
        """Reduce the remaining buckets when all replicas are done.

        Args:
            reduction: the result of `begin`.
            once: as in `all_reduce`.
            readers: the compute streams of the first `readers` devices wait for the sums; None for all. The other
                compute streams must wait for some later event before they compute again.
        """

    def leaves(self, reduction: Any) -> bool:
        """Whether there is so little to sum that the thread that waits for the step does so, by `sum_rest`, in place of
        `finish`. For steps whose sums the caller alone uses."""
        return False

    def begin_here(self, targets: Sequence[FlatBuffers], buckets: Sequence[Bucket], *, warm: bool, known: Any) -> Any:
        """As `begin`, for a step that one thread launches on all devices, all of which have rows.

        Args:
            known: the result for an earlier step of these buffers, which may be used again; None if there was none.

        Returns:
            A `Reduction` for `finish_here`, whose `listeners` are called in place of `ready(rank)`.
        """
        raise NotImplementedError("Only GPUs run steps whose replicas are launched by one thread.")

    def finish_here(self, reduction: Any, computed: Sequence[QueueEvent]) -> list[tuple[int, BaseException]]:
        """As `finish`, on a thread that has all devices by `lent`: all calls of CUDA are made when this returns.

        Args:
            reduction: the result of `begin`.
            computed: by device, the end of its compute work so far, after which the rest is reduced.

        Returns:
            Failures, with the ranks that they belong to.
        """
        raise NotImplementedError

    def all_reduce(
        self,
        sources: Sequence[FlatBuffers],
        targets: Sequence[FlatBuffers],
        buckets: Sequence[Bucket],
        once: Callable[[], object] | None = None,
    ) -> None:
        """Sum the given buckets of `sources` into each of `targets`: `begin` and `finish` in one call.

        All targets get the same bits.

        Args:
            sources: the buffers to add up, one per device, or fewer if the last devices have nothing to add.
            targets: the buffers for the sums, one per device, or fewer if the last devices do not need them.
            buckets: the parts to sum.
            once: run on the first device in the same pass, ordered as by `once()`.

        Raises:
            TypeError: a dtype that is stored but cannot be added here (float8).
        """
        self.finish(self.begin(sources, targets, buckets), once)

    def reduce_scatter(
        self,
        sources: Sequence[FlatBuffers],
        targets: Sequence[FlatBuffers],
        buckets: Sequence[Bucket],
        once: Callable[[], object] | None = None,
    ) -> None:
        """Sum the given buckets of `sources` into `targets`; each target gets its own rank's part (`Bucket.part`).

        The rest of a target is undefined afterwards. There is one target per device. Other arguments, errors and bits
        are those of `all_reduce`, except that sums by NCCL may differ.
        """
        self.finish(self.begin(sources, targets, buckets, scatters=True), once)

    @abstractmethod
    def all_gather(self, buffers: Sequence[FlatBuffers], buckets: Sequence[Bucket]) -> None:
        """Copy each rank's part of the given buckets (`Bucket.part`) from its buffers to all others. Any dtype."""

    @abstractmethod
    def broadcast(self, buffers: Sequence[FlatBuffers], readers: int | None = None) -> None:
        """Copy the first device's buffers to the others.

        Args:
            buffers: of the first devices, one per device.
            readers: the value passed to `finish` just before, if only these devices have computed since.
        """

    def refresh(self, buffers: Sequence[FlatBuffers]) -> None:
        """Copy the first device's buffers to the others before an operation, when no work of another one is left.

        Each device pulls its copy on its compute stream. Later compute work of the first one waits for all of them.
        """
        first = self._devices[0].compute
        for device, target in zip(self._devices[1:], buffers[1:], strict=False):
            device.compute.issue(target.copy_from, buffers[0])
            first.wait(device.compute.record())

    @abstractmethod
    def once(self, work: Callable[[], object]) -> None:
        """Run `work()` on the first device's worker, after all work enqueued so far and before all later work."""

    @property
    def cut_short(self) -> int:
        """How often collectives ended before their sums were right."""
        return 0

    def check(self) -> None:
        """Raise RuntimeError if a collective failed silently. Called when the step is over."""
        return

    def late(self) -> list[str]:
        """The names of the devices whose work has not come to the latest collective yet."""
        return []

    def abort(self) -> None:
        """Make devices leave collectives that do not end. Called when the time of a step is over.

        What was to be summed is undefined then, and `cut_short` counts it.
        """
        return

    def recover(self) -> None:
        """Recover from a failed step. Called when all devices are idle.

        Raises:
            RuntimeError: no collective can run any more.
        """
        return

    # Order.

    def _each(
        self, name: str, ranks: Sequence[int], work: Callable[[int], object], computing: int | None = None
    ) -> None:
        """Run `work(rank)` on these communication streams, ordered against the compute streams of all devices.

        Args:
            name: the work's, in traces.
            ranks: whose streams.
            work: what runs there.
            computing: the first `computing` devices have compute work to wait for.
        """
        done = self._after_compute(name, ranks, work, computing)
        for device in self._devices:
            device.compute.wait(done)

    def _after_compute(
        self, name: str, ranks: Sequence[int], work: Callable[[int], object], computing: int | None = None
    ) -> QueueEvent:
        """Run `work(rank)` on these communication streams after all compute so far. Returns the event of its end."""
        if now.recorder is not None:
            work = partial(self._traced, name, work)
        before = joined([device.compute.record() for device in self._devices[:computing]])
        after = []
        for rank in ranks:
            stream = self._devices[rank].communication
            stream.wait(before)
            stream.enqueue(partial(work, rank))
            after.append(stream.record())
        return joined(after)

    def _traced(self, name: str, work: Callable[[int], object], rank: int) -> None:
        """Run `work(rank)` on a communication stream, for a trace."""
        with span(name, self._devices[rank].communication):
            work(rank)

    def _gather_by_copies(self, buffers: Sequence[FlatBuffers], buckets: Sequence[Bucket]) -> None:
        """`all_gather` by copies: each rank pulls from all others."""
        ranks = len(self._devices)

        def pull(rank: int) -> None:
            # Ranks start at different peers, so that they do not all use one link at once.
            for peer in (*range(rank + 1, ranks), *range(rank)):
                for bucket in buckets:
                    buffers[rank].copy_part(buffers[peer], bucket.part(peer, ranks))

        if ranks > 1 and buckets:
            self._each("all-gather", range(ranks), pull)
