"""Torch modules on a `DeviceDataset`: the loop and train steps give what they give on the arrays, to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastdp
from fastdp.data import DeviceDataset, Scaled

ROWS = 23


@pytest.fixture(autouse=True)
def _devices():
    fastdp.set_virtual_devices(8)
    yield
    fastdp.set_virtual_devices(0)


def arrays():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (ROWS, 6)).astype("uint8"), rng.integers(0, 3, ROWS)


def wrapped(gpus):
    torch.manual_seed(0)
    return fastdp.wrap(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)), gpus=gpus)


def loaders(parallel, sharded):
    """The data set and the same as tensors, in torch's own order."""
    x, y = arrays()
    data = DeviceDataset((x, y), parallel, casts={0: Scaled(scale=1 / 255)}, sharded=sharded)
    floats = torch.from_numpy(x).float() * np.float32(1 / 255)
    for kind in ("data set", "tensors"):
        torch.manual_seed(4)
        if kind == "tensors":
            yield DataLoader(TensorDataset(floats, torch.from_numpy(y)), 6, shuffle=True)
        else:
            yield DataLoader(data, 6, shuffle=True, collate_fn=data.collate)


@pytest.mark.parametrize(("gpus", "sharded"), [(1, False), (2, False), (3, False), (8, False), (2, True), (3, True)])
def test_a_train_step_and_a_loop_give_what_they_give_on_tensors(gpus, sharded):
    found = []
    for loader in loaders(wrapped(gpus), sharded):
        parallel, loss_fn = wrapped(gpus), nn.CrossEntropyLoss()
        step = parallel.train_step(loss_fn, lambda p: torch.optim.SGD(p, 0.1), reduction="mean")
        losses = [float(step(x, y)) for x, y in loader]
        optimizer = torch.optim.SGD(parallel.parameters(), 0.1)
        for x, y in loader:
            optimizer.zero_grad()
            loss = loss_fn(parallel(x), torch.as_tensor(np.asarray(y)))
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        found.append((losses, [one.detach().clone() for one in parallel.parameters()]))
    assert found[0][0] == found[1][0]
    assert len(found[0][0]) == 8
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_its_rows_and_its_memory():
    x, y = arrays()
    data = DeviceDataset({"x": x, "y": y}, wrapped(2))
    assert data.nbytes == {"host": x.nbytes + y.nbytes}
    row = data[5]
    np.testing.assert_array_equal(row["x"], x[5])
    assert row["y"] == y[5]
    batch = data.collate(data.__getitems__([3, 1]))
    np.testing.assert_array_equal(np.asarray(batch["x"]), x[[3, 1]])


@pytest.mark.parametrize("gpus", [1, 2])
def test_the_report_says_where_the_rows_of_each_data_set_are_and_how_many_batches_came(gpus):
    parallel = wrapped(gpus)
    step = parallel.train_step(nn.CrossEntropyLoss(), lambda p: torch.optim.SGD(p, 0.1))
    sets = [DeviceDataset(arrays(), parallel, {0: Scaled()}, sharded=sharded) for sharded in (True, False)]
    for data, count in zip(sets, (3, 2), strict=True):
        for x, y in [batch.nested() for batch in data.batches(6)][:count]:
            step(x, y)
            parallel(x)
    step(torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64))
    sharded, whole = parallel.report().inputs
    assert (sharded["batches"], whole["batches"]) == (6, 4)
    assert sharded["how"].startswith("a DeviceDataset, whose rows the devices have in parts: 0.0 MB on virtual:0")
    assert whole["how"] == "a DeviceDataset, whose rows the devices have"
    assert sharded["waited_seconds"] > 0
    assert 0 < sharded["share"] < 1
    assert "How batches came" in str(parallel.report())
