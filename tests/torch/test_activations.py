"""Gradients of activations: `retain_grad` and hooks on what a module returns or keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

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


class Chain(nn.Module):
    """Returns three activations, of which each is computed from those before it, and one of them twice."""

    def __init__(self, checkpoints: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three = (nn.Linear(4, 4).double() for _ in range(3))
        self.drop, self.checkpoints = nn.Dropout(0.3), checkpoints

    def part(self, h):
        return self.drop(self.two(h).tanh()) * 2

    def forward(self, x):
        first = self.one(x).tanh()
        second = checkpoint(self.part, first, use_reentrant=False) if self.checkpoints else self.part(first)
        self.kept = second.mean(1)
        return self.three(second) + first * x, first, second, first


def rows(number: int, requires_grad: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(9, 4, generator=generator, dtype=torch.float64).requires_grad_(requires_grad)


def asked(model, module):
    """torch.autograd.grad by activations: of the loss through the module alone, and outside of it too."""
    out, first, second, _ = model(rows(1))
    loss = out.square().sum() + module.kept.square().sum()
    found = torch.autograd.grad(loss, [first, second, module.kept], retain_graph=True)
    alone = torch.autograd.grad(out.sum() + second.sum() * 3, second, retain_graph=True, allow_unused=True)
    unused = torch.autograd.grad(first.sum(), second, retain_graph=True, allow_unused=True)
    (loss + first.sum()).backward()
    assert unused == (None,)
    return [*found, *alone, *(p.grad for p in module.parameters())]


def with_arguments(model, module):
    """By activations, an argument and parameters at once."""
    x = rows(1, requires_grad=True)
    out, first, second, _ = model(x)
    return list(torch.autograd.grad(out.square().sum() + first.sum(), [second, x, first, *module.parameters()]))


def hooked(model, module):
    """Hooks that see, and hooks that change what goes on; one on a tensor that nobody has any more."""
    seen = []
    for i in range(2):
        out, first, second, again = model(rows(i))
        assert again is first
        second.register_hook(lambda g: seen.append(g.clone()))
        second.register_hook(lambda g: g * 0.5)
        first.register_hook(lambda g: g.clamp(-0.1, 0.1))
        first.retain_grad()
        del second, again
        out.square().sum().backward()
        seen.append(first.grad)
    return [*seen, *(p.grad for p in module.parameters())]


def path_length(model, module):
    """The regularization of StyleGAN2: a slope of the image by the styles, which the same module returns."""
    image, styles, *_ = model(rows(1))
    (slope,) = torch.autograd.grad((image * rows(2)).sum(), styles, create_graph=True)
    penalty = (slope.square().sum(1).sqrt() - 0.3).square().mean()
    (penalty + image.mean() * 0).backward()
    return [slope, penalty, *(p.grad for p in module.parameters())]


def slopes(model, module):
    """Differentiable slopes by an activation and an argument."""
    x = rows(1, requires_grad=True)
    image, first, second, _ = model(x)
    found = torch.autograd.grad(image.square().sum(), [second, x, first], create_graph=True)
    sum(one.square().mean() for one in found).backward()
    return [*found, x.grad, *(p.grad for p in module.parameters())]


@pytest.mark.filterwarnings("ignore:fastdp. gradients of gradients")
@pytest.mark.parametrize(("devices", "how"), [(2, "trace"), (3, None), (8, None)])
@pytest.mark.parametrize("loop", [asked, with_arguments, hooked, path_length, slopes])
def test_gradients_by_returned_activations_are_those_of_one_device(loop, devices, how):
    module, plain = Chain(), Chain()
    model = fastdp.wrap(module, gpus=devices, compile=how)
    for seed in range(2):
        module.zero_grad()
        plain.zero_grad()
        torch.manual_seed(seed)
        expected = loop(plain, plain)
        torch.manual_seed(seed)
        torch.testing.assert_close(loop(model, module), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loop", [asked, hooked])
def test_parts_that_backward_computes_again_have_the_draws_of_one_device(loop):
    module, plain = Chain(checkpoints=True), Chain(checkpoints=True)
    torch.manual_seed(1)
    expected = loop(plain, plain)
    torch.manual_seed(1)
    found = loop(fastdp.wrap(module, gpus=3, compile=None), module)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_a_hook_inside_forward_and_one_outside_are_refused_together():
    class Inside(Net):
        def forward(self, x):
            h = self.one(x).tanh()
            h.register_hook(lambda g: g * 2)
            return self.two(h), h

    out, h = fastdp.wrap(Inside(), gpus=2)(torch.randn(9, 4).double())
    with pytest.raises(NotImplementedError, match="both outside or both inside forward"):
        torch.autograd.grad(out.sum(), h)


class Returns(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()

    def forward(self, x):
        h = self.one(x).tanh()
        return self.two(h), h


def test_a_gradient_that_only_a_captured_pass_could_give_is_refused_once():
    model = fastdp.wrap(Returns(), gpus=2, compile="trace")
    for i in range(3):
        sum(one.sum() for one in model(rows(i))).backward()
    out, h = model(rows(3))
    with pytest.raises(NotImplementedError, match=r"Later passes are not captured"):
        torch.autograd.grad(out.sum(), h)
    out, h = model(rows(3))
    assert torch.autograd.grad(out.sum(), h)[0].abs().sum() > 0


def keeps_gradient(module, inputs, output):
    output.register_hook(lambda gradient: setattr(module, "kept", gradient))


@pytest.mark.parametrize("devices", [2, 8])
def test_equal_gradients_of_each_devices_rows_are_no_value_that_all_share(devices):
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).double()
    module[0].register_forward_hook(keeps_gradient)
    out = fastdp.wrap(module, gpus=devices)(torch.randn(8, 4).double())
    with pytest.raises(ValueError, match=r"equal values on all devices.*retain_grad"):
        out[:, 1].sum().backward()  # the same gradient for each row


def test_gradients_that_a_train_step_would_not_merge_are_refused():
    step = fastdp.wrap(Net(), gpus=2).train_step(lambda outputs, y: F.mse_loss(outputs[0], y), torch.optim.SGD)
    with pytest.raises(NotImplementedError, match=r"retain_grad.*Write the loop"):
        step(torch.randn(9, 4).double(), torch.randn(9, 3).double())
