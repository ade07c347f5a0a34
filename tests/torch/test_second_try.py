"""A train step that could not be captured is captured once what was in the way has gone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastdp
from fastdp.capture import second_try, steps

STEPS = 16


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(4, 3).double()
        self.reads, self.counts, self.scale, self.calls = False, False, 1.0, 0

    def forward(self, x):
        y = self.linear(x) * self.scale
        if self.counts:
            self.calls += 1
        if self.reads and float(y.detach().sum()) > 1e9:
            return y * 0
        return y


def reads(step, net):
    net.reads = step < 5


def counts(step, net):
    net.counts = step < 5


def hooked(step, net):
    if step == 0:
        net.handle = [net.linear.weight.register_hook(lambda gradient: gradient * 2)]
    elif step == 5:
        net.handle[0].remove()


def warms_up(step, net):
    net.scale = min(1.0, 0.7 + 0.05 * step)


def counts_on(step, net):
    net.counts, net.other = True, step // 5


def train(net, change, take_step):
    for step in range(STEPS):
        change(step, net)
        take_step(step)


@pytest.mark.filterwarnings("ignore:fastdp runs")
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("change", [reads, counts, hooked, warms_up, counts_on])
def test_a_step_is_captured_when_what_was_in_the_way_has_gone(change, devices, monkeypatch):
    monkeypatch.setattr(second_try, "FIRST", 3)
    monkeypatch.setattr(second_try, "MOST", 3)
    monkeypatch.setattr(steps, "MOST_CHANGES", 1)
    net = Net()
    plain = copy.deepcopy(net)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    model = fastdp.wrap(net, gpus=devices, compile="trace")
    trained = model.train_step(F.mse_loss, lambda p: torch.optim.SGD(p, lr=0.1))
    x, y = torch.randn(STEPS, 8, 4).double(), torch.randn(STEPS, 8, 3).double()

    def plainly(step):
        optimizer.zero_grad()
        F.mse_loss(plain(x[step]), y[step]).backward()
        optimizer.step()

    train(net, change, lambda step: trained(x[step], y[step]))
    train(plain, change, plainly)
    torch.testing.assert_close(list(net.parameters()), list(plain.parameters()), rtol=1e-11, atol=1e-11)
    assert net.calls == plain.calls
    assert list(model.report())[-1]["how"] == ("eager" if change is counts_on else "traced")


def test_what_changes_all_the_time_is_tried_once_more():
    class Step:
        def watch(self, watch):
            watch.values(held, ["n", "other"], "net")

    held, tries = {"n": 0, "other": 0}, second_try.SecondTry(Step())
    due = []
    for step in range(800):
        held["n"] += 1
        held["other"] += step == 500
        if tries.is_due(changed=False):
            due.append(step)
    assert due == [15, 751]
