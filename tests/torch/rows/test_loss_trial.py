"""What `reduction=` says of a loss is tried: a wrong word, and a loss function that keeps something, are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastdp


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = net()

    def forward(self, x):
        return F.dropout(self.body(x), 0.3)


def squares(outputs, y):
    return (outputs - y).square()


WRONG = {
    "a sum": ("mean", lambda o, y: squares(o, y).sum()),
    "a mean": ("sum", lambda o, y: squares(o, y).mean()),
    "a root": ("mean", lambda o, y: squares(o, y).mean().sqrt()),
    "what is not zero": ("mean", lambda o, y: (squares(o, y) * (y != 0)).sum() / (y != 0).sum()),
    "clamped": ("mean", lambda o, y: squares(o, y).mean().clamp(max=0.9)),
    "rows that meet": ("mean", lambda o, y: (o - o.mean(0)).square().mean()),
}


@pytest.mark.parametrize("make", [net, Noisy])
@pytest.mark.parametrize("case", WRONG)
def test_a_loss_that_is_not_what_the_user_says_is_refused(case, make):
    reduction, loss_fn = WRONG[case]
    module, y = make(), torch.randn(9, 3).double()
    y[: 9 // 2, :2] = 0
    step = fastdp.wrap(module, gpus=2).train_step(loss_fn, torch.optim.SGD, reduction=reduction)
    with pytest.raises(ValueError, match=f"the loss is the {reduction} over samples, and it is not.*Leave `reduction`"):
        step(torch.randn(9, 4).double(), y)


class Centers(nn.Module):
    """A loss with a memory."""

    def __init__(self):
        super().__init__()
        self.register_buffer("center", torch.zeros(3).double())
        self.calls = 0

    def forward(self, outputs, y):
        self.calls += 1
        self.center.lerp_(outputs.detach().mean(0), 0.1)
        return F.mse_loss(outputs, y) + (outputs - self.center).square().mean()


@pytest.mark.parametrize("devices", [2, 3])
def test_a_loss_with_a_memory_is_refused_with_a_reduction_and_exact_without(devices):
    x, y, loss_fn = torch.randn(9, 4).double(), torch.randn(9, 3).double(), Centers()
    step = fastdp.wrap(net(), gpus=devices).train_step(loss_fn, torch.optim.SGD, reduction="mean")
    with pytest.raises(ValueError, match=r"loss_fn\.c.*Leave|loss_fn\.c.*leave `reduction` out"):
        step(x, y)
    assert loss_fn.calls == 0 and not loss_fn.center.any()  # noqa: PT018
    module, plain = net(), net()
    step = fastdp.wrap(module, gpus=devices).train_step(loss_fn, lambda p: torch.optim.SGD(p, lr=0.1))
    optimizer, other = torch.optim.SGD(plain.parameters(), lr=0.1), copy.deepcopy(loss_fn)
    for _ in range(2):
        optimizer.zero_grad()
        expected = other(plain(x), y)
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(step(x, y), expected, rtol=1e-11, atol=1e-11, check_dtype=False)
    assert loss_fn.calls == other.calls == 2


def test_draws_and_further_numbers_of_a_right_loss_are_no_difference():
    def loss_fn(outputs, y):
        loss = F.dropout(squares(outputs, y), 0.2).mean()
        return {"loss": loss, "size": outputs.abs().mean()}

    step = fastdp.wrap(Noisy(), gpus=2).train_step(loss_fn, torch.optim.SGD, reduction="mean")
    step(torch.randn(9, 4).double(), torch.randn(9, 3).double())
