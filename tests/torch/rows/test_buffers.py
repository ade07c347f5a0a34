"""Buffers that forward changes by rows: by trials, as declared, or by collectives, on 1, 2, 3 and 8 devices."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastdp

DEVICES = [1, 2, 3, 8]
SEVERAL = [2, 3, 8]


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.01)


class Linear(nn.Module):
    """A linear layer, and what a subclass keeps of its results."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register()
        self.double()

    def register(self):
        """Register buffers."""

    def forward(self, x):
        y = self.linear(x)
        with torch.no_grad():
            self.keep(x, y)
        return y


class Spectrum(Linear):
    """A sum and a moving mean of complex numbers."""

    def register(self):
        self.register_buffer("total", torch.zeros(3, dtype=torch.complex128))
        self.register_buffer("average", torch.ones(3, dtype=torch.complex128))

    def double(self):
        return self._apply(lambda t: t.double() if t.is_floating_point() else t)

    def keep(self, x, y):
        turned = torch.polar(torch.ones_like(y), y)
        self.total += turned.sum(0)
        self.average.lerp_(turned.mean(0), torch.tensor(0.1, dtype=torch.complex128))


class Bins(Linear):
    """Histograms as counts and as shares, and the classes that were seen."""

    def register(self):
        self.register_buffer("counts", torch.zeros(4, dtype=torch.long))
        self.register_buffer("shares", torch.zeros(4))
        self.register_buffer("seen", torch.zeros(4, dtype=torch.bool))

    def keep(self, x, y):
        found = torch.bucketize(y[:, 0].contiguous(), torch.tensor([-0.5, 0.0, 0.5], dtype=torch.float64))
        counts = torch.bincount(found, minlength=4)
        self.counts += counts
        self.shares.mul_(0.9).add_(counts.double() / len(x), alpha=0.1)
        self.seen |= counts > 0


class Extremes(Linear):
    """Extremes for each feature and for all, and a number of rows and of steps."""

    def register(self):
        self.register_buffer("low", torch.full((3,), float("inf")))
        self.register_buffer("high", torch.full((), -float("inf")))
        self.register_buffer("rows", torch.zeros((), dtype=torch.int32))
        self.register_buffer("steps", torch.zeros(1))

    def keep(self, x, y):
        self.low.copy_(torch.minimum(self.low, y.amin(0)))
        self.high = torch.maximum(self.high, y.max())
        self.rows += len(x)
        self.steps += 1


FOUND = {"complex numbers": Spectrum, "histograms": Bins, "extremes and counters": Extremes}


def trained(module, run, batches):
    """The module after a training loop, and the outputs."""
    optimizer, outputs = sgd(module.parameters()), []
    for x in batches:
        optimizer.zero_grad()
        y = run(x)
        y.square().mean().backward()
        optimizer.step()
        outputs.append(y.detach())
    return outputs


def compare(make, devices, batches, rows=None):
    torch.manual_seed(0)
    plain = make()
    looped, stepped = copy.deepcopy(plain), copy.deepcopy(plain)
    expected = trained(plain, plain, batches)
    found = trained(looped, fastdp.wrap(looped, gpus=devices, rows=rows), batches)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    step = fastdp.wrap(stepped, gpus=devices, rows=rows).train_step(lambda y: y.square().mean(), sgd)
    for x in batches:
        step(x)
    for key, value in plain.state_dict().items():
        for module in (looped, stepped):
            torch.testing.assert_close(module.state_dict()[key], value, rtol=1e-10, atol=1e-11, msg=key)


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("name", FOUND)
def test_what_trials_find_is_that_of_plain_torch(name, devices):
    compare(FOUND[name], devices, [numbers(11, 4, seed=seed) for seed in range(3)])


class Outliers(Linear):
    """Notes what is far away, of which a first batch has nothing."""

    def register(self):
        self.register_buffer("peak", torch.tensor(5.0))
        self.register_buffer("bottom", torch.tensor(-5.0))
        self.register_buffer("count", torch.zeros(3, dtype=torch.long))
        self.register_buffer("share", torch.zeros(3))
        self.register_buffer("alarm", torch.tensor(False))

    def keep(self, x, y):
        far = y.abs() > 5
        self.peak.copy_(torch.maximum(self.peak, y.max()))
        self.bottom.copy_(torch.minimum(self.bottom, y.min()))
        self.count += far.sum(0)
        self.share += far.double().mean(0)
        self.alarm |= far.any()


