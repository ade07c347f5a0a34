"""Finds everything in Python that a traced step may have read: a walk over the model's objects.

The walk follows attributes, containers and torch modules, and, of code that is not Keras's or torch's, the globals,
closures and defaults that functions name and what classes hold. It leaves out what no step reads (initializers,
metrics, the optimizer), and what is an input of the traced graph: the model's variables.
"""

from __future__ import annotations

import collections
import enum
import functools
import inspect
import random
import sys
import types
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import torch
from keras.src.backend.common.variables import Variable
from keras.src.utils.tracking import Tracker

from fastdp.capture.watch import Watch

_LIBRARIES = {"keras", "torch", "numpy", "fastdp", "builtins", *sys.stdlib_module_names}
# Equal where `==` says so, and never changed in place. Classes whose `==` is identity are added by `_by_value`.
_VALUES: tuple[type, ...] = (int, float, complex, str, bytes, bool, type(None), range, slice)
_VALUES += (enum.Enum, np.generic, np.dtype)
_VALUES += (
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    keras.DTypePolicy,
    types.MethodType,
    types.CodeType,
)
_CONTAINERS = (dict, list, tuple, set, frozenset, collections.deque)
_UNREAD = (
    keras.Optimizer,
    keras.metrics.Metric,
    keras.Initializer,
    keras.constraints.Constraint,
    keras.random.SeedGenerator,
    keras.KerasTensor,
    keras.callbacks.Callback,
    Tracker,
    inspect.Signature,
    torch.nn.ParameterDict,  # in which Keras keeps a layer's weights for torch
)
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
# What every layer has, and a call reads.
_READ_OF_EVERY_LAYER = {"_dtype_policy", "activity_regularizer", "_trainable", "autocast", "_supports_masking"}
_UNREAD_OF_MODELS = {"history", "stop_training", "_epoch_iterator", "_nodes", "_nodes_by_depth", "_operations_by_depth"}
_UNREAD_OF_MODELS |= {
    "_compile_config",
    "_compiled_trainable_state",
    "_inputs",
    "_outputs",
    "_inputs_struct",
    "_outputs_struct",
    "_fastdp_steps",
    "_fastdp_said",
}
# The modules of classes that layers and models derive from: of these a call comes to `call` and `__call__` alone.
_COMMON = {
    f"keras.src.{name}"
    for name in (
        "layers.layer",
        "ops.operation",
        "backend.torch.layer",
        "backend.torch.trainer",
        "trainers.trainer",
        "saving.keras_saveable",
        "models.model",
        "models.sequential",
        "models.functional",
        "ops.function",
    )
}
# Functions of Keras's layers that a call does not come to.
_NOT_CALLED = (
    "__init__",
    "build",
    "config",
    "adapt",
    "compute_output",
    "_own_variables",
    "enable_lora",
    "_spec",
    "_repr",
)


