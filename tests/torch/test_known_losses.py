"""Torch's own losses in train steps: each replica computes its part, and the sum is the loss of one device."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastdp
from fastdp.comm.context import Context

ROWS, CLASSES = 9, 4
WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 4.0], dtype=torch.float64)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(*shape, ignored=0.0):
    generator = torch.Generator().manual_seed(3)
    found = torch.randint(CLASSES, shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < ignored, -100, found)


class Image(nn.Module):
    """Scores of classes for 2 x 3 pixels."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, CLASSES * 6)

    def forward(self, x):
        return self.linear(x).view(-1, CLASSES, 2, 3)


def scores():
    return nn.Linear(5, CLASSES)


def shares():
    return nn.Sequential(nn.Linear(5, CLASSES), nn.Sigmoid())


CASES = {
    "mse": (scores, nn.MSELoss(), numbers(ROWS, CLASSES)),
    "sum of squares": (scores, partial(F.mse_loss, reduction="sum"), numbers(ROWS, CLASSES)),
    "huber": (scores, nn.HuberLoss(delta=0.3), numbers(ROWS, CLASSES)),
    "binary": (shares, nn.BCELoss(), numbers(ROWS, CLASSES).sigmoid()),
    "binary logits": (scores, nn.BCEWithLogitsLoss(pos_weight=WEIGHTS), numbers(ROWS, CLASSES).sigmoid()),
    "divergence": (scores, nn.KLDivLoss(reduction="batchmean"), numbers(ROWS, CLASSES).softmax(1)),
    "cross entropy": (scores, F.cross_entropy, labels(ROWS)),
    "classes with weights": (scores, nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.1), labels(ROWS)),
    "ignored labels": (scores, nn.CrossEntropyLoss(), labels(ROWS, ignored=0.6)),
    "ignored pixels": (Image, nn.CrossEntropyLoss(WEIGHTS), labels(ROWS, 2, 3, ignored=0.5)),
    "log likelihood": (scores, nn.NLLLoss(WEIGHTS), labels(ROWS)),
}


def trained(y, step):
    return [step(numbers(ROWS, 5, seed=seed), y) for seed in range(3)]


def plainly(module, loss_fn):
    optimizer = torch.optim.SGD(module.parameters(), 0.1)

    def step(x, y):
        optimizer.zero_grad()
        loss = loss_fn(module(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


@pytest.fixture
def no_merged_loss(monkeypatch):
    """Fails a step that computes its loss on the merged outputs."""
    exchange = Context.exchange

    def watched(self, value, place):
        assert place != "the loss of the merged outputs"
        return exchange(self, value, place)

    monkeypatch.setattr(Context, "exchange", watched)


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
@pytest.mark.parametrize("reduction", [None, "mean"])
@pytest.mark.parametrize("name", CASES)
def test_parts_of_a_loss_add_up_to_that_of_one_device(name, reduction, devices, no_merged_loss):
    make, loss_fn, y = CASES[name]
    if reduction == "mean" and name == "sum of squares":
        reduction = "sum"
    module = make().double()
    plain = copy.deepcopy(module)
    expected = trained(y, plainly(plain, loss_fn))
    model = fastdp.wrap(module, gpus=devices, compile=None)
    step = model.train_step(loss_fn, lambda p: torch.optim.SGD(p, 0.1), reduction=reduction)
    torch.testing.assert_close(trained(y, step), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_a_loss_in_which_rows_meet_is_computed_on_the_merged_outputs(devices):
    module = nn.Linear(5, 1).double()
    plain, y = copy.deepcopy(module), numbers(ROWS, 1)

    def weighted(outputs, target):  # not torch's own: a mean over the rows that count
        return ((outputs - target).square() * (target > 0)).sum() / (target > 0).sum()

    expected = trained(y, plainly(plain, weighted))
    step = fastdp.wrap(module, gpus=devices, compile=None).train_step(weighted, lambda p: torch.optim.SGD(p, 0.1))
    torch.testing.assert_close(trained(y, step), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("devices", [2, 3])
def test_a_mean_of_half_precision_divides_once_as_on_one_device(devices):
    module = scores().bfloat16()
    plain, y = copy.deepcopy(module), labels(ROWS, ignored=0.3)
    x = numbers(ROWS, 5).bfloat16()
    theirs = F.cross_entropy(plain(x), y)
    theirs.backward()
    step = fastdp.wrap(module, gpus=devices, compile=None).train_step(
        F.cross_entropy, lambda p: torch.optim.SGD(p, 1.0)
    )
    assert torch.equal(step(x, y), theirs.detach())
