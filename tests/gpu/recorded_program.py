"""A program whose steps are CUDA graphs, recorded without torch: what a captured step asks of the engine.

The gradient of a step holds the batch: each replica writes its own rows to their place and zeros elsewhere, so that the
sum over replicas is the whole batch. The last row is the first one of the first replica's weights, so that a step shows
whether it came after the update before it. The update takes the gradient for the new weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastdp.buffers import ArraySpec, FlatBuffers, Home, Memory
from fastdp.comm.context import Context
from fastdp.comm.select import communicator
from fastdp.program.base import Launched, Program, Result, Totals
from fastdp.runtime.cuda import cupy_api

COLUMNS, LIMIT = 8, 30.0
FLOAT64 = np.dtype("float64")
NBYTES = 4 * COLUMNS  # of a row


@dataclass
class Replica:
    """`loss` is the first number of its rows, on its device; `seen` is where graphs copy it to, in pinned memory.
    `update` are the arguments of the copy that is an update."""

    device: Any
    memory: Memory
    rank: int
    loss: Any
    seen: Any
    update: tuple[int, int, int, int]


@dataclass
class Recording:
    """The graphs of a replica's step, each with the bucket that it completes, and the memory of its rows."""

    inputs: Any
    graphs: list[tuple[int, int]] = field(default_factory=list)
    ready: list[int] = field(default_factory=list)
    launched: Any = None

    def __post_init__(self) -> None:
        self.inputs_at, self.nbytes = cupy_api.array_pointer(self.inputs), self.inputs.nbytes


@dataclass
class StepGraphs:
    """The replicas' graphs with their all-reduces in them."""

    graph: Any
    recordings: list[Recording]

    def begin(self) -> Any:
        return self.graph.begin()


