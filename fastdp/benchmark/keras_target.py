"""Loads a Keras model that is measured: its loss and optimizer, and the batches that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras

from fastdp.benchmark import user_file
from fastdp.benchmark.arrays import Array
from fastdp.benchmark.models import find, is_builtin
from fastdp.benchmark.request import Request
from fastdp.benchmark.target import Target

POLICIES = {"float32": "float32", "bf16": "mixed_bfloat16", "fp16": "mixed_float16"}


def load(request: Request) -> Target:
    """The model of a request, on whichever backend Keras runs.

    Raises:
        ValueError: the model or something that its training needs is unknown; the message has the remedy.
    """
    keras.utils.set_random_seed(request.seed)
    keras.config.set_dtype_policy(POLICIES[request.precision])
    if is_builtin(request.target):
        return _builtin(request)
    named = user_file.split(request.target)
    if named is None:
        return _own(request, _from_file(request), None, Path(request.target).name)
    path, function = named
    return _own(request, *user_file.make(path, function), f"{path.name}:{function}")


def _builtin(request: Request) -> Target:
    known = find(request.target)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    name = request.optimizer or known.optimizer
    return Target(
        known.title,
        "keras",
        known.build("keras"),
        keras.losses.get(request.loss) if request.loss else loss,
        optimizer(name),
        known.inputs_of("keras"),
        known.targets,
        loss_title=request.loss or "cross-entropy",
        optimizer_title=name,
    )


def optimizer(name: str) -> keras.optimizers.Optimizer:
    """An optimizer by Keras's name of it; "sgd" has momentum 0.9.

    Raises:
        ValueError: Keras knows none of that name.
    """
    if name == "sgd":
        return keras.optimizers.SGD(0.01, momentum=0.9)
    return keras.optimizers.get(name)


def _from_file(request: Request) -> keras.Model:
    """The model of a `.keras` file, loaded in safe mode: nothing of the file's own code runs."""
    if request.precision != "float32":
        raise ValueError(
            f"precision {request.precision} of a .keras file: its layers keep the dtype policy that they were saved "
            "with. Build the model in a function, `fastdp bench file.py:make_model`, which gets the policy."
        )
    try:
        return keras.saving.load_model(request.target, safe_mode=True)
    except TypeError as error:  # a class that is not registered
        raise ValueError(
            f"{request.target} cannot be loaded: {str(error).splitlines()[0]} If it has classes of its own, write a "
            "file with a function that imports them and loads it: `fastdp bench file.py:make_model`."
        ) from error


def _own(request: Request, made: Any, make_batch: Any, title: str) -> Target:
    """The target of the user's own model, or pair of model and loss."""
    model, loss = made if isinstance(made, tuple) else (made, None)
    inputs = specs(model, title) if make_batch is None else ()
    compiled = bool(getattr(model, "compiled", False))
    name = request.optimizer or ("" if compiled else "adam")
    chosen = optimizer(name) if name else model.optimizer
    own_loss = request.loss is not None or loss is not None
    loss = request.loss or loss or (model.loss if compiled else default_loss(model, make_batch))
    inside = keras.tree.pack_sequence_as
    return Target(
        title,
        "keras",
        model,
        loss,
        chosen,
        inputs,
        targets_of(model, loss) if make_batch is None else (),
        make_batch,
        pack_inputs=lambda arrays: inside(model._inputs_struct, list(arrays)) if len(arrays) > 1 else arrays[0],
        pack_targets=lambda arrays: inside(model._outputs_struct, list(arrays)) if len(arrays) > 1 else arrays[0],
        loss_weights=model.get_compile_config().get("loss_weights") if compiled and not own_loss else None,
        loss_title="the model's own" if loss is None else _title(loss),
        optimizer_title=name or _title(chosen),
    )


def _title(thing: Any) -> str:
    """The name of a loss or an optimizer, or of several."""
    if isinstance(thing, str):
        return thing
    if isinstance(thing, dict):
        return ", ".join(_title(one) for one in thing.values())
    if isinstance(thing, list | tuple):
        return ", ".join(_title(one) for one in thing)
    return str(getattr(thing, "__name__", None) or getattr(thing, "name", None) or type(thing).__name__)


