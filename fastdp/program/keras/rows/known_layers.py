"""Recognizes models of Keras's own layers in which rows never meet: these need no trial.

Most models consist only of Keras's own layers, whose effect on rows is known. The trial
(`fastdp.program.keras.rows.probe`) costs three calls of the model before the first step, half a second for a ResNet50.
`tests/program/keras/test_known_layers.py` checks every layer below against the trial's verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from torch.nn.modules import module as torch_module

from fastdp.capture.reach import Reach
from fastdp.capture.watch import Watch
from fastdp.program.keras.capture.reach import KerasRules

layers = keras.layers
# Layers whose output for a row depends on that row alone, and BatchNormalization, which fastdp runs across devices.
# They assign no variables except its statistics. Their draws have shapes that begin with the rows.
ROWS_APART = frozenset(
    (
        *(layers.InputLayer, layers.Identity, layers.Dense, layers.EinsumDense, layers.Embedding),
        *(layers.Activation, layers.ReLU, layers.LeakyReLU, layers.ELU, layers.PReLU, layers.Softmax),
        *(layers.Conv1D, layers.Conv2D, layers.Conv3D),
        *(layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose),
        *(layers.DepthwiseConv1D, layers.DepthwiseConv2D, layers.SeparableConv1D, layers.SeparableConv2D),
        *(layers.MaxPooling1D, layers.MaxPooling2D, layers.MaxPooling3D),
        *(layers.AveragePooling1D, layers.AveragePooling2D, layers.AveragePooling3D),
        *(layers.GlobalMaxPooling1D, layers.GlobalMaxPooling2D, layers.GlobalMaxPooling3D),
        *(layers.GlobalAveragePooling1D, layers.GlobalAveragePooling2D, layers.GlobalAveragePooling3D),
        *(layers.BatchNormalization, layers.LayerNormalization, layers.GroupNormalization, layers.RMSNormalization),
        *(layers.UnitNormalization, layers.Rescaling, layers.Normalization),
        *(layers.Flatten, layers.Reshape, layers.Permute, layers.RepeatVector),
        *(layers.ZeroPadding1D, layers.ZeroPadding2D, layers.ZeroPadding3D),
        *(layers.Cropping1D, layers.Cropping2D, layers.Cropping3D),
        *(layers.UpSampling1D, layers.UpSampling2D, layers.UpSampling3D),
        *(layers.Add, layers.Subtract, layers.Multiply, layers.Average, layers.Maximum, layers.Minimum),
        *(layers.Concatenate, layers.Dropout, layers.SpatialDropout1D, layers.SpatialDropout2D),
        *(layers.SpatialDropout3D, layers.GaussianNoise, layers.GaussianDropout),
        *(layers.MultiHeadAttention, layers.GroupQueryAttention),
        *(layers.LSTM, layers.LSTMCell, layers.GRU, layers.GRUCell, layers.SimpleRNN, layers.SimpleRNNCell),
        layers.Bidirectional,
    )
)


# The tables of torch's hooks of each layer, and of all modules.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ACTIVATIONS = keras.activations.relu.__module__
# Elementwise operations between the layers of a functional model.
_BY_NUMBER = ("Add", "Subtract", "Multiply", "Divide")


def keeps_rows_apart(model: keras.Model) -> bool:
    """Whether all parts of a model are known, so that it needs no trial. False if any part is user code or unknown."""
    graph = model._functional if type(model) is keras.Sequential else model
    # The `call` of a user's subclass may do anything.
    is_plain = _full_name(graph) == "keras.src.models.functional.Functional"
    if not is_plain or _is_altered(model) or any(map(bool, global_hooks())):
        return False
    return all(
        keeps_rows_apart(part) if isinstance(part, keras.Model) else _is_known(part) for part in graph.operations
    )


class _Settings(Reach):
    """A walk over what known layers read, which are numbers and names; whatever else a model holds is not looked at."""

    def cannot_follow(self, why: str) -> None:
        """Go on."""


class KnownLayers:
    """Whether a model is made of known layers now. Asks again only when something that layers read has changed.

    Args:
        model: the template.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model, self._are_known = model, False
        self._watch: Watch | None = None

    def __bool__(self) -> bool:
        if self._watch is None or self._watch.changed():
            self._watch, self._are_known = Watch(), keeps_rows_apart(self._model)
            reach = _Settings(self._watch, self._model.variables, KerasRules())
            for layer in self._model._flatten_layers() if self._are_known else ():
                reach.walk(layer, layer.name)
        return self._are_known


def global_hooks() -> list[Any]:
    """The tables of torch's hooks on all modules."""
    return [getattr(torch_module, f"_global{name}") for name in HOOKS]


