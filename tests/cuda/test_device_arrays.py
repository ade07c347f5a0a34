"""Batches that lie on GPUs already, data sets that do, and outputs that stay there: by one launch where one reaches."""

from __future__ import annotations

import numpy as np
import pytest
from gpus import steady_state

import fastdp
from fastdp.data import DeviceDataset, Scaled
from fastdp.program.functions import FunctionProgram
from fastdp.runtime.host.device import HostDevice

LIMIT = 20.0


def program():
    """Two outputs, and a gradient that depends on both arrays."""

    def forward(p, batch):
        x = batch[0].reshape(len(batch[0]), -1)
        return [np.array(x @ p["w"], subok=False), np.array(2 * batch[1], subok=False)]

    def train(p, batch):
        x, outputs = batch[0].reshape(len(batch[0]), -1), forward(p, batch)
        error = outputs[0] - batch[1]
        return float((error * error).mean()), {"w": 2 * x.T @ error / error.size}, outputs

    def update(p, slots, gradients):
        return {"w": p["w"] - 1e-6 * gradients["w"]}, {}

    return FunctionProgram({"w": np.zeros((6, 2), "float32")}, train, update, forward)


def echo():
    """Outputs that lie on the GPU: the rows themselves."""
    return FunctionProgram({"w": np.zeros(1, "float32")}, None, None, lambda p, batch: list(batch))


def rows(n, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(n, 2, 3)).astype("float32"), rng.normal(size=(n, 2)).astype("float32")]


def on_gpu(device, arrays):
    copies = [device.empty(array.shape, array.dtype) for array in arrays]
    for copy, array in zip(copies, arrays, strict=True):
        device.copy(copy, array)
    return copies


def host_results(batches, count=2):
    devices = [HostDevice(i) for i in range(count)]
    engine = fastdp.DataParallel(program(), devices, timeout=LIMIT)
    results = [[np.array(o) for o in engine.train(batch).outputs] for batch in batches]
    for device in devices:
        device.close()
    return results


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("cards", [1, 2])
@pytest.mark.parametrize("where", ["first", "mixed"])
def test_a_batch_on_a_gpu_is_dealt_out_there(gpus, cards, where, seed):
    box = gpus(cards, seed=seed)
    devices = box.devices(2, cards)
    engine = fastdp.DataParallel(program(), devices, timeout=LIMIT, check_replicas=True)
    batches = [rows(n, i) for i, n in enumerate([8, 8, 7, 1])]
    for batch, want in zip(batches, host_results(batches), strict=True):
        copies = on_gpu(devices[0], batch)
        if where == "mixed":
            copies[1] = batch[1]
        got = engine.train(copies).outputs
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        del copies, got
    kernels = {found for _, found in box.sim.functions.values()}
    assert ("slice_rows" in kernels) is (where == "first")  # one array is one copy
    del engine


def test_rows_wait_for_what_the_caller_has_enqueued(gpus):
    box = gpus(1)
    (device,) = box.devices(1)
    engine = fastdp.DataParallel(program(), [device], timeout=LIMIT)
    batch = rows(8)
    copies, pinned = on_gpu(device, rows(8, 9)), [device.pinned.empty(a.shape, a.dtype) for a in batch]
    for host, array, copy in zip(pinned, batch, copies, strict=True):
        host[...] = array
        with box.runtime.on(0):  # as CuPy and torch do by default
            box.runtime.copy_async(
                box.runtime.array_pointer(copy), host.ctypes.data, host.nbytes, box.runtime.DEFAULT_STREAM
            )
    got = engine.predict(copies).outputs
    np.testing.assert_array_equal(got[1], 2 * batch[1])
    assert not box.sim.violations
    del engine, copies, got, copy


class Foreign:
    """An array of another library on a GPU."""

    def __init__(self, array, strides=None):
        self._array = array
        self.shape, self.ndim, self.dtype = array.shape, array.ndim, array.dtype
        self.__cuda_array_interface__ = {
            "data": (array.data.ptr, False),
            "shape": array.shape,
            "typestr": array.dtype.str,
            "strides": strides,
            "version": 3,
        }


