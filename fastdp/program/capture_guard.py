"""What a captured step has fixed of Python: plain values that layers hold, and code that is not Keras's.

A trace reads a layer's attributes once. A callback that lowers `dropout.rate` between two steps would be seen by an
eager step and not by a captured one: so the plain values among them are compared before each step. What code of the
user's keeps elsewhere (lists, globals, files) nobody can compare: a step that runs such code is captured only where
that is asked for by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras

_PLAIN = (int, float, bool, str, type(None))
_TORCHS_OWN = {"training"}  # the mode of torch's modules, which Keras's layers are too, and do not read


class Attributes:
    """The plain attributes of a model's layers, as they were when its steps were captured."""

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self.renew()

    def renew(self) -> None:
        """Take the present values for those that count."""
        self._watched = [
            (layer, vars(layer), name)
            for layer in self._model._flatten_layers()
            for name, value in vars(layer).items()
            if type(value) in _PLAIN and name not in _TORCHS_OWN
        ]
        self._values = [attributes.get(name) for _, attributes, name in self._watched]

    def changed(self) -> str:
        """Which attribute has another value now, as `layer.name`; empty if none has."""
        if [attributes.get(name) for _, attributes, name in self._watched] == self._values:
            return ""
        for (layer, attributes, name), value in zip(self._watched, self._values, strict=True):
            now = attributes.get(name)
            if now is not value and now != value:
                return f"{layer.name}.{name}"
        return ""


def own_code(program: Any) -> str:
    """What of a training step is code of the user's, in words; empty where all of it is Keras's."""
    model = program.model
    for layer in model._flatten_layers():
        if not _is_keras(type(layer)) or isinstance(layer, (keras.layers.Lambda, keras.layers.TorchModuleWrapper)):
            return f"the layer {layer.name!r} ({type(layer).__name__})"
        activation = getattr(layer, "activation", None)
        if activation is not None and not _is_keras(activation):
            return f"the activation of {layer.name!r}"
    for variable in program.trainable:
        if variable.regularizer is not None and not _is_keras(type(variable.regularizer)):
            return f"the regularizer of {variable.path!r}"
    for loss in _losses(program.trainer._compile_loss):
        if not _is_keras(loss):
            return f"the loss {getattr(loss, '__name__', type(loss).__name__)!r}"
    return ""


def _losses(compiled: Any) -> Iterator[Any]:
    """The losses that were given to `compile`: functions, also those in Keras's wrappers, and classes."""
    for loss in keras.tree.flatten(compiled._user_loss) if compiled is not None else []:
        if loss is not None and not isinstance(loss, str):
            yield getattr(loss, "fn", type(loss) if isinstance(loss, keras.Loss) else loss)


def _is_keras(thing: Any) -> bool:
    """Whether a class or function is Keras's own. Activations may be objects: then their class counts."""
    module = getattr(thing, "__module__", None) or type(thing).__module__
    return str(module).split(".")[0] == "keras"
