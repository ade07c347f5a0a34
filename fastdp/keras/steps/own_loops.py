"""Runs the calls of a whole model from a script's own training loop on all devices, with gradients.

`y = model(x)` returns the merged outputs as one node of autograd's graph. `loss.backward()` splits their gradient by
rows, and the weights' `.grad` get the sum over the devices, which equals one device's gradient. Everything in between
(losses, penalties, Keras or torch optimizers) is the script's own code, on the host, with the whole batch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import torch
from keras.src.backend.common import global_state

from fastdp.engine.data_parallel import DataParallel
from fastdp.keras.steps.call_arguments import CallArguments
from fastdp.keras.steps.layer_calls import Attempt, LayerCalls
from fastdp.program.keras.layer_calls import CallProgram
from fastdp.runtime.forks import LongLock
from fastdp.warn import warn_user


class _Thread(threading.local):
    """Whether the thread is inside a step."""

    inside = False


_thread = _Thread()


class ModelCalls(LayerCalls):
    """Runs calls of a whole model on an engine."""

    cuts_outputs = True

    def __init__(self, engine: DataParallel[CallProgram]) -> None:
        super().__init__(engine)
        self._unbuilt = not all(layer.built for layer in self.program.model._flatten_layers())
        self._begun: set[Any] = set()
        self._one_at_a_time = LongLock()

    def run(self, layer: Any, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run one call of the model: on all devices if possible, else as plain Keras, with one warning."""
        with inside_step():
            call = CallArguments(layer, original, args, _with_context(layer, kwargs))
            reason = why_not_call(call)
            if reason is None and call.most_rows > 1 and not self._builds(call):
                with self._one_at_a_time:
                    attempt = self.attempt(call)
                if attempt.why_not is None:
                    return attempt.outputs
                reason = attempt.why_not
            if reason is not None and self.has_others:
                say_once(layer, reason)
            return original(layer, *args, **kwargs)

    def note_second_gradient(self) -> None:
        """Warn once that gradients of gradients are computed on one device."""
        say_once(self.program.model, "gradients of its gradients are requested (create_graph=True)", "gradients")

    def attempt(self, call: CallArguments) -> Attempt:
        """As for layers, but assume that the script may have written to the weights, which nothing reports."""
        self.program.doubt()
        return super().attempt(call)

    def _builds(self, call: CallArguments) -> bool:
        """Whether a call may build layers that are not built yet, so that the first call of its kind must be plain."""
        if not self._unbuilt or call.key in self._begun:
            return False
        self._begun.add(call.key)
        return True


def why_not_call(call: CallArguments) -> str | None:
    """Why the arguments of a call cannot be split by rows; None where they can, or are a single row."""
    if not call.tensors:
        return "it was called with no tensors or arrays"
    if call.most_rows:
        return None
    if any(tensor.layout != torch.strided for tensor in call.tensors):
        return "it was called with sparse tensors"
    return "it was called with tensors that have no rows" if all(not t.ndim for t in call.tensors) else None


def say_once(model: keras.Model, reason: str, what: str = "calls") -> None:
    """Warn once per model and reason that its calls run on one device."""
    said = model.__dict__.setdefault("_fastdp_said", set())
    if (what, reason) not in said:
        said.add((what, reason))
        warn_user(f"fastdp: {what} of the model {model.name!r} run on one device, as plain Keras: {reason}.")


def calls_model(args: Any, kwargs: Any) -> bool:
    """Whether a call computes numbers, being neither symbolic nor part of a step."""
    if within_step() or keras.src.backend.in_stateless_scope() or torch.compiler.is_compiling():
        return False
    return not any(isinstance(leaf, keras.KerasTensor) for leaf in keras.tree.flatten((args, kwargs)))


def is_own_call(args: Any, kwargs: Any) -> bool:
    """Whether a script itself calls a model on a batch of two rows or more, which devices could split."""
    if global_state.get_global_attribute("current_call_ctx") is not None or not calls_model(args, kwargs):
        return False
    leaves = keras.tree.flatten((args, kwargs))
    return any(isinstance(leaf, (torch.Tensor, np.ndarray)) and leaf.ndim and leaf.shape[0] > 1 for leaf in leaves)


def is_plain_call(args: Any, kwargs: Any) -> bool:
    """Whether a call passes only the model's inputs: no masks, no training mode, no further arguments."""
    if len(args) != 1 or any(value is not None and value is not False for value in kwargs.values()):
        return False
    return not set(kwargs) - {"training", "mask"} and not any(
        getattr(leaf, "_keras_mask", None) is not None for leaf in keras.tree.flatten(args)
    )


def wants_gradient(model: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call's outputs would take part in autograd."""
    if not torch.is_grad_enabled():
        return False
    leaves = keras.tree.flatten((args, kwargs))
    given = any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves)
    return given or any(variable.value.requires_grad for variable in model.trainable_variables)


def _with_context(layer: keras.Layer, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's keyword arguments, with `training` taken from the calling layer, which workers do not see."""
    context = global_state.get_global_attribute("current_call_ctx")
    training = getattr(context, "training", None)
    if training is None or kwargs.get("training") is not None or not layer._call_has_training_arg:
        return kwargs
    return {**kwargs, "training": training}


# Steps: their calls of models are part of them, and are not split here.


@contextmanager
def inside_step() -> Iterator[None]:
    """Mark this thread's calls as part of a step, so that they are not split."""
    before = within_step()
    _thread.inside = True
    try:
        yield
    finally:
        _thread.inside = before


def within_step() -> bool:
    """Whether this thread is inside a step."""
    return _thread.inside
