"""Outputs that share memory on one device do so on several: what the loop writes to one of them, the others have."""

from __future__ import annotations

import pytest
import torch
from regression_step import data
from torch import nn

import fastdp

DEVICES = [1, 2, 3, 8]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_buffer("queue", torch.zeros(5, 3))
        self.double()

    def hidden(self, x):
        return self.last(self.first(x).tanh())

    def forward(self, x):
        return self.parts(x, self.hidden(x))


class Twice(Net):
    def parts(self, x, h):
        return h, h


class Detached(Net):
    def parts(self, x, h):
        return h, h.detach()


class DetachedFirst(Net):
    def parts(self, x, h):
        return h.detach()[:, 0], h


class Column(Net):
    def parts(self, x, h):
        return h, h[:, 0]


class Turned(Net):
    def parts(self, x, h):
        return {"h": h, "turned": h.t(), "flat": h.view(-1), "inner": h[:, :2], "deep": h[:, :2][:, 1]}


class StepsFirst(Net):
    """The rows are the second axis in memory."""

    def parts(self, x, h):
        states = torch.stack([h, h * 2])
        return states, states[-1], states.transpose(0, 1)


class Kept(Net):
    def parts(self, x, h):
        self.kept, self.live = h.detach(), h
        return h, self.kept, self.live


class Backwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Reversed(Net):
    """Shares memory by a function whose gradient is another one."""

    def parts(self, x, h):
        return h, Backwards.apply(h)


CLASSES = [Twice, Detached, DetachedFirst, Column, Turned, StepsFirst, Kept, Reversed]
TENSORS = dict.fromkeys((Twice, Detached, DetachedFirst, Column, Reversed), 2) | {Turned: 5, StepsFirst: 3, Kept: 3}


def tensors_of(outputs) -> list[torch.Tensor]:
    return list(outputs.values()) if isinstance(outputs, dict) else list(outputs)


def steps(module, model, written: int | None, *, count: int = 3) -> list[torch.Tensor]:
    """Losses, outputs and weights of steps in which the loop doubles one output in place, or none."""
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), []
    for seed in range(count):
        optimizer.zero_grad()
        outputs = tensors_of(model(data(seed)[0]))
        if written is not None:
            outputs[written].mul_(2.0)
        loss = sum((one * (at + 1.0)).sum() + one.square().mean() for at, one in enumerate(outputs))
        loss.backward()
        optimizer.step()
        found += [loss.detach(), *(one.detach().clone() for one in outputs)]
    return [*found, *(parameter.detach().clone() for parameter in module.parameters())]


def outcome(module, model, written: int | None) -> list[torch.Tensor] | str:
    try:
        return steps(module, model, written)
    except RuntimeError as error:  # torch's own, of a tensor that is needed for a gradient
        return str(error)[:70]


@pytest.mark.parametrize("compile", [None, "trace"])
@pytest.mark.parametrize("cls", CLASSES)
def test_what_is_written_to_one_output_is_in_the_others(cls, compile):
    if cls is Kept and compile:
        pytest.skip("an attribute with a gradient is not captured")
    for written in (None, *range(TENSORS[cls])):
        if cls is Reversed and written is not None:
            continue  # torch forbids it
        plain = cls()
        expected = outcome(plain, plain, written)
        for devices in (2, 3, 8):
            module = cls()
            found = outcome(module, fastdp.wrap(module, gpus=devices, compile=compile), written)
            assert type(found) is type(expected), (written, devices, found, expected)
            torch.testing.assert_close(found, expected, msg=lambda text, at=(written, devices): f"{at}: {text}")


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("cls", [Twice, Detached, Column, Turned, StepsFirst])
def test_outputs_without_gradients_share_memory(cls, devices):
    plain, module, x = cls(), cls(), data(0)[0]
    model = fastdp.wrap(module, gpus=devices)
    with torch.no_grad():
        for written in range(TENSORS[cls]):
            expected, found = tensors_of(plain(x)), tensors_of(model(x))
            expected[written].zero_()
            found[written].zero_()
            torch.testing.assert_close(found, expected)


