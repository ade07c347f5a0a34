"""A model's own `train_step`, `test_step` and `predict_step`, with the calls of its layers on all devices.

The step runs once per batch on the host thread, as its author wrote it, with the whole batch: losses, metrics,
gradients (`loss.backward()`, `v.value.grad`, `torch.autograd.grad`) and optimizers, however many, see what one device
would see. While it runs, the model's layers and sub-models, called from it, are run by the replicas on their rows
(`fastdp.keras.steps.layer_calls`). A call that cannot be split runs on one device, as plain Keras runs it.
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
from fastdp.program.keras.replica import running

_thread = threading.local()
_lock = threading.Lock()
_users = [0]
_original: list[Callable[..., Any]] = []


OWN_STEPS = ("train_step", "test_step", "predict_step")


def has_own(model: Any, step: str) -> bool:
    """Whether a model has a `train_step`, `test_step` or `predict_step` of its own: its class, or the object itself."""
    return step in vars(model) or getattr(type(model), step) is not getattr(TorchTrainer, step)


def check_own_step(model: Any) -> None:
    """A model that trains by a step of its own has a layer that the step can call, and that has something to compute.

    Raises:
        ValueError: it has none. (What the step does with its layers its first batch tells.)
    """
    callable_layers = [
        layer
        for layer in model._flatten_layers()
        if layer.weights and type(layer).call not in (keras.Layer.call, keras.Model.call)
    ]
    if has_own(model, "train_step") and not callable_layers:
        raise ValueError(
            f"The model {model.name!r} trains by a train_step() of its own, and neither has a layer with weights nor a "
            "call() with some, so there is nothing that devices could share. Let train_step() call layers with the "
            "weights, or train the model itself on one device (model.fit)."
        )


# Layers called from a custom step.


@contextmanager
def layer_calls(calls: LayerCalls) -> Iterator[None]:
    """Run the outermost calls of the model's layers, from this thread, on all devices."""
    before = getattr(_thread, "calls", None)
    _thread.calls = calls
    _count_users(1)
    try:
        yield
    finally:
        _count_users(-1)
        _thread.calls = before


def _count_users(change: int) -> None:
    """Put the aware `Layer.__call__` in place for the first user, and Keras's own back after the last."""
    with _lock:
        _users[0] += change
        if _users[0] == 1 and change == 1:
            _original.append(keras.Layer.__call__)
            keras.Layer.__call__ = _aware(keras.Layer.__call__)
        elif _users[0] == 0:
            keras.Layer.__call__ = _original.pop()


def _aware(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Layer.__call__`, which asks whether a custom step on this thread is the caller."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls = getattr(_thread, "calls", None)
        if calls is None or running() is not None or in_stateless_scope():
            return original(self, *args, **kwargs)
        _thread.calls = None  # calls from inside this one are its own affair
        try:
            return calls.run(self, original, args, kwargs)
        finally:
            _thread.calls = calls

    return __call__
