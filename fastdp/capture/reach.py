"""Finds everything in Python that a traced step may have read: a walk from some objects.

The walk follows attributes, containers and classes. In code that does not belong to a library it also follows the
globals, modules, closures and defaults that functions name. It skips inputs of the traced graph. `Rules` describe the
library that models are made of. What cannot be followed is an error that names it.
"""

from __future__ import annotations

import collections
import contextvars
import enum
import functools
import inspect
import os
import random
import threading
import types
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from fastdp.capture import libraries
from fastdp.capture.code_names import global_names, modules_of, names_in_code, strings_in_code
from fastdp.capture.watch import Watch
from fastdp.errors import NotCapturable

# Immutable values that `==` compares completely. `_by_value` adds classes whose `==` is identity.
_VALUES: tuple[type, ...] = (int, float, complex, str, bytes, bool, type(None), range, slice)
_VALUES += (enum.Enum, np.generic, np.dtype)
_VALUES += (torch.dtype, torch.device, torch.layout, torch.memory_format, types.CodeType)
_CONTAINERS = (dict, list, tuple, set, frozenset, collections.deque)
_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial, staticmethod, classmethod)
_UNREAD = (inspect.Signature, *libraries.UNREAD)
_UNREAD_METHODS = ("__del__", "__repr__", "__str__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)


class Rules:
    """Describes the libraries that models are made of. This base class describes none.

    Attributes:
        libraries: packages whose code is not the user's, besides torch, NumPy and the standard library.
        values: immutable classes that `==` compares completely.
        unread: classes whose instances no step reads.
    """

    libraries: frozenset[str] = frozenset()
    values: tuple[type, ...] = ()
    unread: tuple[type, ...] = ()

    def is_own(self, thing: Any) -> bool:
        """Whether a class, function or module is the user's, or belongs to a library without rules."""
        name = thing.__name__ if isinstance(thing, types.ModuleType) else getattr(thing, "__module__", None)
        names = [name]
        if isinstance(thing, types.FunctionType):  # which a decorator may have given the name of another one
            names.append(thing.__globals__.get("__name__"))
        packages = [name.split(".")[0] for name in names if isinstance(name, str)]
        if not packages:
            return isinstance(thing, types.FunctionType)
        return not all(libraries.is_library(package) or package in self.libraries for package in packages)

    def looks_into(self, cls: type) -> bool:
        """Whether the walk enters instances of a library's class, as it does for the user's classes."""
        return libraries.may_change(cls)

    def watches(self, reach: Reach, value: Any, what: str) -> bool:
        """Watch a value of a kind that needs a special walk. Returns whether it is of such a kind."""
        return False

    def name_of(self, value: Any, what: str) -> str:
        """The name for messages of an object that was reached as `what`."""
        return what

    def read_names(self, value: Any, names: Iterable[str]) -> Iterable[str]:
        """The attributes of an object, among `names`, that a step may read."""
        return names

    def has_further_attributes(self, value: Any) -> bool:
        """Whether an object may get new attributes that no step reads."""
        return False

    def walk_further(self, reach: Reach, value: Any, what: str) -> None:
        """Walk what a step reads of an object besides the attributes in `read_names`."""

    def unread_methods(self, cls: type) -> Iterable[str]:
        """The names of methods of a user's class that no step calls."""
        return ()

    def functions(self, cls: type) -> Iterable[str]:
        """The names of the functions of a library's class that a step may call."""
        return ()


class Reach:
    """Fills a `Watch` with the values that can be reached from some roots.

    Args:
        watch: the watch to fill.
        inputs: objects whose values are inputs of the graph.
        rules: the rules of the library that the model is made of.
    """

    def __init__(self, watch: Watch, inputs: Iterable[Any], rules: Rules) -> None:
        self.watch = watch
        self._inputs = {id(one): one for one in inputs}
        self._rules = rules
        self._values = (*_VALUES, *rules.values)
        self._compared = (*self._values, types.MethodType)
        self._unread = (*_UNREAD, *rules.unread)
        self._seen: dict[int, Any] = {}
        self._classes: set[type] = set()
        self._of_modules: dict[int, set[str]] = {}  # the variables of modules that are watched

    def is_input(self, value: Any) -> bool:
        """Whether this object is an input of the graph."""
        return id(value) in self._inputs

    def cannot_follow(self, why: str) -> None:
        """Called at what may change unseen. A subclass that need not see everything does nothing here.

        Raises:
            NotCapturable: always.
        """
        raise NotCapturable(why)

    def walk(self, value: Any, what: str) -> None:
        """Watch the contents of a value. The caller watches that the place keeps the same value.

        Raises:
            NotCapturable: nobody can see from outside whether something in it has changed.
        """
        place, value = value, libraries.behind(value)
        if isinstance(value, self._values) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if value is not place and self._by_value(value):  # the caller watches the place alone
            self.watch.values({"": value}, [""], what)
        if self._rules.watches(self, value, what) or self.is_input(value):
            return
        if isinstance(value, torch.Tensor):
            self.watch.tensor(value, what)
        elif isinstance(value, np.ndarray):
            self.watch.array(value, what)
        elif isinstance(value, _GENERATORS):
            self.watch.generators.append((value, what))
        elif isinstance(value, _FUNCTIONS):
            self._function(value, what)
        elif isinstance(value, property):
            self.walk(value.fget, what)
        elif isinstance(value, (contextvars.ContextVar, threading.local)):
            self.cannot_follow(f"{what}, a context variable, whose value the caller of each step sets")
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, _CONTAINERS):
            self._container(value, what)
        elif libraries.is_buffer(value):
            self.watch.memory(value, what)
        elif not isinstance(value, (*self._unread, types.ModuleType)) and self._is_looked_into(type(value)):
            self._object(value, what)

    def mapping(self, mapping: Any, keys: list[Any], what: str) -> None:
        """Watch and walk the values under some keys of a dict or of a class's attributes."""
        by_value = [key for key in keys if self._by_value(mapping[key])]
        self.watch.values(mapping, by_value, what)
        for key in keys:
            name = f"{what}.{key}" if isinstance(key, str) else f"{what}[{key!r}]"
            if key not in by_value:
                self.watch.object(mapping, key, name)
            self.walk(mapping[key], name)

    # Kinds of values.

    def _attribute(self, owner: Any, name: str, what: str) -> None:
        """Watch and walk one attribute of an object without a mapping of attributes."""
        value = getattr(owner, name)
        self.watch.attribute(owner, name, what, self._by_value(value))
        self.walk(value, what)

    def _container(self, container: Any, what: str) -> None:
        """Watch and walk the elements of a container. One that `==` compares completely is watched by the caller."""
        if not self._by_value(container):
            if isinstance(container, dict):
                self.mapping(container, list(container), what)
                self.watch.size(container, what)
            elif not isinstance(container, (tuple, frozenset)):
                self.watch.elements(container, what)
        for i, element in enumerate(container.values() if isinstance(container, dict) else list(container)):
            self.walk(element, f"{what}[{i}]")
        if self._rules.is_own(type(container)):
            self._object(container, what)

    def _object(self, value: Any, what: str) -> None:
        """Watch and walk the attributes of an object, and its class."""
        rules = self._rules
        what = rules.name_of(value, what)
        if libraries.is_moved_by_reading(value) and not rules.is_own(type(value)):
            self.cannot_follow(f"{what}, an iterator: a trace would read from it too")
        if libraries.is_opaque(value) and not isinstance(value, _CONTAINERS):
            self.cannot_follow(f"{what}, an object of class {type(value).__name__}, which may change unseen")
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            self.mapping(attributes, self._read(attributes, rules.read_names(value, attributes)), what)
            if not rules.has_further_attributes(value):
                self.watch.size(attributes, what)
        rules.walk_further(self, value, what)
        for cls in type(value).__mro__:
            for name in slots_of_class(cls):
                if hasattr(value, name):
                    self._attribute(value, name, what)
            self._class(cls)

    def _class(self, cls: type) -> None:
        """Watch all attributes of a user's class, or the functions of a library's class that a step may call."""
        if cls in self._classes or issubclass(cls, (enum.Enum, BaseException)):
            return
        self._classes.add(cls)
        attributes = vars(cls)
        if self._rules.is_own(cls):
            unread = (*_UNREAD_METHODS, *self._rules.unread_methods(cls))
            names = [n for n, one in attributes.items() if n not in unread and _may_be_read(n, one)]
            self.watch.writable_by(attributes, cls)
            self.mapping(attributes, names, cls.__name__)
            self.watch.size(attributes, cls.__name__)
        else:
            self.watch.values(attributes, list(self._rules.functions(cls)), cls.__name__)

    def _function(self, function: Any, what: str) -> None:
        """Watch what a user's function reads besides its arguments, and what a method or a partial is bound to."""
        if isinstance(function, functools.partial):
            for name in ("func", "args", "keywords"):
                self._attribute(function, name, what)
            return
        if isinstance(function, types.MethodType):
            self.walk(function.__self__, what)
        function = getattr(function, "__func__", function)
        if not isinstance(function, types.FunctionType):
            return
        is_own = self._rules.is_own(function)
        if is_own or libraries.is_standard(function.__module__.split(".")[0]):
            for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
                if cell != types.CellType():  # an empty one
                    self._attribute(cell, "cell_contents", f"{name} in {function.__qualname__}()")
        if is_own:
            self._code(function)

    def _code(self, function: types.FunctionType) -> None:
        """Watch the globals, modules, defaults and attributes that a user's function reads."""
        for name in ("__code__", "__defaults__", "__kwdefaults__"):
            self._attribute(function, name, f"{function.__qualname__}()")
        self.mapping(function.__dict__, self._read(function.__dict__, function.__dict__), f"{function.__qualname__}()")
        code, known = function.__code__, function.__globals__
        loaded = global_names(code)
        if "eval" in loaded or "exec" in loaded:
            self.cannot_follow(f"eval() or exec() in {function.__qualname__}(), which may read anything")
        if "globals" in loaded:
            loaded |= set(strings_in_code(code))
        named = sorted(loaded & known.keys())
        self.mapping(known, [n for n in named if not isinstance(known[n], types.ModuleType)], function.__module__)
        names = frozenset(names_in_code(code))
        if "getenv" in names:
            self.walk(os.environ, "os.environ")
        for module in modules_of(function):
            self._module(module, names, whole=not loaded.isdisjoint(("getattr", "vars")))

    def _module(self, module: types.ModuleType, names: frozenset[str], *, whole: bool) -> None:
        """Watch the variables of a module that code names, and of modules in it. `whole`: it may name others too."""
        if module.__name__.split(".")[0] in ("sys", "fastdp", *self._rules.libraries):
            return
        variables, seen = vars(module), self._of_modules.setdefault(id(module), set())
        found = {name for name in names & variables.keys() if not isinstance(variables[name], types.ModuleType)}
        if whole and self._rules.is_own(module):
            found |= {n for n, one in variables.items() if not n.startswith("__") and isinstance(one, self._values)}
        self.mapping(variables, sorted(found - seen), module.__name__)
        seen |= found
        inside = [variables[name] for name in sorted(names & variables.keys()) if name not in found]
        for one in inside:
            if one is not module and (one.__name__.startswith(f"{module.__name__}.") or self._rules.is_own(one)):
                self._module(one, names, whole=whole)

    def _read(self, attributes: dict[str, Any], names: Iterable[str]) -> list[str]:
        """Those of some attributes whose values a step may read, and are no inputs of the graph."""
        return [n for n in names if not isinstance(attributes[n], self._unread) and not self.is_input(attributes[n])]

    def _is_looked_into(self, cls: type) -> bool:
        """Whether the walk enters instances of a class."""
        return self._rules.is_own(cls) or self._rules.looks_into(cls)

    def _by_value(self, value: Any) -> bool:
        """Whether `==` compares a value completely."""
        if isinstance(value, _CONTAINERS):
            return all(map(self._by_value, value.values() if isinstance(value, dict) else list(value)))
        own_equality: Any = type(value).__eq__
        return isinstance(value, self._compared) or own_equality is object.__eq__


def slots_of_class(cls: type) -> Iterator[str]:
    """The names of the slots that a class declares."""
    slots = vars(cls).get("__slots__", ())
    return (name for name in ([slots] if isinstance(slots, str) else slots) if not name.startswith("__"))


def _may_be_read(name: str, value: Any) -> bool:
    """Whether a step may read an attribute of a user's class: all but what describes the class, and saving."""
    if name.startswith("__"):
        return isinstance(value, (types.FunctionType, staticmethod))
    return not name.startswith("_abc_")
