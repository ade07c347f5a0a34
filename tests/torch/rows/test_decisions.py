"""A module that decides by a number of all its rows is refused, unless its outputs do not depend on the decision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastdp


class Base(nn.Module):
    limit = 1e3

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4).double()
        self.seen = 0

    def forward(self, x):
        return self.after(x, self.linear(x))


class ByTensor(Base):
    def after(self, x, y):
        return y / y.norm() if y.norm() > self.limit else y


class ByNumber(Base):
    def after(self, x, y):
        size = x.square().mean().item()
        return y * 0.5 if size / 2 >= self.limit else y


class ByFactor(Base):
    """Decides without Python."""

    def after(self, x, y):
        return y * (x.amax() > self.limit)


class Converges(Base):
    """An equilibrium, up to an error of all rows."""

    def after(self, x, y):
        found = torch.zeros_like(y)
        for _ in range(50):
            before, found = found, (0.1 * found + y).tanh()
            if (found - before).norm() < 1e-3:
                break
        return found


class UntilSmall(Base):
    def after(self, x, y):
        error = y.abs().max().item()
        while error > self.limit:
            y = y / 2
            error = y.abs().max().item()
        return y


class Asserts(Base):
    def after(self, x, y):
        assert y.norm() < self.limit, "diverged"
        if y.norm() > self.limit:
            raise ValueError("diverged")
        return y


class Warns(Base):
    def after(self, x, y):
        if y.norm().item() < self.limit:
            self.seen += 1
        return y


class OfParameters(Base):
    def after(self, x, y):
        return y * 2 if self.linear.weight.norm() > self.limit else y


class ByRow(Base):
    def after(self, x, y):
        return torch.where(y.norm(dim=1, keepdim=True) > self.limit, y / 2, y)


class Guards(Base):
    def after(self, x, y):
        chosen = (x > 0).double()
        return y * chosen if chosen.sum() > 0 else y * 0


class OfAllRows(Base):
    def after(self, x, y):
        size = fastdp.replica.all_reduce(y.square().sum()).sqrt()
        return y / 2 if size > self.limit else y


def rows() -> torch.Tensor:
    return torch.randn(9, 4, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("devices", [2, 3, 8])
@pytest.mark.parametrize("cls", [ByTensor, ByNumber, ByFactor, Converges, UntilSmall])
def test_a_decision_by_all_rows_is_refused_with_its_line(cls, devices):
    with pytest.raises(ValueError, match=r"decides by a number of all of its rows \(test_decisions.py, line \d+: `"):
        fastdp.wrap(cls(), gpus=devices)(rows())


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
@pytest.mark.parametrize("cls", [Asserts, Warns, OfParameters, ByRow, Guards, OfAllRows])
def test_a_decision_that_does_not_matter_or_is_no_ones_own_runs(cls, devices):
    module = cls()
    torch.testing.assert_close(fastdp.wrap(module, gpus=devices)(rows()), module(rows()))


def test_on_one_device_all_decisions_are_plain_torchs():
    for cls in (ByTensor, ByNumber, ByFactor, Converges, UntilSmall):
        module = cls()
        torch.testing.assert_close(fastdp.wrap(module, gpus=1)(rows()), module(rows()))
