"""One captured step of one replica as CUDA graphs: recorded once, then replayed.

A recording has its own place for the rows and the random draws of a step, which are copied there before each replay;
variables and gradients are where they always are, in the replica's flat buffers; losses and outputs are at the same
place after every replay, and are read before the next. What is recorded are the segments of the step
(`fastdp.capture.graph.segments`), one graph each, so that collectives go on between them eagerly.

Replicas record one after another, on their own workers and compute streams, while no step of the engine runs: torch
takes one capture at a time.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch

from fastdp.capture.graph.segments import Segment, Segments, Tensors

# Runs before the recording, so that nothing is loaded, chosen or allocated for the first time in it.
WARM_UPS = 2


class Graph(Protocol):
    """Recorded work."""

    def replay(self) -> None:
        """Enqueue the work on the current stream: on the same memory as when it was recorded."""

    def raw_cuda_graph(self) -> int:
        """The graph as CUDA's handle, of graphs that are to be parts of others. Valid as long as this object is."""


class Graphs(Protocol):
    """Records work of one replica."""

    @property
    def nbytes(self) -> int:
        """The memory that belongs to the graphs recorded so far."""

    def record(self, work: Callable[[], Tensors]) -> tuple[Graph, Tensors]:
        """The work as a graph, and what it gives: memory that each replay fills anew. On the device's worker.

        Raises:
            RuntimeError: the work does something that cannot be recorded.
        """


class TorchGraphs:
    """CUDA graphs by torch, on a device's compute stream, with one pool of memory for all of them.

    They may share it since they are replayed one at a time on one stream, and what one gives is read before the next is
    replayed. The capture is "thread_local": what other threads do meanwhile (load data, ask for events) is theirs.

    Args:
        device: a GPU.
        parts: the graphs are to be parts of others too, and CUDA's own handles are kept for that.
    """

    def __init__(self, device: Any, parts: bool = False) -> None:
        self._parts = parts
        self._stream = torch.cuda.ExternalStream(device.compute.handle, device=device.torch_device)
        self._pool = torch.cuda.graph_pool_handle()
        self._alive: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def record(self, work: Callable[[], Tensors]) -> tuple[Graph, Tensors]:
        """As `Graphs.record`."""
        if not self._alive:  # torch gives a pool up with its last graph, and refuses to take it up again
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph(keep_graph=True) if self._parts else torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            given = work()
        if self._parts:
            graph.instantiate()  # now, not at the first replay: it may ask for memory
        self._alive.add(graph)
        return graph, given

    @property
    def nbytes(self) -> int:
        """As torch's allocator tells it."""
        segments = torch.cuda.memory_snapshot()
        return sum(one["total_size"] for one in segments if tuple(one["segment_pool_id"]) == tuple(self._pool))


class Recording:
    """A step as recorded on one replica.

    Args:
        graphs: who records.
        step: the step in segments, on this replica's device.
        variables: the replica's, where they stay.
        inputs: rows and draws, with values to warm up on: memory that the recording keeps.
        buffers: the replica's gradients that the step writes, where they stay.

    `step_graph` is for `fastdp.capture.cuda_graphs.step_graphs`: the graphs that this recording is a part of, with
    those of the other replicas.
    """

    def __init__(
        self,
        graphs: Graphs,
        step: Segments,
        variables: list[torch.Tensor],
        inputs: list[torch.Tensor],
        buffers: list[torch.Tensor],
    ) -> None:
        began, before = time.perf_counter(), graphs.nbytes
        self.step_graph: Any = None
        self._inputs = inputs
        self._kept = variables, buffers  # the graphs hold their addresses
        arguments = [*variables, *inputs, *buffers]
        for _ in range(WARM_UPS):
            step(arguments, lambda bucket: None)
        self._graphs: list[tuple[Graph, list[int]]] = []

        def record(part: Segment, given: list[torch.Tensor]) -> Tensors:
            graph, found = graphs.record(lambda: part.run(*given))
            self._graphs.append((graph, part.buckets))
            return found

        self._results = list(step.walk(arguments, record))
        self.seconds = time.perf_counter() - began
        self.nbytes = graphs.nbytes - before

    def replay(self, inputs: Tensors, ready: Callable[[int], None]) -> Tensors:
        """Run the step on these rows and draws; its results, until the next replay. `ready(i)` as in `Segments`."""
        self._stage(inputs)
        for graph, buckets in self._graphs:
            graph.replay()
            for bucket in buckets:
                ready(bucket)
        return self._results

    def replay_in_step_graph(self, inputs: Tensors, launch: Callable[[], None]) -> Tensors:
        """As `replay`, where `launch()` launches all of its graphs at once, and the collectives of its buckets."""
        self._stage(inputs)
        launch()
        return self._results

    def _stage(self, inputs: Tensors) -> None:
        """Bring rows and draws to where the graphs read them."""
        for place, value in zip(self._inputs, inputs, strict=True):
            place.copy_(value, non_blocking=True)

    @property
    def parts(self) -> list[tuple[int, list[int]]]:
        """The graphs as CUDA's handles, with the buckets that are complete when each is over."""
        return [(graph.raw_cuda_graph(), list(buckets)) for graph, buckets in self._graphs]

    @property
    def segments(self) -> int:
        """How many graphs a step is."""
        return len(self._graphs)
