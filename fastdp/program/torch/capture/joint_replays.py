"""Replays captured passes of a loop on replicas that share a call, and compares the first ones with eager passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from fastdp.capture.joint import CapturedJoint
from fastdp.capture.pure_step import Draw
from fastdp.comm.context import Context
from fastdp.program.base import Result
from fastdp.program.torch.batch import Structure
from fastdp.program.torch.capture.comparing import buffers_differ, keeping_draws
from fastdp.program.torch.capture.forward_replays import Eager, parts_of
from fastdp.program.torch.capture.joint_checks import EagerPasses
from fastdp.program.torch.capture.pass_node import NodePass
from fastdp.program.torch.capture.pure_joint import JointForm
from fastdp.program.torch.capture.pure_pass import dense
from fastdp.program.torch.following.merged import WriteNotes
from fastdp.program.torch.loop_passes import ForwardNotes, ForwardPass, GivenLeaves, KeptGraph
from fastdp.program.torch.module import Slot
from fastdp.program.torch.module_buffers import BufferNotes, assign_buffers
from fastdp.program.torch.nest import Nest
from fastdp.program.torch.parameter_hooks import HookedGradients
from fastdp.program.torch.passes import State, together_with
from fastdp.program.torch.replica import ReplicaContext
from fastdp.program.torch.rows.forms import OutputForm


class JointReplays:
    """Runs forward passes with gradients of replicas that share a call: captured where they are, else eagerly.

    Args:
        slots: the module's parameters and buffers.
        trained: the numbers of the parameters that can have a gradient.
    """

    def __init__(self, slots: Sequence[Slot], trained: Sequence[int]) -> None:
        self._slots, self._trained = slots, list(trained)
        self._names = [f"`{slots[i].name}`" for i in trained]

    def run(
        self,
        work: ForwardPass,
        state: State,
        batch: list[np.ndarray],
        context: Context,
        running: ReplicaContext,
        eager: Eager,
        leaves: Callable[[], GivenLeaves],
    ) -> Result:
        """A pass of a replica. `eager` runs it eagerly, `leaves` makes what the module gets."""
        captured = work.captures.find(context) if work.captures is not None else None
        if captured is None or captured.disagreed:
            return eager(batch, context)[0]
        if captured.checks:
            return self._compared(captured, work, state, batch, context, eager, leaves)
        return self._replayed(captured, work, state, context, running, leaves())

    def _replayed(
        self,
        captured: CapturedJoint,
        work: ForwardPass,
        state: State,
        context: Context,
        running: ReplicaContext,
        leaves: GivenLeaves,
    ) -> Result:
        """A captured pass."""
        captures: Any = work.captures
        structure: Structure = context.structure
        form: JointForm = captured.form
        variables = state.variables
        draws = captured.repeat_draws(variables, context)
        before = {i: variables[i].clone() for i in form.written}
        one = NodePass(
            captured,
            [
                *(before.get(i, one) for i, one in enumerate(variables)),
                *(dense(one.detach()) for one in leaves.tensors),
                *draws,
            ],
            [*self._own(state), *leaves.tensors],
            self._parameters(state),
            [*leaves.rows, *leaves.shared],
            partial(
                _again, partial(captures.check_generation, captures.generation), state, context, leaves, before, draws
            ),
            lambda used: None,  # the host notes it, once for all replicas
            lambda why: None,
        )
        tensors = list(one.outputs())
        layouts = structure.layouts_of(form.nest.pack(tensors), tensors)
        structure.agree(OutputForm.of(form.nest, tensors, layouts, context.rows))
        arrays, others = parts_of(tensors, layouts, context)
        sums, buffers = _buffers_of(form, one.values)
        writes = WriteNotes(None, {}, context.rows, structure.roles)
        notes = ForwardNotes(
            form.nest, layouts, list(form.requires_grad), others, structure.draws, writes, buffers, list(form.used)
        )
        normalizes = bool(form.buffers.normalized)
        work.kept[context.index] = KeptGraph(running, tensors, leaves.rows, leaves.shared, True, normalizes)
        return Result(arrays, sums, notes)

    def _compared(
        self,
        captured: CapturedJoint,
        work: ForwardPass,
        state: State,
        batch: list[np.ndarray],
        context: Context,
        eager: Eager,
        leaves: Callable[[], GivenLeaves],
    ) -> Result:
        """An eager pass, and what the captured one makes of it. Numbers that differ are noted in `captured`."""
        before = [variable.clone() for variable in state.variables]
        with keeping_draws(state, context) as kept:
            result, outputs = eager(batch, context)

        def difference() -> str:
            passes = self._eager_passes(captured, work, state, context, result.notes.nest, outputs)
            draws, why = kept.of(captured, before, context)  # with those that backward has repeated
            if why:
                return why
            inputs = [*before, *(dense(one.detach()) for one in leaves().tensors), *draws]
            return self._difference(captured, passes, inputs, context, result)

        captured.compare(difference)
        return result

    def _eager_passes(
        self,
        captured: CapturedJoint,
        work: ForwardPass,
        state: State,
        context: Context,
        nest: Nest,
        outputs: Sequence[torch.Tensor],
    ) -> EagerPasses:
        """Run backward of an eager pass for a comparison."""
        kept, parameters = work.kept[context.index], self._parameters(state)
        kept.running.backward = True
        try:
            with ExitStack() as stack:
                if state.replica.adopted is not None:
                    stack.enter_context(HookedGradients(parameters).aside(None))
                if context.size > 1:
                    stack.enter_context(together_with(kept.running))
                return EagerPasses(captured, nest, outputs, [*parameters, *kept.rows, *kept.shared])
        finally:
            kept.running.backward = False

    def _difference(
        self,
        captured: CapturedJoint,
        passes: EagerPasses,
        inputs: list[torch.Tensor],
        context: Context,
        result: Result,
    ) -> str:
        """What differs between captured passes and eager ones; empty if nothing does."""
        variables = inputs[: len(self._slots)]
        names = [*self._names, *(f"argument {at}" for at in context.structure.differentiated)]
        rough = context.structure.autocast.enabled or any(variables[i].dtype.itemsize < 4 for i in self._trained)
        why, values = passes.difference(inputs, names, rough=rough)
        if why:
            return why
        buffers = [[one.clone() for one in variables] for _ in range(2)]
        assign_buffers(buffers[0], *_buffers_of(captured.form, values))
        assign_buffers(buffers[1], result.sums, result.notes.buffers)
        return buffers_differ(self._slots, *buffers, rough=rough)

    def _own(self, state: State) -> list[torch.Tensor]:
        """The tensors of a replica's module whose versions count what is written to them."""
        if state.replica.adopted is not None:
            return [slot.tensor for slot in self._slots]
        parameters = iter(state.replica.parameters)
        pairs = zip(self._slots, state.variables, strict=True)
        return [next(parameters) if slot.is_parameter else variable for slot, variable in pairs]

    def _parameters(self, state: State) -> list[torch.Tensor]:
        """The parameters of a replica that can have a gradient."""
        own = self._own(state)
        return [own[i] for i in self._trained]


