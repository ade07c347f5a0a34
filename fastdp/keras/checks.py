"""Which models can be wrapped; what to do about the others."""

from __future__ import annotations

from typing import Any

import keras
from keras.src.utils.torch_utils import TorchModuleWrapper


def check_backend(caller: str) -> None:
    """Keras must run on torch.

    Raises:
        RuntimeError: another backend is active.
    """
    backend = keras.backend.backend()
    if backend != "torch":
        raise RuntimeError(
            f"`{caller}` needs Keras's torch backend; the active one is {backend!r}. Set the environment variable "
            "KERAS_BACKEND=torch before Python starts, or import fastdp before keras."
        )


def check_template(model: Any, *, for_training: bool = False, any_batch_size: bool = False) -> None:
    """A template is built, has no state that is tied to rows, and leaves its steps to the engine.

    With `any_batch_size` a fixed batch size of its inputs does not matter: a Sequential model that a first call built
    has that batch's size, and runs with others.

    Raises:
        ValueError: it is not; the message says what to do.
    """
    if not model.built or not all(layer.built for layer in model._flatten_layers()):
        raise ValueError(
            f"The model {model.name!r} is not built, so it has no weights to replicate. Begin it with "
            "keras.Input(shape), call model.build((None, ...)), or call a subclassed model on a batch. Wrap it then."
        )
    if not any_batch_size:
        _check_batch_size(model)
    for layer in model._flatten_layers():
        if getattr(layer, "stateful", False):
            raise ValueError(
                f"The layer {layer.name!r} is stateful: its state belongs to the rows of one batch, which devices "
                "cannot share. Use stateful=False, or train this model on one device without fastdp."
            )
        if isinstance(layer, TorchModuleWrapper):
            raise ValueError(
                f"The layer {layer.name!r} wraps a torch.nn.Module, which keeps its own parameters and cannot run "
                "on a replica's. Use Keras layers, or write the whole model as a torch.nn.Module and wrap that."
            )
    if for_training:
        for step in ("train_step", "test_step"):
            if getattr(type(model), step) is not getattr(keras.Model, step):
                raise ValueError(
                    f"The model {model.name!r} overrides {step}(), which fastdp cannot split over devices. Override "
                    "compute_loss() or compute_metrics() instead: those are honoured."
                )


def check_predict_step(model: Any) -> None:
    """A template's outputs are those of its call.

    Raises:
        ValueError: it has a `predict_step` of its own.
    """
    if type(model).predict_step is not keras.Model.predict_step:
        raise ValueError(
            f"The model {model.name!r} overrides predict_step(), which fastdp cannot split over devices. Compute the "
            "outputs in call(), or call template.predict(), which runs on one device."
        )


def _check_batch_size(model: Any) -> None:
    """No input has a fixed number of rows."""
    for tensor in keras.tree.flatten(getattr(model, "inputs", None) or []):
        if tensor is not None and tensor.shape and tensor.shape[0] is not None:
            raise ValueError(
                f"The input {tensor.name!r} of model {model.name!r} has a fixed batch size of {tensor.shape[0]}, but "
                "each device gets only its part of a batch. Leave batch_size out of keras.Input. A Sequential model "
                "that was built by a call has the size of that batch: begin it with keras.Input(shape)."
            )
