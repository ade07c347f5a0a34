"""A model's own `train_step`, `test_step` and `predict_step`, with the calls of its layers on all devices.

The step runs once per batch on the host thread, as its author wrote it, with the whole batch: losses, metrics,
gradients (`loss.backward()`, `v.value.grad`, `torch.autograd.grad`) and optimizers, however many, see what one device
would see. While it runs, the model's layers and sub-models, called from it, are run by the replicas on their rows
(`fastdp.program.keras_custom`). A layer that cannot be split runs on one device, as plain Keras runs it.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import torch
from keras.src.backend import in_stateless_scope

from fastdp.program.keras_batch import flatten_batch, pack_like
from fastdp.program.keras_custom import Backward, CallProgram, Forward, LayerEffects
from fastdp.program.keras_replica import running
from fastdp.program.torch_tensors import as_tensor

_thread = threading.local()
_lock = threading.Lock()
_users = [0]
_original: list[Callable[..., Any]] = []


def has_own(model: Any, step: str) -> bool:
    """Whether a model has a `train_step`, `test_step` or `predict_step` of its own."""
    return getattr(type(model), step) is not getattr(keras.Model, step)


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


class LayerCalls:
    """Runs the calls of a model's layers on an engine, whose program is a `CallProgram`."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.program: CallProgram = engine.program
        self.count = 0
        self.told = False
        self.postponed = False
        self.refused: dict[str, str] = {}
        self._own = {id(layer) for layer in self.program.model._flatten_layers()}
        self._known: dict[Any, LayerEffects] = {}

    def run(self, layer: Any, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """One call of a layer from a custom step: on all devices if that is possible, else as plain Keras."""
        call = _Call(layer, original, args, kwargs) if self._is_worth_it(layer) else None
        if call is None or not call.splits:
            return original(layer, *args, **kwargs)
        effects = self._effects(layer, call)
        if effects.refused is not None or not effects.tried:
            self.postponed = self.postponed or not effects.tried  # rows that are all equal tell nothing
            if effects.refused is not None and layer.name not in self.refused:
                self.refused[layer.name] = effects.refused
                warnings.warn(
                    f"fastdp: calls of {layer.name!r} from the model's own step run on one device: {effects.refused}.",
                    stacklevel=4,
                )
            return original(layer, *args, **kwargs)
        self.count += 1
        self.program.effects, before = effects, self.program.effects
        try:
            return call.on_devices(self)
        finally:
            self.program.effects = before

    def _is_worth_it(self, layer: Any) -> bool:
        """A layer of the model with weights: the others have little to compute, and the host has their inputs."""
        return id(layer) in self._own and layer.built and bool(layer.weights) and self.program.knows(layer)

    def _effects(self, layer: Any, call: _Call) -> LayerEffects:
        """What is known of such calls of the layer."""
        if call.key not in self._known:
            self._known[call.key] = self.program.effects_of(layer, call.on_rows)
        effects = self._known[call.key]
        if not effects.tried:
            effects._call = lambda rows, _: call.on_rows(rows)
            effects.inspect(call.arrays, call.structure)
        return effects


class _Call:
    """One call of a layer: its arguments as row arrays and a rest that is the same for all rows."""

    def __init__(self, layer: Any, original: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.layer, self._original, self._nest = layer, original, (args, kwargs)
        self._leaves = keras.tree.flatten(self._nest)
        self._places = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, (torch.Tensor, np.ndarray))]
        self.rows = [keras.ops.convert_to_tensor(self._leaves[i]) for i in self._places]
        self._masks = [getattr(self._leaves[i], "_keras_mask", None) for i in self._places]
        tensors = [*self.rows, *(mask for mask in self._masks if mask is not None)]
        sizes = {t.shape[0] if t.ndim and t.layout == torch.strided else -1 for t in tensors}
        symbolic = any(isinstance(leaf, (keras.KerasTensor, keras.Variable)) for leaf in self._leaves)
        self.splits = len(sizes) == 1 and min(sizes) > 1 and not symbolic
        if self.splits:
            self.tensors = tensors
            self.arrays, self.structure = flatten_batch(([t.detach() for t in tensors], None, None))
            rest = [repr(leaf) for i, leaf in enumerate(self._leaves) if i not in self._places]
            self.key = (id(layer), str(keras.tree.map_structure(type, self._nest)), *rest, *self.structure.dtypes)

    def on_rows(self, rows: list[torch.Tensor]) -> Any:
        """The layer on these rows, on this thread."""
        leaves = list(self._leaves)
        masks = iter(rows[len(self._places) :])
        for place, row, mask in zip(self._places, rows, self._masks, strict=False):
            leaves[place] = row
            if mask is not None:
                row._keras_mask = next(masks)
        args, kwargs = pack_like(self._nest, leaves)
        return self._original(self.layer, *args, **kwargs)

    def on_devices(self, calls: LayerCalls) -> Any:
        """The layer on all devices; outputs are merged, and take part in autograd."""
        grad = torch.is_grad_enabled()
        weights = [v for v in self.layer.variables if v.value.requires_grad] if grad else []
        wants = [grad and t.is_floating_point() and t.requires_grad for t in self.tensors]
        work = Forward(self.on_rows, self.structure, wants, weights, grad and (any(wants) or bool(weights)))
        work.seeds = calls.program.seeds_now() if work.differentiable else []
        step = _Step(calls, work, self.arrays)
        tensors = _Bridge.apply(step, *self.tensors, *(v.value for v in weights))
        outputs, losses = tensors[: step.outputs], tensors[step.outputs :]
        count = len(step.structure.dtypes)
        masks = iter(outputs[count:])
        for tensor, masked in zip(outputs, step.structure.masked, strict=False):
            if masked:
                tensor._keras_mask = next(masks)
        self.layer._clear_losses()
        for loss in losses:
            keras.Layer.add_loss(self.layer, loss)  # a Functional model has none of its own
        return step.structure.nested(outputs[:count])


