"""What a traced step reads is found wherever Python keeps it, or refused by name: a change of it is noticed."""

from __future__ import annotations

import argparse
import array
import collections
import ctypes
import functools
import itertools
import os
import queue
import sys
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fastdp.capture import libraries
from fastdp.capture.reach import Reach, Rules
from fastdp.capture.watch import Watch
from fastdp.errors import NotCapturable
from fastdp.program.torch.reach import TorchRules

SETTINGS = types.ModuleType("settings_of_a_user")
PART = types.ModuleType("settings_of_a_user.part")
SETTINGS.part = PART  # type: ignore[attr-defined]
SCALE = 1.0


class Plain:
    scale = 1.0


KEPT = Plain()


class Registry(dict):
    """With an attribute."""


class Schedule:
    def __getitem__(self, step: int) -> float:
        return SCALE


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    for module in (SETTINGS, PART):
        monkeypatch.setattr(module, "scale", 1.0, raising=False)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(globals(), "SCALE", 1.0)
    monkeypatch.setenv("SCALE", "1.0")
    for one in (Plain, KEPT, with_attribute):
        monkeypatch.setattr(one, "scale", 1.0, raising=False)


def closure(value: Any, read: Callable[[Any], Any] = lambda value: value) -> Callable[[], Any]:
    return lambda: read(value)


def import_inside() -> float:
    import settings_of_a_user.part

    return settings_of_a_user.part.scale


def import_from() -> float:
    from settings_of_a_user import part

    return part.scale


def with_attribute() -> float:
    return with_attribute.scale  # type: ignore[attr-defined]


@functools.lru_cache
def cached() -> float:
    return SCALE


@functools.singledispatch
def dispatched(value: object) -> float:
    return SCALE


def bound_loss() -> tuple[Any, Callable[[], Any]]:
    trainer = Plain()
    trainer.loss = lambda: trainer.scale  # type: ignore[attr-defined]
    method = types.MethodType(lambda self: self.scale, trainer)
    return method, lambda: setattr(trainer, "scale", 2.0)


def in_dict(make: Callable[[dict[str, float]], Any]) -> tuple[Any, Callable[[], Any]]:
    known = {"scale": 1.0}
    return closure(make(known)), lambda: known.update(scale=2.0)


def of(value: Any, change: Callable[[Any], Any]) -> tuple[Any, Callable[[], Any]]:
    return closure(value), lambda: change(value)


def global_scale(function: Any) -> tuple[Any, Callable[[], Any]]:
    return function, lambda: globals().update(SCALE=2.0)


def part_scale(function: Any) -> tuple[Any, Callable[[], Any]]:
    return function, lambda: setattr(PART, "scale", 2.0)


def read_only_view() -> tuple[Any, Callable[[], Any]]:
    values = np.ones(3)
    view = values[:1]
    view.setflags(write=False)
    return closure(view), lambda: values.fill(2.0)


def rate() -> tuple[Any, Callable[[], Any]]:
    optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    return closure(schedule), lambda: optimizer.param_groups[0].update(lr=0.2)


def subclass_attribute() -> tuple[Any, Callable[[], Any]]:
    registry = Registry()
    registry.scale = 1.0  # type: ignore[attr-defined]
    return closure(registry), lambda: setattr(registry, "scale", 2.0)


