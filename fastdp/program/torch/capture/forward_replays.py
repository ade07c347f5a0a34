"""Replays captured forward passes on replicas that share a call, and compares the first ones with eager passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fastdp.capture.agreement import Tensors, disagreement, moved
from fastdp.capture.trace import Captured
from fastdp.comm.context import Context
from fastdp.program.base import Result
from fastdp.program.torch.batch import Structure
from fastdp.program.torch.capture.comparing import buffers_differ, keeping_draws
from fastdp.program.torch.capture.pure_forward import ForwardOutcome
from fastdp.program.torch.capture.replays import CapturedReplica
from fastdp.program.torch.following.merged import WriteNotes
from fastdp.program.torch.loop_passes import ForwardNotes, ForwardPass
from fastdp.program.torch.module import Slot
from fastdp.program.torch.module_buffers import assign_buffers
from fastdp.program.torch.passes import State
from fastdp.program.torch.rows.forms import OutputForm
from fastdp.tensors.arrays import output_array
from fastdp.tensors.row_effects import ROWS_FIRST, Layout

# An eager pass, and the tensors of its outputs.
Eager = Callable[[list[np.ndarray], Context], tuple[Result, Sequence[torch.Tensor]]]


class ForwardReplays:
    """Runs forward passes of replicas that share a call: captured where they are, else eagerly.

    Args:
        replicas: the replicas' memory, by rank.
        slots: the module's parameters and buffers.
    """

    def __init__(self, replicas: dict[int, CapturedReplica], slots: Sequence[Slot]) -> None:
        self._replicas, self._slots = replicas, slots

    def run(self, work: ForwardPass, state: State, batch: list[np.ndarray], context: Context, eager: Eager) -> Result:
        """A pass of a replica. `eager` runs it eagerly."""
        captured = work.captures.find(context) if work.captures is not None else None
        if captured is None or captured.disagreed:
            return eager(batch, context)[0]
        if captured.checks:
            return self._compared(captured, work, state, batch, context, eager)
        outcome = captured.replay(self._replicas[context.index], batch, context)
        with torch.no_grad():
            for number, value in zip(outcome.form.written, outcome.written, strict=True):
                work.own_argument(number, batch, context).copy_(value)
        return _result(outcome, context)

    def _compared(
        self,
        captured: Captured[ForwardOutcome],
        work: ForwardPass,
        state: State,
        batch: list[np.ndarray],
        context: Context,
        eager: Eager,
    ) -> Result:
        """An eager pass, and what the captured one makes of it. Numbers that differ are noted in `captured`."""
        before = [variable.clone() for variable in state.variables]
        given = [array.copy() for array in batch] if work.written else batch
        with keeping_draws(state, context) as kept:
            result, outputs = eager(batch, context)

        def difference() -> str:
            draws, why = kept.of(captured, before, context)
            if why:
                return why

            def at(number: int) -> Tensors:
                return captured.repeat(moved(before, number), given, context, draws).outputs

            outcome = captured.repeat(before, given, context, draws)
            arguments = [work.own_argument(number, batch, context) for number in outcome.form.written]
            return self._difference(outcome, at, result, outputs, arguments, before, context)

        captured.compare(difference)
        return result

    def _difference(
        self,
        outcome: ForwardOutcome,
        at: Callable[[int], Tensors],
        result: Result,
        outputs: Sequence[torch.Tensor],
        arguments: Sequence[torch.Tensor],
        before: list[torch.Tensor],
        context: Context,
    ) -> str:
        """What differs between a captured pass and the eager one; empty if nothing does. `at` as in `disagreement`."""
        rough = context.structure.autocast.enabled or any(one.dtype.itemsize < 4 for one in before if one.ndim)
        if outcome.form.nest != result.notes.nest:
            return "the structure of the outputs"
        names = [f"output {i}" for i in range(len(outputs))]
        why = disagreement(outcome.outputs, outputs, names, rough=rough, at=at)
        why = why or disagreement(outcome.written, arguments, ["an argument"] * len(arguments), rough=rough)
        if why:
            return why
        buffers = [[one.clone() for one in before], [one.clone() for one in before]]
        assign_buffers(buffers[0], _sums(outcome), outcome.buffer_notes())
        assign_buffers(buffers[1], result.sums, result.notes.buffers)
        return buffers_differ(self._slots, *buffers, rough=rough)


def parts_of(
    tensors: Sequence[torch.Tensor], layouts: Sequence[Layout], context: Context
) -> tuple[list[np.ndarray], list[torch.Tensor]]:
    """A replica's outputs: arrays of those that have their rows first, and the others."""
    arrays, others = [], []
    for tensor, layout in zip(tensors, layouts, strict=True):
        if layout == ROWS_FIRST:
            arrays.append(output_array(tensor, context.device))
        else:
            others.append(tensor.detach().cpu())
    return arrays, others


def _sums(outcome: ForwardOutcome) -> Any:
    return np.zeros(0) if outcome.sums is None else outcome.sums.cpu().numpy()


def _result(outcome: ForwardOutcome, context: Context) -> Result:
    """The result of a replica's pass from what its graph gave."""
    structure: Structure = context.structure
    nest, tensors = outcome.form.nest, outcome.outputs
    layouts = structure.layouts_of(nest.pack(tensors), tensors)
    structure.agree(OutputForm.of(nest, tensors, layouts, context.rows))
    arrays, others = parts_of(tensors, layouts, context)
    writes = WriteNotes(None, {}, context.rows, structure.roles)
    notes = ForwardNotes(nest, layouts, [False] * len(tensors), others, structure.draws, writes, outcome.buffer_notes())
    return Result(arrays, _sums(outcome), notes)
