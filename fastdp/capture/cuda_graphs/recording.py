"""One captured step of one replica as CUDA graphs: recorded once, then replayed.

A recording owns buffers for the rows and the random draws of a step, which are copied there before each replay.
Variables and gradients stay in the replica's flat buffers. Losses and outputs lie at the same addresses after every
replay and are read before the next. Each segment of the step (`fastdp.capture.graph.segments`) is one graph, so that
collectives can run eagerly between them.

Replicas record one after another, on their own workers and compute streams, while no step of the engine runs: torch
supports one capture at a time.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch

from fastdp.capture.graph.segments import Segment, Segments, Tensors
from fastdp.tracing.spans import span

# Runs before recording, so that the recording itself loads, selects or allocates nothing for the first time.
WARM_UPS = 2


class Graph(Protocol):
    """Recorded work."""

    def replay(self) -> None:
        """Enqueue the work on the current stream, on the memory that it was recorded with."""

    def raw_cuda_graph(self) -> int:
        """The CUDA handle of a graph that is to be part of others. Valid during the life of this object."""


class Graphs(Protocol):
    """Records work of one replica."""

    @property
    def nbytes(self) -> int:
        """The memory that belongs to the graphs recorded so far."""

    def record(self, work: Callable[[], Tensors]) -> tuple[Graph, Tensors]:
        """Record the work; return the graph and the work's results, which each replay overwrites.

        Called on the device's worker.

        Raises:
            RuntimeError: the work does something that cannot be recorded.
        """


class TorchGraphs:
    """Records CUDA graphs through torch, on a device's compute stream, in one memory pool.

    The graphs may share the pool: they are replayed one at a time on one stream, and results are read before the next
    replay. The capture mode is "thread_local", so other threads may load data or query events meanwhile.

    Args:
        device: a GPU.
        parts: the graphs will also be parts of others, so CUDA's handles are kept.
    """

    def __init__(self, device: Any, parts: bool = False) -> None:
        self._parts = parts
        self._stream = torch.cuda.ExternalStream(device.compute.for_torch(), device=device.torch_device)
        self._pool = torch.cuda.graph_pool_handle()
        self._alive: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def record(self, work: Callable[[], Tensors]) -> tuple[Graph, Tensors]:
        """As `Graphs.record`."""
        if not self._alive:  # torch frees a pool with its last graph and refuses to use it again
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph(keep_graph=True) if self._parts else torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                given = work()
        except BaseException:
            self._end_what_torch_left()
            raise
        if self._parts:
            graph.instantiate()  # now, not at the first replay: it may allocate memory
        self._alive.add(graph)
        return graph, given

    def _end_what_torch_left(self) -> None:
        """End an allocator that still records to the pool, and a generator that still counts for the graph.

        Torch before 2.13 leaves both where CUDA cannot end a capture: its allocator then aborts the process later, and
        draws on the GPU are no longer those of the generator.
        """
        index = torch.device(self._stream.device).index
        try:
            torch._C._cuda_endAllocateToPool(index, self._pool)
        except RuntimeError:  # torch has ended both itself
            return
        torch._C._cuda_releasePool(index, self._pool)
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())

    @property
    def nbytes(self) -> int:
        """The pool's size as reported by torch's allocator."""
        segments = torch.cuda.memory_snapshot()
        return sum(one["total_size"] for one in segments if tuple(one["segment_pool_id"]) == tuple(self._pool))


class Recording:
    """A step recorded on one replica.

    Args:
        graphs: the recorder of work.
        step: the step in segments, on this replica's device.
        variables: the replica's variables, at fixed addresses.
        inputs: rows and draws with values for the warm-up. The recording keeps this memory.
        buffers: the replica's gradients that the step writes, at fixed addresses.

    `step_graph` is set by `fastdp.capture.cuda_graphs.step_graphs`: the step graph that this recording and those of the
    other replicas are part of.
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
        """Run the step on these rows and draws. Results are valid until the next replay. `ready` as in `Segments`."""
        self._stage(inputs)
        for graph, buckets in self._graphs:
            with span("graph"):
                graph.replay()
            for bucket in buckets:
                ready(bucket)
        return self._results

    def replay_in_step_graph(self, inputs: Tensors, launch: Callable[[], None]) -> Tensors:
        """As `replay`, but `launch()` launches all graphs of the step and the collectives of its buckets at once."""
        self._stage(inputs)
        launch()
        return self._results

    def _stage(self, inputs: Tensors) -> None:
        """Copy rows and draws to the memory that the graphs read."""
        for place, value in zip(self._inputs, inputs, strict=True):
            place.copy_(value, non_blocking=True)

    @property
    def parts(self) -> list[tuple[int, list[int]]]:
        """The CUDA handle of each graph, with the buckets that are complete at its end."""
        return [(graph.raw_cuda_graph(), list(buckets)) for graph, buckets in self._graphs]

    @property
    def segments(self) -> int:
        """The number of graphs of a step."""
        return len(self._graphs)
