"""Gradients of activations: `retain_grad` and hooks on what a module returns or keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastdp


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()

    def forward(self, x):
        h = self.one(x).tanh()
        square = h * h
        self.kept = square * 3
        self.kept.retain_grad()
        return self.two(h + self.kept), h, square.mean(), square.sum(), h.T


def gradients(model, module, loss):
    """What is retained after one and after two backward passes, and after backward from one output alone."""
    x, found = torch.randn(9, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64), []
    out, *others = model(x)
    for one in others:
        one.retain_grad()
    for retain in (True, False):
        loss(out, *others).backward(retain_graph=retain)
        found += [None if one.grad is None else one.grad.clone() for one in (*others, module.kept)]
    return found


LOSSES = {
    "through the module": lambda out, h, mean, total, t: out.square().sum(),
    "outside too": lambda out, h, mean, total, t: out.square().sum() + h.sum() + mean * 3 + total * total + t.sum(),
    "outside alone": lambda out, h, mean, total, t: h.square().sum(),
}


@pytest.mark.parametrize("devices", [2, 3, 8])
@pytest.mark.parametrize("loss", LOSSES)
def test_retained_gradients_are_those_of_one_device(loss, devices):
    module, plain = Net(), Net()
    found = gradients(fastdp.wrap(module, gpus=devices), module, LOSSES[loss])
    expected = gradients(plain, plain, LOSSES[loss])
    assert [one is None for one in found] == [one is None for one in expected]
    pairs = [pair for pair in zip(found, expected, strict=True) if pair[0] is not None]
    torch.testing.assert_close(*zip(*pairs, strict=True), rtol=1e-10, atol=1e-12)


def test_a_hook_that_would_not_see_the_whole_gradient_is_refused():
    model, x = fastdp.wrap(Net(), gpus=2), torch.randn(9, 4).double()
    out, h, *_ = model(x)
    h.register_hook(lambda gradient: None)
    with pytest.raises(NotImplementedError, match="retain_grad"):
        (out.sum() + h.sum()).backward()
    seen = []
    _, h, *_ = model(x)
    h.register_hook(seen.append)
    h.sum().backward()  # no other output leads to it
    assert seen


def test_a_gradient_that_would_end_at_an_output_is_refused():
    out, h, mean, *_ = fastdp.wrap(Net(), gpus=2)(torch.randn(9, 4).double())
    with pytest.raises(NotImplementedError, match=r"torch\.autograd.grad by a tensor"):
        torch.autograd.grad(out.sum() + h.sum(), h, retain_graph=True)
    (alone,) = torch.autograd.grad(out.sum() + mean, out)
    assert bool((alone == 1).all())


def test_gradients_that_a_train_step_would_not_merge_are_refused():
    step = fastdp.wrap(Net(), gpus=2).train_step(lambda outputs, y: F.mse_loss(outputs[0], y), torch.optim.SGD)
    with pytest.raises(NotImplementedError, match=r"retain_grad.*Write the loop"):
        step(torch.randn(9, 4).double(), torch.randn(9, 3).double())