class RecordedProgram(Program):
    """See above.

    Args:
        rows: the most rows of a batch.
        arrays: how many arrays of weights there are; each holds the batch.
        whole: graphs hold their all-reduces.

    Gradients that wait replace those of the step that reduces them: `accumulate` copies.
    """

    uses_cupy = False

    def __init__(self, rows: int, arrays: int = 3, *, whole: bool = False) -> None:
        self.rows, self.whole = rows, whole
        self.gradients = [ArraySpec(f"w{i}", (rows + 1, COLUMNS), "float32") for i in range(arrays)]
        self.replicas: dict[int, Replica] = {}
        self.recorded: dict[Any, list[Recording]] = {}
        self.joined: dict[Any, StepGraphs] = {}

    # Memory.

    def home(self, device: Any) -> Home:
        return Home(self.gradients, device)

    def bind(self, memory: Memory, device: Any, rank: int) -> Replica:
        one = np.dtype("float32")
        into, out_of = memory.variables.buffers["float32"], memory.gradients.buffers["float32"]
        update = cupy_api.array_pointer(into), cupy_api.array_pointer(out_of), into.nbytes, device.compute.handle
        replica = Replica(device, memory, rank, device.zeros((1,), one), device.pinned.empty((1,), one), update)
        self.replicas[rank] = replica
        return replica

    # The step.

    def record(self, shards: Any) -> None:
        """Record the steps of batches of so many rows. Between steps."""
        key = self._key(shards)
        buckets = self.replicas[0].memory.gradients.buckets()
        found = self.recorded[key] = []
        for rank, rows in enumerate(shards):
            replica = self.replicas[rank]
            recording = Recording(replica.device.empty((rows.stop - rows.start, COLUMNS), np.dtype("float32")))
            recording.launched = _launched(replica, recording.inputs)
            found.append(recording)

            def work(replica: Replica = replica, rows: Any = rows, recording: Recording = recording) -> None:
                stream = replica.device.compute.handle
                for number, bucket in enumerate(buckets):
                    cupy_api.capture_begin(stream)
                    for array in bucket.arrays:
                        self._fill(replica, array, rows, cupy_api.array_pointer(recording.inputs))
                    graph = cupy_api.capture_end(stream)
                    recording.graphs.append((graph, number))
                    recording.ready.append(cupy_api.graph_instantiate(graph))
                    cupy_api.graph_upload(recording.ready[-1], stream)

            replica.device.compute.enqueue(work)
            replica.device.compute.record().synchronize(LIMIT)
        if self.whole and len(shards) == len(self.replicas) > 1:
            self.join(shards)

    def join(self, shards: Any) -> None:
        """Make graphs of whole steps, also after a failure. Between steps."""
        devices = [replica.device for replica in self.replicas.values()]
        targets = [replica.memory.gradients for replica in self.replicas.values()]
        found = self.recorded[self._key(shards)]
        parts = [[(graph, [number]) for graph, number in one.graphs] for one in found]
        graph = communicator(devices).step_graph(targets, targets[0].buckets(), parts, LIMIT)
        self.joined[self._key(shards)] = StepGraphs(graph, found)

    def close(self) -> None:
        """Destroy the graphs."""
        self.joined.clear()
        for found in self.recorded.values():
            for rank, recording in enumerate(found):
                with cupy_api.on(self.replicas[rank].device.ordinal):
                    for (graph, _), ready in zip(recording.graphs, recording.ready, strict=True):
                        cupy_api.graph_exec_destroy(ready)
                        cupy_api.graph_destroy(graph)
        self.recorded.clear()

    def train(self, state: Replica, batch: list[Any], context: Context) -> Result:
        if self._key_of(context) in self.recorded:
            launched = self.launch(state, batch, context)
        else:
            for array in range(len(self.gradients)):
                self._fill(state, array, context.rows, cupy_api.array_pointer(batch[0]))
            launched = _launched(state, batch[0])
        outputs = launched.outputs()
        state.device.to_host(state.loss)  # waits
        result = launched.result()
        result.outputs = outputs
        return result

    def launches(self, contexts: Any) -> bool:
        return self._key_of(contexts[0]) in self.recorded

    def step_graph(self, contexts: Any, why_not: str) -> Any:
        usable = not why_not and not self.is_broken(contexts[0].batch.shards)
        return self.joined.get(self._key_of(contexts[0])) if usable else None

    def is_broken(self, shards: Any) -> bool:
        """Whether the graphs of whole steps were given up after a failure."""
        found = self.joined.get(self._key(shards))
        return found is not None and found.graph.broken

    def launch(self, state: Replica, batch: list[Any], context: Context) -> Launched:
        batch_of_all = context.batch
        recording = self.recorded[batch_of_all.rows, len(batch_of_all.shards)][state.rank]
        stream = state.device.compute.handle
        cupy_api.copy_async(recording.inputs_at, cupy_api.array_pointer(batch[0]), recording.nbytes, stream)
        if context.step_graph is not None:
            context.launch()
        else:
            for (_, bucket), ready in zip(recording.graphs, recording.ready, strict=True):
                cupy_api.graph_launch(ready, stream)
                context.ready(bucket)
        return recording.launched

    def predict(self, state: Replica, batch: list[Any], context: Context) -> Result:
        return Result([batch[0]])

    def update(self, state: Replica, totals: Totals) -> None:
        if totals.reduced:
            cupy_api.copy_async(*state.update)

    def accumulate(self, total: FlatBuffers, part: FlatBuffers) -> None:
        total.copy_from(part)

    # Parts.

    def _key(self, shards: Any) -> Any:
        return shards[0].total, len(shards)

    def _key_of(self, context: Context) -> Any:
        return self._key(context.batch.shards)

    def _fill(self, replica: Replica, array: int, rows: Any, inputs: int) -> None:
        """Enqueue a replica's gradient of one array."""
        stream = replica.device.compute.handle
        gradient = cupy_api.array_pointer(replica.memory.gradients.views[array])
        cupy_api.fill_async(gradient, 0, (self.rows + 1) * NBYTES, stream)
        cupy_api.copy_async(gradient + rows.start * NBYTES, inputs, (rows.stop - rows.start) * NBYTES, stream)
        if replica.rank == 0:
            first = cupy_api.array_pointer(replica.memory.variables.views[array])
            cupy_api.copy_async(gradient + self.rows * NBYTES, first, NBYTES, stream)
        if array == 0:
            cupy_api.copy_async(cupy_api.array_pointer(replica.loss), inputs, 4, stream)
            cupy_api.copy_async(replica.seen.ctypes.data, cupy_api.array_pointer(replica.loss), 4, stream)


def _launched(replica: Replica, rows: Any) -> Launched:
    """What the host does when the graphs are launched."""
    return Launched(lambda: [rows], lambda: Result([], np.array(replica.seen, FLOAT64)))


def expected(program: RecordedProgram, before: np.ndarray, batch: np.ndarray) -> np.ndarray:
    """An array of weights after a step."""
    after = np.zeros((program.rows + 1, COLUMNS), "float32")
    after[: len(batch)] = batch
    after[-1] = before[0]
    return after
