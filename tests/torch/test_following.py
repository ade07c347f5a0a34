"""What the user changes in a module between two steps counts in the next, on all devices."""

from __future__ import annotations

import argparse
import array
import copy
import functools
import types

import numpy as np
import pytest
import torch
from regression_step import data, plain_step
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook

import fastdp

DEVICES = [1, 2, 3, 8]
LEVELS = {"gain": 1.0}  # a global that hooks read


class Sizes:
    __slots__ = ("scale",)


class Options:
    def __init__(self):
        self.sizes = Sizes()
        self.sizes.scale = 1.0
        self.gain, self.table = 1.0, {"shift": torch.zeros(6, dtype=torch.float64)}


class Known(dict):
    """A dict whose keys are its attributes."""

    def __init__(self, **values):
        super().__init__(**values)
        self.__dict__ = self


class Named(list):
    """A list with an attribute."""

    gain = 1.0


class Net(nn.Module):
    """Reads everything that a module can hold besides parameters and buffers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        self.act = nn.Tanh()
        self.power, self.function = 1.0, torch.sin
        self.scale = torch.ones(6, dtype=torch.float64)
        self.numbers, self.array = np.float64(1.0), np.ones(6)
        self.config = {"alpha": 1.0, "deep": {"shifts": [0.0, 0.0]}}
        self.options, self.tensors = Options(), [torch.zeros(6, dtype=torch.float64)]
        self.teacher = [nn.Linear(4, 6).requires_grad_(False).double()]
        self.arguments, self.named = argparse.Namespace(gain=1.0), Named()
        self.prior = torch.distributions.Normal(torch.tensor(0.0), 1.0)
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)  # another one trains it
        self.double()

    def forward(self, x):
        with torch.no_grad():
            taught = self.teacher[0](x)
        y = self.act(self.first(x)) * self.scale * self.power * float(self.numbers) + 0.1 * taught
        y = y * torch.from_numpy(self.array) * self.config["alpha"] + sum(self.config["deep"]["shifts"])
        y = y * self.arguments.gain * self.named.gain + self.prior.loc
        y = y + self.optimizer.param_groups[0]["lr"]
        y = y * self.options.gain * self.options.sizes.scale + self.options.table["shift"] + sum(self.tensors)
        return self.last(self.norm(self.function(y)))


def double(part, arguments, output):
    return output * 2


def by_gain(part, arguments, output):
    return output * LEVELS["gain"]


def scaled_by(part):
    return lambda _, arguments, output: output * part.weight.mean()


def decorated(net):
    inner = net.forward
    net.forward = lambda x: inner(x) * 2 + net.last.bias


def replaced(net):
    net.act.forward = lambda x: x.sigmoid() * net.norm.weight.mean()


def method(net):
    net.act.forward = types.MethodType(lambda self, x: x * 0.5 + net.first.bias, net.act)


def with_keywords(part, arguments, keywords, output):
    return output + len(keywords)


def with_gain(gain):
    def hook(part, arguments, output):
        return output * hook.gain

    hook.gain = gain
    return hook


def once(net):
    def hook(part, arguments, output):
        handles.pop().remove()
        return output * 2

    handles = [net.first.register_forward_hook(hook)]


def on_gradients(part, given, wanted):
    return tuple(None if g is None else g * 0.5 for g in given)


class Scaler:
    def __init__(self, part):
        self.part, self.gain = part, 0.5

    def hook(self, part, arguments, output):
        return output * self.gain * self.part.weight.sum()


CHANGES = {
    "number": lambda net: setattr(net, "power", 0.5),
    "kind of number": lambda net: setattr(net, "power", 2),
    "function": lambda net: setattr(net, "function", F.gelu),
    "closure": lambda net: setattr(net, "function", lambda y: y * net.norm.bias.sum() + net.first.weight.mean()),
    "tensor": lambda net: setattr(net, "scale", torch.full((6,), 0.5, dtype=torch.float64)),
    "in a tensor": lambda net: net.scale.mul_(0.5),
    "data of a tensor": lambda net: net.scale.data.fill_(0.25),
    "numpy of a tensor": lambda net: np.multiply(net.scale.numpy(), 3.0, out=net.scale.numpy()),
    "numpy number": lambda net: setattr(net, "numbers", np.float64(0.5)),
    "array": lambda net: setattr(net, "array", np.full(6, 0.5)),
    "in an array": lambda net: net.array.__setitem__(0, 2.0),
    "in a dict": lambda net: net.config.update(alpha=0.5),
    "deep in a dict": lambda net: net.config["deep"]["shifts"].append(0.5),
    "dict": lambda net: setattr(net, "config", {"alpha": 0.25, "deep": {"shifts": (1.0,)}}),
    "in an object": lambda net: setattr(net.options, "gain", 0.5),
    "in slots": lambda net: setattr(net.options.sizes, "scale", 0.5),
    "tensor in an object": lambda net: net.options.table["shift"].data.add_(0.5),
    "tensor in a table": lambda net: net.options.table.update(shift=torch.ones(6, dtype=torch.float64)),
    "object": lambda net: setattr(net, "options", copy.deepcopy(net.options)),
    "in a list": lambda net: net.tensors.append(torch.ones(6, dtype=torch.float64)),
    "in a namespace": lambda net: setattr(net.arguments, "gain", 0.5),
    "attribute of a list": lambda net: setattr(net.named, "gain", 0.5),
    "distribution": lambda net: net.prior.loc.data.fill_(0.5),
    "rate": lambda net: net.optimizer.param_groups[0].update(lr=0.5),
    "teacher": lambda net: net.teacher[0].weight.data.copy_(net.first.weight.data.mul(0.5)),
    "weights of the teacher": lambda net: net.teacher[0].load_state_dict(net.first.state_dict()),
    "another teacher": lambda net: net.teacher.__setitem__(0, copy.deepcopy(net.first).requires_grad_(False)),
    "part": lambda net: setattr(net, "act", nn.Sigmoid()),
    "part without parameters": lambda net: net.add_module("further", nn.ReLU()),
    "decorated": decorated,
    "forward": replaced,
    "method": method,
    "forward hook": lambda net: net.first.register_forward_hook(double),
    "hook of the module": lambda net: net.register_forward_hook(double),
    "hook before": lambda net: net.last.register_forward_pre_hook(lambda part, arguments: (arguments[0] * 0.5,)),
    "hook with keywords": lambda net: net.first.register_forward_hook(with_keywords, with_kwargs=True),
    "hook on gradients": lambda net: net.norm.register_full_backward_hook(on_gradients),
    "hook with a part": lambda net: net.first.register_forward_hook(scaled_by(net.norm)),
    "partial": lambda net: net.first.register_forward_hook(
        functools.partial(lambda other, part, arguments, output: output * other.weight.mean(), net.last)
    ),
    "default": lambda net: net.first.register_forward_hook(
        lambda part, a, output, other=net.last: output + other.bias[0]
    ),
    "bound": lambda net: net.norm.register_forward_hook(Scaler(net.first).hook),
    "hook that removes itself": once,
    "part of a part": lambda net: net.act.register_module("inner", nn.Identity()),
}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.001, momentum=0.9)


def compare(module, reference):
    for (name, value), other in zip(module.state_dict().items(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-11, msg=name)


def stepper(module, devices, how):
    """A function of a batch that trains by a train step with an update of this kind, or by a loop."""
    if how == "loop":
        model = fastdp.wrap(module, gpus=devices)
        return functools.partial(plain_step, model, sgd(model.parameters()))
    return fastdp.wrap(module, gpus=devices, update=how).train_step(F.mse_loss, sgd)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_steps_counts_in_the_next(change):
    module, reference = Net(), Net()
    step, expected = stepper(module, 3, "first"), functools.partial(plain_step, reference, sgd(reference.parameters()))
    for i in range(3):
        if i == 1:
            for net in (module, reference):
                CHANGES[change](net)
        torch.testing.assert_close(step(*data(i)), expected(*data(i)), rtol=1e-9, atol=1e-11)
    compare(module, reference)


@pytest.mark.parametrize("how", ["first", "each", "loop"])
@pytest.mark.parametrize("devices", DEVICES)
def test_many_changes_between_the_steps_of_a_run_count(devices, how):
    module, reference = Net(), Net()
    step = stepper(module, devices, how)
    expected = functools.partial(plain_step, reference, sgd(reference.parameters()))
    for i, change in enumerate(CHANGES.values()):
        for net in (module, reference):
            change(net)
        if i == len(CHANGES) // 2:
            for net in (module, reference):
                net.first._forward_hooks.popitem(last=False) if net.first._forward_hooks else None
        torch.testing.assert_close(step(*data(i)), expected(*data(i)), rtol=1e-9, atol=1e-11)
    compare(module, reference)


@pytest.mark.parametrize("how", ["first", "loop"])
def test_copies_are_made_anew_only_after_a_change(how):
    module = Net()
    model = fastdp.wrap(module, gpus=3)
    if how == "loop":
        step = functools.partial(plain_step, model, sgd(model.parameters()))
        step(*data(0))
        following = model._calls.program._following
    else:
        step = model.train_step(F.mse_loss, sgd)
        following = step._program._following
    for i in range(3):
        step(*data(i))
    module.power, module.options.gain = 0.5, 2.0  # plain values are assigned
    module.teacher[0].weight.data.zero_()
    module.eval()
    step(*data(4))
    assert following.remade == 0
    module.scale = module.scale * 2
    step(*data(5))
    step(*data(6))
    assert following.remade == 1


@pytest.mark.parametrize("devices", DEVICES)
def test_a_hook_on_all_modules_counts_if_it_keeps_nothing(devices):
    module, reference = Net(), Net()
    step, expected = (
        stepper(module, devices, "first"),
        functools.partial(plain_step, reference, sgd(reference.parameters())),
    )
    for i in range(3):
        handle = register_module_forward_hook(lambda part, arguments, output: output * 0.5) if i == 1 else None
        try:
            torch.testing.assert_close(step(*data(i)), expected(*data(i)), rtol=1e-9, atol=1e-11)
        finally:
            if handle is not None:
                handle.remove()
    compare(module, reference)


def test_a_hook_on_all_modules_that_keeps_something_is_refused():
    module, seen = Net(), []
    step = stepper(module, 2, "first")
    before = copy.deepcopy(module.state_dict())
    handle = register_module_forward_hook(lambda part, arguments, output: seen.append(output))
    try:
        with pytest.raises(ValueError, match=r"All devices would share variable seen .*Register the hook"):
            step(*data(0))
    finally:
        handle.remove()
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
    step(*data(0))


ONE = torch.ones(1, dtype=torch.float64)
PARAMETERS = {
    "parametrized": (
        lambda net: nn.utils.parametrizations.weight_norm(net.first),
        "parts of `first` .*`first.parametrizations.weight.original0` is new",
    ),
    "added": (lambda net: net.act.register_parameter("gain", nn.Parameter(ONE)), "parts of `act` .*`act.gain` is new"),
    "removed": (lambda net: setattr(net, "norm", nn.Identity()), "parts of `model` .*`norm.weight` is gone"),
    "exchanged": (lambda net: setattr(net, "last", copy.deepcopy(net.last)), "of `model` .*`last.weight` was replaced"),
    "buffer": (lambda net: net.act.register_buffer("mask", ONE.clone()), "parts of `act` .*`act.mask` is new"),
}


@pytest.mark.parametrize("devices", [2, 3])
@pytest.mark.parametrize("change", PARAMETERS)
def test_other_parameters_are_an_error_that_names_them(change, devices):
    module = Net()
    step = stepper(module, devices, "first")
    step(*data(0))
    make, message = PARAMETERS[change]
    make(module)
    with pytest.raises(RuntimeError, match=rf"{message}.*Wrap the changed module again"):
        step(*data(1))
    reference = copy.deepcopy(module)
    expected = plain_step(reference, sgd(reference.parameters()), *data(1))
    torch.testing.assert_close(stepper(module, devices, "first")(*data(1)), expected, rtol=1e-9, atol=1e-11)


def test_attributes_of_functions_and_attributes_that_are_keys_are_followed():
    module, reference = Net(), Net()
    hooks, known = [with_gain(1.0) for _ in range(2)], [Known(gain=1.0) for _ in range(2)]
    for net, hook, one in zip((module, reference), hooks, known, strict=True):
        net.first.register_forward_hook(hook)
        net.known = one
        net.last.register_forward_pre_hook(lambda part, arguments, one=one: (arguments[0] * one.gain,))
    step, expected = stepper(module, 3, "first"), functools.partial(plain_step, reference, sgd(reference.parameters()))
    for i in range(3):
        for one in (*hooks, *known):
            one.gain = 1.0 + i
        torch.testing.assert_close(step(*data(i)), expected(*data(i)), rtol=1e-9, atol=1e-11)


def test_memory_that_copies_cannot_follow_is_refused():
    module = Net()
    module.levels = array.array("d", [1.0])
    with pytest.raises(ValueError, match=r"keeps `levels`, an object of class array, whose changes .* Make it a list"):
        stepper(module, 2, "first")(*data(0))
    stepper(module, 1, "first")(*data(0))


def test_a_module_that_holds_too_much_is_refused():
    module = Net()
    rows = [[torch.zeros(1)] for _ in range(20_001)]
    module.first.register_forward_hook(lambda part, arguments, output: output + rows[0][0])
    with pytest.raises(ValueError, match=r"holds more than 20000 values.*Keep data out of"):
        stepper(module, 2, "first")(*data(0))
