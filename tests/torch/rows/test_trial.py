"""Modules whose rows meet: merged exactly on 1, 2, 3 and 8 devices, or refused by an error that names what differs."""

from __future__ import annotations

import copy
import queue

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastdp

DEVICES = [1, 2, 3, 8]
SEVERAL = [2, 3, 8]


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integers(high, *shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


class Linear(nn.Module):
    """A linear layer and what a subclass does with its results."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register()

    def register(self):
        """Register buffers."""

    def forward(self, x):
        return self.linear(x)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(3, 4, num_layers=2, batch_first=True)

    def forward(self, x):
        y, (h, c) = self.cell(x)
        return y, h, c


class Transposed(Linear):
    def forward(self, x):
        return self.linear(x).T


class Statistics(Linear):
    """A mean per expert, a sum, extremes, a penalty of the weights, and two entries for each row."""

    def forward(self, x):
        y = self.linear(x)
        twice = torch.stack([y, y * y], 1).flatten(0, 1)
        return y.softmax(-1).mean(0), (y**2).sum(), y.max(), y.amin(0), self.linear.weight.square().sum(), twice


class SumOfLosses(Linear):
    def forward(self, x):
        return F.mse_loss(self.linear(x), x[:, :3], reduction="sum")


class Squeezed(Linear):
    """Loses the axis of the rows where there is one row."""

    def forward(self, x):
        return self.linear(x).sum(1, keepdim=True).squeeze()


class Observed(Linear):
    """Counts rows, and observes extremes, a histogram and a moving mean."""

    def register(self):
        self.register_buffer("rows", torch.zeros((), dtype=torch.long))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("largest", torch.tensor(-float("inf")))
        self.register_buffer("smallest", torch.full((3,), 9.0))
        self.register_buffer("histogram", torch.zeros(5))
        self.register_buffer("average", torch.zeros(3))

    def forward(self, x):
        y = self.linear(x)
        with torch.no_grad():
            self.rows += len(x)
            self.steps += 1
            self.largest.copy_(torch.maximum(self.largest, y.max()))
            self.smallest.copy_(torch.minimum(self.smallest, y.amin(0)))
            self.histogram += torch.histc(y, 5, -2, 2)
            self.average.lerp_(y.mean(0), 0.1)
        return y


class Noisy(Linear):
    """Draws numbers that belong to no row, as many as a trial has rows, and others for each row."""

    def forward(self, x):
        return self.linear(x) * (1 + torch.rand(3, dtype=x.dtype)) + torch.randn(len(x), 3, dtype=x.dtype)


class LastSize(Linear):
    """Notes the size of its last batch."""

    rows = 0

    def forward(self, x):
        self.rows = len(x)
        return self.linear(x)


def parts(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def loss_of(outputs):
    return sum(
        (one * (1 + torch.arange(one.numel(), dtype=one.dtype).reshape(one.shape))).sum() for one in parts(outputs)
    )


EXACT = {
    "recurrent states with layers first": (Recurrent, (11, 5, 3)),
    "rows along the second axis": (Transposed, (11, 4)),
    "means, sums, extremes, the same, two entries a row": (Statistics, (11, 4)),
    "a sum inside": (SumOfLosses, (11, 4)),
    "an axis that one row loses": (Squeezed, (16, 4)),
    "observers": (Observed, (11, 4)),
    "draws": (Noisy, (16, 4)),
    "a number that is assigned": (LastSize, (11, 4)),
}


@pytest.fixture(autouse=True)
def in_double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("name", EXACT)
def test_train_steps_are_those_of_plain_torch(name, devices):
    make, shape = EXACT[name]
    plain = make()
    module = copy.deepcopy(plain)
    step = fastdp.wrap(module, gpus=devices).train_step(loss_of, lambda p: torch.optim.SGD(p, lr=1e-4))
    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-4)
    for number in range(3):
        x = numbers(*shape, seed=number)
        torch.manual_seed(number)
        optimizer.zero_grad()
        expected = loss_of(plain(x))
        expected.backward()
        optimizer.step()
        torch.manual_seed(number)
        torch.testing.assert_close(step(x), expected.detach(), rtol=1e-11, atol=1e-11)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[key], value, rtol=1e-10, atol=1e-10, msg=key)


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("name", EXACT)
def test_the_loop_is_that_of_plain_torch(name, devices):
    make, shape = EXACT[name]
    plain = make()
    module = copy.deepcopy(plain)
    model = fastdp.wrap(module, gpus=devices)
    for number in range(2):
        x = numbers(*shape, seed=number)
        torch.manual_seed(number)
        expected = plain(x)
        torch.manual_seed(number)
        found = model(x)
        for one, other in zip(parts(found), parts(expected), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
        loss_of(expected).backward()
        loss_of(found).backward()
    for (key, one), other in zip(module.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-10, msg=key)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[key], value, rtol=1e-10, atol=1e-10, msg=key)


class CodeBook(Linear):
    def register(self):
        self.register_buffer("book", numbers(6, 3, seed=5))
        self.register_buffer("size", torch.ones(6))

    def forward(self, x):
        z = self.linear(x)
        nearest = torch.cdist(z, self.book).argmin(1)
        with torch.no_grad():
            one = F.one_hot(nearest, 6).to(z.dtype)
            self.size.mul_(0.9).add_(one.sum(0), alpha=0.1)
            self.book.mul_(0.9).add_(one.T @ z / self.size[:, None], alpha=0.1)
        return z


class StartsByData(Linear):
    """Takes its offset from the first batch, and uses it from the second on."""

    def register(self):
        self.offset = nn.Parameter(torch.zeros(3))
        self.register_buffer("ready", torch.tensor(False))

    def forward(self, x):
        y = self.linear(x)
        if not self.ready:
            with torch.no_grad():
                self.offset.copy_(-y.mean(0))
                self.ready.fill_(True)
            return y
        return y + self.offset


class TwoViews(Linear):
    def forward(self, x):
        return torch.cat([self.linear(x), self.linear(-x)])


class Pairs(Linear):
    def forward(self, x):
        return self.linear(x) @ self.linear(x).T


class BatchDeviation(Linear):
    def forward(self, x):
        return self.linear(x) + x.std(0).mean()


class Masked(Linear):
    def forward(self, x, mask):
        return self.linear(x + mask @ x)


REFUSED = {
    "a code book": (CodeBook, [(11, 4)], "buffer `book`"),
    "a parameter that the first batch sets": (StartsByData, [(11, 4)], "parameter `offset`"),
    "the views of a batch side by side": (TwoViews, [(8, 4)], "output of the module"),
    "all pairs of rows": (Pairs, [(8, 4)], "output of the module"),
    "a deviation over rows": (BatchDeviation, [(8, 4)], "output of the module"),
}


def inputs_of(shapes):
    found = [numbers(*shape, seed=at) for at, shape in enumerate(shapes) if shape != "mask"]
    return [*found, (torch.arange(len(found[0])) < 3).double()] if "mask" in shapes else found


@pytest.mark.parametrize("devices", SEVERAL)
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_merged_is_refused_and_nothing_changes(name, devices):
    make, shapes, named = REFUSED[name]
    module = make()
    inputs, before = inputs_of(shapes), copy.deepcopy(module.state_dict())
    model = fastdp.wrap(module, gpus=devices)
    drawn = torch.get_rng_state()
    with pytest.raises((ValueError, RuntimeError), match=named) as refused:
        model(*inputs)
    assert "gpus=[0]" in str(refused.value)
    step = model.train_step(loss_of, lambda p: torch.optim.SGD(p, lr=0.1))
    with pytest.raises((ValueError, RuntimeError), match=named):
        step(tuple(inputs))
    assert torch.equal(torch.get_rng_state(), drawn)
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("devices", DEVICES)
def test_what_the_user_declares_is_not_judged(devices):
    plain = Masked()
    x, mask = inputs_of([(6, 6, 4), (6, 6)])
    found = fastdp.wrap(copy.deepcopy(plain), gpus=devices, rows={"mask": "same"})(x, mask)
    torch.testing.assert_close(found, plain(x, mask), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("devices", DEVICES)
def test_modules_that_meet_in_forward_are_trusted(devices):
    class Meets(Linear):
        def forward(self, x, valid):
            total = fastdp.replica.all_reduce((self.linear(x).square().sum(1) * valid).sum())
            return total / fastdp.replica.all_reduce(valid.sum())

    plain = Meets()
    inputs = inputs_of([(8, 4), "mask"])
    torch.testing.assert_close(fastdp.wrap(copy.deepcopy(plain), gpus=devices)(*inputs), plain(*inputs))


def test_trials_are_once_per_kind_and_draw_nothing():
    calls = queue.SimpleQueue()  # no list: forward must not change what all devices share

    class Counting(Linear):
        def forward(self, x):
            calls.put(len(x))
            return self.linear(x) + torch.randn(len(x), 3)

    model = fastdp.wrap(Counting(), gpus=2)
    model(numbers(16, 4))
    first = calls.qsize()
    model(numbers(16, 4, seed=1))
    assert calls.qsize() == first + 2
    model.eval()
    model(numbers(16, 4))
    assert calls.qsize() > first + 4


def test_modules_of_torchs_own_parts_are_not_tried():
    seen = []
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU())
    model = fastdp.wrap(module, gpus=2)
    module[0].weight.register_hook(seen.append)
    program = model.train_step(loss_of, lambda p: torch.optim.SGD(p, lr=0.1))._program
    batch = program.batch((numbers(8, 4),), {})
    program.judge(batch, 2)
    assert batch.structure.judged is None


@pytest.mark.parametrize("devices", SEVERAL)
def test_a_buffer_that_only_a_later_step_changes_by_rows_is_refused(devices):
    class Later(Linear):
        def register(self):
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))
            self.register_buffer("first", torch.zeros(3))

        def forward(self, x):
            y = self.linear(x)
            self.steps += 1
            if self.steps == 3:  # trials see two
                self.first = y[0].detach().clone()
            return y

    module = Later()
    step = fastdp.wrap(module, gpus=devices).train_step(loss_of, lambda p: torch.optim.SGD(p, lr=0.1))
    step(numbers(8, 4))
    step(numbers(8, 4))
    with pytest.raises(ValueError, match="buffer `first`"):
        step(numbers(8, 4))
    assert not module.first.any()


class Reaching(nn.Module):
    """Uses a global in place of `self`: a method belongs to all copies of a module."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return REACHED[0].linear(x)


REACHED = []


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_a_method_that_reaches_its_module_past_self_is_refused(devices):
    module = Reaching()
    REACHED[:] = [module]
    with pytest.raises(ValueError, match=r"reaches `linear\.weight` past the module"):
        fastdp.wrap(module, gpus=devices)(torch.randn(9, 4))
    torch.testing.assert_close(fastdp.wrap(module, gpus=1)(torch.ones(9, 4)), module(torch.ones(9, 4)))
