"""`model.no_sync()`: loops that accumulate as with DDP have the gradients of one device at each moment."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastdp

each_number = pytest.mark.parametrize("devices", [1, 2, 3, 8])


def mlp() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 4)).double()


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    sizes = (13, 8, 3, 16, 5, 24, 9)
    return [
        (torch.randn(n, 6, generator=generator).double(), torch.randint(0, 4, (n,), generator=generator)) for n in sizes
    ]


def grads(model) -> list[torch.Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def check(loop, devices):
    """Compare what a loop returns, gradients and weights with those of plain torch, for which there is no `no_sync`."""
    module = mlp()
    reference = copy.deepcopy(module)
    model = fastdp.wrap(module, gpus=devices)
    torch.manual_seed(3)
    ours = loop(model, model.no_sync)
    torch.manual_seed(3)
    theirs = loop(reference, contextlib.nullcontext)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(grads(module), grads(reference), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(list(module.parameters()), list(reference.parameters()), rtol=1e-9, atol=1e-11)


@each_number
@pytest.mark.parametrize("window", [1, 3])
def test_gradients_in_and_after_each_window_are_those_of_one_device(devices, window):
    """The loop of Accelerate and of DDP's page, with a window that the epoch cuts short."""

    def loop(model, no_sync):
        optimizer, seen = torch.optim.Adam(model.parameters(), lr=0.01), []
        for i, (x, y) in enumerate(batches(), 1):
            ends = i % window == 0 or i == len(batches())
            with contextlib.nullcontext() if ends else no_sync():
                loss = F.cross_entropy(model(x), y) / window
                loss.backward()
            seen.append(grads(model))
            if ends:
                seen.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
                optimizer.step()
                optimizer.zero_grad()
        return seen

    check(loop, devices)


@each_number
def test_a_window_that_is_never_closed_clipped_inside_and_cleared_inside(devices):
    def loop(model, no_sync):
        optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), []
        with no_sync():
            for i, (x, y) in enumerate(batches()):
                F.cross_entropy(model(x), y).backward()
                if i == 1:
                    seen.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1))
                if i == 3:
                    optimizer.step()
                    model.zero_grad()
            optimizer.step()
        return seen

    check(loop, devices)


@each_number
def test_hooks_of_parameters_see_the_gradient_of_each_call(devices):
    def loop(model, no_sync):
        seen = []
        parameter = next(iter(model.parameters()))
        handle = parameter.register_hook(lambda gradient: seen.append(gradient.clone()) or gradient * 2)
        with no_sync():
            for x, y in batches()[:2]:
                F.cross_entropy(model(x), y).backward()
        F.cross_entropy(model(*batches()[2][:1]), batches()[2][1]).backward()
        handle.remove()
        return seen

    check(loop, devices)


@each_number
def test_forward_outside_and_backward_inside_nested_and_left_by_an_error(devices):
    def loop(model, no_sync):
        (x, y), (other, labels) = batches()[:2]
        loss = F.cross_entropy(model(x), y)
        with no_sync(), no_sync():
            loss.backward()
            inside = F.cross_entropy(model(other), labels)
        with pytest.raises(ArithmeticError), no_sync():
            raise ArithmeticError
        inside.backward()
        return loss.detach(), inside.detach()

    check(loop, devices)