class Given(Net):
    def forward(self, x, extra=None):
        return x, x[:, :2], self.hidden(x), self.queue, self.last.weight, extra


@pytest.mark.parametrize("compile", [None, "trace"])
@pytest.mark.parametrize("devices", DEVICES)
def test_arguments_buffers_and_parameters_are_returned_as_they_are(devices, compile):
    module = Given()
    model = fastdp.wrap(module, gpus=devices, compile=compile)
    for _ in range(8):
        x, extra = data(0)[0], torch.zeros(9, 1, dtype=torch.float64)
        found, part, _, queue, weight, other = model(x, extra=extra)
        assert found is x
        assert other is extra
        assert queue is module.queue
        assert weight is module.last.weight
        part.fill_(7.0)
        assert bool((x[:, :2] == 7.0).all())
        queue.add_(1.0)
    assert bool((module.queue == 8.0).all())


@pytest.mark.parametrize("devices", DEVICES)
def test_gradients_by_arguments_come_through_views_of_them(devices):
    module = Given()
    model = fastdp.wrap(module, gpus=devices)
    x = data(0)[0].requires_grad_()
    _, part, hidden, _, weight, _ = model(x)
    (part.sum() + hidden.sum() + weight.square().sum()).backward()
    plain, own = Given(), data(0)[0].requires_grad_()
    _, part, hidden, _, weight, _ = plain(own)
    (part.sum() + hidden.sum() + weight.square().sum()).backward()
    torch.testing.assert_close(x.grad, own.grad)
    torch.testing.assert_close(module.last.weight.grad, plain.last.weight.grad)


class SometimesShared(Net):
    def parts(self, x, h):
        return h, h.detach() if bool((x > 0).any()) else h.detach().clone()


@pytest.mark.parametrize("devices", [2, 3])
def test_outputs_that_share_memory_on_some_devices_alone_have_their_own_values(devices):
    module, x = SometimesShared(), data(0)[0]
    x[:5] = -1.0
    first, other = fastdp.wrap(module, gpus=devices, compile=None)(x)
    torch.testing.assert_close(other, first.detach())


@pytest.mark.parametrize("devices", DEVICES)
def test_hooks_and_retained_gradients_of_views_are_those_of_one_device(devices):
    def gradients(model, x):
        outputs, seen = model(x), []
        for name in ("h", "inner", "deep"):
            outputs[name].retain_grad()
            outputs[name].register_hook(lambda gradient: seen.append(gradient.clone()))
        (outputs["deep"].square().sum() + outputs["flat"].sum()).backward()
        return [*(outputs[name].grad for name in ("h", "inner", "deep")), *sorted(seen, key=lambda one: one.shape)]

    x = data(0)[0]
    torch.testing.assert_close(gradients(fastdp.wrap(Turned(), gpus=devices), x), gradients(Turned(), x))


class Overlapping(Net):
    def parts(self, x, h):
        return h[:, :2], h[:, 1:]


class Halves(Net):
    """Has one memory, and no element in common."""

    def parts(self, x, h):
        return h[:, :1], h[:, 1:]


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_a_write_to_an_output_that_shares_a_part_of_another_one_is_an_error(devices):
    model = fastdp.wrap(Overlapping(), gpus=devices)
    first, other = model(data(0)[0])
    (first.sum() + other.sum()).backward()
    first, other = model(data(0)[0])
    first.mul_(2.0)
    with pytest.raises(RuntimeError, match=r"written in place to output 0 .* shares memory with output 1"):
        other.sum().backward()
    with torch.no_grad():
        _, other = model(data(0)[0])
        other.mul_(2.0)
        with pytest.raises(RuntimeError, match="written in place to output 1"):
            model(data(0)[0])
        model(data(0)[0])


@pytest.mark.parametrize("devices", DEVICES)
def test_parts_of_one_memory_without_a_common_element_may_be_written_to(devices):
    with torch.no_grad():
        outputs = [model(data(0)[0]) for model in (Halves(), fastdp.wrap(Halves(), gpus=devices))]
        for first, _ in outputs:
            first.zero_()
        torch.testing.assert_close(outputs[1], outputs[0])