@contextmanager
def _again(
    check: Callable[[], None],
    state: State,
    context: Context,
    leaves: GivenLeaves,
    before: dict[int, torch.Tensor],
    draws: Sequence[torch.Tensor],
    arguments: Sequence[torch.Tensor],
) -> Iterator[list[torch.Tensor]]:
    """As `NodePass.again`. `before`: the values that buffers had before the pass that changed them."""
    check()
    structure: Structure = context.structure
    given = [*leaves.tensors]
    for at, argument in zip(structure.differentiated, arguments, strict=True):
        given[at] = argument
    args, kwargs, _ = structure.nested(given)
    running = ReplicaContext(context, context.rows, draws_by=_Repeated(iter(draws)))
    with state.replica.passes():
        for one in state.replica.buffers:
            if one.index in before:
                one.work.data.copy_(before[one.index])
        try:
            with together_with(running):
                with structure.entered():
                    outputs = state.replica.module(*args, **kwargs)
                running.backward = True
                yield Nest.flatten(outputs, "The module's outputs")[1]
        finally:
            state.replica.restore_buffers()


@dataclass(slots=True)
class _Repeated:
    """Gives the outcomes of draws again."""

    outcomes: Iterator[torch.Tensor]

    def take(self, draw: Draw) -> torch.Tensor:
        """The next outcome."""
        return next(self.outcomes)


def _buffers_of(form: JointForm, values: Sequence[torch.Tensor]) -> tuple[np.ndarray, BufferNotes]:
    """A replica's numbers for buffers, and what they are, from the values of a captured forward pass."""
    found = form.buffers
    sums: Any = values[0].numpy() if found.has_sums else np.zeros(0)
    constants = list(zip(found.constant, values[found.has_sums :], strict=True))
    notes = BufferNotes(list(found.moved), constants, list(found.normalized))
    notes.unjudged = {found.unjudged[i]: value for i, value in constants if i in found.unjudged}
    return sums, notes
