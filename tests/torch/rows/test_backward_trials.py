"""What treats each row's gradient by itself in backward is exact; what combines rows is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastdp


def normed(g):
    return g / (g.norm() + 1e-3)


def normed_rows(g):
    return g / (g.norm(dim=1, keepdim=True) + 1e-3)


class Net(nn.Module):
    def __init__(self, change=None):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()
        self.change = change

    def forward(self, x):
        h = self.one(x).tanh()
        return self.two(self.inside(h))

    def inside(self, h):
        return h


class Hooked(Net):
    def inside(self, h):
        h.register_hook(self.change)
        return h


class OnNode(Net):
    def inside(self, h):
        h.grad_fn.register_prehook(lambda gradients: (self.change(gradients[0]), *gradients[1:]))
        return h


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, change):
        ctx.change = change
        return h.view_as(h)

    @staticmethod
    def backward(ctx, g):
        return -ctx.change(g), None


class InFunction(Net):
    def inside(self, h):
        return Reversed.apply(h, self.change)


class OnPart(Net):
    def __init__(self, change):
        super().__init__(change)
        self.two.register_full_backward_pre_hook(lambda part, gradients: (self.change(gradients[0]),))


class Recomputed(Net):
    """With draws that backward repeats."""

    def inside(self, h):
        return checkpoint(lambda h: F.dropout(h * 2, 0.5), h, use_reentrant=False)


class Reduced(Net):
    """A norm over the rows of all devices."""

    def inside(self, h):
        h.register_hook(lambda g: g / (fastdp.replica.all_reduce(g.square().sum()).sqrt() + 1e-3))
        return h


KINDS = [Hooked, OnNode, InFunction, OnPart]
EXACT = [(kind, change) for kind in KINDS for change in (normed_rows, lambda g: g.clamp(-0.01, 0.01))]


def trained(module, devices, how):
    x, y = torch.randn(9, 4).double(), torch.randn(9, 3).double()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    model = fastdp.wrap(module, gpus=devices) if devices else module
    torch.manual_seed(1)
    if how == "step" and devices:
        step = model.train_step(F.mse_loss, optimizer)
        step(x, y), step(x, y)
        return list(module.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    return list(module.parameters())


@pytest.mark.parametrize("how", ["loop", "step"])
@pytest.mark.parametrize(("kind", "change"), [*EXACT, (Recomputed, None), (Reduced, None)])
def test_gradients_changed_row_by_row_are_those_of_one_device(kind, change, how):
    module = kind(change)
    torch.manual_seed(0)
    expected = trained(copy.deepcopy(module), 0, how)
    torch.manual_seed(0)
    torch.testing.assert_close(trained(module, 3, how), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("change", [normed, lambda g: g - g.mean(0), lambda g: g * min(1.0, 9.0 / float(g.norm()))])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_rows_that_meet_are_refused(kind, change):
    with pytest.raises(ValueError, match=r"do not add up.*all_reduce"):
        fastdp.wrap(kind(change), gpus=2)(torch.randn(9, 4).double())


class Single(Net):
    """In single precision inside, where sums in another order are other numbers."""

    def inside(self, h):
        return (h.float() * 3).relu().to(h.dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rounding_is_no_difference(dtype):
    fastdp.wrap(Single().to(dtype), gpus=2)(torch.randn(64, 4).to(dtype)).sum().backward()
