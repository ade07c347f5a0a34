"""Says which objects, attributes and functions of Keras a training step reads: rules for `fastdp.capture.reach`.

Of a Keras layer, a step reads the attributes that its `call`, and the functions it may reach, name. Of a user's layer
it may read all attributes. No step reads initializers, metrics or the optimizer.
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

from fastdp.capture.code_names import names_in_code
from fastdp.capture.reach import Reach, Rules
from fastdp.capture.watch import Watch

# Attributes of every layer that a call reads.
_READ_OF_EVERY_LAYER = {"_dtype_policy", "activity_regularizer", "_trainable", "autocast", "_supports_masking"}
_UNREAD_OF_MODELS = {
    "history",
    "stop_training",
    "_epoch_iterator",
    "_eval_epoch_iterator",
    "_nodes",
    "_nodes_by_depth",
    "_operations_by_depth",
    "_compile_config",
    "_compiled_trainable_state",
    "_inputs",
    "_outputs",
    "_inputs_struct",
    "_outputs_struct",
    "_fastdp_steps",
    "_fastdp_said",
}
# Modules of the base classes of layers and models: of these a call reaches only `call` and `__call__`.
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
# Functions of Keras's layers that a call does not reach (parts of their names).
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
        patched: functions of Keras that fastdp itself replaces, as (class, name).
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
        torch.nn.ParameterDict,  # holds a layer's weights for torch
    )

    def __init__(self, patched: frozenset[tuple[Any, str]] = frozenset()) -> None:
        self._patched = patched
        self._of_every_operation = set(vars(keras.Operation()))
        self._of_every_layer = set(vars(keras.layers.Layer())) - _READ_OF_EVERY_LAYER
        self._of_every_model = {*vars(keras.Model()), *_UNREAD_OF_MODELS} - {*_READ_OF_EVERY_LAYER, "_layers"}

    def looks_into(self, cls: type) -> bool:
        """Enter instances of Keras's classes and torch's modules."""
        return super().looks_into(cls) or issubclass(cls, torch.nn.Module) or _is_keras(cls)

    def watches(self, reach: Reach, value: Any, what: str) -> bool:
        """Watch a variable's regularizer, and its value if the variable is not the model's."""
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
        """For a Keras layer, the names in its `call`; for others, all but what every operation, layer or model has."""
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
        """True for a model: its trainer adds attributes."""
        return isinstance(value, keras.Model)

    def walk_further(self, reach: Reach, value: Any, what: str) -> None:
        """Walk torch's modules in a layer, and constants among the operands of a functional model."""
        modules = vars(value).get("_modules") if isinstance(value, keras.layers.Layer) else None
        own = (keras.layers.Layer, torch.nn.ParameterDict)
        if modules and not all(isinstance(module, own) for module in modules.values()):
            reach.mapping(vars(value), ["_modules"], what)
        for node in [node for nodes in getattr(value, "_nodes_by_depth", {}).values() for node in nodes]:
            for argument in node.arguments._flat_arguments:
                reach.walk(argument, f"an operand of {node.operation.name}")

    def functions(self, cls: type) -> Iterable[str]:
        """The functions of Keras's own classes, except those that fastdp replaces."""
        return [name for name in _functions(cls) if (cls, name) not in self._patched]


def reach_of(watch: Watch, variables: list[Any], patched: frozenset[tuple[Any, str]] = frozenset()) -> Reach:
    """A walk over objects of Keras, whose inputs are the values of these variables. `patched` as in `KerasRules`."""
    return Reach(watch, [*variables, *(variable._value for variable in variables)], KerasRules(patched))


def _is_keras(cls: type) -> bool:
    return cls.__module__.startswith("keras.")


def _is_part(cls: type) -> bool:
    """Whether a class is one of Keras's layers, losses, regularizers, ..., and not a common base class."""
    return cls.__module__.startswith("keras.src.") and cls.__module__ not in _COMMON


def _functions(cls: type) -> dict[str, Any]:
    """The functions of one of Keras's classes that a call may reach; empty for other classes."""
    functions = {name: one for name, one in vars(cls).items() if isinstance(one, types.FunctionType)}
    if not _is_part(cls):
        return {name: one for name, one in functions.items() if name in ("call", "__call__") and _is_keras(cls)}
    return {name: one for name, one in functions.items() if not any(part in name for part in _NOT_CALLED)}


@functools.cache
def _names_in_calls(cls: type) -> frozenset[str]:
    """The names in all functions of a Keras layer and its bases that a call may reach."""
    found: set[str] = set()
    for base in cls.__mro__:
        for function in _functions(base).values() if base is not keras.layers.Layer else ():
            found.update(names_in_code(function.__code__))
        for function in [one.fget for one in vars(base).values() if isinstance(one, property)]:
            found.update(names_in_code(function.__code__) if _is_part(base) and function is not None else ())
    return frozenset(found)
