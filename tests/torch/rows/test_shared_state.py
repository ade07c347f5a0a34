"""What forward changes outside of its module, and all devices would share, is refused by name and stays as it was."""

from __future__ import annotations

import contextvars
import copy
import functools
import random
import threading

import numpy as np
import pytest
import torch
from torch import nn

import fastdp

STEP = 0
LOG: list[int] = []
MEAN = None
TABLES: dict[int, torch.Tensor] = {}
SCALE = None
GENERATOR, PYTHONS = np.random.default_rng(0), random.Random(0)
SMALL, LARGE, ARRAY = torch.zeros(3).double(), torch.zeros(1 << 18).double(), np.zeros(1 << 18)
NORM = nn.BatchNorm1d(3, affine=False).double()


LOCAL = threading.local()
LOCAL.scale, LOCAL.steps, LOCAL.deep = 2.0, 0, [1.0]


class Settings:
    step = 0


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3).double()

    def forward(self, x):
        return self.after(self.linear(x))


class Counter(Base):
    def after(self, y):
        global STEP  # noqa: PLW0603
        STEP += 1
        return y * STEP


class OfClass(Base):
    calls = 0

    def after(self, y):
        type(self).calls += 1
        return y


class OtherClass(Base):
    def after(self, y):
        Settings.step += 1
        return y


def log(y):
    LOG.append(len(y))


class Helper(Base):
    def after(self, y):
        log(y)
        return y


class Default(Base):
    def after(self, y, seen=[]):  # noqa: B006
        seen.append(1)
        return y


class First(Base):
    """Keeps what the first batch was like."""

    def after(self, y):
        global MEAN  # noqa: PLW0603
        if MEAN is None:
            MEAN = y.detach().mean(0)
        return y - MEAN


class Draws(Base):
    def after(self, y):
        return y if GENERATOR.random() < 0.999 else y * 2


class PythonDraws(Base):
    def after(self, y):
        return y if PYTHONS.random() < 0.999 else y * 2


class Data(Base):
    def after(self, y):
        SMALL.data.add_(y.detach().sum(0))
        return y


class Large(Base):
    def after(self, y):
        LARGE[:3] += 1
        return y


class Array(Base):
    def after(self, y):
        ARRAY[:3] += 1
        return y


class Outer(Base):
    def after(self, y):
        return NORM(y)


class InList(Base):
    def __init__(self):
        super().__init__()
        self.others = [nn.BatchNorm1d(3, affine=False).double()]

    def after(self, y):
        return self.others[0](y)


class OfThread(Base):
    def after(self, y):
        LOCAL.steps += 1
        return y


REFUSED = {
    Counter: "STEP",
    OfClass: "calls",
    OtherClass: "Settings.step",
    Helper: "LOG",
    Default: "a default of Default.after",
    First: "MEAN",
    Draws: "GENERATOR",
    PythonDraws: "PYTHONS",
    Data: "SMALL",
    Large: "LARGE",
    Array: "ARRAY",
    Outer: "running statistics",
    InList: "running statistics",
    OfThread: "LOCAL.steps",
}


def state():
    tensors = [float(one.sum()) for one in (SMALL, LARGE, NORM.running_mean, torch.from_numpy(ARRAY))]
    drawn = GENERATOR.bit_generator.state["state"]["state"], PYTHONS.getstate()
    return STEP, LOCAL.steps, list(LOG), MEAN, OfClass.calls, Settings.step, Default.after.__defaults__, drawn, tensors


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_what_all_devices_would_share_is_refused_and_stays(kind):
    before = copy.deepcopy(state())
    with pytest.raises(ValueError, match=REFUSED[kind]):
        fastdp.wrap(kind(), gpus=2)(torch.randn(9, 4).double())
    assert state() == before


@functools.cache
def table(size):
    return torch.arange(size).double()


class Kept(Base):
    """Keeps tables that depend on lengths alone."""

    def after(self, y):
        global SCALE  # noqa: PLW0603
        if SCALE is None:
            SCALE = torch.full((3,), 2.0).double()
        if len(y) not in TABLES:
            TABLES[len(y)] = torch.zeros(len(y), 1).double()
        return y * SCALE + TABLES[len(y)] + table(3)


READY: list[int] = []


class SetsUp(Base):
    """Sets something up in its first call."""

    def after(self, y):
        if not READY:
            READY.append(threading.get_ident())
        return y


def test_what_is_set_up_once_is_not_set_up_by_each_device():
    model, x = fastdp.wrap(SetsUp(), gpus=8), torch.randn(9, 4).double()
    model(x)
    assert [threading.get_ident()] == READY  # in a trial


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_what_every_call_sets_to_one_value_may_be_kept_outside(devices):
    module, x = Kept(), torch.randn(9, 4).double()
    torch.testing.assert_close(fastdp.wrap(module, gpus=devices)(x), copy.deepcopy(module)(x), rtol=1e-12, atol=1e-12)


class ThreadReads(Base):
    """Reads what the thread of the call has, and puts it back."""

    def after(self, y):
        LOCAL.deep.append(LOCAL.scale)
        LOCAL.inside = y.mean()
        del LOCAL.inside
        return y * LOCAL.deep.pop() + LOCAL.deep[0] + getattr(LOCAL, "shift", 0.0)


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_attributes_of_the_calling_thread_are_those_of_all_devices(devices):
    module, x = ThreadReads(), torch.randn(9, 4).double()
    model = fastdp.wrap(module, gpus=devices)
    for shift in (0.0, 3.0):
        LOCAL.shift = shift
        torch.testing.assert_close(model(x), module(x), rtol=1e-12, atol=1e-12)
    assert vars(LOCAL) == {"scale": 2.0, "steps": 0, "deep": [1.0], "shift": 3.0}
    del LOCAL.shift


class OwnContext(Base):
    """A context variable that is no global."""

    variable = contextvars.ContextVar("context")

    def after(self, y):
        self.variable.set(y.mean())
        return y


def test_a_context_variable_of_a_class_is_found():
    with pytest.raises(RuntimeError, match="context variable 'context'"):
        fastdp.wrap(OwnContext(), gpus=2)(torch.randn(9, 4).double())
