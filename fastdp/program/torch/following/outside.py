"""Finds what methods reach outside of their module: globals, class attributes, closures, which copies share."""

from __future__ import annotations

import contextvars
import enum
import functools
import inspect
import random
import threading
import types
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from fastdp.capture.code_names import names_in_code
from fastdp.program.torch.following.contents import ATOMS, Contents, is_own, is_plain, make_unique, stored_names
from fastdp.program.torch.following.holders import ClassAttributes, Holder

_MOST = 5_000  # values: a step is not watched further


class Outside(Contents):
    """What a module holds, and what the code of its methods reaches besides.

    Args:
        module: the module.
        given: its parameters and buffers, which are not looked into.
        loss_fn: what its code reaches is looked at too.

    Copies of a module share its classes, and so the globals of their methods. Holders are as in `Contents`.

    Attributes:
        large: tensors and arrays that are too large to be compared, with their names.
        host_generators: generators of random numbers of Python and NumPy, with their names.
        thread_locals: objects of threading.local; their attributes are those of the present thread.
        context_variables: that are no globals.
        unset: globals that a function assigns and that do not exist: their table and name.
    """

    def __init__(self, module: nn.Module, given: Iterable[torch.Tensor], loss_fn: Any = None) -> None:
        self._begin(module, given)
        self.large: list[tuple[str, Any]] = []
        self.host_generators: list[tuple[str, Any]] = []
        self.thread_locals: list[threading.local] = []
        self.context_variables: list[contextvars.ContextVar[Any]] = []
        self.unset: list[tuple[dict[str, Any], str]] = []
        self._of_modules: dict[int, tuple[dict[str, Any], set[str]]] = {}
        self.walk(module, "", inside=True)
        if loss_fn is not None:
            self.walk(loss_fn, LOSS, inside=False)
        for known, names in (*self.global_names.values(), *self._of_modules.values()):
            self.holders.append(Holder(known.get("__name__", ""), known, sorted(names), known, partial=True))
        make_unique(self.holders)

    def walk(self, value: Any, name: str, *, inside: bool) -> None:
        """Look into a value. Stops where too much is reached."""
        if type(value) in ATOMS or id(value) in self._seen or id(value) in self._given or len(self._seen) > _MOST:
            return
        if isinstance(value, threading.local):
            self._seen[id(value)] = value
            self.thread_locals.append(value)
            table = vars(value)  # that of the present thread
            self.holders.append(Holder(name, table, list(table), table))
            for key, one in list(table.items()):
                self.walk(one, f"{name}.{key}", inside=False)
        elif isinstance(value, contextvars.ContextVar):
            self._seen[id(value)] = value
            self.context_variables.append(value)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, (property, functools.cached_property)):
            self.walk(getattr(value, "fget", None) or getattr(value, "func", None), name, inside=False)
        elif isinstance(value, (staticmethod, classmethod)):
            self.walk(value.__func__, name, inside=False)
        elif isinstance(value, (torch.Tensor, np.ndarray)) and value.nbytes > LARGE_NBYTES:
            self._seen[id(value)] = value
            self.large.append((name, value))
        elif isinstance(value, _GENERATORS):
            self._seen[id(value)] = value
            self.host_generators.append((name, value))
        elif isinstance(value, types.FunctionType) or not isinstance(_wrapped_in(value), _FUNCTION):
            super().walk(value, name, inside=True)
        else:  # functools.cache
            self.walk(_wrapped_in(value), name, inside=True)

    def _class(self, cls: type) -> None:
        """Attributes and methods of the user's classes."""
        for one in cls.__mro__:
            if id(one) in self._seen or not is_own(one) or issubclass(one, (enum.Enum, BaseException)):
                continue
            self._seen[id(one)] = one
            held = ClassAttributes(one)
            self.holders.append(Holder(one.__name__, held, list(held), one))
            for name, value in list(vars(one).items()):
                if name in ("__call__", "__getattr__") or not name.startswith(("__", "_abc_")):
                    self.walk(value, f"{one.__name__}.{name}", inside=False)

    def _attributes(self, owner: Any, name: str, keys: list[str], inside: bool) -> None:
        self._class(type(owner))
        super()._attributes(owner, name, keys, inside)

    def _module(self, module: nn.Module, name: str, inside: bool) -> None:
        super()._module(module, name, True)
        self._class(type(module))

    def _container(self, container: Any, name: str, inside: bool) -> None:
        if not is_plain(container):
            super()._container(container, name, inside)
        elif isinstance(container, (dict, list, set)):
            keys = list(container) if isinstance(container, dict) else ()
            self.holders.append(Holder(name, container, keys, container))

    def _globals(self, function: types.FunctionType) -> None:
        """The globals that a function names, and what it names in modules of the user's."""
        super()._globals(function)
        known, names = function.__globals__, set(names_in_code(function.__code__))
        self.unset += [(known, name) for name in set(stored_names(function.__code__)) - known.keys()]
        for key in sorted(names & known.keys()):
            value = known[key]
            if isinstance(value, type):
                self._class(value)
            elif isinstance(value, (threading.local, *_GENERATORS)) or _wrapped_in(value) is not None:
                self.walk(value, key, inside=False)
            elif isinstance(value, types.ModuleType) and is_own(value):
                self._named(value, names)

    def _named(self, module: types.ModuleType, names: set[str]) -> None:
        """What a function names in a module of Python."""
        known = vars(module)
        _, kept = self._of_modules.setdefault(id(known), (known, set()))
        for key in sorted(names & known.keys()):
            value = known[key]
            if not isinstance(value, types.ModuleType) and not key.startswith("__"):
                kept.add(key)
                self.walk(value, f"{module.__name__}.{key}", inside=False)

    def leave_out(self, own: Contents) -> None:
        """Keep nothing of what each copy of the module has of its own."""
        owners = {id(one.owner) for one in own.holders if not one.partial}
        names = {id(one.table): set(one.keys) for one in own.holders if one.partial}
        for one in self.holders:
            if one.partial:
                one.keys = [key for key in one.keys if key not in names.get(id(one.table), ())]
        self.holders = [one for one in self.holders if id(one.owner) not in owners]
        values = {id(value) for _, value in (*own.tensors, *own.arrays)}
        self.tensors = [(name, one) for name, one in self.tensors if id(one) not in values]
        self.arrays = [(name, one) for name, one in self.arrays if id(one) not in values]
        self.tables, self.hooks = [], []

    def _leads_back(self, outside: nn.Module) -> bool:
        return True


def _wrapped_in(value: Any) -> Any:
    """The function in one that was decorated; None if there is none. Objects may make attributes as they are asked."""
    return inspect.getattr_static(value, "__wrapped__", None)


LOSS = "loss_fn"
LARGE_NBYTES = 1 << 20
_FUNCTION = types.FunctionType
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState)
