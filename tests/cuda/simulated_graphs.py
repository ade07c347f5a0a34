"""A stand-in for torch's CUDA graphs, on the simulated CUDA: what `fastdp.capture.cuda_graphs.recording.TorchGraphs`
does.

A replay computes the operations again (torch_operations.py), as one piece of work on the device's compute stream of
which the race detector sees all that it reads and writes. What a capture forbids (a value for the host, an allocation
by CUDA, waiting) fails here too.
"""

from __future__ import annotations

import weakref

import torch
from simulated_memory import SimulationError
from simulation import Op
from torch.utils._pytree import tree_leaves
from torch_operations import Operations

THREAD_LOCAL = 1


class SimulatedGraphs:
    """Records on a device of the simulated CUDA.

    Args:
        sim: the simulation.
        device: a CudaDevice.
        refused: operations that cannot be recorded; may change.
        parts: the graphs may be parts of others, which is refused otherwise.
    """

    def __init__(self, sim, device, refused=frozenset(), parts=False):
        self.sim, self.device, self.refused, self.parts = sim, device, refused, parts
        self.graphs = []
        self.nbytes = 0

    def record(self, work):
        handle = self.device.compute.handle
        operations = Operations()
        with self.sim.lock:
            self.sim.capture_begin(handle, THREAD_LOCAL)
        try:
            given = operations.note(work, self.refused)
        finally:
            with self.sim.lock:
                nodes = self.sim.graphs.pop(self.sim.capture_end(handle))
        assert not nodes, f"something else than torch's operations was captured: {nodes}"
        graph = SimulatedGraph(self.sim, handle, operations, self.parts)
        self.nbytes += operations.nbytes()
        self.graphs.append(graph)
        return graph, given


class SimulatedGraph:
    """Torch's operations as one piece of work."""

    def __init__(self, sim, handle, operations, parts=False):
        self.sim, self.handle, self.operations, self.parts = sim, handle, operations, parts
        self.replays = 0
        self._raw = 0

    @property
    def runs(self):
        """How often it has run."""
        return self.operations.runs

    def replay(self):
        """Enqueue the operations, and let what may run, run. The host does not wait for it."""
        reads, writes = self._touched()
        self.replays += 1
        runs = self.runs
        with self.sim.lock:
            self.sim.submit(self.handle, "a graph of torch's", reads, writes, self.operations.run)
            self.sim.settle()
        # What follows on the worker is torch's, and computes at once.
        assert self.runs == runs + 1, "the graph has not run: its stream waits for something"

    def raw_cuda_graph(self):
        """The operations as a graph of CUDA's, of one node. It does not keep torch's memory: this object does."""
        assert self.parts, "torch destroys the graph once it is instantiated, unless keep_graph is asked for"
        if not self._raw:
            sim, itself, stream = self.sim, weakref.ref(self), self.sim.streams[self.handle]

            def run():
                graph = itself()
                if graph is None:
                    sim.fail(SimulationError("a graph runs on memory that torch has given up"))
                graph.operations.run()

            self._raw = sim.handle()
            sim.graphs[self._raw] = [(Op("a graph of torch's", stream, *self._touched(), run), frozenset())]
            weakref.finalize(self, sim.graphs.pop, self._raw)
        return self._raw

    def _touched(self):
        """What of the simulated GPU's memory the operations read and write."""
        reads, writes = [], []
        for _, args, kwargs, results, fresh in self.operations.found:
            reads += self._known((args, kwargs))
            writes += [] if fresh else self._known(results)
        return reads, writes

    def _known(self, values):
        """The pieces of the simulated GPU's memory among tensors. The rest is torch's own, which nobody else knows."""
        found = []
        for tensor in tree_leaves(values):
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
                if self.sim.memory._find(tensor.data_ptr()) is not None:
                    found.append((tensor.data_ptr(), (last + 1) * tensor.itemsize))
        return found