class Reach:
    """Fills a `Watch` with what can be reached from some roots.

    Args:
        watch: to fill.
        variables: the model's, whose values are inputs of the graph.
        patched: functions of Keras, as (class, name), that fastdp itself puts others in place of.

    `generators` are those of random numbers that were met, with their names.
    """

    def __init__(self, watch: Watch, variables: list[Any], patched: set[tuple[Any, str]]) -> None:
        self._watch = watch
        self._patched = patched
        self.generators: list[tuple[Any, str]] = []
        self._inputs = {id(v) for v in variables} | {id(v._value) for v in variables}
        self._seen: dict[int, Any] = {}
        self._classes: set[type] = set()
        self._of_every_operation = set(vars(keras.Operation()))
        self._of_every_layer = set(vars(keras.layers.Layer())) - _READ_OF_EVERY_LAYER
        self._of_every_model = {*vars(keras.Model()), *_UNREAD_OF_MODELS} - {*_READ_OF_EVERY_LAYER, "_layers"}

    def walk(self, value: Any, what: str) -> None:
        """Watch what is in a value. That the value itself stays where it is has been seen to."""
        if isinstance(value, _VALUES) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if id(value) in self._inputs and not isinstance(value, Variable):
            return
        if isinstance(value, torch.Tensor):
            self._watch.tensor(value, what)
        elif isinstance(value, np.ndarray):
            self._watch.array(value, what)
        elif isinstance(value, Variable):
            self._variable(value, what)
        elif isinstance(value, _GENERATORS):
            self.generators.append((value, what))
        elif isinstance(value, (types.FunctionType, types.MethodType, functools.partial, staticmethod, classmethod)):
            self._function(value, what)
        elif isinstance(value, property):
            self.walk(value.fget, what)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, _CONTAINERS):
            self._container(value, what)
        elif not isinstance(value, (*_UNREAD, types.ModuleType)) and _own_kind(type(value)):
            self._object(value, what)

    # Kinds of values.

    def _mapping(self, mapping: Any, keys: list[Any], what: str) -> None:
        """The values under some keys of a dict, or of the attributes of a class."""
        by_value = [key for key in keys if _by_value(mapping[key])]
        self._watch.values(mapping, by_value, what)
        for key in keys:
            name = f"{what}.{key}" if isinstance(key, str) else f"{what}[{key!r}]"
            if key not in by_value:
                self._watch.object(mapping, key, name)
            self.walk(mapping[key], name)

    def _attribute(self, owner: Any, name: str, what: str) -> None:
        """One attribute of an object that has no mapping of them."""
        value = getattr(owner, name)
        self._watch.attribute(owner, name, what, _by_value(value))
        self.walk(value, what)

    def _container(self, container: Any, what: str) -> None:
        """What is in a container. Where `==` tells about all of it, it has been seen to."""
        if not _by_value(container):
            if isinstance(container, dict):
                self._mapping(container, list(container), what)
                self._watch.size(container, what)
                return
            if not isinstance(container, (tuple, frozenset)):
                self._watch.elements(container, what)
        for i, element in enumerate(container.values() if isinstance(container, dict) else list(container)):
            self.walk(element, f"{what}[{i}]")

    def _variable(self, variable: Any, what: str) -> None:
        """A weight's regularizer; of a variable that is not the model's the value too."""
        if id(variable) not in self._inputs:
            self._watch.object(vars(variable), "_value", what)
            self.walk(variable._value, what)
        self._watch.regularizer(variable, f"{variable.path}.regularizer")
        self.walk(variable.regularizer, f"{variable.path}.regularizer")

    def _object(self, value: Any, what: str) -> None:
        """The attributes of an object, and its class."""
        if isinstance(value, keras.layers.Layer):
            what = value.name
        attributes = getattr(value, "__dict__", {})
        if attributes:
            names = self._read_names(value, attributes)
            self._mapping(attributes, names, what)
            if not isinstance(value, keras.Model):
                self._watch.size(attributes, what)
        modules = attributes.get("_modules") if isinstance(value, keras.layers.Layer) else None
        own = (keras.layers.Layer, torch.nn.ParameterDict)
        if modules and not all(isinstance(module, own) for module in modules.values()):
            self._mapping(attributes, ["_modules"], what)
        # Constants among the operands of a functional model.
        for node in [node for nodes in getattr(value, "_nodes_by_depth", {}).values() for node in nodes]:
            for argument in node.arguments._flat_arguments:
                self.walk(argument, f"an operand of {node.operation.name}")
        for cls in type(value).__mro__:
            for name in _slots(cls):
                if hasattr(value, name):
                    self._attribute(value, name, what)
            self._class(cls)

    def _read_names(self, value: Any, attributes: dict[str, Any]) -> list[str]:
        """The names of attributes that a step may read."""
        unread: set[str] = {"training"} if isinstance(value, torch.nn.Module) else set()
        if isinstance(value, keras.Model):
            unread |= self._of_every_model
        elif isinstance(value, keras.layers.Layer):
            unread |= self._of_every_layer
        elif isinstance(value, keras.Operation):
            unread |= self._of_every_operation
        names = [
            name
            for name, one in attributes.items()
            if name not in unread and not isinstance(one, _UNREAD) and id(one) not in self._inputs
        ]
        if isinstance(value, keras.layers.Layer) and not isinstance(value, keras.Model) and not is_own(type(value)):
            cls: Any = type(value)
            read = _names_in_calls(cls) | _READ_OF_EVERY_LAYER
            names = [name for name in names if name in read]
        return names

    def _class(self, cls: type) -> None:
        """The functions of Keras's classes; all that the user's own hold."""
        if cls in self._classes or issubclass(cls, (enum.Enum, BaseException)):
            return
        self._classes.add(cls)
        attributes = vars(cls)
        if is_own(cls):
            names = [n for n in attributes if n == "__call__" or not n.startswith(("__", "_abc_"))]
            self._mapping(attributes, names, cls.__name__)
            self._watch.size(attributes, cls.__name__)
        elif _is_keras(cls):
            names = [name for name in _functions(cls) if (cls, name) not in self._patched]
            self._watch.values(attributes, names, cls.__name__)

    def _function(self, function: Any, what: str) -> None:
        """What a function of the user's reads without being given it; what a method or a partial is bound to."""
        if isinstance(function, functools.partial):
            for name in ("func", "args", "keywords"):
                self._attribute(function, name, what)
            return
        if isinstance(function, types.MethodType):
            self.walk(function.__self__, what)
        function = getattr(function, "__func__", function)
        if not isinstance(function, types.FunctionType) or not is_own(function):
            return
        for name in ("__code__", "__defaults__", "__kwdefaults__"):
            self._attribute(function, name, f"{function.__qualname__}()")
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if cell != types.CellType():  # an empty one
                self._attribute(cell, "cell_contents", f"{name} in {function.__qualname__}()")
        names = set(_names_in_code(function.__code__))
        known = function.__globals__
        named = sorted(name for name in names & known.keys() if not name.startswith("@"))  # pytest's, for `assert`
        self._mapping(known, [n for n in named if not isinstance(known[n], types.ModuleType)], function.__module__)
        for module in [known[n] for n in named if isinstance(known[n], types.ModuleType) and is_own(known[n])]:
            inside = [
                n for n in sorted(names & vars(module).keys()) if not isinstance(vars(module)[n], types.ModuleType)
            ]
            self._mapping(vars(module), inside, module.__name__)


