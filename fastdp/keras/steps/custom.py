"""A model's own `train_step`, `test_step` and `predict_step`, with the calls of its layers on all devices.

The step runs once per batch on the host thread, as its author wrote it, with the whole batch: losses, metrics,
gradients (`loss.backward()`, `v.value.grad`, `torch.autograd.grad`) and any number of optimizers see what one device
would see. When it calls the model's layers and sub-models, the replicas run them on their rows
(`fastdp.keras.steps.layer_calls`). A call that cannot be split runs on one device, as in plain Keras.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
from keras.src.backend import in_stateless_scope
from keras.src.backend.torch.trainer import TorchTrainer

from fastdp.keras.steps.layer_calls import LayerCalls
from fastdp.patching import Patch
from fastdp.program.keras.replica import running

OWN_STEPS = ("train_step", "test_step", "predict_step")


def has_own(model: keras.Model, step: str) -> bool:
    """Whether a model's class, or the model itself, overrides a `train_step`, `test_step` or `predict_step`."""
    return step in vars(model) or getattr(type(model), step) is not getattr(TorchTrainer, step)


def check_own_step(model: keras.Model) -> None:
    """Check that a model with its own `train_step` has a layer with weights that the step can call.

    How the step uses its layers is known only after the first batch.

    Raises:
        ValueError: it has none.
    """
    callable_layers = [
        layer
        for layer in model._flatten_layers()
        if layer.weights and type(layer).call not in (keras.Layer.call, keras.Model.call)
    ]
    if has_own(model, "train_step") and not callable_layers:
        raise ValueError(
            f"The model {model.name!r} has its own train_step(), but neither a layer with weights nor a call() that "
            "uses weights, so there is nothing to split between devices. Let train_step() call layers that hold the "
            "weights, or train the model itself on one device (model.fit)."
        )


# Layers called from a custom step.


class _Thread(threading.local):
    """What runs this thread's calls of layers; None for Keras."""

    calls: LayerCalls | None = None


_thread = _Thread()


@contextmanager
def layer_calls(calls: LayerCalls) -> Iterator[None]:
    """Run the outermost calls of the model's layers, from this thread, on all devices."""
    before = _thread.calls
    with _patch:
        _thread.calls = calls
        try:
            yield
        finally:
            _thread.calls = before


def _aware(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Layer.__call__` that runs calls from a custom step on this thread on all devices."""

    def __call__(self: keras.Layer, *args: Any, **kwargs: Any) -> Any:
        calls = _thread.calls
        if calls is None or running() is not None or in_stateless_scope():
            return original(self, *args, **kwargs)
        _thread.calls = None  # calls nested in this one are part of it
        try:
            return calls.run(self, original, args, kwargs)
        finally:
            _thread.calls = calls

    return __call__


_patch = Patch([(keras.Layer, "__call__", _aware)])
