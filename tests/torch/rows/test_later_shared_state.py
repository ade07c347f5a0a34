"""What forward changes outside of its module in a later step alone, unseen by any trial, is refused in that step."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn

import fastdp

SETTINGS = types.SimpleNamespace(hits=0)
LOG: list[int] = []
COUNTS = {"hits": 0}
TABLE = torch.zeros(2)
SEEN: dict[int, int] = {}


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3).double()

    def forward(self, x):
        if x.mean() > 5:
            self.hit()
        return self.linear(x)


class OfNamespace(Base):
    def hit(self):
        SETTINGS.hits += 1


class OfList(Base):
    def hit(self):
        LOG.append(1)


class OfDict(Base):
    def hit(self):
        COUNTS["hits"] += 1


class OfTensor(Base):
    def hit(self):
        TABLE.add_(1)


class OfClass(Base):
    hits = 0

    def hit(self):
        type(self).hits += 1


REACHED = {
    OfNamespace: lambda: SETTINGS.hits,
    OfList: lambda: len(LOG),
    OfDict: lambda: COUNTS["hits"],
    OfTensor: lambda: float(TABLE.sum()),
    OfClass: lambda: OfClass.hits,
}


def rows(offset: float = 0.0) -> torch.Tensor:
    return torch.randn(9, 4, generator=torch.Generator().manual_seed(1)).double() + offset


@pytest.mark.parametrize("how", ["loop", "inference", "step"])
@pytest.mark.parametrize("cls", REACHED)
def test_a_later_change_is_refused_and_nothing_has_changed(cls, how):
    module = cls()
    model = fastdp.wrap(module, gpus=3, compile=None)
    step = model.train_step(lambda y: y.square().mean(), lambda p: torch.optim.SGD(p, lr=0.1))

    def run(x):
        if how == "step":
            step(x)
        elif how == "inference":
            with torch.no_grad():
                model(x)
        else:
            model(x).sum().backward()

    for _ in range(3):
        run(rows())
    before, weight = REACHED[cls](), module.linear.weight.detach().clone()
    with pytest.raises(ValueError, match="lies outside of the module"):
        run(rows(10.0))
    assert REACHED[cls]() == before
    torch.testing.assert_close(module.linear.weight.detach(), weight, rtol=0.0, atol=0.0)
    run(rows())


class KeepsEntries(Base):
    """Keeps one entry for each length, as tables of positions are kept."""

    def forward(self, x):
        SEEN.setdefault(x.shape[1] if float(x.mean()) < 5 else -1, 1)
        return self.linear(x)


class Longer(nn.Module):
    """Makes its table anew for greater lengths than before, for all modules of the class."""

    table = torch.zeros(0, dtype=torch.float64)

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 2).double()

    def forward(self, x):
        if len(type(self).table) < x.shape[1]:
            type(self).table = torch.arange(x.shape[1]).double()
        return self.linear(x[..., None] + type(self).table[: x.shape[1], None])


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_what_every_device_sets_to_one_value_may_be_set_later(devices):
    module = KeepsEntries()
    model = fastdp.wrap(module, gpus=devices)
    for offset in (0.0, 0.0, 10.0):
        torch.testing.assert_close(model(rows(offset)), module(rows(offset)))
    assert SEEN == {4: 1, -1: 1}
    SEEN.clear()
    module = Longer()
    model = fastdp.wrap(module, gpus=devices)
    for length in (3, 4, 3, 7, 5):
        x = torch.randn(9, length, dtype=torch.float64)
        found = model(x)
        assert len(Longer.table) >= length
        torch.testing.assert_close(found, module(x))


def test_what_the_user_changes_between_two_steps_counts_in_the_next_one():
    class Scaled(Base):
        def forward(self, x):
            return self.linear(x) * (1 + COUNTS["hits"]) * TABLE.mean()

    module = Scaled()
    model = fastdp.wrap(module, gpus=3)
    for number in range(4):
        COUNTS["hits"] = number
        TABLE.fill_(number + 1.0)
        torch.testing.assert_close(model(rows()), module(rows()))
    COUNTS["hits"] = 0


class Options(dict):
    """Items as attributes, as many scripts have them: what is not there is a KeyError, also where Python asks."""

    __getattr__ = dict.__getitem__


OPTIONS = Options(scale=2.0)


class Configured(Base):
    def forward(self, x):
        return self.linear(x) * OPTIONS.scale


class Holds(Configured):
    def __init__(self):
        super().__init__()
        self.options = Options(shift=1.0)


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_a_dict_whose_items_are_attributes_may_be_read(devices):
    module = Configured()
    torch.testing.assert_close(fastdp.wrap(module, gpus=devices)(rows()), module(rows()))
    if devices > 1:  # Python cannot copy it
        with pytest.raises(ValueError, match="cannot be copied"):
            fastdp.wrap(Holds(), gpus=devices)(rows())


def test_what_the_user_puts_in_place_of_a_plain_value_between_two_steps_is_no_error():
    class Reads(Base):
        factor = 2.0

        def forward(self, x):
            factor = type(self).factor
            return self.linear(x) * (factor() if callable(factor) else factor) * SETTINGS.scale

    module = Reads()
    SETTINGS.scale = 1.0
    model = fastdp.wrap(module, gpus=3)
    for number, factor in enumerate((2.0, lambda: 3.0, torch.ones(1).double(), None, 4.0)):
        Reads.factor = factor if factor is not None else 5
        SETTINGS.scale = 1.0 if number < 3 else torch.ones(())
        torch.testing.assert_close(model(rows()), module(rows()))
    del SETTINGS.scale
