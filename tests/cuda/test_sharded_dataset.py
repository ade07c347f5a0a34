"""A data set that is sharded over simulated GPUs: the rows of peers, the memory of each card, and what a step sends."""

from __future__ import annotations

import numpy as np
import pytest
from gpus import steady_state

import fastdp
from fastdp.data import DeviceDataset, Scaled
from fastdp.program.functions import FunctionProgram
from fastdp.runtime.host.device import HostDevice

LIMIT = 20.0


def echo():
    """Outputs that lie on the GPU: the rows themselves."""
    return FunctionProgram({"w": np.zeros(1, "float32")}, None, None, lambda p, batch: list(batch))


def arrays(rows=23):
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (rows, 2, 3)).astype(np.uint8)
    return [pixels, rng.normal(size=(rows, 2)).astype("float32"), rng.integers(0, 9, rows), np.empty((rows, 0), "f4")]


def outputs(engine, data, seed):
    """What the GPUs gather for the batches of an epoch; a batch of five rows leaves some of eight devices without."""
    return [[np.array(o) for o in engine.predict(batch).outputs] for batch in data.batches(9, seed=seed)]


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize(("count", "cards"), [(1, 1), (2, 2), (3, 3), (8, 8), (4, 2)])
@pytest.mark.parametrize("casts", [{}, {0: Scaled("float16", 2.0, -1.0)}])
def test_rows_of_all_cards_come_to_each(gpus, count, cards, casts, seed):
    box = gpus(cards, seed=seed)
    devices, host = box.devices(count, cards), HostDevice(0)
    engine, reference = (fastdp.DataParallel(echo(), one, timeout=LIMIT) for one in (devices, [host]))
    data, same = DeviceDataset(arrays(), engine, casts, sharded=True), DeviceDataset(arrays(), reference, casts)
    taken = {space: nbytes for space, nbytes in data.nbytes.items() if space != "host"}
    total = sum(array.nbytes for array in arrays())
    assert sum(taken.values()) == total
    assert set(taken) == {f"cuda:{i}" for i in range(cards)}
    for epoch in range(2):
        for ours, theirs in zip(outputs(engine, data, epoch), outputs(reference, same, epoch), strict=True):
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(a, b)
    host.close(LIMIT)
    del engine, data


def test_a_card_holds_its_part_of_the_memory(gpus):
    """Counted is what CUDA's malloc gave on each card, and was not freed."""
    box = gpus(4)
    devices = box.devices(4)
    pixels = np.zeros((4000, 64), np.uint8)
    taken = []

    def held():
        return [sum(one.nbytes for one in box.sim.memory.alive() if one.device == card) for card in range(4)]

    for sharded in (False, True):
        before = held()
        data = DeviceDataset([pixels], devices, sharded=sharded)
        taken.append([now - one for now, one in zip(held(), before, strict=True)])
        assert list(data.nbytes.values())[1:] == [pixels.nbytes // (4 if sharded else 1)] * 4
        del data
        for device in devices:
            device.arena.trim()
    for part, whole in zip(*reversed(taken), strict=True):
        assert whole / 4.1 < part < whole / 3.9


def test_what_kernels_do_not_reach_and_what_is_lost_comes_from_the_host(gpus, monkeypatch):
    box = gpus(3)
    devices = box.devices(3)
    engine = fastdp.DataParallel(echo(), devices, timeout=LIMIT)
    data, casts = DeviceDataset(arrays(), engine, {0: Scaled()}, sharded=True), np.float32(1 / 255)
    pixels, targets, labels, nothing = arrays()
    want = [pixels * casts, targets, labels, nothing]
    index = np.random.default_rng(3).permutation(23)

    def check():
        for got, array in zip(engine.predict(data.rows(index)).outputs, want, strict=True):
            np.testing.assert_array_equal(got, array[index])

    check()
    sent = []
    fill = box.device.RowGather.fill
    monkeypatch.setattr(
        box.device.RowGather, "fill", lambda rows, pinned: (sent.append(rows.pinned_nbytes), fill(rows, pinned))
    )
    check()
    assert max(sent) == 2 * 8 * 8  # row numbers and places
    devices[1].lost = "as a test says"
    check()
    assert sorted(sent[3:])[1] > 2 * 8 * 8  # the two others, in any order, send rows of the lost one too
    devices[1].lost = ""
    monkeypatch.setattr(box.device.CudaDevice, "reads", lambda device, other: False)
    check()
    before = dict(box.sim.calls)
    check()
    for name in ("malloc", "free", "hostAlloc", "freeHost", "memcpyPeerAsync"):
        assert box.sim.calls[name] == before.get(name, 0), name


def test_a_step_sends_row_numbers_alone_and_allocates_nothing(gpus):
    box = gpus(2)
    devices = box.devices(2)
    engine = fastdp.DataParallel(echo(), devices, timeout=LIMIT, cpu_merge=False)
    data = DeviceDataset(arrays(64), engine, {0: Scaled()}, sharded=True)
    for seed in (0, 1):
        for batch in data.batches(16, seed=seed):
            engine.predict(batch)
    with steady_state(box, devices) as sent:
        for batch in data.batches(16, seed=2):
            engine.predict(batch)
    assert sent == [2 * 8 * 8] * 2 * 4
    del engine, data, batch
