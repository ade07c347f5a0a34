"""Which models can be wrapped; what to do about the others."""

from __future__ import annotations

from typing import Any

import keras
from keras.src.models.functional import Functional
from keras.src.utils.torch_utils import TorchModuleWrapper

from fastdp.keras.custom_steps import OWN_STEPS, has_own
from fastdp.program.keras_modules import draws_at_random


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


def is_built(model: Any) -> bool:
    """Whether a model has all the variables that a call of it uses. A layer that it holds and never calls counts not.

    What a functional model calls was called when it was made; of another one its first call tells, which builds
    whatever it calls. A step of the model's own calls what it likes, and each layer is looked at there.
    """
    if not model.built:
        return False
    if model._called or type(model).call in (Functional.call, keras.Sequential.call):
        return True
    return any(has_own(model, step) for step in OWN_STEPS) or not unbuilt_layers(model)


def unbuilt_layers(model: Any) -> list[Any]:
    """The layers that a model holds and has never called, or that another of its modes calls."""
    return [layer for layer in model._flatten_layers() if not layer.built]


def check_loop(model: Any, loop: str, *maker: str) -> None:
    """A loop of Keras's is what the model's author left as Keras has it: a parallel model runs Keras's own.

    Args:
        model: the template.
        loop: the name of the loop ("fit").
        maker: the name of the function that it asks for its steps ("make_train_function").

    Raises:
        ValueError: the model has another.
    """
    for name in (loop, *maker):
        if name in vars(model) or getattr(type(model), name) is not getattr(keras.Model, name):
            raise ValueError(
                f"The model {model.name!r} has a {name}() of its own, which a parallel model does not run: its "
                f"{loop}() is Keras's. Call fastdp.install() instead of fastdp.wrap, and {loop}() of the model itself; "
                "or let what is special about it be a train_step(), test_step() or predict_step(): those are run."
            )


def check_template(model: Any, *, any_batch_size: bool = False) -> None:
    """A template is built, and has no state that is tied to rows.

    With `any_batch_size` a fixed batch size of its inputs does not matter: a Sequential model that a first call built
    has that batch's size, and runs with others.

    Raises:
        ValueError: it is not; the message says what to do.
    """
    if not is_built(model):
        raise ValueError(
            f"The model {model.name!r} is not built, so it has no weights to replicate. Begin it with "
            "keras.Input(shape), call model.build((None, ...)), or call a subclassed model on a batch. Wrap it then."
        )
    for layer in model._flatten_layers():
        if getattr(layer, "stateful", False):
            raise ValueError(
                f"The layer {layer.name!r} is stateful: its state belongs to the rows of one batch, which devices "
                "cannot share. Use stateful=False, or train this model on one device without fastdp."
            )
        if isinstance(layer, (keras.layers.MixUp, keras.layers.CutMix)):
            raise ValueError(
                f"The layer {layer.name!r} mixes rows of the batch, of which each device has its own only. Take it out "
                "of the model, and apply it to the data before fit (in a generator or a PyDataset)."
            )
        if isinstance(layer, TorchModuleWrapper):
            _check_module(layer)
    if not any_batch_size:
        _check_batch_size(model)


def _check_module(layer: Any) -> None:
    """A wrapped torch module has nothing but parameters, and draws nothing.

    Raises:
        ValueError: it has buffers, or random layers.
    """
    remedy = "Use keras.layers for this part, or write the whole model as a torch.nn.Module and wrap that."
    buffers = [name for name, _ in layer.module.named_buffers()]
    if buffers:
        raise ValueError(
            f"The TorchModuleWrapper {layer.name!r} holds a module that has buffers ({', '.join(buffers[:3])}), which "
            f"Keras does not track and devices cannot share. {remedy}"
        )
    draws = [type(module).__name__ for module in layer.module.modules() if draws_at_random(module)]
    if draws:
        raise ValueError(
            f"The TorchModuleWrapper {layer.name!r} holds a module that draws at random ({draws[0]}), from torch's "
            f"global generator, which devices cannot share. {remedy}"
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
