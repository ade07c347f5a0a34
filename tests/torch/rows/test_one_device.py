"""On one device, and with one row, a batch is whatever plain torch takes: nothing is checked, and nothing is split."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import fastdp


@dataclasses.dataclass
class Graph:
    """Inputs of a user's own class."""

    nodes: torch.Tensor
    edges: torch.Tensor


class Takes(nn.Module):
    """Takes anything."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x, mask=None, how="sum", graph=None):
        if graph is not None:
            return self.linear(graph.nodes.index_add(0, graph.edges[1], graph.nodes[graph.edges[0]]))
        y = self.linear(x)
        y = y if mask is None else mask @ y
        return y.mean() if how == "mean" else y.sum()


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


INPUTS = {
    "a mask of other lengths": {"x": numbers(5, 4), "mask": numbers(7, 5)},
    "a mask of equal lengths": {"x": numbers(5, 4), "mask": numbers(5, 5)},
    "None, a string, and an array": {"x": np.ones((5, 4)), "mask": None, "how": "mean"},
    "no rows": {"x": numbers(0, 4)},
    "no array": {"x": None, "graph": Graph(numbers(6, 4), torch.tensor([[0, 1], [2, 3]]))},
}


def plainly(module, optimizer, inputs, *targets):
    optimizer.zero_grad()
    inputs = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in inputs.items()}
    loss = loss_of(module(**inputs), *targets)
    loss.backward()
    optimizer.step()
    return loss.detach()


def loss_of(outputs, *targets):
    return outputs.sum() + sum(target.sum() for target in targets)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.mark.parametrize("rows", [None, {"mask": 1}])
@pytest.mark.parametrize("name", INPUTS)
def test_train_steps_are_those_of_plain_torch(name, rows):
    module = Takes().double()
    plain = copy.deepcopy(module)
    step = fastdp.wrap(module, gpus=[0], rows=rows).train_step(loss_of, sgd)
    optimizer = sgd(plain.parameters())
    for targets in ((), (numbers(2),), (numbers(5), numbers(3, 1))):
        expected = plainly(plain, optimizer, INPUTS[name], *targets)
        assert torch.equal(step(INPUTS[name], *targets), expected)
    for one, other in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", INPUTS)
def test_calls_are_those_of_plain_torch(name):
    module = Takes().double()
    model = fastdp.wrap(module, gpus=[0])
    inputs = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in INPUTS[name].items()}
    assert torch.equal(model(**INPUTS[name]), module(**inputs))


def test_what_is_no_batch_is_an_error_on_several_devices_and_the_next_step_works():
    module = Takes().double()
    model = fastdp.wrap(module, gpus=2)
    step = model.train_step(loss_of, sgd)
    for bad, said in (("no rows", "at least one row"), ("no array", "edges of a graph, cannot be split")):
        with pytest.raises(ValueError, match=said):
            step(INPUTS[bad])
        with pytest.raises(ValueError, match=said):
            model(**INPUTS[bad])
    assert torch.isfinite(step({"x": numbers(6, 4)}))
