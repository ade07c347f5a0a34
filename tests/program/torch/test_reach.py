"""Everything that a torch module's step reads is watched."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module

from fastdp.capture.watch import Watch
from fastdp.program.torch.reach import reach_of


@dataclasses.dataclass
class Config:
    scale: float = 1.0


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1))
        self.config, self.numbers, self.table = Config(), [1.0, 2.0], {"a": {"b": 1}}
        self.array, self.tensor = np.ones(3), torch.ones(3)
        self.hidden = [nn.Linear(2, 2)]

    def forward(self, x):
        return self.body(x)


CHANGES = {
    "a dropout's rate": lambda net: setattr(net.body[1], "p", 0.2),
    "the mode of a part": lambda net: net.body[0].eval(),
    "a field of a dataclass": lambda net: setattr(net.config, "scale", 2.0),
    "a list": lambda net: net.numbers.append(3.0),
    "a dict in a dict": lambda net: net.table["a"].update(b=2),
    "an array": lambda net: net.array.__setitem__(0, 2.0),
    "a tensor": lambda net: net.tensor.data.mul_(2.0),
    "a weight in a list": lambda net: net.hidden[0].weight.data.mul_(2.0),
    "a hook": lambda net: net.body[0].register_forward_hook(lambda *_: None),
    "a hook before": lambda net: net.body.register_forward_pre_hook(lambda *_: None, with_kwargs=True),
    "a forward of its own": lambda net: setattr(net.body[0], "forward", lambda x: x),
    "a part": lambda net: net.body.append(nn.ReLU()),
    "a parameter": lambda net: setattr(net.body[0], "weight", nn.Parameter(torch.zeros(4, 4))),
    "a buffer": lambda net: net.register_buffer("more", torch.zeros(1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change):
    net, watch = Net(), Watch()
    reach_of(watch, net.parameters()).walk(net, "model")
    assert not watch.refused
    assert not watch.changed()
    with torch.no_grad():
        net.body[0].weight.zero_()  # an input
    assert not watch.changed()
    CHANGES[change](net)
    assert watch.changed()


def test_an_exchanged_function_of_torchs_own_class_and_a_hook_for_all_modules_are_seen(monkeypatch):
    net, watch = Net(), Watch()
    reach_of(watch, net.parameters()).walk(net, "model")
    with monkeypatch.context() as patched:
        patched.setattr(nn.Linear, "forward", lambda self, x: x)
        assert watch.changed() == "Linear.forward"
    assert not watch.changed()
    handle = torch_module.register_module_forward_hook(lambda *_: None)
    try:
        assert watch.changed().startswith("global hooks")
    finally:
        handle.remove()
