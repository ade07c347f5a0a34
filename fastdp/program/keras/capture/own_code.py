"""Finds the code of the user's that a step of a Keras model runs: nobody can tell all that it reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
from torch.nn.modules import module as torch_module

from fastdp.program.keras.program import KerasProgram
from fastdp.program.keras.rows.known_layers import HOOKS


def own_code(program: KerasProgram) -> str:
    """A part of a training step that is the user's code, in words; empty if all of it is Keras's."""
    model = program.model
    for layer in model._flatten_layers():
        if not is_keras(type(layer)) or isinstance(layer, (keras.layers.Lambda, keras.layers.TorchModuleWrapper)):
            return f"the layer {layer.name!r} ({type(layer).__name__})"
        if "call" in vars(layer) or not is_keras(type(layer).call):
            return f"call() of {layer.name!r}"
        if any(getattr(layer, name) for name in HOOKS):
            return f"a hook of {layer.name!r}"
        activation = getattr(layer, "activation", None)
        if activation is not None and not is_keras(activation):
            return f"the activation of {layer.name!r}"
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "a hook of all modules"
    for variable in program.trainable:
        if variable.regularizer is not None and not is_keras(type(variable.regularizer)):
            return f"the regularizer of {variable.path!r}"
    for loss in losses_of(program):
        if not is_keras(loss):
            return f"the loss {getattr(loss, '__name__', type(loss).__name__)!r}"
    return ""


def losses_of(program: KerasProgram) -> Iterator[Any]:
    """The losses passed to `compile` by the user: functions, unwrapped from Keras's wrappers, and classes."""
    compiled: Any = program.trainer._compile_loss
    for loss in keras.tree.flatten(compiled._user_loss) if compiled is not None else []:
        if loss is not None and not isinstance(loss, str):
            yield getattr(loss, "fn", type(loss) if isinstance(loss, keras.Loss) else loss)


def is_keras(thing: Any) -> bool:
    """Whether a class or function is Keras's own. For objects, such as some activations, their class decides."""
    module = getattr(thing, "__module__", None) or type(thing).__module__
    return str(module).split(".")[0] == "keras"
