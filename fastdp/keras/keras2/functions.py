"""Intermediate outputs as in Keras 2's backend: `function`, `learning_phase`, and `get_layer_output`."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import torch
from numpy.typing import NDArray

from fastdp.keras.template_view import TemplateView


class LearningPhase:
    """The symbol for training (1) or testing (0) in the inputs of a `function`."""

    def __repr__(self) -> str:
        return "learning_phase()"


_LEARNING_PHASE = LearningPhase()


def learning_phase() -> LearningPhase:
    """The symbol for "training or testing" in the inputs of `function`; always the same object.

    Example:
        >>> f = function([model.layers[0].input, learning_phase()], [model.layers[3].output])
        >>> in_test, in_training = f([x, 0]), f([x, 1])
    """
    return _LEARNING_PHASE


class Function:
    """The callable that `function` returns. Call it with one value for each input."""

    def __init__(self, inputs: Any, outputs: Any) -> None:
        self._inputs = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
        tensors = [tensor for tensor in self._inputs if tensor is not _LEARNING_PHASE]
        self._returns_list = isinstance(outputs, (list, tuple))
        outputs = list(outputs) if self._returns_list else [outputs]
        for name, group in (("inputs", tensors), ("outputs", outputs)):
            wrong = [tensor for tensor in group if not isinstance(tensor, keras.KerasTensor)]
            if wrong or not group:
                raise ValueError(
                    f"{name} must hold symbolic tensors of a Sequential or functional model, got "
                    f"{wrong[0] if wrong else group!r}: use layer.input and layer.output"
                )
        self._model = keras.Model(tensors, outputs)

    def __call__(self, inputs: Any) -> Any:
        values = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
        if len(values) != len(self._inputs):
            raise ValueError(
                f"inputs must hold {len(self._inputs)} values, one for each of {self._inputs}, got "
                f"{len(values)}: pass a list in that order"
            )
        training, arrays = False, []
        for symbol, value in zip(self._inputs, values, strict=True):
            if symbol is _LEARNING_PHASE:
                training = bool(value)
            else:
                arrays.append(value if keras.ops.is_tensor(value) else np.asarray(value))
        outputs = _run(self._model, arrays, training)
        return outputs if self._returns_list else outputs[0]


def function(inputs: Any, outputs: Any) -> Function:
    """A callable that computes some tensors of a model from the values of others: Keras 2's `K.function`.

    Args:
        inputs: symbolic tensors, such as `layer.input` or `model.inputs`, and possibly
            `learning_phase()`; a list or a single one.
        outputs: symbolic tensors that can be computed from the inputs, such as `layer.output`.

    The result takes a list with one array for each input and returns NumPy arrays owned by the caller, in a
    list if `outputs` is a list. Without `learning_phase()`, or with the value 0 for it, layers behave as in
    `predict`. With 1 they behave as in training (dropout drops), but no weight and no moving statistic
    changes. Each call uses the model's current weights. All rows run at once, on the device of the weights.

    Raises:
        ValueError: an entry is not a symbolic tensor, the outputs cannot be computed from the inputs, or a
            call passes another number of values.

    Example:
        >>> features = function([model.layers[0].input, learning_phase()], [model.layers[3].output])
        >>> features([x, 0])[0].shape
        (100, 64)
    """
    return Function(inputs, outputs)


def get_layer_output(model: keras.Model, layer: keras.layers.Layer | str | int, x: Any, training: bool = False) -> Any:
    """The output of one layer of a model for the inputs `x`.

    Args:
        model: a Sequential or functional model, or a parallel model of one.
        layer: one of its layers, or its name, or its index in `model.layers`.
        x: the model's input: one array, or a list, tuple or dict of arrays, with any number of rows.
        training: whether layers behave as in training. In both cases no weight and no moving statistic changes.

    Returns a NumPy array owned by the caller, or a list of them for a layer with several outputs. For a layer
    that is called several times, it is the output of the first call.

    Raises:
        ValueError: the model has no such layer, or has no graph of layers. A subclassed model can return any
            value from its own `call`.

    Example:
        >>> get_layer_output(model, "features", x).shape
        (100, 64)
    """
    model = model.template if isinstance(model, TemplateView) else model
    if isinstance(layer, str):
        layer = model.get_layer(name=layer)
    elif not isinstance(layer, keras.layers.Layer):
        layer = model.get_layer(index=layer)
    if all(layer is not own for own in model.layers) or not hasattr(model, "inputs") or not model.inputs:
        raise ValueError(
            f"layer must belong to the graph of a Sequential or functional model, got {layer.name!r} and "
            f"model {model.name!r}: use one of model.layers, and ask a nested model for its own layers"
        )
    output = layer.output
    outputs = keras.tree.flatten(output)
    values = _arrange(model, x)
    found = _run(keras.Model(model.inputs, outputs), values, bool(training))
    return found if isinstance(output, (list, tuple)) else found[0]


def _arrange(model: keras.Model, x: Any) -> list[Any]:
    """The input arrays in the order of `model.inputs`."""
    if isinstance(x, dict):
        structure = getattr(model, "input", None)  # a Sequential has none
        names = list(structure) if isinstance(structure, dict) else [tensor.name for tensor in model.inputs]
        missing = [name for name in names if name not in x]
        if missing:
            raise ValueError(f"x must hold the inputs {names}, got {list(x)}: add {missing}")
        by_name = {name: x[name] for name in names}
        values = keras.tree.flatten(by_name) if isinstance(structure, dict) else list(by_name.values())
    elif isinstance(x, (list, tuple)) and x and hasattr(x[0], "shape"):
        values = keras.tree.flatten(x)
    else:
        values = [x]
    if len(values) != len(model.inputs):
        raise ValueError(
            f"x must hold {len(model.inputs)} arrays, one for each input of the model, got {len(values)}: "
            "pass a list in the order of model.inputs, or a dict"
        )
    return [value if keras.ops.is_tensor(value) else np.asarray(value) for value in values]


def _run(model: keras.Model, values: list[Any], training: bool) -> list[NDArray[Any]]:
    """Run a functional model without changing its state, except that random generators advance."""
    state = model.non_trainable_variables
    with torch.no_grad():
        outputs, after = model.stateless_call(
            [variable.value for variable in model.trainable_variables],
            [variable.value for variable in state],
            values,
            training=training,
        )
    weights = {id(variable) for variable in model.non_trainable_weights}
    for variable, value in zip(state, after, strict=True):
        if id(variable) not in weights:  # the state of a random generator
            variable.assign(value)
    return [np.array(keras.ops.convert_to_numpy(tensor)) for tensor in keras.tree.flatten(outputs)]
