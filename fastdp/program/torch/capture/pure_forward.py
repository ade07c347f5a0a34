"""`TorchPureForward`: a forward pass of a torch module without gradients, as captured passes ask for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import nn

from fastdp.capture.pure_step import Draws, Moved, ReplicaTensors
from fastdp.capture.watch import Watch
from fastdp.comm.context import Context
from fastdp.errors import NotCapturable
from fastdp.program.torch.batch import with_extremes
from fastdp.program.torch.capture.guard import side_effect, watch_pass
from fastdp.program.torch.capture.pure_pass import PurePass, same_values
from fastdp.program.torch.capture.step_parts import FoundInBuffers, found_in_buffers, is_fake
from fastdp.program.torch.module import Slot
from fastdp.program.torch.module_buffers import BufferNotes
from fastdp.program.torch.nest import Nest
from fastdp.program.torch.rows.declared import parts_fit
from fastdp.tensors import pytree


@dataclass(frozen=True, slots=True)
class ForwardForm:
    """The form of a `ForwardOutcome`.

    Attributes:
        nest: of the outputs.
        buffers: what forward leaves in buffers, without their values.
        written: the numbers of the arguments that forward changes in place, among those of `PureStep.rows`.
    """

    nest: Nest
    buffers: FoundInBuffers
    written: tuple[int, ...] = ()

    def filled(
        self, gradients: Sequence[torch.Tensor | None], values: Iterator[torch.Tensor], moved: Moved
    ) -> ForwardOutcome:
        """As `fastdp.capture.pure_step.OutcomeForm.filled`."""
        sums = next(values) if self.buffers.has_sums else None
        constants = list(islice(values, len(self.buffers.constant)))
        written = list(islice(values, len(self.written)))
        return ForwardOutcome(list(values), sums, constants, written, self)


@dataclass(slots=True)
class ForwardOutcome:
    """The result of a pure forward pass.

    Attributes:
        outputs: the tensors of the module's outputs.
        sums: a float64 vector: what buffers are moved by, as `form.buffers` says; None if none is.
        constants: the values of the buffers in `form.buffers.constant`.
        written: the values that forward has left in the arguments `form.written`.
        gradients: none.
    """

    outputs: list[torch.Tensor]
    sums: torch.Tensor | None
    constants: list[torch.Tensor]
    written: list[torch.Tensor]
    form: ForwardForm
    gradients: Sequence[torch.Tensor | None] = field(default=())

    def buffer_notes(self) -> BufferNotes:
        """What forward has left in buffers."""
        form = self.form.buffers
        values = list(zip(form.constant, self.constants, strict=True))
        notes = BufferNotes(list(form.moved), values, list(form.normalized))
        notes.unjudged = {form.unjudged[i]: value for i, value in values if i in form.unjudged}
        return notes


class TorchPureForward(PurePass):
    """Implements `PureStep` with `ForwardOutcome` as its outcome.

    Args:
        module, slots, replicas, sync_batch_norm, devices: as in `PurePass`.
        records: gradients are enabled around the call, though nothing has any.

    Whether torch's inference mode is on forward sees as in an eager pass (`Structure.inference`).
    """

    def __init__(
        self,
        module: nn.Module,
        slots: Sequence[Slot],
        replicas: Mapping[int, ReplicaTensors],
        *,
        sync_batch_norm: bool,
        devices: int,
        records: bool = False,
    ) -> None:
        super().__init__(module, slots, replicas, sync_batch_norm=sync_batch_norm, devices=devices)
        self.name = f"forward of {type(module).__name__}"
        self._records = records
        self._written_rows: frozenset[int] = frozenset()

    def own_code(self) -> str:
        """As `PureStep.own_code`: what a replay would leave out. Other code is compared with eager passes."""
        return side_effect(self._module)

    def watch(self, watch: Watch) -> None:
        """As `PureStep.watch`."""
        watch_pass(watch, self._module, self._slots)

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """As `PureStep.tracing`. Only forward itself is in inference mode."""
        with torch.inference_mode(False), super().tracing():
            yield

    def compute(
        self, variables: Sequence[torch.Tensor], rows: Sequence[torch.Tensor], context: Context, draws: Draws
    ) -> ForwardOutcome:
        """As `PureStep.compute`. Nothing has a gradient."""
        structure, fake = context.structure, is_fake(variables)
        given = [row.detach().clone() if not fake or i in self._written_rows else row for i, row in enumerate(rows)]
        versions = [row._version for row in given]
        with torch.set_grad_enabled(self._records), self.lent_pass(variables, context, draws) as ran:
            packed = self._nested(given, structure)
            leaves, spec = pytree.tree_flatten(packed)
            with structure.entered():
                outputs = with_extremes(self._module(*packed[0], **packed[1]), ran.running.context)
            now, spec_now = pytree.tree_flatten(packed)
        if spec_now != spec or any(one is not other for one, other in zip(now, leaves, strict=True)):
            raise NotCapturable("an argument (a list or a dict) that forward changes")
        nest, tensors = Nest.flatten(outputs, "The module's outputs")
        if any(tensor.requires_grad for tensor in tensors):
            raise NotCapturable("an output that requires a gradient")
        if not fake:
            self._ran(outputs, tensors, [*ran.values, *given])
        if context.rows.count < context.rows.total:
            parts_fit(structure.layouts_of(outputs, tensors), tensors, context.rows)
        with torch.no_grad():
            buffers = found_in_buffers(
                self._slots, ran.values, variables, ran.lent, self._changed(ran, variables), ran.running
            )
            written = self._changed_rows(given, rows, versions, fake=fake)
        if written:
            self._check_written([given[number] for number in written], max(written) < len(structure.nest.dtypes))
        sums = torch.cat(buffers.sums) if buffers.sums else None
        form = ForwardForm(nest, buffers.without_values(), written)
        return ForwardOutcome(tensors, sums, list(buffers.constant.values()), [given[i] for i in written], form)

    def flatten(self, outcome: ForwardOutcome) -> tuple[list[torch.Tensor], ForwardForm]:
        """As `PureStep.flatten`."""
        sums = [outcome.sums] if outcome.sums is not None else []
        return [*sums, *outcome.constants, *outcome.written, *outcome.outputs], outcome.form

    def _ran(self, outputs: Any, tensors: Sequence[torch.Tensor], given: list[torch.Tensor]) -> None:
        """Called after a run with real values. Does nothing here.

        Args:
            outputs: of the module, and the `tensors` in it.
            given: the module's parameters and buffers, and its arguments.
        """

    def _check_written(self, arguments: Sequence[torch.Tensor], have_rows: bool) -> None:
        """Check that a replay can write to the arguments that forward changes.

        Raises:
            NotCapturable: it cannot.
        """
        if not have_rows or any(one.is_cuda for one in arguments):
            raise NotCapturable("an argument without rows, or on a GPU, which forward changes")

    def _changed_rows(
        self, given: Sequence[torch.Tensor], rows: Sequence[torch.Tensor], versions: Sequence[int], *, fake: bool
    ) -> tuple[int, ...]:
        """The numbers of the arguments that forward has changed in place.

        Raises:
            NotCapturable: in the trace it has changed another one than before it.
        """
        written = {i for i, (one, then) in enumerate(zip(given, versions, strict=True)) if one._version != then}
        if fake:
            if written - self._written_rows:
                raise NotCapturable("an argument that forward changes in the trace alone")
            return tuple(sorted(self._written_rows))
        pairs = enumerate(zip(given, rows, strict=True))
        written |= {i for i, (one, then) in pairs if one.shape != then.shape or not same_values(one, then)}
        self._written_rows = frozenset(written)
        return tuple(sorted(written))
