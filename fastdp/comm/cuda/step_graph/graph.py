"""Owns the CUDA graphs of a whole training step, and what CUDA and NCCL hold for them."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Sequence
from typing import Any

from fastdp.comm.cuda.nccl import destroy
from fastdp.comm.cuda.peer_kernels import PeerKernels
from fastdp.comm.cuda.step_graph.reduction import StepGraphReduction
from fastdp.runtime.cuda import cupy_api
from fastdp.runtime.cuda.device import CudaDevice
from fastdp.runtime.cuda.memory import defer
from fastdp.runtime.cuda.streams import CudaStream

# NCCL waits, when it is asked to abort, until the GPUs have left its kernels.
_ABORT_SECONDS = 30.0


class Held:
    """What CUDA and NCCL hold for whole steps of one layout of buckets: communicators, and graphs with their launchable
    forms. NCCL waits for its graphs to be gone before it gives a communicator up, so they always go first."""

    def __init__(self, comms: Sequence[Any]) -> None:
        self.comms = list(comms)
        self.broken = False
        self._graphs: list[tuple[int, list[int], int]] = []
        self._lock = threading.Lock()

    def add(self, ordinal: int, graphs: Sequence[int], launchable: int) -> None:
        """A launchable graph and those that it is made of, to be destroyed with it: what NCCL keeps for a captured
        collective belongs to the graph that it was captured in, and its copies."""
        with self._lock:
            self._graphs.append((ordinal, list(graphs), launchable))

    def drop(self, launchable: Sequence[int] | None = None) -> None:
        """Destroy these graphs, or all of them. One that is running is freed by CUDA when it is over."""
        with self._lock:
            gone = [one for one in self._graphs if launchable is None or one[2] in launchable]
            self._graphs = [one for one in self._graphs if one not in gone]
        for ordinal, graphs, ready in gone:
            with cupy_api.on(ordinal):
                cupy_api.graph_exec_destroy(ready)
                for graph in graphs:
                    cupy_api.graph_destroy(graph)

    def destroy(self) -> None:
        """Give everything back."""
        self.drop()
        destroy(self._take())

    def abort(self) -> None:
        """Have the GPUs leave the collectives that they wait in, and give everything up. No graph is being launched."""
        self.broken = True
        self.drop()
        for comm in self._take():
            cupy_api.nccl_abort(comm)

    def _take(self) -> list[Any]:
        with self._lock:
            comms, self.comms = self.comms, []
            return comms


class Owner:
    """Whoever uses what is held has a reference to this; it is given back when nobody has.

    Freeing it may wait for GPUs, so that is not done in the garbage collector.
    """

    def __init__(self, held: Held) -> None:
        self.held = held
        weakref.finalize(self, defer, held.destroy).atexit = False


class StepGraph:
    """The graphs of one step, ready to be launched; made by `StepGraphs.make`.

    Args:
        owner: of the communicators in them.
        devices: one per rank.
        launchable: their graphs.
        early: how many buckets may be reduced while a replica still computes.
        kept: whose memory the graphs work on.
        kernels: whose memory the collectives may have, too.
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
        self._owner, self._devices, self._launchable = owner, list(devices), list(launchable)
        self._kernels, self._memory = kernels, kernels.memory if kernels is not None else None
        self._kept = kept
        weakref.finalize(self, defer, functools.partial(owner.held.drop, list(launchable))).atexit = False

    @property
    def broken(self) -> bool:
        """Whether it cannot be launched any more: it was aborted, or the kernels have moved to other memory."""
        moved = self._kernels is not None and self._kernels.memory is not self._memory
        return self._owner.held.broken or moved

    def begin(self) -> StepGraphReduction:
        """The reduction of one step that runs so. On the host thread, before its replicas run."""
        return StepGraphReduction(self)

    def launch(self, rank: int) -> None:
        """Enqueue a rank's graph on its compute stream. On its worker."""
        device = self._devices[rank]
        stream = device.compute
        assert isinstance(stream, CudaStream)
        with cupy_api.on(device.ordinal):
            cupy_api.graph_launch(self._launchable[rank], stream.handle)

    def abort(self) -> None:
        """Have the GPUs leave its collectives, and never launch it again. Kernels of ours give up by themselves."""
        self._owner.held.broken = True
        # By a thread of its own, so that nobody waits for good where NCCL does.
        thread = threading.Thread(target=self._owner.held.abort, name="fastdp-abort", daemon=True)
        thread.start()
        thread.join(_ABORT_SECONDS)
