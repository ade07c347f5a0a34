"""Modules that do something else for some numbers of rows: refused where this changes a result, and exact elsewhere."""

from __future__ import annotations

import copy
import queue

import pytest
import torch
from torch import nn

import fastdp


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3).double()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        return self.after(self.linear(x), len(x))


class Exactly(Base):
    def after(self, y, rows):
        return y * 2 if rows == 24 else y


class Many(Base):
    def after(self, y, rows):
        return y.tanh() if rows > 16 else y


class Some(Base):
    def after(self, y, rows):
        return y, y[:6].mean()


class Flag(Base):
    def after(self, y, rows):
        self.is_large = rows > 16
        return y


class Largest(Base):
    def after(self, y, rows):
        self.most = torch.tensor(3.0).double() if rows > 16 else y.detach().max()
        return y


class Buffer(Base):
    def after(self, y, rows):
        self.steps += 1 if rows < 10 else 2
        return y


class Number(Base):
    def after(self, y, rows):
        return y, rows > 16


class Part(Base):
    """Only parts of some batches are of this size: a branch that only devices take."""

    def after(self, y, rows):
        return y * 2 if rows == 12 else y


OTHERS = [Exactly, Many, Some, Flag, Largest, Buffer, Number, Part]


@pytest.mark.parametrize("devices", [2, 3])
@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.__name__)
def test_another_result_for_the_rows_of_a_step_is_refused(kind, devices):
    devices = {Part: 2, Buffer: 3}.get(kind, devices)
    model = fastdp.wrap(kind(), gpus=devices)
    if kind is not Some:
        model(torch.randn(8, 4).double())  # the few rows of which nothing tells
    with pytest.raises(ValueError, match=r"for some numbers of rows: with \[.*24 in all"):
        model(torch.randn(24, 4).double())


class InParts(Base):
    def after(self, y, rows):
        return torch.cat([one.tanh() for one in y.split(7)]) if rows > 7 else y.tanh()


def test_other_ways_to_one_result_are_exact():
    module, x = InParts(), torch.randn(24, 4).double()
    expected = copy.deepcopy(module)(x)
    for devices in (2, 3, 8):
        torch.testing.assert_close(fastdp.wrap(module, gpus=devices)(x), expected, rtol=1e-12, atol=1e-12)


def test_each_number_of_rows_is_tried_once():
    calls = queue.SimpleQueue()  # no list: forward must not change what all devices share

    class Count(Base):
        def after(self, y, rows):
            calls.put(rows)
            return y

    model, counts = fastdp.wrap(Count(), gpus=2), []
    for rows in (16, 16, 12, 12, 16):
        model(torch.randn(rows, 4).double())
        counts.append([calls.get() for _ in range(calls.qsize())])
    assert [counts[0][-5:], *counts[1:]] == [[16, 8, 8, 8, 8], [8, 8], [12, 6, 6, 6, 6], [6, 6], [8, 8]]
