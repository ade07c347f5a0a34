"""Devices of the simulated CUDA for tests of the engine and of what is above it."""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import sys
import time

from host_outputs import Outputs
from simulation import Op

from fastdp.engine.replicas import Replica

if importlib.util.find_spec("torch") is not None:  # loaded before anything stands in for what it loads
    importlib.import_module("fastdp.capture.cuda_graphs.recorder")

# That a launched graph may take, which waits for those of other ranks.
GRAPH_SECONDS = 20.0


class Gpus:
    """Devices of the simulated CUDA, and what the replicas on them touch."""

    def __init__(self, sim, monkeypatch):
        self.sim = sim
        self.runtime = importlib.import_module("fastdp.runtime.cuda.cupy_api")
        self.device = importlib.import_module("fastdp.runtime.cuda.device")
        monkeypatch.setattr(self.runtime, "torch_device", lambda ordinal: "cpu")
        outputs = Outputs()
        close = self.device.CudaDevice.close

        def close_device(device, *args):
            outputs.forget(device)
            close(device, *args)

        def wrap_on(device, *args):
            return outputs.wrap(device, *args)

        monkeypatch.setattr(self.device.CudaDevice, "wrap", wrap_on)
        monkeypatch.setattr(self.device.CudaDevice, "close", close_device)
        self.made = []
        self.graphs, self.not_recorded = [], set()
        self.launches, self.launch_graph = [], self.runtime.graph_launch
        monkeypatch.setattr(self.runtime, "graph_launch", self._launch)
        self._ran_keras = False
        if importlib.util.find_spec("torch") is not None:
            graphs = "fastdp.capture.cuda_graphs"
            monkeypatch.setattr(importlib.import_module(f"{graphs}.recorder"), "TorchGraphs", self.graphs_of)
            recording = importlib.import_module(f"{graphs}.recording").Recording
            replay = recording.replay_in_step_graph
            monkeypatch.setattr(recording, "replay_in_step_graph", self._replaying(replay))
        for name in ("train", "launch", "predict", "update"):
            monkeypatch.setattr(Replica, name, self._touching(getattr(Replica, name), name))

    def devices(self, count, cards=None):
        cards = cards or self.sim.count
        more = [self.device.CudaDevice(i, i % cards, virtual=count > cards) for i in range(count)]
        self.made += more
        return more

    def close(self, seconds=20.0):
        """Close the devices, and give back their memory, and that of what is left of a test's models and graphs."""
        self.graphs.clear()  # they hold the replicas' memory
        if self._ran_keras:
            sys.modules["keras"].backend.clear_session()
        gc.collect()
        for device in self.made:
            device.close(seconds)
        gc.collect()
        for device in self.made:
            device.arena.trim()
            device.pinned.close()

    def drain(self, devices):
        """Let all streams run empty after a race was found, and forget it, with the accesses that were out of order."""
        for device in devices:
            for stream in device._streams:
                self.sim.synchronize(stream.handle)
            device.recover()
        self.sim.violations.clear()
        for allocation in self.sim.memory.alive():
            allocation.accesses.clear()

    def graphs_of(self, device, parts=False):
        """Torch's CUDA graphs on a device; operations in `not_recorded` cannot be captured."""
        simulated = importlib.import_module("simulated_graphs")
        self.graphs.append(simulated.SimulatedGraphs(self.sim, device, self.not_recorded, parts))
        return self.graphs[-1]

    def _launch(self, graph_exec, stream):
        """Launch a graph, and note it."""
        self.launch_graph(graph_exec, stream)
        self.launches.append((graph_exec, stream))

    def _replaying(self, replay):
        """What follows a launch on the worker is torch's, and computes at once: so it waits until the graph has run, as
        on a GPU the worker's stream would."""

        def run(recording, *args):
            results = replay(recording, *args)
            self._wait_for_graphs(importlib.import_module("fastdp.runtime.cuda.streams").current_stream().handle)
            return results

        return run

    def _wait_for_graphs(self, stream):
        """Wait until a stream has run all graphs that were launched on it."""
        deadline = time.monotonic() + GRAPH_SECONDS
        while True:
            with self.sim.lock:
                self.sim.settle()
                items = self.sim.streams[stream].queue
                if not any(isinstance(item, Op) and item.graph is not None for item in items):
                    return
            assert time.monotonic() < deadline, f"a graph on stream {stream:#x} waits for other ranks' for ever"
            time.sleep(1e-4)

    def _behind_graphs(self, launched, stream):
        """A replica's launched step whose outputs are looked at when its graph has run: see `wrap`."""
        outputs = launched.outputs

        def behind():
            self._wait_for_graphs(stream)
            return outputs()

        launched.outputs = behind
        return launched

    def _touching(self, work, name):
        def run(replica, *args):
            if not replica.device.on_gpu:
                return work(replica, *args)
            self._ran_keras = self._ran_keras or hasattr(replica._program, "trainer")
            rt, compute = self.runtime, replica.device.compute.handle
            flats = [replica.memory.variables, replica.memory.slots, replica.memory.gradients]
            ranges = [(rt.array_pointer(b), b.nbytes) for flat in flats for b in flat.buffers.values()]
            batch = args[0] if name != "update" else []
            reads = ranges + [(rt.array_pointer(a), a.nbytes) for a in batch]
            gradients = ranges[-len(flats[2].buffers) or len(ranges) :]
            writes = {"train": gradients, "launch": gradients, "predict": [], "update": ranges}[name]
            # What runs below reads host memory now. With the lock, as CuPy's calls have it: work that another worker
            # is just running has left its queue, and has not written yet.
            with self.sim.lock:
                self.sim.synchronize(compute)
                self.sim.submit(compute, name, reads, writes, lambda: None)
                self.sim.synchronize(compute)
            done = work(replica, *args)
            return self._behind_graphs(done, compute) if name == "launch" else done

        return run


@contextlib.contextmanager
def steady_state(box, devices):
    """A block of steps that allocates and loads nothing; gives the bytes of each copy into these devices."""
    sent, copy = [], box.runtime.copy_async
    feeding = [device.copy_in.handle for device in devices]

    def noted(target, source, nbytes, stream):
        if stream in feeding:
            sent.append(nbytes)
        copy(target, source, nbytes, stream)

    before, box.runtime.copy_async = dict(box.sim.calls), noted
    try:
        yield sent
    finally:
        box.runtime.copy_async = copy
    for name in ("malloc", "free", "hostAlloc", "freeHost", "moduleLoadData"):
        assert box.sim.calls[name] == before.get(name, 0), name
