"""Outputs that are zero for all rows in the first steps, as penalties and counts are, and are not in later ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastdp


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4).double()

    def forward(self, x):
        return self.linear(x), self.other(x)


class Count(Base):
    def other(self, x):
        return (x > 9).sum()


class Peak(Base):
    def other(self, x):
        return F.relu(x - 9).amax()


class Penalty(Base):
    def other(self, x):
        return F.relu(self.linear(x).square() - 1e3).mean()


class Excess(Base):
    def other(self, x):
        return F.relu(self.linear(x).square() - 1e3).sum()


class OfMean(Base):
    def other(self, x):
        return F.relu(x.mean() - 20)


class PeakOfOutputs(Base):
    def other(self, x):
        return F.relu(self.linear(x).square() - 1e3).amax()


def rows(number: int) -> torch.Tensor:
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(number)).double()
    return x + torch.arange(9.0, dtype=torch.float64)[:, None] * (10.0 if number >= 2 else 0.0)


def steps(module, model) -> list[torch.Tensor]:
    optimizer, found = torch.optim.SGD(model.parameters(), lr=1e-5), []
    for number in range(5):
        y, other = model(rows(number))
        optimizer.zero_grad()
        (y.square().mean() + other).backward()
        optimizer.step()
        found.append(other.detach())
    return [*found, *(one.detach() for one in module.parameters())]


@pytest.mark.parametrize("compile", [None, "trace"])
@pytest.mark.parametrize("devices", [2, 3, 8])
@pytest.mark.parametrize("cls", [Count, Peak, Penalty, Excess])
def test_what_is_no_longer_zero_is_that_of_one_device(cls, devices, compile):
    plain, module = cls(), cls()
    expected = steps(plain, plain)
    assert expected[0] == 0
    assert expected[3] != 0
    torch.testing.assert_close(steps(module, fastdp.wrap(module, gpus=devices, compile=compile)), expected)


@pytest.mark.parametrize("cls", [OfMean, PeakOfOutputs])
def test_what_cannot_be_merged_then_is_refused_in_that_step(cls):
    module = cls()
    with pytest.raises(ValueError, match=r"output 1 of the module cannot be merged.*in this step differ"):
        steps(module, fastdp.wrap(module, gpus=3))


@pytest.mark.parametrize("cls", [Count, Penalty, OfMean])
def test_a_train_step_asks_what_they_are(cls):
    module = cls()
    model = fastdp.wrap(module, gpus=3)
    step = model.train_step(lambda out: out[0].square().mean() + out[1], lambda p: torch.optim.SGD(p, lr=1e-5))
    step(rows(0))
    before = module.linear.weight.detach().clone()
    with pytest.raises((ValueError, fastdp.ReplicaError), match="output 1 of the module cannot be merged"):
        step(rows(3))
    torch.testing.assert_close(module.linear.weight.detach(), before, rtol=0.0, atol=0.0)
