"""Modules that change their arguments in place: as on one device, or refused by name."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastdp

SEVERAL = [2, 3, 8]


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Scales(nn.Module):
    """Normalizes its input in place."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3).double()

    def forward(self, x):
        x.sub_(0.5).mul_(2.0)
        return self.linear(x)


class Masks(Scales):
    """Counts the calls in a mask of all rows."""

    def forward(self, x, mask):
        mask.add_(1.0)
        return self.linear(x * mask)


def rectified():
    return nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3)).double()


def trained_plainly(module, x, y):
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    losses = []
    for _ in range(3):  # the same memory again: each pass finds what the last one has left
        optimizer.zero_grad()
        loss = F.mse_loss(module(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("devices", [1, *SEVERAL])
@pytest.mark.parametrize("make", [Scales, rectified])
def test_a_train_step_leaves_the_batch_as_one_device_does(make, devices):
    module, x, y = make(), numbers(9, 4), numbers(9, 3, seed=1)
    plain, theirs = copy.deepcopy(module), x.clone()
    expected = trained_plainly(plain, theirs, y)
    step = fastdp.wrap(module, gpus=devices).train_step(F.mse_loss, lambda p: torch.optim.SGD(p, 0.1))
    torch.testing.assert_close([step(x, y) for _ in range(3)], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x, theirs, rtol=0, atol=0)
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("devices", [1, *SEVERAL])
@pytest.mark.parametrize("make", [Scales, rectified])
def test_a_loop_leaves_the_batch_as_one_device_does(make, devices):
    module, x, y = make(), numbers(9, 4), numbers(9, 3, seed=1)
    plain, theirs = copy.deepcopy(module), x.clone()
    expected = trained_plainly(plain, theirs, y)
    found = trained_plainly(fastdp.wrap(module, gpus=devices), x, y)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x, theirs, rtol=0, atol=0)
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("devices", SEVERAL)
def test_an_argument_that_all_replicas_would_change_is_refused(devices):
    module, x, mask = Masks(), numbers(9, 4), numbers(4, seed=1)
    model, before = fastdp.wrap(module, gpus=devices, rows={"mask": "same"}), mask.clone()
    with pytest.raises(ValueError, match=r"changes its argument `mask` in place.*mask = mask.clone\(\)"):
        model(x, mask)
    with pytest.raises(ValueError, match="changes its argument `mask` in place"):
        model.train_step(F.mse_loss, lambda p: torch.optim.SGD(p, 0.1))((x, mask), numbers(9, 3))
    assert torch.equal(mask, before)


@pytest.mark.parametrize("devices", SEVERAL)
@pytest.mark.parametrize("make", [Scales, lambda: nn.Linear(4, 3).double()])
def test_a_batch_that_is_changed_before_backward_is_an_error_as_in_torch(make, devices):
    x = numbers(9, 4)
    loss = fastdp.wrap(make(), gpus=devices)(x).sum()
    x.zero_()
    with pytest.raises(RuntimeError, match=r"changed again before backward|modified by an inplace operation"):
        loss.backward()


class Fills(Scales):
    """Puts something into an argument, as `how` says."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, given, log=None):
        if self.how == "copy":
            given = dict(given)
        hidden = self.linear(given["x"])
        if self.how == "log":
            log.append(hidden.detach())
        elif self.how == "count":
            given["calls"] += 1
        else:
            given["hidden"] = hidden
        return hidden


@pytest.mark.parametrize(("how", "place"), [("key", "[0]['hidden']"), ("count", "[0]['calls']"), ("log", "['log'][0]")])
def test_what_forward_puts_into_a_dict_or_a_list_is_refused_by_name(how, place):
    module, given, log = Fills(how), {"x": numbers(8, 4), "calls": 1000}, []
    with pytest.raises(ValueError, match=re.escape(f"into an argument, at {place}")):
        fastdp.wrap(module, gpus=2)(given, log=log)
    assert (given.keys(), given["calls"], log) == ({"x", "calls"}, 1000, [])


def test_forward_may_fill_a_copy_of_a_dict():
    module, given = Fills("copy"), {"x": numbers(8, 4), "calls": 1000}
    torch.testing.assert_close(fastdp.wrap(module, gpus=2)(given), module(given), rtol=0.0, atol=1e-12)
