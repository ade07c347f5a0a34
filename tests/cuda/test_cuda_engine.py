"""The engine on the simulated CUDA: results equal those of the host, in an order that nothing is missing from.

What a replica itself computes runs on host memory at once; to the race detector it is one piece of work on the
device's compute stream that reads and writes what a replica may touch.
"""

from __future__ import annotations

import gc
import importlib

import fake_cupy
import keras
import numpy as np
import pytest
import torch
from least_squares import line, rows

import fastdp
from fastdp.buffers import ArraySpec, FlatBuffers
from fastdp.comm.algorithm import TWO_SHOT_NBYTES
from fastdp.options import Options
from fastdp.runtime.host.device import HostDevice

LIMIT = 20.0


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize(("count", "cards"), [(1, 1), (2, 2), (3, 3), (4, 1), (8, 2)])
@pytest.mark.parametrize("n", [1, 7, 32])
def test_a_function_program_trains_as_on_the_host(gpus, count, cards, n, seed):
    box = gpus(cards, seed=seed)
    ours, theirs = line(bias=True), line(bias=True)
    engine = fastdp.DataParallel(ours, box.devices(count, cards), timeout=LIMIT, check_replicas=True)
    host = [HostDevice(i) for i in range(count)]
    reference = fastdp.DataParallel(theirs, host, timeout=LIMIT)
    for step in range(3):
        batch = rows(n, step)
        got, want = engine.train(batch), reference.train(batch)
        np.testing.assert_allclose(got.outputs[0], want.outputs[0], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(got.sums, want.sums, rtol=1e-6)
    np.testing.assert_allclose(
        np.asarray(engine.predict(rows(n)).outputs[0]), reference.predict(rows(n)).outputs[0], rtol=1e-5, atol=1e-6
    )
    for device in host:
        device.close()
    del engine, ours, got
    gc.collect()


@pytest.mark.parametrize("update", ["first", "each"])
@pytest.mark.parametrize("cards", [1, 2, 3, 4, 8])
def test_shards_on_any_number_of_cards_have_the_bits_of_those_in_host_memory(gpus, monkeypatch, cards, update):
    monkeypatch.setattr(fake_cupy, "MULTIPROCESSORS", 8)
    box = gpus(cards, seed=0)
    ours, theirs = line(bias=True), line(bias=True)
    devices, host = box.devices(cards), [HostDevice(0)]
    engine = fastdp.DataParallel(ours, devices, shards=8, timeout=LIMIT, check_replicas=True, update=update)
    reference = fastdp.DataParallel(theirs, host, shards=8, timeout=LIMIT)
    assert len(engine.replicas) == len(reference.replicas) == 8
    assert {part.part_of for part in engine.devices} == set(devices)
    assert set(engine._communicator.choice.ways) == {"one-shot", "two-shot"}  # NCCL's sums depend on the cards
    for step, n in enumerate((32, 5, 32, 19)):
        batch = rows(n, step)
        got, want = engine.train(batch), reference.train(batch)
        assert got.sums.tobytes() == want.sums.tobytes()
        assert np.asarray(got.outputs[0]).tobytes() == np.asarray(want.outputs[0]).tobytes()
    for name, value in theirs.parameters.items():
        assert np.asarray(ours.parameters[name]).tobytes() == value.tobytes()
    host[0].close()
    del engine, ours, got
    gc.collect()


def test_gpus_add_up_at_most_eight_shards(gpus):
    box = gpus(2)
    with pytest.raises(ValueError, match=r"`shards` must be at most 8 on GPUs\. Received: shards=16"):
        fastdp.DataParallel(line(), box.devices(2), shards=16)


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize(("count", "cards"), [(2, 2), (4, 1), (8, 2)])
def test_an_exposed_home_is_updated_once_and_copied_to_all_before_each_step(gpus, count, cards, seed):
    box = gpus(cards, seed=seed)
    ours, theirs = line(bias=True), line(bias=True)
    ours.home_is_exposed = True
    updated, make_update = [], ours.update

    def update(state, totals):
        updated.append(state)
        make_update(state, totals)

    ours.update = update
    engine = fastdp.DataParallel(ours, box.devices(count, cards), timeout=LIMIT, update="each")
    host = [HostDevice(i) for i in range(count)]
    reference = fastdp.DataParallel(theirs, host, timeout=LIMIT)
    for step, n in enumerate((32, 1, 7, 32)):
        if step == 2:
            for program in (ours, theirs):
                program.set_parameters({"w": 0.5 * program.parameters["w"]})
        batch = rows(n, step)
        np.testing.assert_allclose(engine.train(batch).sums, reference.train(batch).sums, rtol=1e-5)
    assert engine.update == "first"
    assert len(updated) == 4
    for device in host:
        device.close()
    del engine, ours
    gc.collect()


def test_the_steady_state_allocates_nothing_and_waits_for_no_whole_device(gpus):
    box = gpus(2)
    engine = fastdp.DataParallel(line(bias=True), box.devices(2), timeout=LIMIT)
    for _ in range(4):  # the two batch buffers, the staging ring, pinned outputs
        engine.train(rows(16))
    before = dict(box.sim.calls)
    for _ in range(5):
        engine.train(rows(16))
    after = box.sim.calls
    assert after["memcpyAsync"] > before["memcpyAsync"]  # the counter counts
    for name in ("malloc", "free", "hostAlloc", "freeHost", "deviceSynchronize", "deviceEnablePeerAccess"):
        assert after[name] == before.get(name, 0), name


@pytest.mark.parametrize("missing", ["compute", "communication"])
def test_a_missing_wait_is_found(gpus, monkeypatch, missing):
    box = gpus(2)
    streams = importlib.import_module("fastdp.runtime.cuda.streams")
    engine = fastdp.DataParallel(line(bias=True), box.devices(2), timeout=LIMIT)
    engine.train(rows(8))
    kept = streams.CudaStream._passed
    monkeypatch.setattr(
        streams.CudaStream, "_passed", lambda self, event: None if self.name == missing else kept(self, event)
    )
    box.sim.synchronize = lambda handle: None  # the replicas' own work no longer joins the host

    def two_steps():
        for _ in range(2):
            engine.train(rows(8))

    with pytest.raises(RuntimeError, match="nothing orders"):
        two_steps()
    assert box.sim.violations
    box.sim.violations.clear()
    del box.sim.synchronize
    monkeypatch.undo()


@pytest.mark.parametrize("cpu_merge", [True, False])
def test_outputs_are_merged_where_they_are_asked_for(gpus, cpu_merge):
    box = gpus(3)
    devices = box.devices(3)
    engine = fastdp.DataParallel(line(bias=True), devices, timeout=LIMIT, cpu_merge=cpu_merge, merge_device=1)
    batch = rows(7)
    (output,) = engine.predict(batch).outputs
    assert box.runtime.is_array(output) is not cpu_merge
    if not cpu_merge:
        assert box.runtime.array_device(output) == devices[1].ordinal
        output = devices[1].to_host(output)
    program = line(bias=True)
    np.testing.assert_allclose(output, program._predict(program.parameters, batch)[0], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="merge_device"):
        fastdp.DataParallel(line(bias=True), devices, merge_device=3)


@pytest.mark.parametrize("nccl", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("n", [1, 70_000, 700_000])
def test_all_reduce_by_every_way(gpus, monkeypatch, nccl, dtype, n):
    box = gpus(2)
    monkeypatch.setattr(box.runtime, "nccl_available", lambda: nccl)
    cuda = importlib.import_module("fastdp.comm.cuda.communicator")
    devices = box.devices(2 if nccl else 4)
    comm = cuda.CudaCommunicator(devices, LIMIT)
    spec = [ArraySpec("g", (n,), dtype)]
    flats = [FlatBuffers(spec, device) for device in devices]
    host = np.random.default_rng(0).integers(-4, 5, (len(devices), n)).astype("float32")

    def stored(values):
        return as_stored(values, dtype)

    for device, flat, values in zip(devices, flats, host, strict=True):
        device.copy(flat.views[0], stored(values))
    bucket = flats[0].buckets()
    ways = {comm.how(one) for one in bucket}
    with pytest.warns(UserWarning, match="host memory") if "host" in ways else nothing():
        comm.all_reduce(flats[:-1], flats, bucket)  # the last one has no rows
        for device in devices:
            device.synchronize(LIMIT)
    comm.check()
    want = stored(host[:-1].sum(0))
    for device, flat in zip(devices, flats, strict=True):
        assert device.communication.record().finish(LIMIT) is None
        np.testing.assert_array_equal(device.to_host(flat.views[0]), want)
    expected = {"host"} if dtype == "float64" and not nccl else {"nccl"} if dtype == "float64" else None
    if expected:
        assert ways == expected
    elif n == 1:
        assert ways == {"one-shot"}
    elif n * 4 > TWO_SHOT_NBYTES and dtype == "float32":
        assert ("nccl" if nccl else "two-shot") in ways
    del flats, comm
    gc.collect()


def as_stored(values, dtype):
    """fp32 numbers as the buffers of `dtype` keep them."""
    if dtype == "bfloat16":
        return torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    return values.astype(dtype)


class nothing:
    def __enter__(self):
        return self

    def __exit__(self, *args):
        return False


def test_a_failure_of_a_replica_changes_no_weight_and_the_next_step_works(gpus):
    box = gpus(2)
    program = line(bias=True)
    engine = fastdp.DataParallel(program, box.devices(2), timeout=LIMIT)
    engine.train(rows(8))
    before = engine.replicas[1].device.to_host(engine.replicas[1].memory.variables.buffers["float32"])
    kept = program._train
    program._train = lambda p, batch: (_ for _ in ()).throw(FloatingPointError("no number"))
    with pytest.raises(FloatingPointError, match="no number"):
        engine.train(rows(8))
    program._train = kept
    after = engine.replicas[1].device.to_host(engine.replicas[1].memory.variables.buffers["float32"])
    np.testing.assert_array_equal(before, after)
    engine.train(rows(8))


def model():
    keras.utils.set_random_seed(3)
    inputs = keras.Input((6,))
    x = keras.layers.Dense(8, activation="tanh")(inputs)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Dropout(0.3, seed=5)(x)
    return keras.Model(inputs, keras.layers.Dense(2)(x))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_keras_model_trains_as_on_the_host(gpus, optimizer):
    from fastdp.keras.parallel_model import ParallelModel

    box = gpus(2)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 6)).astype("float32"), rng.normal(size=(20, 2)).astype("float32")
    results = []
    host = [HostDevice(i) for i in range(3)]
    for devices in (host, box.devices(3)):
        parallel = ParallelModel(model(), devices, Options(timeout=LIMIT, check_replicas=True))
        parallel.compile(optimizer=optimizer, loss="mse", metrics=["mae"])
        history = parallel.fit(x, y, batch_size=8, epochs=2, verbose=0, shuffle=False).history
        results.append((history, parallel.predict(x, batch_size=7, verbose=0), parallel.get_weights()))
    for key in results[0][0]:
        np.testing.assert_allclose(results[0][0][key], results[1][0][key], rtol=1e-5)
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-4, atol=1e-5)
    for a, b in zip(results[0][2], results[1][2], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    for device in host:
        device.close()
    # The model's tensors lie in the simulated memory: they go before it does.
    del parallel, results, devices
    keras.backend.clear_session()
    gc.collect()


def test_a_torch_module_trains_as_on_the_host(gpus):
    from fastdp.torch.parallel_module import TorchParallel

    box = gpus(2)
    torch.manual_seed(0)
    x, y = torch.randn(11, 4), torch.randn(11, 1)
    results = []
    host = [HostDevice(i) for i in range(3)]
    for devices in (host, box.devices(3)):
        torch.manual_seed(1)
        module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
        dp = TorchParallel(module, devices, Options(timeout=LIMIT))
        step = dp.train_step(torch.nn.functional.mse_loss, lambda p: torch.optim.SGD(p, lr=0.1))
        losses = [float(step(x, y)) for _ in range(4)]
        results.append((losses, dp(x).detach().clone()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-5)
    for device in host:
        device.close()
    del dp, step, module, devices, results
    gc.collect()


def test_communicators_of_an_engine_that_is_gone_are_destroyed_when_a_step_is_over(gpus):
    """Not by the garbage collector, which may run between the launches of two kernels that wait for each other."""
    box = gpus(2)
    devices = box.devices(2)
    # In another order: engines on the same devices share their communicators.
    first, second = (fastdp.DataParallel(line(bias=True), order, timeout=LIMIT) for order in (devices, devices[::-1]))
    first.train(rows(7))
    before = box.sim.calls["destroy"]
    del first
    gc.collect()
    assert box.sim.calls["destroy"] == before
    second.train(rows(7))
    assert box.sim.calls["destroy"] == before + 2
