"""Hooks on parameters see the gradient of the global batch, once, in torch's order."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F

import fastdp
from fastdp.buffers import FlatBuffers

DEVICES = [1, 2, 3, 8]


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def data(seed: int, rows: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    kind = {"generator": generator, "dtype": torch.float64}
    return torch.randn(rows, 4, **kind), torch.randn(rows, 2, **kind)


def hook(module: nn.Module, seen: list) -> None:
    """Hooks that change gradients by no linear rule, and note what they see, in its order."""

    def noted(name, change, of=lambda gradient: gradient):
        def run(gradient):
            seen.append((name, of(gradient).clone()))
            return change(gradient)

        return run

    module[0].weight.register_hook(noted("clamp", lambda g: g.clamp(-0.05, 0.05)))
    module[0].weight.register_hook(noted("sign", lambda g: g + 0.01 * g.sign()))
    module[2].bias.register_hook(noted("nothing", lambda g: None))

    def after(parameter):
        seen.append(("after", parameter.grad.clone()))
        parameter.grad.mul_(parameter.grad.abs())

    module[0].weight.register_post_accumulate_grad_hook(after)
    module[2].weight.register_post_accumulate_grad_hook(after)
    for parameter in (module[0].weight, module[2].bias, module[0].bias):
        node = get_gradient_edge(parameter).node
        NODES.append(node)  # whose hooks are gone with it
        node.register_prehook(noted("node", lambda given: (given[0] * given[0].abs(),), first))
        node.register_hook(lambda gave, given: seen.append(("after node", given[0].clone())))


NODES = []


def first(given):
    return given[0]


def trained(make, devices: int | None, rows=(9, 7, 2, 1, 9), **options):
    """A module after some steps, and what its hooks saw."""
    module, seen = net(), []
    make(module, seen)
    optimizer = None if devices else sgd(module.parameters())
    step = devices and fastdp.wrap(module, gpus=devices, check_replicas=True, **options).train_step(F.mse_loss, sgd)
    for i, count in enumerate(rows):
        x, y = data(i, count)
        if step:
            step(x, y)
            continue
        optimizer.zero_grad()
        F.mse_loss(module(x), y).backward()
        optimizer.step()
    return module, seen


def assert_same(found, expected) -> None:
    (module, seen), (reference, noted) = found, expected
    for value, other in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-11)
    assert [name for name, _ in seen] == [name for name, _ in noted]
    for (_, value), (_, other) in zip(seen, noted, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("update", ["first", "each"])
@pytest.mark.parametrize("devices", DEVICES)
def test_hooks_run_on_the_gradient_of_the_whole_batch(devices, update, small, monkeypatch):
    if small:
        monkeypatch.setattr(FlatBuffers.buckets, "__defaults__", (4, 64))
    assert_same(trained(hook, devices, update=update), trained(hook, None))


def in_backward(module: nn.Module, seen: list) -> None:
    """The optimizer of one layer steps as soon as its gradients are there."""
    optimizers = {p: torch.optim.SGD([p], lr=0.2) for p in module[0].parameters()}

    def step(parameter):
        optimizers[parameter].step()
        parameter.grad = None

    for parameter in module[0].parameters():
        parameter.register_post_accumulate_grad_hook(step)


@pytest.mark.parametrize("update", ["first", "each"])
@pytest.mark.parametrize("devices", DEVICES)
def test_an_optimizer_that_steps_inside_backward_is_that_of_one_device(devices, update):
    assert_same(trained(in_backward, devices, update=update), trained(in_backward, None))


@pytest.mark.parametrize("devices", DEVICES)
def test_hooks_that_come_and_go_count(devices):
    def run(module, step):
        seen = []
        for i in range(3):
            handles = [p.register_hook(lambda g, i=i: g * i) for p in module.parameters()]
            handles.append(module[2].bias.register_hook(lambda g: seen.append(("bias", g.clone()))))
            step(*data(i))
            for handle in handles:
                handle.remove()
            step(*data(i))
        return module, seen

    module, reference = net(), net()
    optimizer = sgd(reference.parameters())

    def plain(x, y):
        optimizer.zero_grad()
        F.mse_loss(reference(x), y).backward()
        optimizer.step()

    parallel = fastdp.wrap(module, gpus=devices, check_replicas=True).train_step(F.mse_loss, sgd)
    assert_same(run(module, parallel), run(reference, plain))
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in module.parameters())


@pytest.mark.parametrize("update", ["first", "each"])
@pytest.mark.parametrize("devices", DEVICES)
def test_a_hook_that_fails_stops_the_step_and_changes_no_weight(devices, update):
    module, fails = net(), [True]

    def fail(gradient):
        if fails[0]:
            raise ArithmeticError("not today")

    module[0].weight.register_hook(fail)
    before = copy.deepcopy(module.state_dict())
    step = fastdp.wrap(module, gpus=devices, check_replicas=True, update=update).train_step(F.mse_loss, sgd)
    with pytest.raises(ArithmeticError, match="not today"):
        step(*data(0))
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())
    fails[0] = False
    step(*data(0))


@pytest.mark.parametrize("devices", [1, 3])
def test_hooks_in_a_window_of_accumulation_see_each_calls_gradient_or_are_refused(devices):
    module, reference = net(), net()
    for one in (module, reference):
        one[0].weight.register_hook(lambda g: g.clamp(-0.02, 0.02))
    step = fastdp.wrap(module, gpus=devices).train_step(F.mse_loss, sgd, accumulate=3)
    if devices > 1:
        with pytest.raises(ValueError, match=r"`accumulate` must be 1.*hooks on its parameters"):
            step(*data(0))
        return
    for i in range(3):
        step(*data(i))
        (F.mse_loss(reference(data(i)[0]), data(i)[1]) / 3).backward()
    sgd(reference.parameters()).step()
    assert_same((module, []), (reference, []))
