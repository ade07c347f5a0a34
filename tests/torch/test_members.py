"""What a parallel module has of the module's own members: dtypes, files, and modules that are parallel already."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastdp

DEVICES = (1, 2, 3, 8)


@pytest.mark.parametrize("devices", DEVICES)
def test_a_module_converted_after_its_first_call_runs_in_the_new_dtype(devices):
    module = nn.Linear(4, 2)
    model = fastdp.wrap(module, gpus=devices)
    x = torch.randn(9, 4)
    model(x)
    model.double()
    torch.testing.assert_close(model(x.double()), module(x.double()))
    assert model(x.double()).dtype == torch.float64


def test_a_file_of_data_parallel_is_loaded_without_its_prefix():
    module, other = nn.Linear(4, 2), nn.Linear(4, 2)
    model = fastdp.wrap(module, gpus=2)
    saved = {f"module.{name}": value for name, value in other.state_dict().items()}
    model.load_state_dict(saved)
    torch.testing.assert_close(module.state_dict(), other.state_dict())
    assert all(name.startswith("module.") for name in saved)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({"module.weight": other.weight})


def test_a_parallel_module_is_not_wrapped_again():
    with pytest.raises(ValueError, match=r"Wrap its module: model\.module"):
        fastdp.wrap(fastdp.wrap(nn.Linear(4, 2), gpus=2), gpus=2)


@pytest.mark.parametrize("devices", DEVICES)
def test_parts_are_counted_and_chosen_as_those_of_the_module(devices):
    module = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    model = fastdp.wrap(module, gpus=devices)
    assert len(model) == 3
    assert list(model) == list(module)
    assert model[0] is module[0]
    assert model[-1] is module[2]
    assert module[1] in model
    assert nn.Tanh() not in model
    assert len(model[:2]) == 2


def test_a_module_without_parts_to_choose_says_so_and_is_true():
    model = fastdp.wrap(nn.Linear(4, 2), gpus=2)
    assert model
    for ask in (len, iter, lambda one: one[0], lambda one: 1 in one):
        with pytest.raises(TypeError, match="Linear of a TorchParallel has no __"):
            ask(model)