class _Step:
    """The two engine steps of one call: forward, and backward if it is asked for."""

    def __init__(self, calls: LayerCalls, work: Forward, arrays: list[np.ndarray]) -> None:
        self.calls, self.work, self._arrays = calls, work, arrays
        self._effects = calls.program.effects
        self.structure: Any = None
        self.outputs = 0

    def forward(self) -> list[torch.Tensor]:
        """The merged outputs, their masks, and the sums of the `add_loss` terms."""
        result = self.calls.engine.predict(self._arrays, structure=self.work)
        notes = result.notes
        self.calls.program.assign(result.sums, notes)
        self.structure, self.outputs = notes.structure, len(result.outputs)
        dtypes = [*notes.structure.dtypes, *["bool"] * (len(result.outputs) - len(notes.structure.dtypes))]
        merged = [as_tensor(array, dtype) for array, dtype in zip(result.outputs, dtypes, strict=True)]
        return [*merged, *(torch.tensor(float(value)) for value in result.sums[: notes.terms])]

    def backward(self, gradients: tuple[torch.Tensor | None, ...]) -> list[torch.Tensor | None]:
        """The gradients of the row tensors and of the weights."""
        work = Backward(
            self.work, gradients[: self.outputs], gradients[self.outputs :], [None] * len(self.work.weights)
        )
        result = self.calls.engine.predict(self._arrays, structure=work)
        wanted = [d for d, wants in zip(self.work.structure.dtypes, self.work.wants_gradient, strict=False) if wants]
        rows = iter(as_tensor(array, dtype) for array, dtype in zip(result.outputs, wanted, strict=True))
        return [*(next(rows) if wants else None for wants in self.work.wants_gradient), *work.weights]

    def gradients_with_graph(
        self, tensors: tuple[torch.Tensor, ...], gradients: tuple[torch.Tensor | None, ...]
    ) -> list[torch.Tensor | None]:
        """The same, as something that can be differentiated again: computed on one device."""
        count = len(self.work.wants_gradient)
        program = self.calls.program
        program.effects, before = self._effects, program.effects
        try:
            roots = program.replay(self.work, list(tensors[:count]), self._arrays)
        finally:
            program.effects = before
        pairs = [(r, g) for r, g in zip(roots, gradients, strict=True) if g is not None and r.requires_grad]
        wants = [*self.work.wants_gradient, *[True] * len(self.work.weights)]
        targets = [tensor for tensor, wanted in zip(tensors, wants, strict=True) if wanted]
        roots, seeds = [root for root, _ in pairs], [seed for _, seed in pairs]
        found = iter(torch.autograd.grad(roots, targets, seeds, create_graph=True, allow_unused=True))
        return [next(found) if wanted else None for wanted in wants]


class _Bridge(torch.autograd.Function):
    """A call on all devices as one node of autograd's graph: row tensors and weights in, merged outputs out."""

    @staticmethod
    def forward(ctx: Any, step: _Step, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.step = step
        ctx.save_for_backward(*tensors)  # a weight that is changed before the backward pass is an error, as in torch
        ctx.set_materialize_grads(False)
        outputs = step.forward()
        ctx.mark_non_differentiable(*(tensor for tensor in outputs if not tensor.is_floating_point()))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        tensors = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, *ctx.step.gradients_with_graph(tensors, gradients)
        return None, *ctx.step.backward(gradients)


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
