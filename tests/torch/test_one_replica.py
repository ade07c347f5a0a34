"""A step with one replica is plain torch, bit for bit, and the first replica is the user's own module."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastdp


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.AlphaDropout(0.1), nn.Linear(16, 2)
    )


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.05)


def data(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 4, generator=generator), torch.randn(rows, 2, generator=generator)


def plainly(module: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = F.mse_loss(module(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_one_device_repeats_plain_torch_to_the_last_bit_with_its_draws(accumulate):
    module, reference = net(), net()
    step = fastdp.wrap(module, gpus=1).train_step(F.mse_loss, adam, accumulate=accumulate)
    optimizer, losses, expected = adam(reference.parameters()), [], []
    torch.manual_seed(1)
    for i in range(8):
        losses.append(step(*data(6, i)))
    after = torch.get_rng_state()
    torch.manual_seed(1)
    for i in range(0, 8, accumulate):
        optimizer.zero_grad()
        for x, y in (data(6, i + j) for j in range(accumulate)):
            expected.append(F.mse_loss(reference(x), y))
            (expected[-1] / accumulate).backward()
        optimizer.step()
    assert torch.equal(after, torch.get_rng_state())
    assert torch.equal(torch.stack(losses), torch.stack(expected).detach())
    for value, other in zip(module.state_dict().values(), reference.state_dict().values(), strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("devices", [1, 3])
def test_a_batch_of_one_row_is_plain_torch_on_any_number_of_devices(devices):
    module, reference = (
        nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Dropout(0.5), nn.Linear(8, 2)) for _ in "ab"
    )
    reference.load_state_dict(module.state_dict())
    step = fastdp.wrap(module, gpus=devices, check_replicas=True).train_step(F.mse_loss, adam)
    optimizer = adam(reference.parameters())
    for i in range(4):
        torch.manual_seed(i)
        loss = step(*data(1, i))
        torch.manual_seed(i)
        assert torch.equal(loss, plainly(reference, optimizer, *data(1, i)))
    for value, other in zip(module.parameters(), reference.parameters(), strict=True):
        assert torch.equal(value, other)


class Counting(nn.Module):
    """Buffers that forward changes in place, replaces, and resizes; it fails after that if asked to."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 2), nn.BatchNorm1d(2)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("largest", torch.zeros(4))
        self.register_buffer("cache", torch.zeros(1))
        self.fails = 0  # a number: with it the module is of the same kind, and not tried anew

    def forward(self, x):
        self.calls += 1
        self.largest = torch.maximum(self.largest, x.detach().amax(0))
        y = self.norm(self.linear(x)) + 0.0 * torch.rand(())
        self.cache = torch.zeros(len(x))
        if self.fails:
            raise ArithmeticError("not today")
        return y


def test_buffers_that_forward_writes_are_those_of_plain_torch():
    module, reference = Counting(), Counting()
    reference.load_state_dict(module.state_dict())
    step = fastdp.wrap(module, gpus=1).train_step(F.mse_loss, adam)
    optimizer = adam(reference.parameters())
    for i, rows in enumerate((6, 5, 7)):
        step(*data(rows, i))
        plainly(reference, optimizer, *data(rows, i))
        for name, value in reference.state_dict().items():
            assert torch.equal(module.state_dict()[name], value), name


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("where", ["forward", "loss", "update"])
def test_a_failed_step_changes_neither_buffers_nor_weights_nor_generators_nor_gradients(devices, where, rows):
    module = Counting()
    if rows == 1:
        module.norm = nn.Identity()
    fails = {"loss": False, "update": False}

    def loss_fn(outputs, y):
        if fails["loss"]:
            raise ArithmeticError("not today")
        return F.mse_loss(outputs, y)

    class Moody(torch.optim.Adam):
        def step(self, closure=None):
            super().step(closure)
            if fails["update"]:
                raise ArithmeticError("not today")

    step = fastdp.wrap(module, gpus=devices, check_replicas=True).train_step(loss_fn, Moody)
    step(*data(rows))
    gradients = [torch.ones_like(p) for p in module.parameters()]
    for p, gradient in zip(module.parameters(), gradients, strict=True):
        p.grad = gradient
    before, drawn = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    module.fails, fails[where] = int(where == "forward"), True
    with pytest.raises(ArithmeticError, match="not today"):
        step(*data(rows, 1))
    del before["cache"]
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), drawn)
    module.fails, fails["loss"], fails["update"] = 0, False, False
    step(*data(rows, 1))
    assert all(p.grad is g and bool((g == 1).all()) for p, g in zip(module.parameters(), gradients, strict=True))


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_the_first_replica_is_the_users_own_module(devices):
    module, seen = net(), []
    step = fastdp.wrap(module, gpus=devices).train_step(F.mse_loss, adam)
    module[0].register_forward_hook(lambda part, inputs, output: seen.append(part))
    step(*data(8))
    assert seen == [module[0]]


def test_hooks_on_parameters_fire_as_in_plain_torch():
    module, reference = nn.Linear(4, 2), nn.Linear(4, 2)
    reference.load_state_dict(module.state_dict())
    step = fastdp.wrap(module, gpus=1).train_step(F.mse_loss, adam)
    optimizer, seen = adam(reference.parameters()), {module: [], reference: []}
    for one, log in seen.items():
        one.weight.register_hook(lambda gradient: gradient * 2)
        one.bias.register_post_accumulate_grad_hook(lambda p, log=log: log.append(p.grad.clone()))
    for i in range(3):
        step(*data(8, i))
        plainly(reference, optimizer, *data(8, i))
    assert torch.equal(torch.stack(seen[module]), torch.stack(seen[reference]))
    assert torch.equal(module.weight, reference.weight)
