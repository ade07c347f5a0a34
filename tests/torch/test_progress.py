"""`fastdp.progress` around torch's loaders and loops: nothing changes, and the parallel module is watched."""

from __future__ import annotations

import re

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fastdp

X = torch.randn(22, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def devices():
    fastdp.set_virtual_devices(2)
    yield
    fastdp.set_virtual_devices(0)


def loader():
    return DataLoader(TensorDataset(X, X[:, :2]), batch_size=8)


def made():
    torch.manual_seed(1)
    return torch.nn.Linear(6, 2)


def by_step(module, watched):
    dp = fastdp.wrap(module, gpus=2, compile=None)
    step = dp.train_step(torch.nn.functional.mse_loss, lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    for x, y in fastdp.progress(loader(), parallel=dp) if watched else loader():
        step(x, y)
    return dp


def by_loop(module, watched):
    dp = fastdp.wrap(module, gpus=2, compile=None)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for x, y in fastdp.progress(loader(), parallel=dp) if watched else loader():
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(dp(x), y).backward()
        optimizer.step()
    return dp


@pytest.mark.parametrize("way", [by_step, by_loop])
def test_a_loop_trains_the_same_with_a_bar(way, capsys):
    weights = []
    for watched in (False, True):
        module = made()
        report = way(module, watched).report()
        weights.append(module.weight.detach().clone())
        assert [device.name for device in report.devices] == ["virtual:0", "virtual:1"]
    assert torch.equal(*weights)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"3/3 steps, [\d,]+ samples/s, input wait \d+%, [\d,]+ MB", line)
    assert bool(re.search(r"utilization \d+% \d+%", line)) == (way is by_step)


class Stream(IterableDataset):
    """A data set without a length."""

    def __iter__(self):
        yield from X


def test_a_loader_of_a_stream_has_no_length(capsys):
    seen = torch.cat(list(fastdp.progress(DataLoader(Stream(), batch_size=8))))
    assert torch.equal(seen, X)
    assert re.match(r"3 steps, [\d,]+ samples/s", capsys.readouterr().err)
