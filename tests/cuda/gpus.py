"""Devices of the simulated CUDA for tests of the engine and of what is above it."""

from __future__ import annotations

import ctypes
import importlib

import numpy as np

from fastdp.replica import Replica


class Gpus:
    """Devices of the simulated CUDA, and what the replicas on them touch."""

    def __init__(self, sim, monkeypatch):
        self.sim = sim
        self.runtime = importlib.import_module("fastdp.backend.cuda.runtime")
        self.device = importlib.import_module("fastdp.backend.cuda.device")
        monkeypatch.setattr(self.runtime, "torch_device", lambda ordinal: "cpu")
        monkeypatch.setattr(self.device.CudaDevice, "wrap", self.wrap)
        self.made = []
        for name in ("train", "predict", "update"):
            monkeypatch.setattr(Replica, name, self._touching(getattr(Replica, name), name))

    def devices(self, count, cards=None):
        cards = cards or self.sim.count
        more = [self.device.CudaDevice(i, i % cards, virtual=count > cards) for i in range(count)]
        self.made += more
        return more

    @staticmethod
    def wrap(device, pointer, shape, dtype, owner):
        """Torch's tensors are on the host here: their values go where a GPU's tensor would be."""
        values = np.ndarray(shape, dtype, (ctypes.c_char * max(1, owner.nbytes)).from_address(pointer))
        array = device.empty(shape, np.dtype(dtype))
        if array.nbytes:
            np.asarray(array).view(np.ndarray)[...] = values
        return array

    def _touching(self, work, name):
        def run(replica, *args):
            if not replica.device.on_gpu:
                return work(replica, *args)
            rt, compute = self.runtime, replica.device.compute.handle
            flats = [replica.memory.variables, replica.memory.slots, replica.memory.gradients]
            ranges = [(rt.array_pointer(b), b.nbytes) for flat in flats for b in flat.buffers.values()]
            batch = args[0] if name != "update" else []
            reads = ranges + [(rt.array_pointer(a), a.nbytes) for a in batch]
            writes = {"train": ranges[-len(flats[2].buffers) or len(ranges) :], "predict": [], "update": ranges}[name]
            # What runs below reads host memory now. With the lock, as CuPy's calls have it: work that another worker
            # is just running has left its queue, and has not written yet.
            with self.sim.lock:
                self.sim.synchronize(compute)
                self.sim.submit(compute, name, reads, writes, lambda: None)
                self.sim.synchronize(compute)
            return work(replica, *args)

        return run