ROLES = {"peak": "max", "bottom": "min", "count": "sum", "share": "mean", "alarm": "max"}
DECLARED = {f"buffer:{name}": role for name, role in ROLES.items()}
SPREAD = [numbers(11, 4) * 0.1, numbers(11, 4, seed=1) * 20, numbers(11, 4, seed=2) * 0.1]


@pytest.mark.parametrize("devices", DEVICES)
def test_declared_buffers_are_those_of_plain_torch_though_no_trial_sees_them_change(devices):
    compare(Outliers, devices, SPREAD, DECLARED)


@pytest.mark.parametrize("left", ["peak", "bottom", "count", "share"])
def test_without_a_declaration_a_change_that_differs_is_an_error_that_names_it(left):
    module = Outliers()
    rows = {f"buffer:{name}": role for name, role in ROLES.items() if name != left}
    model = fastdp.wrap(module, gpus=3, rows=rows)
    model(SPREAD[0])
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=f'buffer `{left}`.*"buffer:{left}": "max"'):
        model(SPREAD[1])
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "role", "message"),
    [
        ("peek", "max", "the buffer 'peek', which the module has not"),
        ("count", "mean", "to one of"),
        ("alarm", "sum", "to one of"),
        ("peak", 1, "to one of"),
    ],
)
def test_what_cannot_be_meant_is_an_error(name, role, message):
    with pytest.raises(ValueError, match=message):
        fastdp.wrap(Outliers(), gpus=2, rows={f"buffer:{name}": role})


def test_a_buffer_that_is_said_to_be_the_same_and_is_not_is_an_error():
    with pytest.raises(ValueError, match="says to be the same"):
        fastdp.wrap(Extremes(), gpus=2, rows={"buffer:low": "same"})(numbers(8, 4))


# What users write for state that follows the batch: refused as it stands in plain torch, exact with collectives.


class Queue(Linear):
    """A queue of keys and its pointer, as in MoCo."""

    gathers = True

    def register(self):
        self.register_buffer("queue", torch.zeros(3, 20))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    def gathered(self, tensor):
        return fastdp.replica.all_gather(tensor) if self.gathers else tensor

    def keep(self, x, y):
        keys = self.gathered(F.normalize(y, dim=1))
        places = (int(self.pointer) + torch.arange(len(keys))) % self.queue.shape[1]
        self.queue[:, places] = keys.T
        self.pointer[0] = (int(self.pointer) + len(keys)) % self.queue.shape[1]

    def forward(self, x):
        y = self.linear(x)
        logits = torch.cat([y, y @ self.queue.clone()], 1)
        with torch.no_grad():
            self.keep(x, y)
        return logits


class CodeBook(Linear):
    """A code book that follows the mean of what is nearest to each code, as in VQ-VAE."""

    gathers = True

    def register(self):
        self.register_buffer("book", numbers(5, 3, seed=9))
        self.register_buffer("size", torch.ones(5))
        self.register_buffer("sums", numbers(5, 3, seed=9))

    def summed(self, tensor):
        return fastdp.replica.all_reduce(tensor) if self.gathers else tensor

    def forward(self, x):
        z = self.linear(x)
        nearest = F.one_hot(torch.cdist(z.detach(), self.book).argmin(1), 5).to(z.dtype)
        quantized = nearest @ self.book
        with torch.no_grad():
            self.size.mul_(0.9).add_(self.summed(nearest.sum(0)), alpha=0.1)
            self.sums.mul_(0.9).add_(self.summed(nearest.T @ z), alpha=0.1)
            self.book.copy_(self.sums / self.size[:, None])
        return z + (quantized - z).detach() + 0.25 * (z - quantized)


class ActNorm(Linear):
    """Sets its offset and its scale from the first batch."""

    gathers = True

    def register(self):
        self.offset, self.scale = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))
        self.register_buffer("ready", torch.tensor(False))

    def mean(self, tensor):
        found = tensor.mean(0)
        return fastdp.replica.all_reduce(found, "mean") if self.gathers else found

    def forward(self, x):
        y = self.linear(x)
        if not self.ready:
            with torch.no_grad():
                mean = self.mean(y)
                self.offset.copy_(-mean)
                self.scale.copy_(self.mean((y - mean) ** 2).rsqrt())
                self.ready.fill_(True)
        return (y + self.offset) * self.scale


