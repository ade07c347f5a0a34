"""Owns the CUDA graphs of a whole training step, and the CUDA and NCCL resources behind them."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Sequence
from typing import Any

from fastdp.comm.cuda.nccl import ABORT_SECONDS, abort, aside, destroy
from fastdp.comm.cuda.peer_kernels import PeerKernels
from fastdp.comm.cuda.step_graph.reduction import StepGraphReduction
from fastdp.runtime.cuda import cupy_api
from fastdp.runtime.cuda.device import CudaDevice
from fastdp.runtime.cuda.memory import defer
from fastdp.runtime.cuda.streams import CudaStream
from fastdp.tracing import spans
from fastdp.tracing.spans import span

# All that is held in this process.
alive: weakref.WeakSet[Held] = weakref.WeakSet()


class Held:
    """The resources of the step graphs for one layout of buckets: communicators, graphs and launchable graphs. NCCL
    destroys a communicator only after its graphs are gone, so graphs are always destroyed first."""

    def __init__(self, comms: Sequence[Any]) -> None:
        self.comms = list(comms)
        self.broken = False
        self._graphs: list[tuple[int, list[int], int]] = []
        self._lock = threading.Lock()
        alive.add(self)

    def add(self, ordinal: int, graphs: Sequence[int], launchable: int) -> None:
        """Add a launchable graph and the graphs that it is made of. They are destroyed together: NCCL's resources of a
        captured collective belong to the graph that it was captured in, and to copies of that graph."""
        with self._lock:
            self._graphs.append((ordinal, list(graphs), launchable))

    def drop(self, launchable: Sequence[int] | None = None) -> None:
        """Destroy these graphs, or all graphs. CUDA frees a running graph when it ends."""
        with self._lock:
            gone = [one for one in self._graphs if launchable is None or one[2] in launchable]
            self._graphs = [one for one in self._graphs if one not in gone]
        for ordinal, graphs, ready in gone:
            with cupy_api.on(ordinal):
                cupy_api.graph_exec_destroy(ready)
                for graph in graphs:
                    cupy_api.graph_destroy(graph)

    def destroy(self) -> None:
        """Destroy all graphs, then the communicators."""
        self.drop()
        destroy(self._take())

    def abort(self) -> None:
        """Make the GPUs leave the collectives that they wait in, and give everything up. No graph is being launched."""
        self.broken = True
        self.drop()
        abort(self._take())

    def _take(self) -> list[Any]:
        with self._lock:
            comms, self.comms = self.comms, []
            return comms


class Owner:
    """A reference to held resources. They are freed when no reference is left.

    Freeing may wait for GPUs, so it does not happen in the garbage collector.
    """

    def __init__(self, held: Held) -> None:
        self.held = held
        weakref.finalize(self, defer, held.destroy).atexit = False


class StepGraph:
    """The graphs of one step, ready to be launched; made by `StepGraphs.make`.

    Args:
        owner: keeps the communicators in the graphs.
        devices: one per rank.
        launchable: the devices' graphs.
        early: how many buckets may be reduced while a replica still computes.
        kept: objects whose memory the graphs use, to be kept alive.
        kernels: the peer kernels, whose memory the collectives may use too.
    """

    def __init__(
        self,
        owner: Owner,
        devices: Sequence[CudaDevice],
        launchable: Sequence[int],
        early: int,
        kept: object,
        kernels: PeerKernels | None,
    ) -> None:
        self.early = early
        self.size = len(devices)
        self.changed = threading.Condition()
        self._owner, self._devices, self._launchable = owner, list(devices), list(launchable)
        self._cards = [device.ordinal for device in devices]
        self._streams = [device.compute.handle for device in devices if isinstance(device.compute, CudaStream)]
        self._kernels, self._memory = kernels, kernels.memory if kernels is not None else None
        self._kept = kept
        weakref.finalize(self, defer, functools.partial(owner.held.drop, list(launchable))).atexit = False

    @property
    def broken(self) -> bool:
        """Whether the graphs cannot be launched any more: they were aborted, or the kernels have new memory."""
        moved = self._kernels is not None and self._kernels.memory is not self._memory
        return self._owner.held.broken or moved

    def begin(self) -> StepGraphReduction:
        """Begin the reduction of one step that runs as these graphs. On the host thread, before its replicas run."""
        return StepGraphReduction(self)

    def launch(self, rank: int) -> None:
        """Enqueue a rank's graph on its compute stream. On its worker."""
        device = self._devices[rank]
        stream = device.compute
        assert isinstance(stream, CudaStream)
        with cupy_api.on(device.ordinal), span("step graph", stream):
            cupy_api.graph_launch(self._launchable[rank], stream.handle)

    def launch_here(self, rank: int) -> None:
        """As `launch`, on the thread that has all devices by `lent`. The current device changes."""
        cupy_api.switch_to(self._cards[rank])
        if spans.now.recorder is not None:
            self.launch(rank)
        else:
            cupy_api.graph_launch(self._launchable[rank], self._streams[rank])

    def abort(self) -> None:
        """Make the GPUs leave the collectives, and never launch the graphs again. Our own kernels time out."""
        self._owner.held.broken = True
        aside(self._owner.held.abort).join(ABORT_SECONDS)
