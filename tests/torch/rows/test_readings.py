"""Where inputs have their rows, found by trials: on 1, 2, 3 and 8 devices against plain torch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastdp

DEVICES = [1, 2, 3, 8]
SEVERAL = [2, 3, 8]
ROWS = 8  # as many as steps, heads, experts and layers: lengths tell nothing


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.double()


class Attention(Linear):
    def forward(self, x, mask):
        return (self.linear(x) @ x.transpose(-1, -2) + mask).softmax(-1) @ x


class Biased(Linear):
    """Adds a bias of each head to the scores of all heads."""

    def forward(self, x, bias):
        heads = self.linear(x)[:, None].expand(-1, len(bias) if len(bias) > 1 else 2, -1, -1)
        return (heads @ heads.transpose(-1, -2) + bias).softmax(-1).sum(1)


class Experts(Linear):
    """Scales each expert's gate by a number that the step hands in."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(4, ROWS).double()

    def forward(self, x, scales):
        return self.gate(x) * scales + self.linear(x).sum(1, keepdim=True)


class Positions(Linear):
    """Looks up the embeddings of positions, the same for all rows."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(ROWS, 4).double()

    def forward(self, x, positions):
        return self.linear(x + self.embed(positions))


class Recurrent(nn.Module):
    def __init__(self, layers, *, batch_first):
        super().__init__()
        self.cell = nn.LSTM(4, 3, num_layers=layers, batch_first=batch_first).double()

    def forward(self, x, states):
        y, (h, c) = self.cell(x, states)
        return y, h, c


class Cached(Linear):
    """Attends to earlier keys and values, which have heads first."""

    def forward(self, x, past):
        keys, values = past
        return (self.linear(x)[None] @ keys.transpose(-1, -2)).softmax(-1) @ values


class StepsFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRU(4, 3).double()

    def forward(self, x):
        return self.cell(x)[0]


class Weights(Linear):
    """Numbers for each class, at which the loss looks too."""

    def forward(self, x, weights=None):
        return self.linear(x) if weights is None else self.linear(x) * weights


def states(layers, rows=ROWS, seed=1):
    return numbers(layers, rows, 3, seed=seed), numbers(layers, rows, 3, seed=seed + 1)


CASES = {
    "a mask for all rows": (Attention, lambda: (numbers(ROWS, ROWS, 4), numbers(ROWS, ROWS, seed=1))),
    "a mask for all rows, of another length": (Attention, lambda: (numbers(ROWS, 5, 4), numbers(5, 5, seed=1))),
    "a mask for each row": (Attention, lambda: (numbers(ROWS, 5, 4), numbers(ROWS, 1, 5, seed=1))),
    "a bias of heads": (Biased, lambda: (numbers(ROWS, 5, 4), numbers(ROWS, 5, 5, seed=1))),
    "a bias of zeros": (Biased, lambda: (numbers(ROWS, 5, 4), torch.zeros(ROWS, 5, 5, dtype=torch.float64))),
    "numbers of experts": (Experts, lambda: (numbers(ROWS, 4), numbers(ROWS, seed=1))),
    "equal numbers of experts": (Experts, lambda: (numbers(ROWS, 4), torch.ones(ROWS, dtype=torch.float64))),
    "positions": (Positions, lambda: (numbers(ROWS, ROWS, 4), torch.arange(ROWS))),
    "states with layers first": (
        lambda: Recurrent(2, batch_first=True),
        lambda: (numbers(ROWS, 5, 4), states(2)),
    ),
    "as many layers as rows": (
        lambda: Recurrent(ROWS, batch_first=True),
        lambda: (numbers(ROWS, 5, 4), states(ROWS)),
    ),
    "as many layers and steps as rows, all zero": (
        lambda: Recurrent(ROWS, batch_first=False),
        lambda: (numbers(ROWS, ROWS, 4), tuple(one * 0 for one in states(ROWS))),
    ),
    "keys and values with heads first": (
        Cached,
        lambda: (numbers(ROWS, 6, 4), (numbers(2, ROWS, 5, 4, seed=1), numbers(2, ROWS, 5, 4, seed=2))),
    ),
    "steps first": (StepsFirst, lambda: (numbers(6, ROWS, 4),)),
    "as many steps as rows": (StepsFirst, lambda: (numbers(ROWS, ROWS, 4),)),
}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def loss_of(outputs, *targets):
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weighed = [(one * (1 + torch.arange(one.numel()).reshape(one.shape) % 7)).square().mean() for one in outputs]
    return sum(weighed) + sum(target.sum() for target in targets)


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_train_steps_are_those_of_plain_torch(name, devices):
    make, inputs = CASES[name]
    torch.manual_seed(0)
    module = make()
    plain = copy.deepcopy(module)
    step = fastdp.wrap(module, gpus=devices, check_replicas=True).train_step(loss_of, sgd)
    optimizer = sgd(plain.parameters())
    for shift in (0.0, 0.5):  # what is judged on zeros must hold for others
        given = torch.utils._pytree.tree_map(lambda x, shift=shift: x + shift if x.is_floating_point() else x, inputs())
        optimizer.zero_grad()
        expected = loss_of(plain(*given))
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(step(given), expected.detach(), rtol=1e-11, atol=1e-11)
    for one, other in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_the_loop_is_that_of_plain_torch_with_gradients_of_inputs(name, devices):
    make, inputs = CASES[name]
    torch.manual_seed(0)
    module = make()
    found = []
    for model in (fastdp.wrap(copy.deepcopy(module), gpus=devices), module):
        given = torch.utils._pytree.tree_map(
            lambda x: x.clone().requires_grad_() if x.is_floating_point() else x, inputs()
        )
        outputs = model(*given)
        loss_of(outputs).backward()
        leaves = [x.grad for x in torch.utils._pytree.tree_leaves(given) if x.requires_grad]
        found.append([outputs, leaves, [p.grad for p in model.parameters()]])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("devices", DEVICES)
def test_each_batch_is_read_by_its_own_lengths(devices):
    module = Attention()
    model = fastdp.wrap(copy.deepcopy(module), gpus=devices)
    for rows, steps in ((8, 5), (8, 8), (16, 8), (8, 8), (3, 8), (5, 5), (1, 5)):
        for mask in (numbers(steps, steps, seed=rows), numbers(rows, 1, steps, seed=steps)):
            x = numbers(rows, steps, 4)
            torch.testing.assert_close(model(x, mask), module(x, mask), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("devices", DEVICES)
def test_targets_are_whole_for_a_loss_of_the_merged_outputs(devices):
    def loss(outputs, labels, weights):
        return F.cross_entropy(outputs, labels, weight=weights)

    module = Weights()
    plain = copy.deepcopy(module)
    step = fastdp.wrap(module, gpus=devices).train_step(loss, sgd)
    x, labels, weights = numbers(ROWS, 4), torch.arange(ROWS) % 4, torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)
    optimizer = sgd(plain.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        expected = loss(plain(x), labels, weights)
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(step(x, labels, weights), expected.detach())
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=1e-10, atol=1e-11)


def test_values_that_agree_with_anything_prove_nothing():
    module = Biased()
    module.linear.weight.data.mul_(3.0)
    model = fastdp.wrap(copy.deepcopy(module), gpus=2)
    x = numbers(2, 5, 4)
    for bias in (torch.zeros(2, 5, 5, dtype=torch.float64), numbers(2, 5, 5, seed=1)):
        torch.testing.assert_close(model(x, bias), module(x, bias), rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match="output of the module"):
        fastdp.wrap(Deviation(), gpus=2)(torch.zeros(ROWS, 4, dtype=torch.float64))


class Deviation(Linear):
    def forward(self, x):
        return self.linear(x) + x.std(0).mean()


class Gated(Linear):
    """Relates rows to their mean by a gate that starts closed."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        return self.linear(x) + self.gate * x.mean(0)