def specs(model: keras.Model, title: str) -> tuple[Array, ...]:
    """The inputs that a built Functional or Sequential model takes.

    Raises:
        ValueError: the model has no input specs, or one with an open size.
    """
    remedy = "Write a function make_batch(rows) beside it that returns (inputs, targets) of so many rows."
    if not isinstance(model, keras.Model):
        raise ValueError(f"{title} must return a keras.Model or a torch.nn.Module, got {type(model).__name__}")
    tensors = getattr(model, "inputs", None)
    if not tensors:
        raise ValueError(f"{title}: the inputs of this model are unknown, since it is not Functional. {remedy}")
    found = []
    for tensor in tensors:
        shape = tuple(tensor.shape[1:])
        if None in shape:
            raise ValueError(
                f"{title}: the input {tensor.name!r} has the shape {tuple(tensor.shape)} with open sizes. Give them in "
                f"keras.Input. Or: {remedy}"
            )
        found.append(Array(tensor.name, shape, keras.backend.standardize_dtype(tensor.dtype), _vocabulary(model)))
    return tuple(found)


def _vocabulary(model: keras.Model) -> int:
    """Below which whole-number inputs may be drawn: the smallest vocabulary of the model's embeddings."""
    sizes = [layer.input_dim for layer in model._flatten_layers() if isinstance(layer, keras.layers.Embedding)]
    return int(min(sizes, default=2))


def default_loss(model: keras.Model, make_batch: Any = None) -> Any:
    """The loss for an output that the model's last layers tell: by softmax, by sigmoid, else the squared error.

    The user's own batches tell by their labels: whole numbers are classes. Without labels the model adds its loss
    itself, and there is no other.
    """
    labels = [None] * len(model.outputs) if make_batch is None else labels_of(make_batch)
    if not labels:
        return None
    chosen = []
    for place, label in enumerate(labels):
        activation = _activation(model, place)
        whole = label is None or "int" in keras.backend.standardize_dtype(label.dtype)
        if activation == "softmax":
            chosen.append("sparse_categorical_crossentropy" if whole else "categorical_crossentropy")
        elif activation == "sigmoid":
            chosen.append("binary_crossentropy")
        elif label is not None and whole:
            chosen.append(keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        else:
            chosen.append("mean_squared_error")
    return chosen[0] if len(chosen) == 1 else chosen


def labels_of(make_batch: Any) -> list[Any]:
    """The labels in a batch of the user's own, flat; empty where it has None or an empty tuple in their place."""
    return [label for label in keras.tree.flatten(user_file.batch_of(make_batch, 2)[1]) if label is not None]


def _activation(model: keras.Model, place: int) -> str:
    """The name of the activation that makes an output; empty where there is none, or it is not known."""
    outputs = getattr(model, "outputs", None)
    if not outputs:
        return ""
    history = getattr(outputs[place], "_keras_history", None)
    layer = history.operation if history is not None else model.layers[-1]
    activation = getattr(layer, "activation", None)
    return "softmax" if isinstance(layer, keras.layers.Softmax) else str(getattr(activation, "__name__", ""))


def targets_of(model: keras.Model, loss: Any) -> tuple[Array, ...]:
    """The labels that the losses of a model's outputs take."""
    losses = _by_output(model, loss)
    return tuple(
        _target(f"y{place or ''}", tuple(tensor.shape[1:]), _title(one))
        for place, (tensor, one) in enumerate(zip(model.outputs, losses, strict=True))
    )


def _by_output(model: keras.Model, loss: Any) -> Sequence[Any]:
    """The loss of each output."""
    if isinstance(loss, dict):
        return [loss.get(name) for name in model.output_names]
    return loss if isinstance(loss, list | tuple) else [loss] * len(model.outputs)


def _target(name: str, shape: tuple[int, ...], loss: str) -> Array:
    """The labels of one output of this shape."""
    if loss.startswith("sparse_"):
        return Array(name, shape[:-1], "int64", max(1, int(shape[-1])))
    if "binary" in loss or "crossentropy" in loss:
        return Array(name, shape, "bool")
    return Array(name, shape)
