"""The communicator of GPUs: NCCL, our kernels over peer memory for small buckets, or the host where neither works.

One thread issues a collective for all ranks: NCCL wants the calls of several communicators in one group, and kernels
that wait for each other must all be launched before anything waits for them. At the end of a step's backward pass, the
first device's worker issues; the other communication queues continue when it has. A bucket that is complete earlier is
issued by the worker that completes it (`fastdp.comm.cuda.reduction`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastdp.buffers import Bucket, FlatBuffers
from fastdp.comm.algorithm import Choice
from fastdp.comm.base import Communicator
from fastdp.comm.cuda import at_exit as at_exit  # loaded for the end of the process
from fastdp.comm.cuda.host_sum import HostSum
from fastdp.comm.cuda.nccl import EagerNccl, NcclCollectives
from fastdp.comm.cuda.one_thread import OneThreadReduction, bound_collectives
from fastdp.comm.cuda.peer_kernels import PeerKernels, address_of, stream_of
from fastdp.comm.cuda.reduction import CudaReduction, begin_together
from fastdp.comm.cuda.step_graph.build import Parts, StepGraphs
from fastdp.comm.cuda.step_graph.graph import StepGraph
from fastdp.comm.cuda.step_graph.reduction import StepGraphReduction
from fastdp.comm.host.communicator import refuse_unknown
from fastdp.launch.args import MAX_RANKS
from fastdp.runtime.cuda import cupy_api
from fastdp.runtime.cuda.device import CudaDevice
from fastdp.runtime.cuda.memory import run_deferred
from fastdp.runtime.cuda.peer_access import PeerAccess
from fastdp.runtime.cuda.streams import CudaEvent, CudaStream
from fastdp.runtime.queue import QueueEvent, QueueStream, joined
from fastdp.tracing.spans import NOTHING, spans

# Steps in which NCCL allocates, after it has connected the GPUs again.
_COLD_STEPS = 2


class CudaCommunicator(Communicator):
    """Collectives over the given GPUs, in their order.

    Args:
        devices: one per rank; several may share a card.
        timeout: seconds that making peer access ready, and an abort by NCCL, may take.

    Sums are taken in place: `sources` are the first of `targets`. Further targets count as zeros and are overwritten.
    Memory for the kernels is allocated when buckets are larger than before.

    Our kernels and the host sum in rank order, fp16 and bf16 in fp32 with one rounding. NCCL has its own order, the
    same for all ranks. Devices that run shards are summed in the tree of the shards, never by NCCL.

    Raises:
        RuntimeError: several GPUs cannot work together under the process's settings (CUDA_LAUNCH_BLOCKING=1).
    """

    _devices: list[CudaDevice]

    def __init__(self, devices: Sequence[CudaDevice], timeout: float = 60.0) -> None:
        super().__init__(devices)
        self._cards = [device.ordinal for device in devices]
        self._computing = [_cuda(device.compute) for device in devices]
        run_deferred()
        cupy_api.check_environment(self._cards)
        several = len(devices) > 1
        peers = PeerAccess(sorted(set(self._cards)), timeout) if several else None
        self._nccl = EagerNccl(self._devices, connects=not any(one.part_of for one in self._devices))
        self._cold = 0
        self._timeout = timeout
        self._cut_short = 0
        # Whether a step graph was launched since the last step that ended well.
        self._in_graphs = False
        self._before: Sequence[QueueEvent] = ()
        has_kernels = peers is not None and len(devices) <= MAX_RANKS and peers.complete
        self._kernels = PeerKernels(devices) if has_kernels else None
        self._step_graphs = StepGraphs(devices, self._kernels)
        apart = len(set(self._cards)) == len(self._cards)
        self.choice = Choice(kernels=has_kernels, nccl=bool(self._nccl.comms), apart=apart)
        # The algorithms of buckets, as the limits were when they were chosen.
        self._ways: dict[Bucket, str] = {}
        self._scatter_ways: dict[Bucket, str] = {}
        self._planned_by = self.choice.limits
        self._sum_on_host = HostSum(self._devices)
        self._streams = [_cuda(device.communication) for device in devices]

    def all_reduce_by(self, way: str, buffers: Sequence[FlatBuffers], bucket: Bucket) -> None:
        """All-reduce one bucket in place by one of `choice.ways`, whatever its size. It may allocate memory."""
        if self._kernels is not None:
            self._kernels.prepare([(bucket, way)])

        def issue() -> None:
            self._run(buffers, [(bucket, way)], (), self._nccl.all_reduce)
            self._show_errors()

        self._issue(issue)

    def libraries(self) -> dict[str, int]:
        """The versions on which times depend."""
        return {"nccl": cupy_api.nccl_version() if self._nccl.comms else 0}

    def prepare(self, buckets: Sequence[Bucket]) -> None:
        """Choose an algorithm for each bucket, and allocate its memory."""
        if len(self._devices) > 1:
            self._plan(buckets, self._ways, self.choice.how)

    def begin(
        self,
        sources: Sequence[FlatBuffers],
        targets: Sequence[FlatBuffers],
        buckets: Sequence[Bucket],
        *,
        warm: bool = True,
        scatters: bool = False,
        branches: Sequence[tuple[int, int]] | None = None,
    ) -> CudaReduction:
        """A reduction whose buckets may be announced one by one.

        Until a step is `warm`, no bucket begins early: cudaMalloc on one worker waits for GPUs, and must not come
        between the launches of a collective by another worker.
        """
        refuse_unknown(buckets)
        _check_in_place(sources, targets)
        several = len(self._devices) > 1
        if self._cold:
            warm, self._cold = False, self._cold - 1
        known, how = (self._scatter_ways, self.choice.how_to_scatter) if scatters else (self._ways, self.choice.how)
        ways = self._plan(buckets, known, how) if several else []
        by_nccl = self._nccl.reduce_scatter if scatters else self._nccl.all_reduce
        name = "reduce-scatter" if scatters else "all-reduce"

        def issue(numbers: Sequence[int]) -> None:
            chosen = [(buckets[number], ways[number]) for number in numbers]
            self._run(targets, chosen, range(len(sources), len(targets)), by_nccl, name)

        # Reducing on the host waits for the GPUs, which must not happen in the middle of a replica's work.
        early = [number for number, way in enumerate(ways) if way != "host"] if warm else []
        return CudaReduction(self._devices, len(sources), len(buckets), early, issue)

    def begin_here(
        self,
        targets: Sequence[FlatBuffers],
        buckets: Sequence[Bucket],
        *,
        warm: bool,
        known: OneThreadReduction | None,
    ) -> OneThreadReduction:
        """As `Communicator.begin_here`. `known` is used again unless something has changed that it depends on."""
        kernels = self._kernels
        if self._cold:
            warm, self._cold = False, self._cold - 1
        made_for = warm, self.choice.limits, self._nccl.cut_short
        if known is not None and known.made_for == made_for and known.memory is (kernels and kernels.memory):
            return known.begin()
        refuse_unknown(buckets)
        ways = self._plan(buckets, self._ways, self.choice.how)
        early = [warm and way != "host" for way in ways]  # as in `begin`
        bound = bound_collectives(self._devices, kernels, self._nccl, targets, buckets, ways, early)

        def issue(numbers: Sequence[int]) -> None:
            self._run(targets, [(buckets[number], ways[number]) for number in numbers], (), self._nccl.all_reduce)

        made = OneThreadReduction(self._devices, bound, issue)
        made.made_for, made.memory = made_for, kernels and kernels.memory
        return made

    def why_no_step_graph(self, buckets: Sequence[Bucket]) -> str:
        """Why a step with these buckets cannot run as one graph per GPU (`step_graph`); empty if it can."""
        return self._step_graphs.why_not([self.how(bucket) for bucket in buckets])

    def step_graph(
        self, targets: Sequence[FlatBuffers], buckets: Sequence[Bucket], parts: Sequence[Parts], timeout: float
    ) -> StepGraph:
        """Combine the replicas' recorded graphs with the all-reduces of their buckets into one graph per GPU. On the
        host thread, while no step of any engine runs. Arguments and errors as in `StepGraphs.make`."""
        ways = self._plan(buckets, self._ways, self.choice.how)
        return self._step_graphs.make(self, targets, buckets, ways, parts, timeout)

    def issue(self, targets: Sequence[FlatBuffers], buckets: Sequence[Bucket], by_nccl: NcclCollectives) -> None:
        """All-reduce these buckets on all ranks from the calling thread; `by_nccl` runs those that NCCL reduces. Called
        by `StepGraphs`, with buckets that are planned already."""
        planned = [(bucket, self._ways[bucket]) for bucket in buckets]
        self._run(targets, planned, (), by_nccl.all_reduce)

    def finish(
        self,
        reduction: CudaReduction | StepGraphReduction,
        once: Callable[[], object] | None = None,
        readers: int | None = None,
    ) -> None:
        """Reduce the rest. Collectives run on all devices, so all compute streams wait, whatever `readers` says."""
        if len(self._devices) == 1:
            if once is not None:
                self.once(once)
            return

        self._in_graphs = self._in_graphs or isinstance(reduction, StepGraphReduction)

        def issue() -> None:
            if once is not None:
                once()
            reduction.issue(reduction.rest())
            self._show_errors()

        self._issue(issue)

    def finish_here(
        self, reduction: CudaReduction | OneThreadReduction | StepGraphReduction, computed: Sequence[QueueEvent]
    ) -> list[tuple[int, BaseException]]:
        """Reduce the rest, when all GPUs have come to it. A compute stream waits for its own rank's collectives."""
        if len(self._devices) == 1:
            return []
        by_graphs = type(reduction) is StepGraphReduction  # abstract base classes make `isinstance` slow
        self._in_graphs, self._before = self._in_graphs or by_graphs, computed
        streams = self._computing if by_graphs else self._streams
        rest = [] if by_graphs else reduction.rest()
        if rest:
            handles = [event.handle for event in computed if isinstance(event, CudaEvent) and event.handle]

            def issue() -> None:
                begin_together(streams, handles)
                reduction.issue(rest)

            streams[0].issue(issue)
        if self._kernels is not None and self._kernels.memory:
            streams[0].issue(self._show_errors, streams)
        if type(reduction) is OneThreadReduction and streams[0].failure is None:
            return reduction.join()
        if not by_graphs:
            for device, stream in zip(self._devices, streams, strict=True):
                device.compute.wait(stream.record())
        return [(rank, stream.failure) for rank, stream in enumerate(streams) if stream.failure is not None]

    def all_gather(self, buffers: Sequence[FlatBuffers], buckets: Sequence[Bucket]) -> None:
        """Gather by NCCL, or by copies over the links."""
        by_nccl = [one for one in buckets if self.choice.how_to_gather(one.nbytes) == "nccl"]
        if by_nccl:
            self._issue(lambda: self._nccl.all_gather(buffers, by_nccl))
        self._gather_by_copies(buffers, [bucket for bucket in buckets if bucket not in by_nccl])

    def broadcast(self, buffers: Sequence[FlatBuffers], readers: int | None = None) -> None:
        """Each device pulls a copy over its own link when all compute is done."""
        self._each("broadcast", range(1, len(buffers)), lambda rank: buffers[rank].copy_from(buffers[0]))

    def once(self, work: Callable[[], object]) -> None:
        """Run `work()`, ordered against all communication streams."""
        self._issue(work)

    def check(self) -> None:
        """Look for failed collectives. Called when the step is over.

        Raises:
            RuntimeError: NCCL reports a failure, or a rank gave up waiting for the others.
        """
        run_deferred()
        for rank in self._kernels.given_up() if self._kernels is not None else ():
            self._cut_short += 1
            raise RuntimeError(
                f"A collective on {self._devices[rank].name} gave up waiting for the other GPUs: the gradients "
                "of this step are wrong. Run `fastdp devices` to look at the links, and see docs/hardware.md."
            )
        used = [self._nccl.comms] if self._nccl.in_use else []
        for comms in (*used, *(self._step_graphs.comms() if self._in_graphs else ())):
            for rank, comm in enumerate(comms):
                error = cupy_api.nccl_async_error(comm)
                if error is not None:
                    self._cut_short += 1
                    raise RuntimeError(f"NCCL failed on {self._devices[rank].name}: {error}") from error
        self._nccl.in_use = self._in_graphs = False

    @property
    def cut_short(self) -> int:
        """How often collectives were aborted, or ranks gave up waiting for others."""
        return self._cut_short + self._nccl.cut_short

    def late(self) -> list[str]:
        """The names of the GPUs whose work has not come to the latest collective yet."""
        return [device.name for device, event in zip(self._devices, self._before, strict=False) if not event.done]

    def abort(self) -> None:
        """Abort NCCL's collectives. Our own kernels stop waiting by themselves.

        An eager collective begins when all GPUs have come to it. While one is late, none waits in NCCL: once it comes,
        the step ends by itself. A graph waits in NCCL for the others' graphs.
        """
        if self._in_graphs:
            self._cut_short += self._step_graphs.abort()
        elif not self.late():
            self._nccl.abort()

    def recover(self) -> None:
        """Reset ranks that gave up waiting for others, and connect NCCL again after an abort."""
        if self._kernels is not None and self._kernels.recover():
            self._cut_short += 1
        self._in_graphs = False
        if self._nccl.renew(self._timeout):
            self._cold = _COLD_STEPS

    # Order.

    def _issue(self, work: Callable[[], object]) -> None:
        """Run `work()`, which issues to all communication streams, on the first device's worker."""
        self._before = [device.compute.record() for device in self._devices]
        before = joined(self._before)
        ready = []
        for device in self._devices:
            device.communication.wait(before)
            ready.append(device.communication.record())
        first = self._devices[0].communication
        first.wait(joined(ready))
        first.enqueue(work)
        issued = first.record()
        after = [issued]
        for device in self._devices[1:]:
            device.communication.wait(issued)
            after.append(device.communication.record())
        done = joined(after)
        for device in self._devices:
            device.compute.wait(done)

    # Ways to reduce.

    def _plan(self, buckets: Sequence[Bucket], known: dict[Bucket, str], how: Callable[[str, int], str]) -> list[str]:
        """The algorithm of each bucket. Allocates memory for new buckets. On the host thread."""
        if self._planned_by != self.choice.limits:
            self._ways.clear()
            self._scatter_ways.clear()
            self._planned_by = self.choice.limits
        fresh = [(bucket, how(bucket.dtype, bucket.nbytes)) for bucket in buckets if bucket not in known]
        if fresh and self._kernels is not None:
            self._kernels.prepare(fresh)
        known.update(fresh)
        return [known[bucket] for bucket in buckets]

    def _run(
        self,
        targets: Sequence[FlatBuffers],
        planned: Sequence[tuple[Bucket, str]],
        idle: Sequence[int],
        by_nccl: Callable[[Sequence[FlatBuffers], Sequence[Bucket]], None],
        name: str = "all-reduce",
    ) -> None:
        """Issue each bucket's reduction by its algorithm, for all ranks. Ranks without rows (`idle`) add zeros.

        `name`: the collective's, in traces.
        """
        with spans("reduce", self._streams, buckets=len(planned)) if planned else NOTHING:
            for bucket, _ in planned:
                for rank in idle if bucket.nbytes else ():
                    with cupy_api.on(self._cards[rank]):
                        address = address_of(targets[rank], bucket)
                        cupy_api.fill_async(address, 0, bucket.nbytes, stream_of(self._devices[rank]))
            for bucket, way in planned:
                if way not in ("nccl", "host"):
                    assert self._kernels is not None
                    with spans(name, self._streams, way=way, nbytes=bucket.nbytes):
                        self._kernels.run(targets, bucket, way)
            nccl = [bucket for bucket, way in planned if way == "nccl"]
            if nccl:
                with spans(name, self._streams, way="nccl", nbytes=sum(bucket.nbytes for bucket in nccl)):
                    by_nccl(targets, nccl)
            for bucket, way in planned:
                if way == "host":
                    with spans(name, self._streams, way="host", nbytes=bucket.nbytes):
                        self._sum_on_host(targets, bucket)

    def _show_errors(self, streams: Sequence[CudaStream] = ()) -> None:
        """Enqueue copies of the kernels' error flags for `check`, after the last collective: once per step.

        Args:
            streams: by rank, behind that collective. Default: the communication streams.
        """
        if self._kernels is not None:
            self._kernels.show_errors(streams or self._streams)


def _cuda(stream: QueueStream) -> CudaStream:
    assert isinstance(stream, CudaStream)
    return stream


def _check_in_place(sources: Sequence[FlatBuffers], targets: Sequence[FlatBuffers]) -> None:
    """GPUs sum in place."""
    if any(source is not target for source, target in zip(sources, targets, strict=False)):
        raise ValueError("GPUs reduce in place: `sources` must be the first of `targets`.")