def hooks_of(model: keras.Model) -> list[int]:
    """Identifies the hooks on a model's layers and on all modules."""
    tables = [*(getattr(layer, name, {}) for layer in model._flatten_layers() for name in HOOKS), *global_hooks()]
    return [id(hook) for table in tables for hook in table.values()]


def has_known_regularizers(trainable: Sequence[keras.Variable]) -> bool:
    """Whether all regularizers of these variables are Keras's own."""
    regularizers = [v.regularizer for v in trainable if v.regularizer is not None]
    return all(type(one).__module__.startswith("keras.") for one in regularizers)


def why_overwritten(variables: Sequence[keras.Variable]) -> str | None:
    """Why devices cannot train these variables: one is overwritten with its gradient; None where none is."""
    found = next((v for v in variables if v.trainable and v.overwrite_with_gradient), None)
    if found is None:
        return None
    return (
        f"The variable {found.path!r} is overwritten with its gradient (as scales of float8 are), which is no sum over "
        "rows, so that it cannot be combined from the devices' rows. Use another quantization, or gpus=[0]."
    )


def _full_name(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__name__}"


def _is_known(part: Any) -> bool:
    """Whether a part of a functional model is a known layer with only known layers inside, or an elementwise op."""
    if isinstance(part, layers.Layer):
        return _is_called_plainly(part) and all(
            type(layer) in ROWS_APART and not _is_altered(layer) and _settings_are_known(layer)
            for layer in part._flatten_layers()
        )
    if _full_name(part) not in {f"keras.src.ops.numpy.{name}" for name in _BY_NUMBER}:
        return False
    # If ranks differ, broadcasting aligns the rows of one operand with another axis of the other.
    return all(
        len({len(tensor.shape) for tensor in node.input_tensors}) == 1
        and all(isinstance(value, (keras.KerasTensor, int, float)) for value in keras.tree.flatten(node.arguments.args))
        for node in part._inbound_nodes
    )


def _is_called_plainly(layer: Any) -> bool:
    """Whether a layer gets only the graph's tensors and plain values, and no tensor's last axis is the row axis.

    An array among the arguments may have an axis that the user means as rows.
    """
    nodes = layer._inbound_nodes
    given = [leaf for node in nodes for leaf in keras.tree.flatten((node.arguments.args, node.arguments.kwargs))]
    least = 1 if type(layer) in (layers.Embedding, layers.Identity, layers.Flatten) else 2
    return all(isinstance(leaf, (keras.KerasTensor, bool, int, float, str, type(None))) for leaf in given) and all(
        len(tensor.shape) >= least for node in nodes for tensor in node.input_tensors
    )


def _is_altered(layer: Any) -> bool:
    """Whether the layer object itself has a replaced `call`, torch hooks, or losses."""
    own = vars(layer)
    hooks = any(own.get(name) for name in HOOKS)
    return "call" in own or "__call__" in own or hooks or bool(layer._losses)


def _settings_are_known(layer: Any) -> bool:
    """Whether no setting of a layer is user code, adds losses or state, or mixes rows."""
    functions = (getattr(layer, name, None) for name in ("activation", "recurrent_activation"))
    if not all(f is None or _is_activation(f) for f in functions):
        return False
    if type(layer) is layers.Rescaling and (np.ndim(layer.scale) > 1 or np.ndim(layer.offset) > 1):
        return False
    if getattr(layer, "activity_regularizer", None) is not None or getattr(layer, "stateful", False):
        return False
    if getattr(layer, "renorm", False):  # assigns more variables than the statistics
        return False
    noise = getattr(layer, "noise_shape", None)
    if (noise is not None and noise[0] is not None) or getattr(layer, "quantization_mode", None) is not None:
        return False
    axes = (*_as_tuple(getattr(layer, "axis", None)), *_as_tuple(getattr(layer, "_attention_axes", None)))
    if not all(isinstance(axis, int) and (axis == -1 or axis > 0) for axis in axes):
        return False
    equation = getattr(layer, "equation", None)
    return equation is None or _rows_first(equation)


def _is_activation(function: Any) -> bool:
    """Whether a function is a Keras activation; these act along the last axis. Layers are checked separately."""
    return isinstance(function, layers.Layer) or getattr(function, "__module__", "") == _ACTIVATIONS


def _as_tuple(axes: Any) -> tuple[Any, ...]:
    return () if axes is None else tuple(axes) if isinstance(axes, (list, tuple)) else (axes,)


def _rows_first(equation: str) -> bool:
    """Whether the first axis of an einsum's inputs is also the first of its outputs, and is no axis of the weights."""
    operands, _, outputs = equation.replace(" ", "").partition("->")
    inputs, _, weights = operands.partition(",")
    return inputs[:1] == outputs[:1] != "" and inputs[0] not in weights
