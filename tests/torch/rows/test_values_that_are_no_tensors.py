"""Outputs that are no tensors are the same for any rows, or an error: several devices have no rule to merge them."""

from __future__ import annotations

import enum

import pytest
import torch
from torch import nn

import fastdp

several = pytest.mark.parametrize("devices", [2, 3, 8])


class Counts(nn.Module):
    """Returns its number of rows as `how` says, and a name."""

    def __init__(self, how):
        super().__init__()
        self.a, self.how = nn.Linear(6, 4).double(), how

    def forward(self, x):
        return {"y": self.a(x), "rows": self.how(x), "name": "a"}


def loss_fn(outputs, target):
    return (outputs["y"] - target).square().sum() / outputs["rows"]


def make_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.mark.parametrize("rows", [24, 23])
@several
def test_a_number_of_rows_is_refused_though_it_may_be_the_same_on_all_devices(devices, rows):
    x, target = torch.randn(rows, 6).double(), torch.randn(rows, 4).double()
    module = Counts(len)
    before = module.a.weight.detach().clone()
    model = fastdp.wrap(module, gpus=devices)
    with pytest.raises(
        ValueError, match=r"besides tensors, \[\[2, 'a'\], \[3, 'a'\], \[5, 'a'\]\] for \[2, 3, 5\] rows"
    ):
        model(x)
    for reduction in (None, "mean"):
        step = model.train_step(loss_fn, make_sgd, reduction=reduction, outputs=True)
        with pytest.raises(ValueError, match=r"such as torch.tensor\(value\)"):
            step(x, target)
    assert torch.equal(module.a.weight, before)


@several
def test_the_number_of_rows_as_a_tensor_is_their_sum(devices):
    torch.manual_seed(0)
    x, target = torch.randn(24, 6).double(), torch.randn(24, 4).double()
    module = Counts(lambda x: torch.tensor(len(x)))
    expected = loss_fn(module(x), target).detach()
    step = fastdp.wrap(module, gpus=devices).train_step(loss_fn, make_sgd, outputs=True)
    torch.testing.assert_close(step(x, target), expected, rtol=1e-9, atol=1e-11)
    assert step.result.outputs["rows"] == 24
    assert step.result.outputs["name"] == "a"


class Way(enum.Enum):
    ONCE = 1
    TWICE = 2


class TakesWays(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 4).double()

    def forward(self, x, way, dtype):
        return self.a(x.to(dtype) * way.value), way, dtype


@pytest.mark.parametrize("compiled", [None, "trace"])
@pytest.mark.parametrize("devices", [1, 3])
def test_enums_and_dtypes_are_arguments_and_outputs(devices, compiled):
    module = TakesWays()
    model = fastdp.wrap(module, gpus=devices, compile=compiled)
    with torch.no_grad():
        for way in (*[Way.ONCE] * 4, *[Way.TWICE] * 4, Way.ONCE):
            x = torch.randn(7, 6)
            found = model(x, way, dtype=torch.float64)
            torch.testing.assert_close(found[0], module(x, way, torch.float64)[0])
            assert found[1:] == (way, torch.float64)


def test_objects_are_refused_with_what_to_write_for_each():
    model = fastdp.wrap(TakesWays(), gpus=2)
    for value, remedy in ((torch.Generator(), "draws as on one device"), (torch.tanh, "a string or an enum")):
        with pytest.raises(TypeError, match=rf"at `\[0\]\[1\]`\. Keep it in the module as an attribute.*{remedy}"):
            model(torch.randn(7, 6), value, torch.float64)
    normal = fastdp.wrap(Counts(lambda x: torch.distributions.Normal(x, 1.0)), gpus=2)
    with pytest.raises(TypeError, match=r"at `\['rows'\]`\. Return its parameters, and make the Normal of the merged"):
        normal(torch.randn(7, 6).double())
