"""Builds the CUDA graph of a whole training step per GPU from recorded segments and captured all-reduces.

Collectives are captured separately from the replicas' work, by one thread on the communication streams of all GPUs, as
NCCL requires. Their communicators are not used eagerly once they are in a graph. Each GPU's graph is then assembled:
the replica's segments run in order, and in parallel to them the collectives. A collective comes after the segment that
completes its bucket and after the previous collective, so all ranks run collectives in the same order.

A GPU that has launched its graph waits in a collective until all others have launched theirs. So workers meet at a
barrier on the host before they launch. If a launch fails after the barrier, the communicators are aborted, because the
other GPUs would wait in their collectives forever.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from fastdp.buffers import Bucket, FlatBuffers
from fastdp.comm.cuda.nccl import ABORT_SECONDS, NcclCollectives, aside, connect
from fastdp.comm.cuda.peer_kernels import PeerKernels, stream_of
from fastdp.comm.cuda.step_graph.graph import Held, Owner, StepGraph
from fastdp.comm.rendezvous import Rendezvous
from fastdp.errors import StepAborted
from fastdp.runtime.cuda import cupy_api
from fastdp.runtime.cuda.child_graphs import chained
from fastdp.runtime.cuda.device import CudaDevice
from fastdp.runtime.queue import joined

# A replica's graphs in order, each with the buckets that are complete when it ends.
Parts = Sequence[tuple[int, Sequence[int]]]

# CUDA's variable for the number of hardware queues that a card's streams share, its default, and the queues that a
# replica needs: two branches of its graph, a copy stream, and one to spare.
_VARIABLE, _QUEUES, _QUEUES_OF_A_REPLICA = "CUDA_DEVICE_MAX_CONNECTIONS", 8, 4


class StepGraphs:
    """Makes the step graphs of some GPUs.

    Args:
        devices: one per rank; several may share a card.
        kernels: their kernels over peer memory, if they have any.
    """

    def __init__(self, devices: Sequence[CudaDevice], kernels: PeerKernels | None) -> None:
        self._devices, self._kernels = list(devices), kernels
        self._owners: weakref.WeakValueDictionary[tuple[Bucket, ...], Owner] = weakref.WeakValueDictionary()

    def comms(self) -> list[list[Any]]:
        """NCCL's communicators that are in graphs; each list is in rank order."""
        owners = [reference() for reference in self._owners.valuerefs()]
        return [list(owner.held.comms) for owner in owners if owner is not None]

    def abort(self) -> bool:
        """Make the GPUs leave NCCL's kernels in graphs, and never launch those graphs again; whether there are any."""
        held = [owner.held for owner in self._owners.values() if owner.held.comms]
        for one in held:
            one.broken = True
            aside(one.abort)
        return bool(held)

    def why_not(self, ways: Sequence[str]) -> str:
        """Why steps whose buckets are reduced by these algorithms cannot be step graphs; empty if they can."""
        if "host" in ways:
            return "gradients are added up in host memory"
        cards = [device.ordinal for device in self._devices]
        shared = max(cards.count(card) for card in cards)
        queues, needed = os.environ.get(_VARIABLE, "").strip(), _QUEUES_OF_A_REPLICA * shared
        if shared > 1 and (int(queues) if queues.isdigit() else _QUEUES) < needed:
            return (
                f"{shared} virtual GPUs share a card, and one may wait in a collective for work that is queued behind "
                f"it: set {_VARIABLE}={needed} (32 at most) before CUDA starts"
            )
        return ""

    def make(
        self,
        communicator: Any,
        targets: Sequence[FlatBuffers],
        buckets: Sequence[Bucket],
        ways: Sequence[str],
        parts: Sequence[Parts],
        timeout: float,
    ) -> StepGraph:
        """Make the graphs of a step and launch them once. On the host thread, while no step of any engine runs.

        Args:
            communicator: a CudaCommunicator over these devices.
            targets: each rank's gradients, which this call overwrites.
            buckets: all buckets of the gradients.
            ways: the algorithm for each bucket.
            parts: the recorded graphs of each replica, which complete all buckets; copied.
            timeout: seconds that each stage of this call may take.

        Raises:
            RuntimeError: CUDA or NCCL refuses.
            DeviceTimeoutError: a stage took longer. The communicators in the graphs are aborted.
        """
        owner = self._owner(communicator, targets, buckets, ways, timeout)
        made: list[int] = []

        def build() -> None:
            order = [number for _, complete in parts[0] for number in complete]
            captured: list[list[int]] = []
            try:
                for number in order:
                    captured.append(self._captured(communicator, targets, buckets[number], owner))
                for rank in range(len(self._devices)):
                    made.append(self._assembled(rank, owner, parts[rank], order, [graphs[rank] for graphs in captured]))
            finally:
                for graphs in captured:
                    for graph in graphs[len(made) :]:  # the others belong to the assembled graphs
                        cupy_api.graph_destroy(graph)

        try:
            self._on_first(communicator, build, timeout)
        except BaseException:
            owner.held.drop(made)
            raise
        early = sum(
            all(number not in complete for rank in parts for _, complete in rank[-1:]) for number in range(len(buckets))
        )
        step = StepGraph(owner, self._devices, made, early, list(targets), self._kernels)
        self._warm_up(step, timeout)
        return step

    def _owner(
        self,
        communicator: Any,
        targets: Sequence[FlatBuffers],
        buckets: Sequence[Bucket],
        ways: Sequence[str],
        timeout: float,
    ) -> Owner:
        """The communicators for a layout of buckets, on which the same collectives have run once eagerly.

        NCCL connects and allocates at the first use. After that the communicators are not used eagerly.
        """
        owner = self._owners.get(tuple(buckets))
        if owner is not None and not owner.held.broken:
            return owner
        by_nccl = [bucket for bucket, way in zip(buckets, ways, strict=True) if way == "nccl"]
        held = Held(connect([device.ordinal for device in self._devices]) if by_nccl else [])
        owner = Owner(held)
        if by_nccl and not held.comms:
            raise RuntimeError("NCCL does not connect these GPUs a second time, for collectives in graphs.")
        if by_nccl:
            collectives = NcclCollectives(self._devices, list(held.comms))
            try:
                self._on_first(communicator, lambda: communicator.issue(targets, by_nccl, collectives), timeout)
            except BaseException:
                aside(held.abort).join(ABORT_SECONDS)
                raise
        self._owners[tuple(buckets)] = owner
        return owner

    def _captured(self, communicator: Any, targets: Sequence[FlatBuffers], bucket: Bucket, owner: Owner) -> list[int]:
        """Capture the collective of one bucket as one graph per rank. The caller destroys the graphs."""
        begun: list[int] = []
        graphs: list[int] = []
        failed: BaseException | None = None
        try:
            for device in self._devices:
                with cupy_api.on(device.ordinal):
                    cupy_api.capture_begin(stream_of(device))
                begun.append(stream_of(device))
            communicator.issue(targets, [bucket], NcclCollectives(self._devices, list(owner.held.comms)))
        except BaseException as error:
            failed = error
            raise
        finally:
            for stream in begun:  # end every capture, whatever happens: a stream under capture runs nothing
                try:
                    graphs.append(cupy_api.capture_end(stream))
                except cupy_api.CudaError as error:
                    failed = failed or error
            if failed is not None:
                for graph in graphs:
                    cupy_api.graph_destroy(graph)
        if failed is not None:
            raise failed
        return graphs

    def _assembled(
        self, rank: int, owner: Owner, parts: Parts, order: Sequence[int], collectives: Sequence[int]
    ) -> int:
        """Assemble, instantiate and upload a rank's graph."""
        device = self._devices[rank]
        behind = {number: at for at, (_, complete) in enumerate(parts) for number in complete}
        branches = [(behind[number], graph) for number, graph in zip(order, collectives, strict=True)]
        with cupy_api.on(device.ordinal):
            graph, ready = chained([graph for graph, _ in parts], branches), 0
            try:
                ready = cupy_api.graph_instantiate(graph)
                cupy_api.graph_upload(ready, stream_of(device))
            except BaseException:
                if ready:
                    cupy_api.graph_exec_destroy(ready)
                cupy_api.graph_destroy(graph)
                raise
        owner.held.add(device.ordinal, [graph, *collectives], ready)
        return ready

    def _warm_up(self, step: StepGraph, timeout: float) -> None:
        """Launch a step for the first time, in the usual way: by all workers, after a barrier."""
        reduction, rendezvous = step.begin(), Rendezvous(step.size, timeout)
        failures: list[BaseException] = []

        def launch(rank: int) -> None:
            try:
                reduction.launch(rank, rendezvous)
            except BaseException as error:  # noqa: BLE001, as below
                failures.append(error)
                rendezvous.abort(error)

        for rank, device in enumerate(self._devices):
            device.compute.enqueue(functools.partial(launch, rank))
        try:
            self._wait(timeout)
        except BaseException as error:
            rendezvous.abort(error)
            reduction.abandon(error)
            raise
        if failures:
            raise next((error for error in failures if not isinstance(error, StepAborted)), failures[0])

    # Between steps.

    def _on_first(self, communicator: Any, work: Callable[[], object], timeout: float) -> None:
        """Run `work()`, which issues to all communication streams, on the first device's worker, and wait for it."""
        failures: list[BaseException] = []

        def run() -> None:
            # Any error is raised on the calling thread, so that the worker's queue stays intact.
            try:
                work()
            except BaseException as error:  # noqa: BLE001
                failures.append(error)

        communicator.once(run)
        self._wait(timeout)
        if failures:
            raise failures[0]

    def _wait(self, timeout: float) -> None:
        """Wait until the compute of all devices is done. After a failure the next step cleans up."""
        try:
            joined([device.compute.record() for device in self._devices]).synchronize(timeout)
        except BaseException:
            for device in self._devices:
                device.unsettled = True
            raise