class ClassWeights(Linear):
    def forward(self, x, labels, weights):
        return F.cross_entropy(self.linear(x), labels, weights)


class OwnWeights(Linear):
    def forward(self, x, labels, weights):
        each = F.cross_entropy(self.linear(x), labels, reduction="none")
        return (each * weights[labels]).sum() / weights[labels].sum()


@pytest.mark.parametrize("devices", SEVERAL)
def test_what_counts_only_later_is_refused_at_once(devices):
    with pytest.raises(ValueError, match="output of the module"):
        fastdp.wrap(Gated(), gpus=devices)(numbers(ROWS, 4))
    model, labels = fastdp.wrap(ClassWeights(), gpus=devices), torch.arange(ROWS) % 4
    for weights in (torch.ones(4, dtype=torch.float64), torch.arange(1.0, 5.0, dtype=torch.float64)):
        found = model(numbers(ROWS, 4), labels, weights)  # a loss of torch's own is weighed where it is computed
        torch.testing.assert_close(found, model.module(numbers(ROWS, 4), labels, weights), rtol=1e-11, atol=1e-11)
    model = fastdp.wrap(OwnWeights(), gpus=devices)
    for weights in (torch.ones(4, dtype=torch.float64), torch.arange(1.0, 5.0, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"output of the module.*mean_over"):
            model(numbers(ROWS, 4), labels, weights)
    counted = fastdp.mean_over(lambda labels, weights: weights[labels])
    model = fastdp.wrap(model.module, gpus=devices, rows={"output": counted})
    found = model(numbers(ROWS, 4), labels, weights)
    torch.testing.assert_close(found, model.module(numbers(ROWS, 4), labels, weights), rtol=1e-11, atol=1e-11)


class Heads(nn.Module):
    """Attention with a mask for each row and head, one behind the other."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True).double()

    def forward(self, x, mask):
        return self.attention(x, x, x, attn_mask=mask)[0]


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("rows", [None, {"x": 0, "mask": 0}])
def test_several_entries_for_each_row_are_found_and_can_be_told(devices, rows):
    module = Heads()
    x, mask = numbers(ROWS, 5, 4), numbers(2 * ROWS, 5, 5, seed=1).requires_grad_()
    other = mask.detach().clone().requires_grad_()
    found = fastdp.wrap(copy.deepcopy(module), gpus=devices, rows=rows)(x, mask)
    expected = module(x, other)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    loss_of(found).backward()
    loss_of(expected).backward()
    torch.testing.assert_close(mask.grad, other.grad, rtol=1e-10, atol=1e-12)


class Pairs(Linear):
    def forward(self, x, unused=None):
        return self.linear(x) @ self.linear(x).T


class Contrasts(Linear):
    """All pairs, where a collective gives all rows."""

    def forward(self, x, mask):
        keys = fastdp.replica.all_gather(x)
        return self.linear(x) @ keys.T * mask


@pytest.mark.parametrize("devices", SEVERAL)
def test_what_no_reading_makes_exact_is_refused(devices):
    with pytest.raises(ValueError, match="output of the module"):
        fastdp.wrap(Pairs(), gpus=devices)(numbers(ROWS, 4))
    with pytest.raises(ValueError, match="output of the module"):  # not: all devices compute all pairs
        fastdp.wrap(Pairs(), gpus=devices)(numbers(ROWS, 4), numbers(ROWS, seed=1))
    with pytest.raises(ValueError, match="same number of rows"):
        fastdp.wrap(Attention(), gpus=devices)(numbers(ROWS, 5, 4), numbers(3, 7))
    with pytest.raises(ValueError, match="same number of rows"):  # a collective hides what a mask is
        fastdp.wrap(Contrasts(), gpus=devices)(numbers(ROWS, 4), numbers(3, ROWS))


@pytest.mark.parametrize("devices", SEVERAL)
def test_what_is_said_of_an_output_is_tried_while_an_argument_is_not_told(devices):
    module = StepsFirst()
    x = numbers(6, 4, 4)
    found = fastdp.wrap(copy.deepcopy(module), gpus=devices, rows={"output": 1})(x)
    torch.testing.assert_close(found, module(x), rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match="what `rows` says of it"):
        fastdp.wrap(Linear2(), gpus=devices, rows={"output": "mean"})(numbers(ROWS, 4))


class Linear2(Linear):
    def forward(self, x):
        return self.linear(x).sum()


@pytest.mark.parametrize("devices", DEVICES)
def test_one_row_with_a_mask_is_plain_torch(devices):
    module = Pairs()
    found = fastdp.wrap(copy.deepcopy(module), gpus=devices)(numbers(1, 4), numbers(3, 5))
    assert torch.equal(found, module(numbers(1, 4)))
