"""Calls of a whole model from a loop that a script writes itself, on all devices, with gradients.

`y = model(x)` gives the merged outputs as one node of autograd's graph: `loss.backward()` deals out their gradient by
rows, and the weights' `.grad` get the sum over the devices, which is one device's gradient. What happens in between
(losses, penalties, optimizers of Keras's or of torch's) is the script's own, on the host, with the whole batch.
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

from fastdp.errors import ReplicaError
from fastdp.keras.custom_steps import LayerCalls, _Call
from fastdp.program.keras_custom import LayerEffects
from fastdp.program.keras_effects import NotByRowsError, refusal
from fastdp.program.keras_rows import keeps_rows_apart
from fastdp.warn import warn_user

_thread = threading.local()


class ModelCalls(LayerCalls):
    """Runs calls of a whole model on an engine, whose program is a `CallProgram`."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._layers = self.program.model._flatten_layers()
        self._unbuilt = not all(layer.built for layer in self._layers)
        self._begun: set[Any] = set()
        self._one_at_a_time = threading.RLock()

    def run(self, layer: Any, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """One call of the model: on all devices if that is possible, else as plain Keras, which is said once."""
        with inside_step():
            call = _Call(layer, original, args, _with_context(layer, kwargs))
            reason = why_not_call(call) or self._why_not(layer)
            if reason is None and call.splits and not self._builds(call):
                with self._one_at_a_time:
                    effects = self._effects(layer, call)
                    if effects.refused is None and effects.tried:
                        self.program.doubted = True
                        try:
                            return self._on_devices(effects, call)
                        except (NotByRowsError, ReplicaError) as error:
                            effects.refused = refusal(error)
                reason = effects.refused or (None if effects.tried else "the rows of its batches are all equal")
            if reason is not None:
                say_once(layer, reason)
            return original(layer, *args, **kwargs)

    def note_second_gradient(self) -> None:
        """Say once that it is computed on one device."""
        say_once(self.program.model, "gradients of its gradients are asked for (create_graph=True)", "gradients")

    def _builds(self, call: _Call) -> bool:
        """Whether a call may build layers that no call has built: the first of its kind is plain then."""
        if not self._unbuilt or call.key in self._begun:
            return False
        self._begun.add(call.key)
        return True

    def _why_not(self, layer: Any) -> str | None:
        """Why no call of the model can be split as things are; None where it can."""
        if not self.program.knows(layer):
            return "it has weights that the replicas do not have"
        hooked = next((part for part in self._layers if is_hooked(part)), None)
        return (
            None if hooked is None else f"a hook of torch's on {hooked.name!r} sees the whole batch on one device only"
        )

    def _effects(self, layer: Any, call: _Call) -> LayerEffects:
        """What is known of such calls. A model of layers that are known is not tried."""
        plain = len(call._nest[0]) == 1 and not set(call._nest[1]) - {"training"}
        if call.key not in self._known and plain and keeps_rows_apart(layer):
            effects = self._known[call.key] = self.program.effects_of(layer, call.on_rows)
            effects.tried, effects._losses = True, []
        return super()._effects(layer, call)


def why_not_call(call: _Call) -> str | None:
    """Why the arguments of a call cannot be dealt out by rows; None where they can, or are a single row."""
    if call.splits:
        return None
    tensors = [*call.rows, *(mask for mask in call._masks if mask is not None)]
    if not tensors:
        return "it was called with no tensors or arrays"
    if any(tensor.layout != torch.strided for tensor in tensors):
        return "it was called with sparse tensors"
    if any(not tensor.ndim for tensor in tensors):
        return "it was called with a tensor that has no rows"
    sizes = sorted({tensor.shape[0] for tensor in tensors})
    if len(sizes) > 1:
        return f"the tensors that it was called with have unequal numbers of rows: {sizes}"
    return None  # no row, or one: nothing that devices could share


def say_once(model: Any, reason: str, what: str = "calls") -> None:
    """Say once per model and reason that its calls run on one device."""
    said = model.__dict__.setdefault("_fastdp_said", set())
    if (what, reason) not in said:
        said.add((what, reason))
        warn_user(f"fastdp: {what} of the model {model.name!r} run on one device, as plain Keras: {reason}.")


def is_hooked(layer: Any) -> bool:
    """Whether a script has put a hook of torch's on a layer."""
    own = vars(layer)
    return any(own.get(name) for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"))


def why_not_here() -> str | None:
    """Why this thread's calls cannot be dealt out to others: what torch keeps for each thread alone."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return "torch.autocast holds for this thread alone; use keras.config.set_dtype_policy('mixed_bfloat16') instead"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func and torch.vmap follow operations on this thread alone"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode gradients are followed on this thread alone"
    if torch._C._len_torch_dispatch_stack():
        return "a dispatch mode of torch's follows operations on this thread alone"
    return None


def calls_model(args: Any, kwargs: Any) -> bool:
    """Whether a call computes numbers: it is neither symbolic, nor a part of a step."""
    if within_step() or keras.src.backend.in_stateless_scope() or torch.compiler.is_compiling():
        return False
    return not any(isinstance(leaf, keras.KerasTensor) for leaf in keras.tree.flatten((args, kwargs)))


def is_own_call(args: Any, kwargs: Any) -> bool:
    """Whether a script itself calls a model on a batch of two rows or more that devices could share."""
    if global_state.get_global_attribute("current_call_ctx") is not None or not calls_model(args, kwargs):
        return False
    leaves = keras.tree.flatten((args, kwargs))
    return any(isinstance(leaf, (torch.Tensor, np.ndarray)) and leaf.ndim and leaf.shape[0] > 1 for leaf in leaves)


def is_plain_call(args: Any, kwargs: Any) -> bool:
    """Whether a call gives the model its inputs and nothing else: no masks, no training mode, no arguments more."""
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


def _with_context(layer: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's keyword arguments, with `training` of the layer that makes it: workers know of no such layer."""
    context = global_state.get_global_attribute("current_call_ctx")
    training = getattr(context, "training", None)
    if training is None or kwargs.get("training") is not None or not layer._call_has_training_arg:
        return kwargs
    return {**kwargs, "training": training}


# Steps, whose calls of models are their own affair.


@contextmanager
def inside_step() -> Iterator[None]:
    """Calls from this thread are a step's own: they are not dealt out."""
    before = within_step()
    _thread.inside = True
    try:
        yield
    finally:
        _thread.inside = before


def within_step() -> bool:
    """Whether this thread is inside a step."""
    return getattr(_thread, "inside", False)
