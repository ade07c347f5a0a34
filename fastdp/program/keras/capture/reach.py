"""Says which objects, attributes and functions of Keras a training step reads: rules for `fastdp.capture.reach`.

A layer of Keras's is read as far as its `call` and what that comes to name it; a layer of the user's wholly. No step
reads initializers, metrics or the optimizer.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable
from typing import Any

import keras
import torch
from keras.src.backend.common.variables import Variable
from keras.src.utils.tracking import Tracker

from fastdp.capture.reach import Reach, Rules, names_in_code
from fastdp.capture.watch import Watch

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


class KerasRules(Rules):
    """Rules for Keras's layers, losses and variables, and for torch modules inside a model.

    Args:
        patched: functions of Keras, as (class, name), that fastdp itself puts others in place of.
    """

    libraries = frozenset({"keras"})
    values = (keras.DTypePolicy,)
    unread = (
        keras.Optimizer,
        keras.metrics.Metric,
        keras.Initializer,
        keras.constraints.Constraint,
        keras.random.SeedGenerator,
        keras.KerasTensor,
        keras.callbacks.Callback,
        Tracker,
        torch.nn.ParameterDict,  # in which Keras keeps a layer's weights for torch
    )

    def __init__(self, patched: frozenset[tuple[Any, str]] = frozenset()) -> None:
        self._patched = patched
        self._of_every_operation = set(vars(keras.Operation()))
        self._of_every_layer = set(vars(keras.layers.Layer())) - _READ_OF_EVERY_LAYER
        self._of_every_model = {*vars(keras.Model()), *_UNREAD_OF_MODELS} - {*_READ_OF_EVERY_LAYER, "_layers"}

    def looks_into(self, cls: type) -> bool:
        """Keras's classes, and torch's modules."""
        return super().looks_into(cls) or issubclass(cls, torch.nn.Module) or _is_keras(cls)

    def watches(self, reach: Reach, value: Any, what: str) -> bool:
        """A variable: its regularizer; of one that is not the model's the value too."""
        if not isinstance(value, Variable):
            return False
        if not reach.is_input(value):
            reach.watch.object(vars(value), "_value", what)
            reach.walk(value._value, what)
        name = f"{value.path}.regularizer"
        reach.watch.attribute_of_many(value, "_regularizer", name)
        reach.walk(value.regularizer, name)
        return True

    def name_of(self, value: Any, what: str) -> str:
        """A layer's own name."""
        return value.name if isinstance(value, keras.layers.Layer) else what

    def read_names(self, value: Any, names: Iterable[str]) -> Iterable[str]:
        """Of a layer of Keras's what its `call` names; of others all but what each operation, layer or model has."""
        unread: set[str] = {"training"} if isinstance(value, torch.nn.Module) else set()
        if isinstance(value, keras.Model):
            unread |= self._of_every_model
        elif isinstance(value, keras.layers.Layer):
            unread |= self._of_every_layer
        elif isinstance(value, keras.Operation):
            unread |= self._of_every_operation
        found = [name for name in names if name not in unread]
        is_layer = isinstance(value, keras.layers.Layer) and not isinstance(value, keras.Model)
        if not is_layer or self.is_own(type(value)):
            return found
        cls: Any = type(value)
        read = _names_in_calls(cls) | _READ_OF_EVERY_LAYER
        return [name for name in found if name in read]

    def has_further_attributes(self, value: Any) -> bool:
        """A model: what its trainer keeps."""
        return isinstance(value, keras.Model)

    def walk_further(self, reach: Reach, value: Any, what: str) -> None:
        """Torch's modules in a layer, and constants among the operands of a functional model."""
        modules = vars(value).get("_modules") if isinstance(value, keras.layers.Layer) else None
        own = (keras.layers.Layer, torch.nn.ParameterDict)
        if modules and not all(isinstance(module, own) for module in modules.values()):
            reach.mapping(vars(value), ["_modules"], what)
        for node in [node for nodes in getattr(value, "_nodes_by_depth", {}).values() for node in nodes]:
            for argument in node.arguments._flat_arguments:
                reach.walk(argument, f"an operand of {node.operation.name}")

    def functions(self, cls: type) -> Iterable[str]:
        """Of Keras's own classes, without those that fastdp exchanges."""
        return [name for name in _functions(cls) if (cls, name) not in self._patched]


def reach_of(watch: Watch, variables: list[Any], patched: frozenset[tuple[Any, str]] = frozenset()) -> Reach:
    """A walk over objects of Keras, whose inputs are the values of these variables. `patched` as of `KerasRules`."""
    return Reach(watch, [*variables, *(variable._value for variable in variables)], KerasRules(patched))


def _is_keras(cls: type) -> bool:
    return cls.__module__.startswith("keras.")


def _is_part(cls: type) -> bool:
    """Whether a class is one of Keras's layers, losses, regularizers, ..., and not what they all derive from."""
    return cls.__module__.startswith("keras.src.") and cls.__module__ not in _COMMON


def _functions(cls: type) -> dict[str, Any]:
    """The functions of one of Keras's classes that a call may come to; of other classes none."""
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
            found.update(names_in_code(function.__code__))
        for function in [one.fget for one in vars(base).values() if isinstance(one, property)]:
            found.update(names_in_code(function.__code__) if _is_part(base) and function is not None else ())
    return frozenset(found)
