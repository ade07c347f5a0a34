"""Builds the CUDA graph of a whole training step per GPU from recorded segments and captured all-reduces.

The collectives are captured apart from the replicas' work, on the communication streams of all GPUs by one thread, as
NCCL wants it, and on communicators that nobody uses eagerly once they are in a graph. A graph of each GPU is then put
together: the segments of the replica one after the other, and beside them the collectives, each behind the segment that
completes its bucket and behind the collective before it, so that all ranks have them in one order.

A GPU that has launched its graph waits in a collective until all others have launched theirs. So a worker launches
when all replicas have said that they are about to (a barrier on the host), and a launch that fails after that has the
communicators aborted, in whose collectives the others would wait for good.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from fastdp.buffers import Bucket, FlatBuffers
from fastdp.comm.cuda.nccl import NcclCollectives, connect
from fastdp.comm.cuda.peer_kernels import PeerKernels, stream_of
from fastdp.comm.cuda.step_graph.graph import Held, Owner, StepGraph
from fastdp.comm.rendezvous import Rendezvous
from fastdp.errors import StepAborted
from fastdp.runtime.cuda import cupy_api
from fastdp.runtime.cuda.child_graphs import chained
from fastdp.runtime.cuda.device import CudaDevice
from fastdp.runtime.queue import joined

# Of a replica: its graphs in their order, each with the buckets that are complete when it is over.
Parts = Sequence[tuple[int, Sequence[int]]]

# Queues of a card that its streams share, by default and at most, and what a replica's work takes of them: two branches
# of its graph, a copy stream, and one to spare.
_VARIABLE, _QUEUES, _QUEUES_OF_A_REPLICA = "CUDA_DEVICE_MAX_CONNECTIONS", 8, 4


class StepGraphs:
    """Makes whole steps of some GPUs.

    Args:
        devices: one per rank; several may share a card.
        kernels: their kernels over peer memory, if they have any.
    """

    def __init__(self, devices: Sequence[CudaDevice], kernels: PeerKernels | None) -> None:
        self._devices, self._kernels = list(devices), kernels
        self._owners: weakref.WeakValueDictionary[tuple[Bucket, ...], Owner] = weakref.WeakValueDictionary()

    def comms(self) -> list[list[Any]]:
        """The communicators of NCCL that are in graphs, each list in the order of the ranks."""
        return [list(owner.held.comms) for owner in self._owners.values()]

    def why_not(self, ways: Sequence[str]) -> str:
        """Why steps whose buckets are reduced by these ways cannot be whole; empty where they can."""
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
        """The graphs of a step, which has been launched once. On the host thread, while no step of any engine runs.

        Args:
            communicator: a CudaCommunicator over these devices.
            targets: each rank's gradients, which are overwritten now.
            buckets: all of them.
            ways: how each is reduced.
            parts: what each replica has recorded, with all buckets in each; copied.
            timeout: seconds that each part of this may take.

        Raises:
            RuntimeError: CUDA or NCCL refuses.
            DeviceTimeoutError: it took longer. The communicators in the graphs are aborted.
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
                    for graph in graphs[len(made) :]:  # the others are kept with what they are parts of
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
        """The communicators for a layout of buckets, on which the same collectives have run once, eagerly.

        NCCL connects and allocates when it needs to for the first time. Nobody uses them eagerly after that.
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
            self._on_first(
                communicator,
                lambda: communicator.issue(targets, by_nccl, NcclCollectives(self._devices, held.comms)),
                timeout,
            )
        self._owners[tuple(buckets)] = owner
        return owner

    def _captured(self, communicator: Any, targets: Sequence[FlatBuffers], bucket: Bucket, owner: Owner) -> list[int]:
        """The collective of one bucket as a graph for each rank, which the caller destroys."""
        begun: list[int] = []
        graphs: list[int] = []
        failed: BaseException | None = None
        try:
            for device in self._devices:
                with cupy_api.on(device.ordinal):
                    cupy_api.capture_begin(stream_of(device))
                begun.append(stream_of(device))
            communicator.issue(targets, [bucket], NcclCollectives(self._devices, owner.held.comms))
        except BaseException as error:
            failed = error
            raise
        finally:
            for stream in begun:  # all of them, whatever happens: a stream under capture runs nothing
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
        """A rank's graph, which the GPU is ready for."""
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
        """Launch a step for the first time, as it always is: by all workers, behind a barrier."""
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
        """Run work that issues to all communication streams, on the first device's worker, and wait for it."""
        failures: list[BaseException] = []

        def run() -> None:
            # Whatever it is, it is raised on the thread that asked: the worker's queue stays in order.
            try:
                work()
            except BaseException as error:  # noqa: BLE001
                failures.append(error)

        communicator.once(run)
        self._wait(timeout)
        if failures:
            raise failures[0]

    def _wait(self, timeout: float) -> None:
        """Until the compute of all devices is done, and what it waits for. After a failure the next step cleans up."""
        try:
            joined([device.compute.record() for device in self._devices]).synchronize(timeout)
        except BaseException:
            for device in self._devices:
                device.unsettled = True
            raise
