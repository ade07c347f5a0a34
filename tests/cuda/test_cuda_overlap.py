"""Buckets are reduced on the simulated CUDA while backward goes on: issued early, ordered, and undone by nothing."""

from __future__ import annotations

import gc
import importlib
import random
import threading
import time

import numpy as np
import pytest

import fastdp
from fastdp.buffers import FlatBuffers
from fastdp.comm import algorithm
from fastdp.engine.reductions import WARM_STEPS
from fastdp.program.base import Result
from fastdp.program.functions import FunctionProgram
from fastdp.runtime.host.device import HostDevice

LIMIT = 20.0
NAMES = ["first", "second", "last"]


@pytest.fixture
def gpus(gpus, monkeypatch):
    """Devices of a simulated box; one array per bucket."""
    monkeypatch.setattr(FlatBuffers.buckets, "__defaults__", (4, 4))

    def start(count, way="kernels", **options):
        if way == "nccl":
            monkeypatch.setattr(algorithm, "ONE_SHOT_NBYTES", 0)
            monkeypatch.setattr(algorithm, "TWO_SHOT_NBYTES", 0)
        return gpus(count, **options)

    return start


class Layers(FunctionProgram):
    """Issues the gradient of one array after the other to the compute stream, the last first, and announces each."""

    between = staticmethod(lambda rank, bucket: None)
    sim = None

    def train(self, state, batch, context):
        loss, gradients, _ = self._train(state.parameters, batch)
        for bucket, name in enumerate(reversed(NAMES)):
            values = np.multiply(gradients[name], np.float32(context.rows.share))
            self._write(state.gradients[name], values, context.device)
            context.ready(bucket)
            self.between(context.rank, bucket)
        return Result([], np.array([float(loss) * context.rows.share]))

    def _write(self, view, values, device):
        """A kernel that writes a gradient, in the order of the compute stream and at a time of the GPU's choice."""
        target = np.asarray(view).view(np.ndarray)
        if not device.on_gpu:
            target[...] = values
            return
        pointer = importlib.import_module("fastdp.runtime.cuda.cupy_api").array_pointer(view)

        def run():
            target[...] = values

        self.sim.submit(device.compute.handle, "gradient", [], [(pointer, view.nbytes)], run)


def train(parameters, batch):
    x = np.array(batch[0], subok=False)
    errors = {name: x @ np.array(parameters[name], subok=False) - 1 for name in NAMES}
    loss = sum((error**2).mean() for error in errors.values())
    return loss, {name: 2 * x.T @ error / len(x) for name, error in errors.items()}, []


def program(sim=None):
    start = {name: np.linspace(-1, 1, 16, dtype=np.float32) * (i + 1) for i, name in enumerate(NAMES)}
    made = Layers(start, train, lambda p, s, g: ({n: p[n] - 0.05 * g[n] for n in NAMES}, {}), None)
    made.sim = sim
    return made


def batch(rows, seed=0):
    return [np.random.default_rng(seed).normal(size=(rows, 16)).astype("f4")]


class Issued:
    """Which buckets' collectives have been issued in the middle of backward."""

    def __init__(self, monkeypatch):
        self.buckets, self._changed = [], threading.Condition()
        reduction = importlib.import_module("fastdp.comm.cuda.reduction").CudaReduction
        kept = reduction._begin

        def begin(this, bucket):
            kept(this, bucket)
            with self._changed:
                self.buckets.append(bucket)
                self._changed.notify_all()

        monkeypatch.setattr(reduction, "_begin", begin)

    def wait_for(self, bucket):
        with self._changed:
            assert self._changed.wait_for(lambda: bucket in self.buckets, LIMIT), "it was not issued meanwhile"


def warm(engine, rows):
    for seed in range(WARM_STEPS):
        engine.train(batch(rows, 100 + seed), wants_outputs=False)
        assert not (engine.devices[0].on_gpu and engine.times._watches[-1].early)


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize(("way", "count", "cards"), [("kernels", 2, 2), ("kernels", 4, 1), ("nccl", 3, 3)])
def test_collectives_are_issued_before_any_backward_ends_and_are_ordered_behind_all_gradients(
    gpus, monkeypatch, way, count, cards, seed
):
    box = gpus(cards, way, seed=seed)
    issued = Issued(monkeypatch)
    ours, theirs = program(box.sim), program()
    devices = box.devices(count, cards)
    engine = fastdp.DataParallel(ours, devices, timeout=LIMIT, check_replicas=True)
    host = [HostDevice(i) for i in range(count)]
    reference = fastdp.DataParallel(theirs, host, timeout=LIMIT)
    assert {engine._communicator.how(bucket) for bucket in engine.group.buckets} == {
        "nccl" if way == "nccl" else "one-shot"
    }
    draw = random.Random(seed)
    for device in devices:
        device.delay = lambda: time.sleep(draw.random() * 0.001)
    warm(engine, 7)
    warm(reference, 7)
    for step in range(3):
        issued.buckets.clear()
        ours.between = lambda rank, bucket: issued.wait_for(bucket)
        got = engine.train(batch(7, step), wants_outputs=False)
        ours.between = lambda rank, bucket: None
        want = reference.train(batch(7, step), wants_outputs=False)
        assert sorted(issued.buckets) == [0, 1, 2]
        assert engine.times._watches[-1].early == 3
        np.testing.assert_allclose(got.sums, want.sums, rtol=1e-6)
    for name in NAMES:
        np.testing.assert_allclose(np.asarray(ours.parameters[name]), theirs.parameters[name], rtol=1e-5, atol=1e-6)
    for device in host:
        device.close()
    del engine, ours
    gc.collect()


