"""A backward pass of a loop whose device is full or lost: forward is repeated, and `grad` is that of one device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastdp
from fastdp.engine.replicas import Replica
from fastdp.errors import DeviceLostError

pytestmark = pytest.mark.filterwarnings("ignore:fastdp. virtual")
SURVIVES = {"on_oom": "split", "on_device_loss": "continue", "timeout": 60.0, "sync_batch_norm": True}


class Net(nn.Module):
    """Draws, perhaps batch normalization, and a buffer that forward reads and changes."""

    def __init__(self, norm=nn.Identity):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.norm = nn.Linear(4, 6), nn.Linear(6, 2), norm(6)
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))
        self.double()

    def forward(self, x):
        self.seen.add_(1)
        return self.two(nn.functional.dropout(self.norm(self.one(x)), 0.3)) * (1 + self.seen)


class Faults:
    """Fails once or more on a device, in passes of one direction: forward, and backward after it, are called alike."""

    def __init__(self, patch, error, device="virtual:1", times=1):
        self.left, self.backward = times, False
        original = Replica.call

        def call(replica, batch, context, work):
            # Before a backward pass a replica has the graph of its forward pass: the work is of another function.
            chosen = replica.device.name.startswith(device) and context.rows.count > 1
            if self.backward and self.left and chosen and work.args[0].__name__ == "backward":
                self.left -= 1
                raise error("injected")
            return original(replica, batch, context, work)

        patch.setattr(Replica, "call", call)


def data(rows=12):
    torch.manual_seed(5)
    return torch.randn(rows, 4, dtype=torch.float64, requires_grad=True), torch.randn(rows, 2, dtype=torch.float64)


def trained(module, x, y, passes=1):
    """The loss of some open passes, gradients by weights and inputs, buffers, and what comes out of the generator."""
    torch.manual_seed(1)
    sum(((module(x) - y) ** 2).mean() for _ in range(passes)).backward()
    plain = getattr(module, "module", module)
    return [*(p.grad for p in plain.parameters()), x.grad, *(b.clone() for b in plain.buffers()), torch.rand(3)]


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("error", "times", "compile"),
    [(MemoryError, 1, None), (MemoryError, 1, "trace"), (MemoryError, 2, None), (DeviceLostError, 1, None)],
)
def test_the_gradients_are_those_of_one_device(error, times, compile, monkeypatch):
    norm = nn.Identity if error is MemoryError else nn.BatchNorm1d
    expected = trained(Net(norm), *data(), passes=2)
    model = fastdp.wrap(Net(norm), 3, compile=compile, **SURVIVES)
    faults = Faults(monkeypatch, error, times=times)
    faults.backward = True
    assert_same(trained(model, *data(), passes=2), expected)
    assert not faults.left
    cuts = {0: (), 1: (1, 2, 1), 2: (1, 4, 1)}[times if error is MemoryError else 0]
    assert model._calls.engine.deal.cuts == cuts
    again = [buffer.clone() for buffer in model.module.buffers()]
    model.zero_grad()
    found, twin = trained(model, *data()), Net(norm)
    for ours, theirs in zip(twin.buffers(), again, strict=True):
        ours.copy_(theirs)
    assert_same(found, trained(twin, *data()))


def refused(model, monkeypatch, match, between=lambda *_: None, error=MemoryError):
    """A failure in backward is an error, and `grad` and buffers are as before."""
    faults = Faults(monkeypatch, error)
    x, y = data()
    loss = ((model(x) - y) ** 2).mean()
    before = [value.clone() for value in model.module.state_dict().values()]
    between(model.module, x)
    faults.backward = True
    with pytest.raises(RuntimeError, match=match):
        loss.backward()
    faults.backward = False
    faults.left = 0
    assert x.grad is None
    assert all(parameter.grad is None for parameter in model.module.parameters())
    assert all(map(torch.equal, before, model.module.state_dict().values()))
    trained(model, *data())


def switch(module, x):
    module.eval()


def write(module, x):
    x.detach().add_(0.0)


@pytest.mark.parametrize(
    ("between", "match"),
    [(switch, "the module was changed since"), (write, "modified by an inplace operation")],
)
def test_a_pass_that_would_run_otherwise_is_not_repeated(between, match, monkeypatch):
    refused(fastdp.wrap(Net(), 3, compile=None, **SURVIVES), monkeypatch, match, between)


@pytest.mark.parametrize("between", [switch, write])
def test_rows_that_backward_runs_again_find_what_they_found_or_it_is_an_error(between, monkeypatch):
    model = fastdp.wrap(Net(), 3, compile=None, **SURVIVES)
    Faults(monkeypatch, MemoryError).backward = True
    trained(model, *data())
    x, y = data()
    loss = ((model(x) - y) ** 2).mean()
    between(model.module, x)
    with pytest.raises(RuntimeError, match=r"modified by an inplace|Backward runs rows again .* changed"):
        loss.backward()


class Counts(Net):
    calls = 0

    def forward(self, x):
        self.calls = self.calls + 1
        return super().forward(x) * self.calls


def test_a_pass_that_writes_attributes_is_not_repeated(monkeypatch):
    model = fastdp.wrap(Counts(), 3, compile=None, **SURVIVES)
    refused(model, monkeypatch, r"written to .* the module's attributes")
    assert model._calls.engine.deal.cuts == ()  # the forward pass behind it has found that they cannot be
    model.zero_grad()
    refused(model, monkeypatch, r"cannot run in parts .*: `forward` sets `calls`")


def test_rows_that_batch_normalization_needs_together_stay_together(monkeypatch):
    options = {**SURVIVES, "sync_batch_norm": False}
    model = fastdp.wrap(Net(nn.BatchNorm1d), 3, compile=None, **options)
    refused(model, monkeypatch, r"cannot run in parts.*batch normalization uses the moments of all rows")
    assert model._calls.engine.deal.cuts == ()
    model.zero_grad()
    with pytest.warns(UserWarning, match="virtual:1 was lost"):
        refused(model, monkeypatch, "used each device's own rows", error=DeviceLostError)
