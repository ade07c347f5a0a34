"""Where rows are, as the user says it: in `rows={...}` and by marks, against plain torch on 1, 2, 3 and 8 devices."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastdp

DEVICES = [1, 2, 3, 8]
ROWS = 8  # as many as there are steps, experts and layers of nothing: lengths tell nothing


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


class States(nn.Module):
    """Takes and returns recurrent states with layers first."""

    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(3, 4, num_layers=2, batch_first=True)

    def forward(self, x, hx):
        y, (h, c) = self.cell(x, hx)
        return y, h, c


class Masked(nn.Module):
    """Attention with a mask of as many steps as there are rows."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x, mask):
        scores = self.linear(x) @ x.transpose(1, 2) + mask
        return scores.softmax(-1) @ x


class Balanced(nn.Module):
    """Returns a load per expert that is a mean over rows, a sum, a value without rows, and a transposed output."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(3, ROWS)

    def forward(self, x):
        gates = self.gate(x).softmax(-1)
        return gates, gates.mean(0), (gates**2).sum(), self.gate.weight.square().sum(), gates.T


def balanced_loss(outputs, y):
    gates, load, total, penalty, transposed = outputs
    return (
        ((gates - y) ** 2).mean() + (load**2).sum() + 0.1 * total + 0.01 * penalty + (transposed.cumsum(1) ** 2).mean()
    )


CASES = {
    "states with layers first": (
        States,
        {"hx": 1, "output[1]": 1, "output[2]": 1},
        lambda: ((numbers(ROWS, 5, 3), (numbers(2, ROWS, 4, seed=1), numbers(2, ROWS, 4, seed=2))), numbers(ROWS)),
        lambda out, y: (out[0].sum((1, 2)) * y).mean() + out[1].square().sum() + (out[2].sum((0, 2)) * y).sum(),
    ),
    "a mask for all rows": (
        Masked,
        {"mask": "same"},
        lambda: ((numbers(ROWS, ROWS, 3), numbers(ROWS, ROWS, seed=1)), numbers(ROWS)),
        lambda out, y: (out.sum((1, 2)) * y).mean(),
    ),
    "outputs without rows": (
        Balanced,
        {"output[1]": "mean", "output[2]": "sum", "output[3]": "same", "output[4]": 1},
        lambda: ((numbers(ROWS, 3),), numbers(ROWS, ROWS, seed=1)),
        balanced_loss,
    ),
}


def made(case):
    module, rows, batch, loss = CASES[case]
    torch.manual_seed(0)
    return module().double(), rows, *batch(), loss


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_training_equals_plain_torch(case, devices):
    module, rows, inputs, y, loss = made(case)
    reference = copy.deepcopy(module)
    step = fastdp.wrap(module, gpus=devices, rows=rows, check_replicas=True).train_step(loss, sgd)
    optimizer = sgd(reference.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        expected = loss(reference(*inputs), y)
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(step(inputs, y), expected.detach(), rtol=1e-10, atol=1e-10)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_plain_torch(case, devices):
    module, rows, inputs, _, _ = made(case)
    with torch.no_grad():
        found, expected = fastdp.wrap(module, gpus=devices, rows=rows)(*inputs), module(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_marks_say_the_same_as_rows():
    module, rows, (x, (h, c)), _, _ = made("states with layers first")
    marked = (fastdp.rows(h.clone(), axis=1), fastdp.rows(c.clone(), axis=1))
    outputs = {name: axis for name, axis in rows.items() if name.startswith("output")}
    with torch.no_grad():
        torch.testing.assert_close(fastdp.wrap(module, gpus=3, rows=outputs)(x, marked), module(x, (h, c)))
    module, _, (x, mask), _, _ = made("a mask for all rows")
    with torch.no_grad():
        torch.testing.assert_close(fastdp.wrap(module, gpus=3)(x, fastdp.same(mask)), module(x, mask))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"musk": "same"}, "no argument of forward"),
        ({"mask": "sum"}, "must map 'mask'"),
        ({"output": -1}, "must map 'output'"),
        ("merge", r"must be a dict.*fastdp\.replica\.all_gather\(x\)"),
        ("replica", r"must be a dict.*would have other numbers"),
    ],
)
def test_what_cannot_be_meant_is_an_error(rows, message):
    with pytest.raises(ValueError, match=message):
        fastdp.wrap(Masked(), gpus=2, rows=rows)


def test_a_name_of_no_output_is_an_error_that_lists_the_outputs():
    step = fastdp.wrap(Masked().double(), gpus=2, rows={"mask": "same", "output[7]": 1}).train_step(
        lambda out, y: out.sum() * y.sum(), sgd
    )
    with pytest.raises(ValueError, match="no output of the module"):
        step((numbers(ROWS, 4, 3), numbers(4, 4)), numbers(ROWS))


@pytest.mark.parametrize("devices", DEVICES)
def test_the_users_own_loop_knows_the_declared_rows(devices):
    def loop(model):
        x, h, c = numbers(ROWS, 5, 3), numbers(2, ROWS, 4, seed=1), numbers(2, ROWS, 4, seed=2)
        for tensor in (x, h, c):
            tensor.requires_grad_()
        y, last, _ = model(x, (h, c))
        ((y**2).sum() + (last * torch.arange(ROWS)[:, None]).sum()).backward()
        return [y, last, x.grad, h.grad, c.grad, *(p.grad for p in model.parameters())]

    torch.manual_seed(0)
    module = States().double()
    reference = copy.deepcopy(module)
    ours = loop(fastdp.wrap(module, gpus=devices, rows={"hx": 1, "output[1]": 1, "output[2]": 1}))
    torch.testing.assert_close(ours, loop(reference), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("devices", DEVICES)
def test_the_users_own_loop_merges_means_sums_and_values_without_rows(devices):
    def loop(model):
        gates, mean, total, same, across = model(numbers(ROWS, 3))
        loss = (gates**3).sum() + (mean**2).sum() * 3 + total**2 + same * 5 + (across * torch.arange(ROWS)).sum()
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    torch.manual_seed(0)
    module = Balanced().double()
    reference = copy.deepcopy(module)
    rows = {"output[1]": "mean", "output[2]": "sum", "output[3]": "same", "output[4]": 1}
    torch.testing.assert_close(
        loop(fastdp.wrap(module, gpus=devices, rows=rows)), loop(reference), rtol=1e-9, atol=1e-11
    )