@pytest.mark.parametrize("way", ["kernels", "nccl"])
def test_a_replica_without_rows_gets_the_sums_of_the_others(gpus, way):
    box = gpus(3, way, seed=3)
    ours, theirs = program(box.sim), program()
    engine = fastdp.DataParallel(ours, box.devices(3), timeout=LIMIT, check_replicas=True)
    host = [HostDevice(0)]
    reference = fastdp.DataParallel(theirs, host, timeout=LIMIT)
    for seed in range(WARM_STEPS + 2):
        engine.train(batch(2, seed), wants_outputs=False)
        reference.train(batch(2, seed), wants_outputs=False)
    assert engine.times._watches[-1].early == 3
    for name in NAMES:
        np.testing.assert_allclose(np.asarray(ours.parameters[name]), theirs.parameters[name], rtol=1e-5, atol=1e-6)
    host[0].close()
    del engine, ours
    gc.collect()


def test_a_collective_that_waits_for_no_gradient_is_found(gpus, monkeypatch):
    """The proof proves something: without the waits for the replicas' events the simulation finds the race."""
    box = gpus(2, seed=1)
    engine = fastdp.DataParallel(program(box.sim), box.devices(2), timeout=LIMIT)
    warm(engine, 6)
    reduction = importlib.import_module("fastdp.comm.cuda.reduction")
    monkeypatch.setattr(reduction, "cupy_api", Deaf(reduction.cupy_api))

    def steps():
        for seed in range(4):
            engine.train(batch(6, seed), wants_outputs=False)

    with pytest.raises(RuntimeError, match="nothing orders"):
        steps()
    assert box.sim.violations
    box.sim.violations.clear()


class Deaf:
    """The runtime without stream_wait_event."""

    def __init__(self, runtime):
        self._runtime = runtime

    def __getattr__(self, name):
        return getattr(self._runtime, name)

    def stream_wait_event(self, stream, event):
        """Nothing."""


@pytest.mark.parametrize("way", ["kernels", "nccl"])
def test_a_failure_after_a_collective_was_issued_changes_no_weight_and_the_next_step_works(gpus, monkeypatch, way):
    box = gpus(2, way, seed=2)
    issued = Issued(monkeypatch)
    ours = program(box.sim)
    devices = box.devices(2)
    engine = fastdp.DataParallel(ours, devices, timeout=LIMIT, check_replicas=True)
    warm(engine, 6)

    def values():
        return [d.to_host(r.memory.variables.buffers["float32"]) for d, r in zip(devices, engine.replicas, strict=True)]

    def fail(rank, bucket):
        issued.wait_for(0)
        if bucket == 1 and rank == 1:
            raise FloatingPointError("planned")

    before = values()
    ours.between = fail
    with pytest.raises(FloatingPointError, match="planned"):
        engine.train(batch(6, 5), wants_outputs=False)
    np.testing.assert_array_equal(before, values())
    ours.between = lambda rank, bucket: None
    engine.train(batch(6, 6), wants_outputs=False)
    assert not np.array_equal(before, values())


def test_a_call_that_fails_in_the_middle_of_issuing_fails_the_step_and_nobody_hangs(gpus):
    box = gpus(2, "nccl")
    ours = program(box.sim)
    engine = fastdp.DataParallel(ours, box.devices(2), timeout=LIMIT)
    warm(engine, 6)
    box.sim.failures["streamWaitEvent"] = 719

    began = time.monotonic()
    with pytest.raises(fastdp.ReplicaError, match="LaunchFailure"):
        engine.train(batch(6, 5), wants_outputs=False)
    assert time.monotonic() - began < LIMIT / 2
    engine.train(batch(6, 6), wants_outputs=False)
    del engine, ours
    gc.collect()


def test_nothing_is_allocated_by_steps_that_begin_early(gpus):
    box = gpus(2)
    engine = fastdp.DataParallel(program(box.sim), box.devices(2), timeout=LIMIT)
    warm(engine, 6)
    engine.train(batch(6), wants_outputs=False)
    before = dict(box.sim.calls)
    for seed in range(3):
        engine.train(batch(6, seed), wants_outputs=False)
    for name in ("malloc", "free", "hostAlloc", "freeHost", "deviceSynchronize"):
        assert box.sim.calls[name] == before.get(name, 0), name