PLACES: dict[str, Callable[[], tuple[Any, Callable[[], Any]]]] = {
    "what a method is bound to": bound_loss,
    "an attribute of a function": lambda: (with_attribute, lambda: setattr(with_attribute, "scale", 2.0)),
    "a module in a package": lambda: part_scale(lambda: SETTINGS.part.scale),  # type: ignore[attr-defined]
    "a module that is imported where it is read": lambda: part_scale(import_inside),
    "a part of a package that is imported there": lambda: part_scale(import_from),
    "a module by its name": lambda: part_scale(lambda: sys.modules["settings_of_a_user.part"].scale),
    "a global by its name": lambda: global_scale(lambda: globals()["SCALE"]),
    "a variable of a module by its name": lambda: (
        lambda: getattr(SETTINGS, "sc" + "ale"),
        lambda: setattr(SETTINGS, "scale", 2.0),
    ),
    "the environment": lambda: (lambda: os.environ["SCALE"], lambda: os.environ.update(SCALE="2.0")),
    "the environment, by a function": lambda: (lambda: os.getenv("SCALE"), lambda: os.environ.update(SCALE="2.0")),
    "a function of a library that is replaced": lambda: (
        lambda: np.testing.assert_warns,
        lambda: setattr(np.testing, "assert_warns", Plain),
    ),
    "a cached function": lambda: global_scale(closure(cached)),
    "a function by kind": lambda: global_scale(closure(dispatched)),
    "an operator of a class": lambda: global_scale(closure(Schedule())),
    "a namespace of arguments": lambda: of(argparse.Namespace(scale=1.0), lambda one: setattr(one, "scale", 2.0)),
    "a wrapped dict": lambda: of(collections.UserDict(scale=1.0), lambda one: one.update(scale=2.0)),
    "an attribute of a subclass of dict": subclass_attribute,
    "an event": lambda: of(threading.Event(), threading.Event.set),
    "an object that had no attributes": lambda: of(Plain(), lambda one: setattr(one, "scale", 2.0)),
    "a weak reference": lambda: (
        closure([weakref.ref(KEPT), weakref.proxy(KEPT)]),
        lambda: setattr(KEPT, "scale", 2.0),
    ),
    "a view of a dict": lambda: in_dict(dict.values),
    "a dict that only reads": lambda: in_dict(types.MappingProxyType),
    "a method of a dict": lambda: in_dict(lambda known: known.get),
    "a bytearray": lambda: of(bytearray(b"1"), lambda one: one.__setitem__(0, 2)),
    "an array of Python's": lambda: of(array.array("d", [1.0]), lambda one: one.__setitem__(0, 2.0)),
    "a number of ctypes": lambda: of(ctypes.c_double(1.0), lambda one: setattr(one, "value", 2.0)),
    "an array that only reads what another may write": read_only_view,
    "a transposed tensor": lambda: of(torch.ones(2, 3).t(), lambda one: one.data.fill_(2.0)),
    "a rate that a schedule knows": rate,
}


@pytest.mark.parametrize("place", PLACES)
def test_a_change_is_noticed_in(place, monkeypatch):
    monkeypatch.setattr(np.testing, "assert_warns", np.testing.assert_warns)
    function, change = PLACES[place]()
    watch = Watch()
    Reach(watch, [], TorchRules()).walk(function, "the function")
    assert (watch.refused, watch.changed()) == ("", "")
    change()
    assert watch.changed()


REFUSED = {
    "an iterator": closure(itertools.count()),
    "a generator": closure(one for one in [1.0]),
    "a pointer": closure(types.SimpleNamespace(one=ctypes.pointer(ctypes.c_double(1.0)))),
    "a queue": closure(queue.SimpleQueue()),
    "a value of the thread": closure(threading.local()),
    "code in a string": lambda: eval("SCALE"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_nobody_can_compare_is_refused(kind):
    with pytest.raises(NotCapturable, match=r"iterator|unseen|context variable|eval"):
        Reach(Watch(), [], Rules()).walk(REFUSED[kind], "the function")


def test_a_module_of_the_user_may_have_the_name_of_one_in_the_standard_library(tmp_path, monkeypatch):
    (tmp_path / "sched.py").write_text("def loss():\n    return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sched", raising=False)
    libraries.is_standard.cache_clear()
    import sched

    own, taken = Rules().is_own(sched.loss), Rules().is_own(argparse.Namespace)  # type: ignore[attr-defined]
    libraries.is_standard.cache_clear()
    monkeypatch.delitem(sys.modules, "sched")
    assert (own, taken) == (True, False)


def test_a_function_with_the_name_of_a_librarys_is_the_users():
    @functools.wraps(torch.relu)
    def relu() -> float:
        return SCALE

    relu.__module__ = "torch"
    assert Rules().is_own(relu)
