"""Captured passes with gradients on one device: outputs of a module as a node of the user's own graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.autograd import Variable

from fastdp.buffers import FlatBuffers
from fastdp.capture.joint import CapturedJoint
from fastdp.capture.kinds import CapturesByKind
from fastdp.comm.batch import Batch
from fastdp.comm.context import Context
from fastdp.comm.rendezvous import Rendezvous
from fastdp.program.torch.batch import Structure
from fastdp.program.torch.capture.call_kinds import CallKind, CallKinds
from fastdp.program.torch.capture.comparing import KeptDraws, buffers_differ
from fastdp.program.torch.capture.joint_captures import JointCaptures
from fastdp.program.torch.capture.joint_checks import EagerPasses
from fastdp.program.torch.capture.pass_node import NodePass
from fastdp.program.torch.capture.pure_joint import JointForm, TorchPureJoint
from fastdp.program.torch.capture.pure_pass import dense
from fastdp.program.torch.capture.replays import CapturedReplica
from fastdp.program.torch.module import slots_of
from fastdp.program.torch.nest import Nest, is_dense
from fastdp.program.torch.parameter_hooks import HookedGradients
from fastdp.runtime.queue import QueueDevice
from fastdp.shard import Rows
from fastdp.tensors import pytree

_LOOK = attrgetter("shape", "dtype", "device", "is_leaf")
_NOBODY = Rendezvous(1, 1.0)


class LoneLoop:
    """Calls of a module with gradients, by plain torch or by captured passes.

    Args:
        module: the user's own, in host memory.
        device: the only device.
        mode, alone, deterministic: as of `Captures`.
    """

    def __init__(
        self,
        module: nn.Module,
        device: QueueDevice,
        mode: str,
        alone: Callable[[], AbstractContextManager[None]],
        *,
        deterministic: bool,
    ) -> None:
        self._module, self._device = module, device
        self._mode, self._within, self._deterministic = mode, alone, deterministic
        self._slots = slots_of(module)
        self._trained = [
            i
            for i, slot in enumerate(self._slots)
            if slot.is_parameter and (slot.tensor.is_floating_point() or slot.tensor.is_complex())
        ]
        self._looks = self._look()
        self._names = [f"`{self._slots[i].name}`" for i in self._trained]
        self._kinds = CallKinds(module)
        self.captures: CapturesByKind[CapturedJoint] = CapturesByKind(self._captures)

    def __call__(self, batch: Batch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, bool]:
        """The outputs of a call, and whether calls like it will be plain torch from now on.

        Args:
            batch: without arrays; the arguments are in its structure.
            args, kwargs: the arguments.
        """
        captures = self._of(batch.structure) if self._may_capture(batch.structure) else None
        if captures is None:
            return self._module(*args, **kwargs), True
        began = time.perf_counter()
        captures.prepare(batch, True)
        context = Context(0, Rows(0, batch.rows, batch.rows), 0, _NOBODY, 1, batch, batch.structure, True, self._device)
        shapes, captured = [*captures.present], captures.find(context)
        if captured is None or captured.disagreed:
            began = time.perf_counter()  # calls that stay eager take no longer
            outputs = self._module(*args, **kwargs)
            if captures.stays_eager(context):
                return outputs, True
        elif captured.checks:
            outputs = self._compared(captured, context)
        else:
            outputs = self._replayed(captures, captured, context)
        _notice_backward(outputs, time.perf_counter() - began, partial(captures.note, shapes=shapes))
        return outputs, False

    def _captures(self, kind: CallKind) -> JointCaptures:
        """The captured passes of a kind of calls."""
        replica = CapturedReplica(self._device, [], [], FlatBuffers([], self._device))
        joint = TorchPureJoint(self._module, self._slots, self._trained, {0: replica}, sync_batch_norm=False, devices=1)
        return JointCaptures(joint, self._mode, 1, self._within, deterministic=self._deterministic)

    def _of(self, structure: Structure) -> JointCaptures | None:
        """The captured passes of calls like this one; None if it runs eagerly."""
        kind = self._kinds.of(structure)
        captures: Any = self.captures.of(kind, f"{kind.label}, with gradients")
        return captures if captures is not None and not captures.is_refused else None

    def _may_capture(self, structure: Structure) -> bool:
        """Whether the module has the tensors that it had, and the arguments are tensors and plain values."""
        leaves = structure.nest.leaves
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        structure.differentiated = tuple([at for at, one in enumerate(tensors) if one.requires_grad])
        return self._look() == self._looks and all(map(is_dense, tensors))

    def _look(self) -> list[Any]:
        """What the module's tensors are like."""
        return [
            None if one is None else (_LOOK(one), one.stride())
            for one in [slot.table.get(slot.key) for slot in self._slots]
        ]

    def _variables(self) -> list[torch.Tensor]:
        """The module's tensors, without gradients."""
        return [slot.tensor.detach() for slot in self._slots]

    def _compared(self, captured: CapturedJoint, context: Context) -> Any:
        """An eager pass, and what the captured one makes of it. Numbers that differ are noted in `captured`."""
        structure: Structure = context.structure
        before = [one.clone() for one in self._variables()]
        rows = structure.tensors([], "cpu")
        for at in structure.differentiated:  # not the arguments, whose hooks run in the user's backward alone
            rows[at] = rows[at].view_as(rows[at])
        kept = KeptDraws(context)
        args, kwargs, _ = structure.nested(rows)
        outputs = self._module(*args, **kwargs)

        def difference() -> str:
            draws, why = kept.of(captured, before, context)
            inputs = [*before, *(dense(one.detach()) for one in rows), *draws]
            return why or self._difference(captured, inputs, outputs, rows, structure)

        captured.compare(difference)
        return outputs

    def _difference(
        self,
        captured: CapturedJoint,
        inputs: list[torch.Tensor],
        outputs: Any,
        rows: Sequence[torch.Tensor],
        structure: Structure,
    ) -> str:
        """What differs between captured and eager passes; empty if nothing does."""
        nest, tensors = Nest.flatten(outputs, "The module's outputs")
        parameters = [self._slots[i].tensor for i in self._trained]
        arguments = [rows[at] for at in structure.differentiated]
        names = [*self._names, *(f"argument {at}" for at in structure.differentiated)]
        rough = structure.autocast.enabled or any(one.dtype.itemsize < 4 for one in parameters)
        with HookedGradients(parameters).aside(None):
            passes = EagerPasses(captured, nest, tensors, [*parameters, *arguments])
        why, values = passes.difference(inputs, names, rough=rough)
        form: JointForm = captured.form
        found = dict(zip(form.buffers.constant, values, strict=False))
        left = [found.get(i, inputs[i]) for i in range(len(self._slots))]
        return why or buffers_differ(self._slots, left, self._variables(), rough=rough)

    def _replayed(self, captures: JointCaptures, captured: CapturedJoint, context: Context) -> Any:
        """The outputs of a captured pass."""
        structure, form = context.structure, captured.form
        variables, rows = self._variables(), structure.tensors([], "cpu")
        drawn = torch.get_rng_state() if captured.drawn else None
        draws = captured.repeat_draws(variables, context)
        before = {i: variables[i].clone() for i in form.written}
        one = NodePass(
            captured,
            [*(before.get(i, one) for i, one in enumerate(variables)), *(dense(one.detach()) for one in rows), *draws],
            [*variables, *rows],
            [self._slots[i].tensor for i in self._trained],
            [rows[at] for at in structure.differentiated],
            partial(
                self._again, structure, rows, before, drawn, partial(captures.check_generation, captures.generation)
            ),
            partial(captures.note_used, structure),
            captures.refuse,
        )
        outputs = one.outputs()
        with torch.no_grad():
            for i, value in zip(form.buffers.constant, one.values, strict=True):
                variables[i].copy_(value)
        return form.nest.pack(outputs)

    @contextmanager
    def _again(
        self,
        structure: Structure,
        rows: Sequence[torch.Tensor],
        before: dict[int, torch.Tensor],
        drawn: torch.Tensor | None,
        check: Callable[[], None],
        arguments: Sequence[torch.Tensor],
    ) -> Iterator[list[torch.Tensor]]:
        """As `NodePass.again`. `before`: the values that buffers had before the pass that changed them."""
        check()
        given = [*rows]
        for at, argument in zip(structure.differentiated, arguments, strict=True):
            given[at] = argument
        args, kwargs, _ = structure.nested(given)
        slots, now = self._slots, {i: self._slots[i].tensor for i in before}
        generator = torch.get_rng_state()
        try:
            for i, value in before.items():
                slots[i].table[slots[i].key] = value.clone()
            if drawn is not None:
                torch.set_rng_state(drawn)
            with structure.autocast.enter():
                outputs = self._module(*args, **kwargs)
            torch.set_rng_state(generator)
            yield Nest.flatten(outputs, "The module's outputs")[1]
        finally:
            torch.set_rng_state(generator)
            for i, buffer in now.items():
                slots[i].table[slots[i].key] = buffer


def _notice_backward(outputs: Any, seconds: float, note: Callable[[float], None]) -> None:
    """Call `note` with the seconds of a pass when the first backward pass through its outputs has ended.

    Args:
        outputs: of the module.
        seconds: what forward has taken.
        note: called once, on the thread of backward.
    """
    begun = False

    def ended(began: float) -> None:
        note(seconds + time.perf_counter() - began)

    def begins(_: Any) -> None:
        nonlocal begun
        if not begun:
            begun = True
            Variable._execution_engine.queue_callback(partial(ended, time.perf_counter()))

    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    for node in {leaf.grad_fn for leaf in leaves if leaf.grad_fn is not None}:
        node.register_prehook(begins)
