"""Outputs and arguments that are dataclasses, named tuples or dicts of another class: those of one device."""

from __future__ import annotations

import copy
import dataclasses
import typing
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastdp

ROWS = (7, 5, 7, 7, 2)


class ModelOutput(OrderedDict):
    """As transformers' outputs: fields that are not None are items too."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)


@dataclasses.dataclass
class Classified(ModelOutput):
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden: tuple[torch.Tensor, ...] | None = None


@dataclasses.dataclass
class Plain:
    loss: torch.Tensor | None
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...]

    @property
    def classes(self):
        return self.logits.argmax(-1)


class Named(typing.NamedTuple):
    loss: torch.Tensor | None
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...]

    def doubled(self):
        return 2 * self.logits


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.body, self.head = kind, nn.Linear(4, 5).double(), nn.Linear(5, 3).double()

    def forward(self, x, labels=None):
        hidden = torch.tanh(self.body(x))
        logits = self.head(hidden)
        return self.kind(None if labels is None else F.cross_entropy(logits, labels), logits, (hidden,))


def batches():
    generator = torch.Generator().manual_seed(1)
    for rows in ROWS:
        yield torch.randn(rows, 4, generator=generator, dtype=torch.float64), torch.arange(rows) % 3


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.05)


def by_loop(model, parameters):
    optimizer, found = adam(parameters), []
    for x, labels in batches():
        optimizer.zero_grad()
        out = model(x, labels=labels)
        loss = out.loss + 0.1 * out.logits.square().mean() + out.hidden[0].mean()
        loss.backward()
        optimizer.step()
        found += [loss.detach(), out.loss.detach(), out.logits.detach(), type(out)]
    with torch.no_grad():
        out = model(x)
    assert out.loss is None
    return [*found, out.logits]


def loss_of(out, labels):
    return F.cross_entropy(out.logits, labels)


def same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other) if isinstance(other, torch.Tensor) else None
        assert type(one) is type(other)
        assert isinstance(other, torch.Tensor) or one is other


@pytest.mark.parametrize(("devices", "how"), [(1, None), (2, None), (3, "trace"), (8, "trace")])
@pytest.mark.parametrize("kind", [Classified, Plain, Named])
def test_a_loop_gives_the_outputs_of_one_device_as_their_class(kind, devices, how):
    module, plain = Net(kind), Net(kind)
    plain.load_state_dict(module.state_dict())
    expected = by_loop(plain, plain.parameters())
    same(by_loop(fastdp.wrap(module, gpus=devices, compile=how), module.parameters()), expected)
    torch.testing.assert_close(dict(module.state_dict()), dict(plain.state_dict()))


@pytest.mark.parametrize("kind", [Classified, Plain])
def test_a_train_step_gives_them_to_the_loss_function_and_merges_them(kind):
    module = Net(kind)
    plain = copy.deepcopy(module)
    model = fastdp.wrap(module, gpus=3, compile="trace")
    step = model.train_step(loss_of, adam, reduction="mean", outputs=True)
    optimizer = adam(plain.parameters())
    for x, labels in batches():
        optimizer.zero_grad()
        out = plain(x)
        loss = loss_of(out, labels)
        loss.backward()
        optimizer.step()
        assert float(step(x, labels)) == pytest.approx(float(loss.detach()), rel=1e-9)
        assert type(step.result.outputs) is kind
        torch.testing.assert_close(step.result.outputs.logits, out.logits.detach())


@pytest.mark.parametrize("name", ["output.loss", "output['loss']", 'output["loss"]'])
@pytest.mark.parametrize("kind", [Classified, Plain, Named])
def test_rows_are_declared_by_the_name_of_a_field(kind, name):
    x, labels = next(batches())
    module = Net(kind)
    expected = module(x, labels)
    found = fastdp.wrap(module, gpus=2, rows={name: "mean", "output.hidden": 0})(x, labels)
    torch.testing.assert_close((found.loss, found.hidden), (expected.loss, expected.hidden))
    with pytest.raises(ValueError, match=r"saw.*not what `rows` says"):
        fastdp.wrap(module, gpus=2, rows={name: "sum"})(x, labels)


@pytest.mark.parametrize("kind", [Classified, Plain])
def test_a_declared_output_may_be_missing_from_a_call(kind):
    x, labels = next(batches())
    model = fastdp.wrap(Net(kind), gpus=2, rows={"output.loss": "mean"})
    assert model(x).loss is None
    assert model(x, labels).loss is not None
    with pytest.raises(ValueError, match=r"'output\.los', which is no output"):
        fastdp.wrap(Net(kind), gpus=2, rows={"output.los": "mean"})(x)


def test_a_dict_of_a_class_of_its_own_keeps_items_and_attributes_one():
    x, labels = next(batches())
    found = fastdp.wrap(Net(Classified), gpus=2)(x, labels)
    assert found.logits is found["logits"]
    assert list(found) == ["loss", "logits", "hidden"]


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    labels: torch.Tensor
    tag: str = "train"


class TakesBatches(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3).double()

    def forward(self, batch):
        logits = self.head(batch.x)
        return F.cross_entropy(logits, batch.labels), logits


def test_an_argument_is_split_by_its_fields():
    module = TakesBatches()
    plain = copy.deepcopy(module)
    model = fastdp.wrap(module, gpus=3)
    for x, labels in batches():
        expected, found = plain(Batch(x, labels)), model(Batch(x, labels))
        torch.testing.assert_close(found, expected)
        expected[0].backward()
        found[0].backward()
    torch.testing.assert_close(module.head.weight.grad, plain.head.weight.grad)


def test_what_is_no_nest_is_named_by_its_place():
    module = Net(lambda loss, logits, hidden: Plain(loss, logits, (iter(hidden),)))
    with pytest.raises(TypeError, match=r"a tuple_iterator in it, at `\.hidden\[0\]`"):
        fastdp.wrap(module, gpus=2)(next(batches())[0])
