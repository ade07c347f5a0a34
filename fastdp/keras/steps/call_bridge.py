"""Runs one call of a layer on all devices as one node of autograd's graph."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import keras
import torch
from keras.src.backend.torch.core import get_device

from fastdp.comm.batch import Batch
from fastdp.engine.data_parallel import DataParallel
from fastdp.engine.step import StepResult
from fastdp.keras.steps.call_arguments import DealtCall
from fastdp.program.keras.layer_calls import Backward, CallProgram, Forward
from fastdp.program.keras.rows.call_probe import LayerEffects
from fastdp.tensors.arrays import as_tensor


class Calls(Protocol):
    """What the bridge needs of `fastdp.keras.steps.layer_calls.LayerCalls`."""

    engine: DataParallel[CallProgram]
    program: CallProgram
    cuts_outputs: bool

    def note_second_gradient(self) -> None:
        """Note that a gradient which itself needs a gradient is computed on one device."""


def on_devices(calls: Calls, effects: LayerEffects, call: DealtCall) -> Any:
    """Run the layer on all devices; its merged outputs take part in autograd.

    Args:
        calls: owns the engine, and is notified of second gradients. Where it `cuts_outputs`, outputs computed from
            one another are refused, since the gradient between them is unknown.
        effects: what is known about calls of this kind.

    Raises:
        NotByRowsError: the call cannot be split. Nothing was assigned yet.
    """
    layer = call.arguments.layer
    grad = torch.is_grad_enabled()
    shared = call.shared
    rows_want, shared_want = ([grad and _has_gradient(t) for t in tensors] for tensors in (call.tensors, shared))
    weights = [v for v in layer.variables if v.value.requires_grad] if grad else []
    differentiable = any(rows_want) or any(shared_want) or bool(weights)
    work = Forward(effects, call.on_rows, rows_want, weights, differentiable, shared, shared_want)
    work.refuses_chains = calls.cuts_outputs
    work.seeds = calls.program.seeds_now() if differentiable else []
    step = _Step(calls, work, call.batch)
    tensors = _Bridge.apply(step, *call.tensors, *shared, *(v.value for v in weights))
    step.given = [weakref.ref(tensor) for tensor in tensors] if work.chained else []
    outputs, numbers = tensors[: step.outputs], tensors[step.outputs :]
    losses = len(numbers) - work.form.numbers
    layer._clear_losses()
    # Each loss goes to the layer that added it: the layer's next call clears it, as in plain Keras.
    for loss, owner in zip(numbers[:losses], work.added_by, strict=True):
        keras.Layer.add_loss(layer if owner is None else owner, loss)  # a Functional model has no method of its own
    return work.form.pack(outputs, numbers[losses:], step.masked)


def _has_gradient(tensor: torch.Tensor) -> bool:
    return tensor.requires_grad and (tensor.is_floating_point() or tensor.is_complex())


class _Step:
    """The engine steps of one call: forward, and backward where autograd requests it."""

    def __init__(self, calls: Calls, work: Forward, batch: Batch) -> None:
        self._calls, self._engine, self._program = calls, calls.engine, calls.program
        self.work, self._batch = work, batch
        self.masked: Sequence[bool] = ()
        self.outputs = 0
        self.formed = 0
        self.given: list[weakref.ref[torch.Tensor]] = []

    def forward(self) -> list[torch.Tensor]:
        """Run forward; the merged outputs, their masks, the sums of the `add_loss` terms, and single-number outputs."""
        result = self._engine.surviving(self._forward)
        self.formed = self._engine.formed
        notes = result.notes
        self._program.assign(result.sums, notes, result.every_note, self.work.effects)
        self.masked, self.outputs = notes.structure.masked, len(result.outputs)
        dtypes = [*notes.structure.dtypes, *["bool"] * (len(result.outputs) - len(notes.structure.dtypes))]
        device = get_device()  # where plain Keras puts outputs
        merged = [as_tensor(array, dtype).to(device) for array, dtype in zip(result.outputs, dtypes, strict=True)]
        numbers = zip(result.sums[: notes.terms].tolist(), self.work.number_dtypes, strict=True)
        made = [torch.tensor(n if t.is_floating_point else round(n), dtype=t, device=device) for n, t in numbers]
        return [*merged, *made]

    def _forward(self) -> StepResult:
        """Run forward on the replicas that there are."""
        self.work.ran.clear()
        return self._engine.call(self._batch, partial(self._program.forward, self.work))

    def backward(self, gradients: tuple[torch.Tensor | None, ...]) -> list[torch.Tensor | None]:
        """Run backward; the gradients of the row tensors, of the shared tensors and of the weights."""
        self._check_chains()
        forward = self.work
        work = Backward(forward, gradients[: self.outputs], gradients[self.outputs :])
        work.leaves = [None] * forward.leaf_count
        result = self._engine.call(self._batch, partial(self._program.backward, work), self.formed)
        wanted = [d for d, wants in zip(self._batch.structure.dtypes, forward.rows_want, strict=False) if wants]
        rows = iter(as_tensor(array, dtype) for array, dtype in zip(result.outputs, wanted, strict=True))
        leaves = iter(work.leaves)
        shared = [next(leaves) if wants else None for wants in forward.shared_want]
        return [*(next(rows) if wants else None for wants in forward.rows_want), *shared, *leaves]

    def _check_chains(self) -> None:
        """Check that no script observes the gradient of an output from which another output was computed.

        Only the gradient of such an output's direct uses is known.

        Raises:
            NotImplementedError: an output of this kind has a hook or retains its gradient.
        """
        for tensor in (ref() for ref in self.given):
            if tensor is not None and (tensor.retains_grad or tensor._backward_hooks):
                raise NotImplementedError(
                    "An output of a layer has retain_grad() or a hook, and the layer computes another of its outputs "
                    "from it: on several devices the gradient between the two is not known. Call the layers one after "
                    "the other in the step, or train the model itself on one device."
                )

    def gradients_with_graph(
        self, tensors: tuple[torch.Tensor, ...], gradients: tuple[torch.Tensor | None, ...]
    ) -> list[torch.Tensor | None]:
        """As `backward`, but differentiable again: computed on one device."""
        self._calls.note_second_gradient()
        work = self.work
        rows, others = len(work.rows_want), len(work.rows_want) + len(work.shared_want)
        roots = self._program.replay(work, list(tensors[:rows]), list(tensors[rows:others]), self._batch)
        pairs = [(r, g) for r, g in zip(roots, gradients, strict=True) if g is not None and r.requires_grad]
        wants = [*work.rows_want, *work.shared_want, *[True] * len(work.weights)]
        targets = [tensor for tensor, wanted in zip(tensors, wants, strict=True) if wanted]
        roots, seeds = [root for root, _ in pairs], [seed for _, seed in pairs]
        found = iter(torch.autograd.grad(roots, targets, seeds, create_graph=True, allow_unused=True))
        return [next(found) if wanted else None for wanted in wants]


class _Bridge(torch.autograd.Function):
    """A call on all devices as one node of autograd's graph.

    Its inputs are row tensors, shared tensors and weights; its outputs are the merged ones.
    """

    @staticmethod
    def forward(ctx: Any, step: _Step, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.step = step
        ctx.save_for_backward(*tensors)  # so a weight changed before the backward pass is an error, as in torch
        ctx.set_materialize_grads(False)
        outputs = step.forward()
        ctx.mark_non_differentiable(*(t for t in outputs if not (t.is_floating_point() or t.is_complex())))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        tensors = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, *ctx.step.gradients_with_graph(tensors, gradients)
        found = ctx.step.backward(gradients)
        return None, *(g if g is None else g.to(t.device) for g, t in zip(found, tensors, strict=True))
