"""A stand-in for torch's CUDA graphs, on the simulated CUDA: what `fastdp.capture.cuda_graphs.recording.TorchGraphs`
does.

While it records nothing is computed: each operation is noted with the memory that it takes and gives, and what it
would give is garbage. A replay computes the operations again, in order, on that same memory, as one piece of work on
the device's compute stream of which the race detector sees all that it reads and writes. So a value that is looked at
while it is recorded, or a replay that would have to look elsewhere than the recording did, gives wrong numbers here as
on a GPU. What a capture forbids (a value for the host, an allocation by CUDA, waiting) fails here too.
"""

from __future__ import annotations

import weakref

import torch
from simulated_memory import SimulationError
from simulation import Op
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FORBIDDEN = "CUDA error: operation not permitted when stream is capturing (simulated)"
_FOR_THE_HOST = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
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
        operations = _Operations(self.refused)
        with self.sim.lock:
            self.sim.capture_begin(handle, THREAD_LOCAL)
        try:
            with operations:
                given = list(work())
        finally:
            with self.sim.lock:
                nodes = self.sim.graphs.pop(self.sim.capture_end(handle))
        assert not nodes, f"something else than torch's operations was captured: {nodes}"
        graph = SimulatedGraph(self.sim, handle, operations.found, self.parts)
        self.nbytes += sum(tensor.untyped_storage().nbytes() for tensor in graph.made())
        self.graphs.append(graph)
        return graph, given


class SimulatedGraph:
    """Operations with the memory that they take and give: (function, args, kwargs, results, whether those are new)."""

    def __init__(self, sim, handle, operations, parts=False):
        self.sim, self.handle, self.operations, self.parts = sim, handle, operations, parts
        self.replays = self.runs = 0
        self._raw = 0

    def made(self):
        """What lies in memory of the graph's own."""
        return [tensor for *_, results, fresh in self.operations if fresh for tensor in results]

    def replay(self):
        """Enqueue the operations, and let what may run, run. The host does not wait for it."""
        reads, writes = self._touched()
        self.replays += 1
        runs = self.runs
        with self.sim.lock:
            self.sim.submit(self.handle, "a graph of torch's", reads, writes, self._run)
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
                graph._run()

            self._raw = sim.handle()
            sim.graphs[self._raw] = [(Op("a graph of torch's", stream, *self._touched(), run), frozenset())]
            weakref.finalize(self, sim.graphs.pop, self._raw)
        return self._raw

    def _touched(self):
        """What of the simulated GPU's memory the operations read and write."""
        reads, writes = [], []
        for _, args, kwargs, results, fresh in self.operations:
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

    def _run(self):
        self.runs += 1
        with torch.no_grad():
            for function, args, kwargs, results, fresh in self.operations:
                found = _tensors(function(*args, **kwargs))
                if fresh:
                    for result, value in zip(results, found, strict=True):
                        result.copy_(value)


class _Operations(TorchDispatchMode):
    """Notes operations instead of running them."""

    def __init__(self, refused):
        super().__init__()
        self.refused, self.found = refused, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in self.refused or _FOR_THE_HOST & set(function.tags):
            raise RuntimeError(FORBIDDEN)
        if function._schema.is_mutable:
            written = _written(function, args, kwargs)
            self.found.append((function, args, kwargs, written, False))
            assert len(function._schema.returns) < 2, f"the simulation does not know what {function} gives"
            return written[0] if function._schema.returns else None
        # It is run on garbage, for the shapes of what it gives.
        results = function(*args, **kwargs)
        taken = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs)) if tensor.numel()}
        tensors = _tensors(results)
        if any(tensor.numel() and tensor.untyped_storage().data_ptr() in taken for tensor in tensors):
            return results  # a view: no kernel
        for tensor in tensors:
            tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.zero_()
        self.found.append((function, args, kwargs, tensors, True))
        return results


def _tensors(values):
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _written(function, args, kwargs):
    """The tensors that an operation writes into."""
    arguments = enumerate(function._schema.arguments)
    return [
        args[i] if i < len(args) else kwargs[argument.name]
        for i, argument in arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
