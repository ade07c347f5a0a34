"""Whatever way the user writes to a module's tensors between two steps, all replicas have it in the next."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastdp

DEVICES = [1, 2, 3, 8]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4))
        self.register_buffer("scale", torch.ones(4))
        self.double()

    def forward(self, x):
        return self.body(x) * self.scale


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def data(seed: int, rows: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    kind = {"generator": generator, "dtype": torch.float64}
    return torch.randn(rows, 4, **kind), torch.randn(rows, 4, **kind)


def average(net: Net, decay: float = 0.5) -> None:
    """An exponential moving average that is copied into the weights."""
    shadow = [torch.full_like(p, 0.1) for p in net.parameters()]
    for p, s in zip(net.parameters(), shadow, strict=True):
        s.mul_(decay).add_(p.data, alpha=1 - decay)
        p.data.copy_(s)


def vector(net: Net) -> None:
    flat = nn.utils.parameters_to_vector(net.parameters()).detach()
    nn.utils.vector_to_parameters(flat * 0.5, net.parameters())


def swapped(net: Net) -> None:
    net.body[0].weight.data = torch.full((4, 4), 0.25, dtype=torch.float64)


def shared(net: Net) -> None:
    net.body[0].weight.data = net.body[3].weight.data.clone()[:, :]


CHANGES = {
    "data zeroed": lambda net: net.body[0].weight.data.zero_(),
    "data of a buffer": lambda net: net.scale.data.mul_(0.5),
    "moments": lambda net: net.body[1].running_mean.data.fill_(0.5),
    "numpy": lambda net: net.body[0].weight.detach().numpy().__setitem__((0, 0), 0.75),
    "numpy of a buffer": lambda net: np.multiply(net.scale.numpy(), 2.0, out=net.scale.numpy()),
    "average": average,
    "vector": vector,
    "swapped data": swapped,
    "data of another": shared,
    "initialized": lambda net: nn.init.orthogonal_(net.body[0].weight),
    "set_": lambda net: net.scale.set_(torch.full((4,), 3.0, dtype=torch.float64)),
    "buffer replaced": lambda net: setattr(net, "scale", torch.full((4,), 3.0, dtype=torch.float64)),
    "state dict": lambda net: net.load_state_dict({k: v * 0.5 for k, v in net.state_dict().items()}),
    "frozen": lambda net: net.body[0].requires_grad_(False),
    "memory format": lambda net: setattr(net.body[0].weight, "data", net.body[0].weight.data.t().contiguous().t()),
}


@pytest.mark.parametrize("update", ["first", "each"])
@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_steps_counts_in_the_next(change, devices, update):
    module, reference = Net(), Net()
    dp = fastdp.wrap(module, gpus=devices, check_replicas=True, sync_batch_norm=True, update=update)
    step, optimizer = dp.train_step(F.mse_loss, sgd), sgd(reference.parameters())
    for i in range(4):
        if i % 2:
            for one in (module, reference):
                torch.manual_seed(i)
                CHANGES[change](one)
        if i == 3:  # a forward pass too begins with what the user has written
            x = data(5)[0]
            torch.testing.assert_close(dp.eval()(x), copy.deepcopy(reference).eval()(x).detach(), rtol=1e-9, atol=1e-11)
            dp.train()
        loss = step(*data(i))
        optimizer.zero_grad()
        expected = F.mse_loss(reference(data(i)[0]), data(i)[1])
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-9, atol=1e-11)
    for (name, value), other in zip(module.state_dict().items(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("update", ["first", "each"])
def test_writes_reach_each_of_several_train_steps_of_a_module(update):
    module = Net()
    dp = fastdp.wrap(module, gpus=3, check_replicas=True, update=update)
    one, two = (dp.train_step(F.mse_loss, sgd) for _ in range(2))
    for step in (one, two, one):
        module.scale.numpy()[:] = 0.0
        torch.testing.assert_close(step(*data(0)), F.mse_loss(torch.zeros(9, 4).double(), data(0)[1]))


@pytest.mark.parametrize("devices", [2, 3])
@pytest.mark.parametrize("change", [lambda net: net.to(torch.float32), lambda net: net.body[0].half()])
def test_another_dtype_names_the_parameter_and_the_remedy(change, devices):
    module = Net()
    step = fastdp.wrap(module, gpus=devices).train_step(F.mse_loss, sgd)
    step(*data(0))
    change(module)
    with pytest.raises(RuntimeError, match=r"` of the module was torch.float64.*Wrap the changed module"):
        step(*data(0))


@pytest.mark.parametrize("devices", DEVICES)
def test_a_module_that_is_wrapped_again_has_its_new_part(devices):
    """The new part's parameters have the names and shapes of the old ones."""

    def train(wrap):
        module = Net()
        for seed in (1, 2):
            torch.manual_seed(seed)
            module.body[3] = nn.Linear(4, 4).double()
            step = wrap(module)
            for _ in range(2):
                step(*data(seed))
        return module.state_dict()

    def plain(module):
        optimizer = sgd(module.parameters())

        def step(x, y):
            optimizer.zero_grad()
            F.mse_loss(module(x), y).backward()
            optimizer.step()

        return step

    def parallel(module):
        return fastdp.wrap(module, gpus=devices, sync_batch_norm=True).train_step(F.mse_loss, sgd)

    torch.testing.assert_close(train(parallel), train(plain), rtol=1e-9, atol=1e-11)


class Lazy(dict):
    """A table that makes its items when it is asked for them, as libraries do that import their parts late."""

    made = 0

    def items(self):
        type(self).made += 1
        return [("scale", 2.0)]

    def keys(self):
        return dict(self.items()).keys()

    __iter__ = keys


LAZY = Lazy(weight=3.0)


class ReadsLazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x) * LAZY["weight"]


def test_a_table_that_makes_its_items_is_not_asked_for_them():
    module = ReadsLazy()
    x = torch.ones(5, 4)
    torch.testing.assert_close(fastdp.wrap(module, gpus=2)(x), module(x))
    assert Lazy.made == 0
