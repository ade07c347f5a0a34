"""Replays captured steps on the replicas of a torch program, and compares the first ones with eager steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fastdp.buffers import FlatBuffers
from fastdp.capture.agreement import Tensors, disagreement, moved
from fastdp.capture.resumed import ResumedCaptures
from fastdp.capture.shapes import are_recorded
from fastdp.capture.trace import Captured
from fastdp.comm.context import Context
from fastdp.program.base import Launched, Result
from fastdp.program.torch.batch import outputs_to_arrays
from fastdp.program.torch.capture.comparing import buffers_differ, keeping_draws
from fastdp.program.torch.capture.outcome import TorchOutcome
from fastdp.program.torch.gradients import Found
from fastdp.program.torch.module import Slot
from fastdp.program.torch.module_buffers import BufferNotes, assign_buffers
from fastdp.program.torch.nest import Nest
from fastdp.program.torch.passes import Notes, State
from fastdp.runtime.queue import QueueDevice
from fastdp.tensors.row_effects import Effect

CHECKS = 2  # steps of each captured form that run eagerly too


@dataclass(slots=True)
class CapturedReplica:
    """The memory of a replica: implements `fastdp.capture.pure_step.ReplicaTensors`."""

    device: QueueDevice
    variables: list[torch.Tensor]
    gradients: list[torch.Tensor]
    gradient_buffers: FlatBuffers


class Replays:
    """Runs training steps of replicas: captured where they are, else eagerly.

    Args:
        captures: the captured steps.
        replicas: the replicas' memory, by rank.
        slots: the module's parameters and buffers.
        trained: the numbers of those that have gradients.
        merges: eager steps on several devices compute the loss on the merged outputs.
    """

    def __init__(
        self,
        captures: ResumedCaptures[Captured[TorchOutcome]],
        replicas: dict[int, CapturedReplica],
        slots: Sequence[Slot],
        trained: Sequence[int],
        *,
        merges: bool,
    ) -> None:
        self.captures, self._merges = captures, merges
        self._replicas, self._slots = replicas, slots
        self._names = [f"the gradient of `{slots[i].name}`" for i in trained]

    def train(
        self, state: State, batch: list[np.ndarray], context: Context, eager: Callable[[Context], Result]
    ) -> Result:
        """A step of a replica. `eager` runs it eagerly."""
        captured = self.captures.find(context)
        if captured is None or captured.disagreed:
            return eager(context)
        if captured.checks:
            return self._compared(captured, state, batch, context, eager)
        outcome = captured.replay(self._replicas[context.index], batch, context)
        state.gradients.replayed()
        return _result(outcome, context)

    def launches(self, contexts: Sequence[Context]) -> bool:
        """Whether these replicas' steps are recorded, and none meets others for outputs that have no rows."""
        if not are_recorded(self.captures.find, contexts):
            return False
        forms: list[Any] = [context.found.form for context in contexts]
        layouts = [layout for form in forms if form.outputs is not None for layout in form.outputs[1]]
        return all(context.size > 1 for context in contexts) and all(one.effect is Effect.ROWS for one in layouts)

    def launch(self, state: State, batch: list[np.ndarray], context: Context) -> Launched:
        """Enqueue a recorded step of a replica."""
        captured: Captured[TorchOutcome] = context.found
        outcome = captured.replay(self._replicas[context.index], batch, context)
        state.gradients.replayed()
        nests: list[Nest] = []

        def outputs() -> list[np.ndarray]:
            arrays, nest = _outputs(outcome, context)
            nests.extend([nest] if nest is not None else [])
            return arrays

        return Launched(outputs, lambda: _summed(outcome, context, nests[0] if nests else None))

    def _compared(
        self,
        captured: Captured[TorchOutcome],
        state: State,
        batch: list[np.ndarray],
        context: Context,
        eager: Callable[[Context], Result],
    ) -> Result:
        """An eager step, and what the captured one makes of it. Numbers that differ are noted in `captured`."""
        before = [variable.clone() for variable in state.variables]
        with keeping_draws(state, context) as kept:
            result = eager(replace(context, ready=_keep))

        def difference() -> str:
            draws, why = kept.of(captured, before, context)
            if why:
                return why

            def at(number: int) -> Tensors:
                return captured.repeat(moved(before, number), batch, context, draws).gradients

            outcome = captured.repeat(before, batch, context, draws)
            return self._difference(outcome, at, state, result, before, context)

        captured.compare(difference)
        return result

    def _difference(
        self,
        outcome: TorchOutcome,
        at: Callable[[int], Tensors],
        state: State,
        result: Result,
        before: list[torch.Tensor],
        context: Context,
    ) -> str:
        """What differs between a captured step and the eager one; empty if nothing does. `at` as in `disagreement`."""
        notes: Notes = result.notes
        rough = context.structure.autocast.enabled or outcome.form.loss_dtype not in (torch.float32, torch.float64)
        losses = [torch.tensor(float(sums[0]), dtype=outcome.form.loss_dtype) for sums in (outcome.sums, result.sums)]
        shared = self._merges and context.size > 1  # all of it is the first replica's, in eager steps
        why = disagreement([losses[0]], [losses[1]], ["the loss"], rough=rough) if not shared else ""
        used = [gradient if i in notes.found.used else None for i, gradient in enumerate(state.gradients.present)]
        why = why or disagreement(outcome.gradients, used, self._names, rough=rough, at=at)
        if why:
            return why
        found = _result(outcome, context)
        buffers = [[one.clone() for one in before], [one.clone() for one in before]]
        for variables, one in zip(buffers, (found, result), strict=True):
            assign_buffers(variables, one.sums[1:], one.notes.buffers)
        if context.size == 1 and state.replica.adopted is not None:  # forward has left them in the module
            buffers[1] = [slot.tensor.detach() for slot in self._slots]
        return buffers_differ(self._slots, *buffers, rough=rough)


def _keep(bucket: int) -> None:
    """A bucket of gradients is complete: it is not reduced yet, for it is still to be compared."""


def _result(outcome: TorchOutcome, context: Context) -> Result:
    """The result of a replica's step from what its graph gave."""
    arrays, nest = _outputs(outcome, context)
    result = _summed(outcome, context, nest)
    result.outputs = arrays
    return result


def _summed(outcome: TorchOutcome, context: Context, nest: Nest | None) -> Result:
    """As `_result`, without the outputs. Waits for the values."""
    form = outcome.form
    sums: Any = outcome.sums.cpu().numpy()
    values = list(zip(form.constant, outcome.constants, strict=True))
    buffers = BufferNotes(list(form.moved), values, list(form.normalized))
    buffers.unjudged = {form.unjudged[i]: value for i, value in values if i in form.unjudged}
    used = frozenset(i for i, gradient in enumerate(outcome.gradients) if gradient is not None)
    draws = context.structure.draws if context.size > 1 else None
    reported = outcome.reported and outcome.reported.read(form.weight)
    notes = Notes(nest, form.loss_dtype, buffers, Found(used), reported=reported, draws=draws)
    return Result([], sums, notes)


def _outputs(outcome: TorchOutcome, context: Context) -> tuple[list[np.ndarray], Nest | None]:
    """The outputs as arrays on the replica's device, if they are wanted, and their nest."""
    if outcome.form.outputs is None:
        return [], None
    made, layouts = outcome.form.outputs
    return outputs_to_arrays(made.pack(outcome.outputs), context, layouts)