def test_arrays_of_other_libraries_are_taken_and_those_in_another_order_refused(gpus):
    box = gpus(2)
    devices = box.devices(2)
    engine = fastdp.DataParallel(program(), devices, timeout=LIMIT)
    batch = rows(8)
    foreign = [Foreign(copy) for copy in on_gpu(devices[1], batch)]
    got = engine.train(foreign).outputs
    np.testing.assert_allclose(got[0], host_results([batch])[0][0], rtol=1e-5, atol=1e-6)
    strided = [foreign[0], Foreign(foreign[1]._array, strides=(4, 32))]
    with pytest.raises(ValueError, match=r"C-contiguous.*tensor.contiguous"):
        engine.train(strided)
    (turned,) = on_gpu(devices[0], [np.zeros((2, 8), np.float32)])
    with pytest.raises(ValueError, match="C-contiguous"):
        engine.train([foreign[0], turned.T])
    assert np.isfinite(engine.train(foreign).sums[0])
    del engine, foreign, strided, got, turned


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize(("count", "cards", "peers"), [(1, 1, True), (2, 2, True), (2, 2, False), (4, 1, True)])
def test_several_outputs_are_merged_on_a_gpu_by_one_launch_where_it_is_reached(
    gpus, monkeypatch, count, cards, peers, seed
):
    box = gpus(cards, seed=seed)
    devices = box.devices(count, cards)
    if not peers:
        monkeypatch.setattr(box.device, "reaches", lambda device, other: device == other)
    engine = fastdp.DataParallel(echo(), devices, timeout=LIMIT, cpu_merge=False)
    engine.predict(rows(9))  # the replicas are up to date now
    for n in (9, 1):
        batch = rows(n)
        before = dict(box.sim.calls)
        outputs = engine.predict(batch).outputs
        assert all(box.runtime.is_array(output) for output in outputs)
        launched = box.sim.calls["launchKernel"] - before.get("launchKernel", 0)
        # One for each replica that reaches the first GPU: the others' copies go through the driver, one by one.
        reaching = [d for d in devices[:n] if peers or d.ordinal == 0]
        assert launched == len(reaching)
        assert box.sim.calls["moduleLoadData"] == before.get("moduleLoadData", 0)
        copied = box.sim.calls["memcpyPeerAsync"] - before.get("memcpyPeerAsync", 0)
        assert copied == 2 * (min(n, count) - len(reaching))
        for output, want in zip(outputs, batch, strict=True):
            np.testing.assert_array_equal(devices[0].to_host(output), want)
    del engine, outputs, output


# Data sets on the devices.


def pixels(n=23):
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (n, 2, 3)).astype(np.uint8), rng.normal(size=(n, 2)).astype("float32")]


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize(("count", "cards"), [(1, 1), (2, 2), (4, 1), (4, 2)])
@pytest.mark.parametrize("casts", [{}, {0: Scaled()}, {0: Scaled("float16", 2.0, -1.0)}])
def test_a_data_set_on_the_gpus_gives_what_it_gives_on_the_host(gpus, count, cards, casts, seed):
    box = gpus(cards, seed=seed)
    devices, hosts = box.devices(count, cards), [HostDevice(i) for i in range(count)]
    engine = fastdp.DataParallel(program(), devices, timeout=LIMIT, check_replicas=True)
    reference = fastdp.DataParallel(program(), hosts, timeout=LIMIT)
    data, same = (DeviceDataset(pixels(), one.devices, casts) for one in (engine, reference))
    assert len(data._copies) == cards  # not one for each virtual GPU
    for epoch in range(2):
        for ours, theirs in zip(data.batches(6, seed=epoch), same.batches(6, seed=epoch), strict=True):
            got, want = engine.train(ours), reference.train(theirs)
            np.testing.assert_array_equal(got.outputs[1], want.outputs[1])
            np.testing.assert_allclose(got.outputs[0], want.outputs[0], rtol=1e-4, atol=1e-5)
    for host in hosts:
        host.close()
    del engine, data, got


def test_its_steady_state_allocates_nothing_and_copies_row_numbers_alone(gpus):
    box = gpus(2)
    devices = box.devices(2)
    engine = fastdp.DataParallel(program(), devices, timeout=LIMIT)
    data = DeviceDataset(pixels(64), devices, {0: Scaled()})
    for batch in data.batches(16, seed=0):
        engine.train(batch, wants_outputs=False)
    with steady_state(box, devices) as sent:
        for batch in data.batches(16, seed=1):
            engine.train(batch, wants_outputs=False)
    assert sent == [8 * 8] * 2 * 4  # of int64
    engine = data = batch = None


def test_arrays_and_a_data_set_may_take_turns(gpus):
    box = gpus(1, seed=2)
    devices = box.devices(2)
    engine = fastdp.DataParallel(program(), devices, timeout=LIMIT)
    data = DeviceDataset(pixels(), devices, {0: Scaled()})
    for turn in range(3):
        batch = rows(12, turn)
        index = np.arange(12)[::-1]
        second = engine.predict(data.rows(index), structure=None).outputs[1]
        np.testing.assert_array_equal(second, 2 * pixels()[1][index])
        engine.train(batch, while_running=lambda b=batch: engine.stage(b))
        assert all(device._feed._staged is not None for device in devices)
        np.testing.assert_array_equal(engine.predict(data.rows(index)).outputs[1], second)
        np.testing.assert_array_equal(engine.predict(batch).outputs[1], 2 * batch[1])
    engine = data = second = None


def test_a_gpu_that_it_was_not_made_for_is_named(gpus):
    box = gpus(2)
    devices = box.devices(2)
    engine = fastdp.DataParallel(program(), devices, timeout=LIMIT)
    data = DeviceDataset(pixels(), devices[:1])
    with pytest.raises(ValueError, match=r"not on gpu:1: it was made for \['cuda:0'\]"):
        engine.train(data.rows([1, 2]))
    assert np.isfinite(engine.train(rows(4)).sums[0])
    del engine, data