class WeightNorm(Linear):
    """Weight norm with the data-dependent start of Salimans and Kingma."""

    gathers = True

    def register(self):
        self.gain, self.bias = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
        self.register_buffer("started", torch.zeros((), dtype=torch.long))

    mean = ActNorm.mean

    def forward(self, x):
        t = x @ F.normalize(self.linear.weight, dim=1).T
        if self.started == 0:
            with torch.no_grad():
                mean = self.mean(t)
                self.gain.copy_(self.mean((t - mean) ** 2).rsqrt())
                self.bias.copy_(-mean * self.gain)
                self.started += 1
        return t * self.gain + self.bias


FOLLOWS = {"a queue": Queue, "a code book": CodeBook, "an ActNorm": ActNorm, "a weight norm": WeightNorm}


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("name", FOLLOWS)
def test_state_that_follows_the_batch_is_exact_by_collectives(name, devices):
    compare(FOLLOWS[name], devices, [numbers(9, 4, seed=seed) for seed in range(4)])


@pytest.mark.parametrize("devices", SEVERAL)
@pytest.mark.parametrize("name", FOLLOWS)
def test_state_that_follows_the_batch_is_refused_without_them_and_nothing_changes(name, devices):
    module = FOLLOWS[name]()
    module.gathers = False
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=r"fastdp\.replica\.all_reduce or fastdp\.replica\.all_gather"):
        fastdp.wrap(module, gpus=devices)(numbers(9, 4))
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


class Experts(Linear):
    """Routes each row to an expert, and adds the loss that balances them: a product of two means over the batch."""

    gathers = True
    mean = ActNorm.mean

    def forward(self, x):
        gates = self.linear(x).softmax(1)
        chosen = F.one_hot(gates.argmax(1), 3).to(gates.dtype)
        return gates * chosen, 3 * (self.mean(chosen) * self.mean(gates)).sum()


@pytest.mark.parametrize("devices", DEVICES)
def test_a_loss_that_balances_experts_is_exact_by_collectives(devices):
    def loss(outputs):
        return outputs[0].square().mean() + 0.1 * outputs[1]

    torch.manual_seed(0)
    plain = Experts()
    module, x = copy.deepcopy(plain), numbers(11, 4)
    expected = loss(plain(x))
    expected.backward()
    found = loss(fastdp.wrap(module, gpus=devices)(x))
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    for one, other in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("devices", SEVERAL)
def test_a_loss_that_balances_experts_is_refused_without_them(devices):
    module = Experts()
    module.gathers = False
    with pytest.raises(ValueError, match=r"output\[1\].*all_reduce"):
        fastdp.wrap(module, gpus=devices)(numbers(11, 4))


class Rates(Linear):
    """What captured steps can move: sums and means of what is far away, and complex numbers."""

    def register(self):
        self.register_buffer("count", torch.zeros(3, dtype=torch.long))
        self.register_buffer("share", torch.zeros(3))
        self.register_buffer("turns", torch.zeros(3, dtype=torch.complex128))

    def keep(self, x, y):
        far = y.abs() > 5
        self.count += far.sum(0)
        self.share += far.double().mean(0)
        self.turns += torch.polar(torch.ones_like(y), y).mean(0)


@pytest.mark.parametrize("devices", DEVICES)
def test_captured_steps_move_declared_and_complex_buffers_too(devices):
    torch.manual_seed(0)
    module = Rates()
    plain = copy.deepcopy(module)
    rows = {"buffer:count": "sum", "buffer:share": "mean"}
    parallel = fastdp.wrap(module, gpus=devices, rows=rows, compile="trace")
    step = parallel.train_step(lambda y: y.square().mean(), sgd, reduction="mean")
    batches = [numbers(11, 4, seed=seed) * (0.1 if seed < 3 else 20) for seed in range(6)]
    trained(plain, plain, batches)
    for x in batches:
        step(x)
    assert "  traced " in str(parallel.report())
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[key], value, rtol=1e-10, atol=1e-11, msg=key)