def is_own(thing: Any) -> bool:
    """Whether a class, function or module is the user's own, or another library's: not Keras's, torch's or NumPy's."""
    name = thing.__name__ if isinstance(thing, types.ModuleType) else getattr(thing, "__module__", None)
    return isinstance(name, str) and name.split(".")[0] not in _LIBRARIES


def _own_kind(cls: type) -> bool:
    """Whether instances of a class are looked into: those of the user's classes, of Keras's, and torch's modules."""
    if issubclass(cls, (torch.nn.Module, types.SimpleNamespace)):
        return True
    return is_own(cls) or _is_keras(cls)


def _is_keras(cls: type) -> bool:
    return cls.__module__.startswith("keras.")


def _by_value(value: Any) -> bool:
    """Whether `==` tells all there is to know of a value where it stands."""
    if isinstance(value, _CONTAINERS):
        return all(map(_by_value, value.values() if isinstance(value, dict) else list(value)))
    own_equality: Any = type(value).__eq__
    return isinstance(value, _VALUES) or own_equality is object.__eq__


def _slots(cls: type) -> Iterator[str]:
    """The attributes of a class's instances that lie in slots."""
    slots = vars(cls).get("__slots__", ())
    return (name for name in ([slots] if isinstance(slots, str) else slots) if not name.startswith("__"))


def _is_part(cls: type) -> bool:
    """Whether a class is one of Keras's layers, losses, regularizers, ..., and not what they all derive from."""
    return cls.__module__.startswith("keras.src.") and cls.__module__ not in _COMMON


def _functions(cls: type) -> dict[str, Any]:
    """The functions of one of Keras's classes that a call may come to."""
    functions = {name: one for name, one in vars(cls).items() if isinstance(one, types.FunctionType)}
    if not _is_part(cls):
        return {name: one for name, one in functions.items() if name in ("call", "__call__") and _is_keras(cls)}
    return {name: one for name, one in functions.items() if not any(part in name for part in _NOT_CALLED)}


@functools.cache
def _names_in_calls(cls: type) -> frozenset[str]:
    """The names in the functions of one of Keras's layers, and of its bases, which a call may come to."""
    found: set[str] = set()
    for base in cls.__mro__:
        for function in _functions(base).values() if base is not keras.layers.Layer else ():
            found.update(_names_in_code(function.__code__))
        for function in [one.fget for one in vars(base).values() if isinstance(one, property)]:
            found.update(_names_in_code(function.__code__) if _is_part(base) and function is not None else ())
    return frozenset(found)


def _names_in_code(code: types.CodeType) -> Iterator[str]:
    """The names of globals and attributes in a function, and in those inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in_code(constant)
