"""Gradients that wait on their replicas, on the simulated CUDA: as on the host, and in order."""

from __future__ import annotations

import gc

import keras
import numpy as np
import pytest
from least_squares import line, rows

import fastdp
from fastdp.engine.replicas import Replica
from fastdp.keras.parallel_model import ParallelModel
from fastdp.options import Options
from fastdp.runtime.host.device import HostDevice

LIMIT = 20.0


@pytest.fixture
def box(gpus, monkeypatch):
    made = gpus(2, seed=0)
    original, fold = Replica.accumulate, Replica.fold

    def accumulate(replica, total, part):
        """One piece of work on the compute stream, which runs on host memory at once."""
        if replica.device.on_gpu:
            compute, rt = replica.device.compute.handle, made.runtime
            ranges = [[(rt.array_pointer(b), b.nbytes) for b in flat.buffers.values()] for flat in (total, part)]
            made.sim.synchronize(compute)
            made.sim.submit(compute, "accumulate", [*ranges[0], *ranges[1]], ranges[0], lambda: None)
            made.sim.synchronize(compute)
        original(replica, total, part)

    def fold_in_order(replica):
        """Likewise; it reads the reduced gradients and writes slots."""
        if replica.device.on_gpu:
            compute, rt, memory = replica.device.compute.handle, made.runtime, replica.memory
            ranges = [
                [(rt.array_pointer(b), b.nbytes) for b in flat.buffers.values()]
                for flat in (memory.slots, memory.gradients)
            ]
            made.sim.synchronize(compute)
            made.sim.submit(compute, "fold", [*ranges[0], *ranges[1]], ranges[0], lambda: None)
            made.sim.synchronize(compute)
        fold(replica)

    monkeypatch.setattr(Replica, "accumulate", accumulate)
    monkeypatch.setattr(Replica, "fold", fold_in_order)
    return made


@pytest.mark.parametrize("count", [1, 2, 4])
def test_cycles_of_uneven_batches_are_as_on_the_host(box, count):
    ours, theirs = line(None), line(None)
    host = [HostDevice(i) for i in range(count)]
    devices = box.devices(count, 2)
    engines = [
        fastdp.DataParallel(p, d, timeout=LIMIT, check_replicas=True) for p, d in ((ours, devices), (theirs, host))
    ]
    for i, n in enumerate([8, 1, 7, 8, 2, 1, 3, 1, 1]):
        for engine in engines:
            engine.train(rows(n, i, None), reduce=i % 3 == 2)
    found = devices[0].to_host(ours.parameters["w"])
    np.testing.assert_allclose(found, theirs.parameters["w"], rtol=1e-5)
    assert not np.allclose(found, line(None).parameters["w"])
    assert not box.sim.violations
    for device in host:
        device.close()
    del engines, engine, ours
    gc.collect()


def test_a_keras_model_accumulates_as_on_the_host_also_when_somebody_looks(box):
    host, results = [HostDevice(i) for i in range(3)], []
    for devices in (host, box.devices(3)):
        keras.utils.set_random_seed(3)
        layers = [keras.Input((6,)), keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(1)]
        parallel = ParallelModel(keras.Sequential(layers), devices, Options(timeout=LIMIT, check_replicas=True))
        parallel.compile(optimizer=keras.optimizers.SGD(0.1, momentum=0.9, gradient_accumulation_steps=3), loss="mse")
        seen = []
        for i, n in enumerate([8, 1, 7, 8, 2, 1, 9]):
            parallel.train_on_batch(*rows(n, i, None))
            if i in (0, 4, 6):
                seen.append([np.array(v).copy() for v in parallel.optimizer.variables])
        assert parallel.engine.program.accumulation.how.startswith("on the replicas")
        results.append([*parallel.get_weights(), *(value for values in seen for value in values)])
    for theirs, ours in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    assert not box.sim.violations
    for device in host:
        device.close()
    # The model's tensors lie in the simulated memory: they go before it does.
    del parallel, devices, layers, results, theirs, ours
    keras.backend.clear_session()
    gc.collect()
