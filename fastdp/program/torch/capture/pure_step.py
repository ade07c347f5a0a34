"""`TorchPureStep`: the training step of a torch module as captured steps ask for it."""

from __future__ import annotations

import traceback
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import nn

from fastdp.capture.pure_step import Draw, Draws, Moved, ReplicaTensors
from fastdp.capture.trace import as_traced
from fastdp.capture.watch import Watch
from fastdp.comm.context import Context
from fastdp.errors import NotCapturable
from fastdp.program.torch.batch import Structure, with_extremes
from fastdp.program.torch.capture.guard import refuse_hooks, side_effect, watch_step
from fastdp.program.torch.capture.lent_tensors import LentTensors
from fastdp.program.torch.capture.outcome import OutcomeForm, TorchOutcome
from fastdp.program.torch.capture.step_parts import (
    ALONE,
    TOGETHER,
    NoTracedPeers,
    TracedLoss,
    found_in_buffers,
    gradients_of_leaves,
    is_fake,
)
from fastdp.program.torch.half import may_overflow
from fastdp.program.torch.known_losses import known_loss
from fastdp.program.torch.loss import LossFunction, check_reduction
from fastdp.program.torch.losses import split
from fastdp.program.torch.module import Slot
from fastdp.program.torch.nest import Nest
from fastdp.program.torch.random.checkpoints import REPEATED_DRAWS
from fastdp.program.torch.replica import ReplicaContext, ReplicaDraw
from fastdp.program.torch.rows.declared import parts_fit
from fastdp.program.torch.shared_draws import SharedDraws
from fastdp.tensors.collectives import peers_scope
from fastdp.tensors.function_mode import ReplicaMode

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_REMEDY = 'pass reduction="mean" (or "sum") to train_step if the loss is the mean (or the sum) over samples'


class TorchPureStep:
    """Implements `PureStep` with `TorchOutcome` as its outcome.

    Args:
        module: the user's own.
        slots: its parameters and buffers; their numbers are those of the variables.
        trained: the numbers of the parameters that can have a gradient.
        replicas: by rank; the program adds them.
        loss_fn, reduction, sync_batch_norm, accumulate: as in `TorchProgram`.
        scales: a gradient scaler scales the loss.
        devices: the number of devices.
    """

    spans_devices = False

    def __init__(
        self,
        module: nn.Module,
        slots: Sequence[Slot],
        trained: Sequence[int],
        replicas: Mapping[int, ReplicaTensors],
        loss_fn: LossFunction,
        *,
        reduction: str | None,
        sync_batch_norm: bool,
        accumulate: int,
        scales: bool,
        devices: int,
    ) -> None:
        self.name = type(module).__name__
        self.trained = list(trained)
        self.replicas = replicas
        self.most_replicas = devices
        self._module, self._slots = module, slots
        self._loss_fn, self._reduction = loss_fn, reduction
        self._sync_batch_norm, self._accumulate, self._scales = sync_batch_norm, accumulate, scales
        self._known = known_loss(loss_fn) if reduction is None else None
        self._written: frozenset[int] = frozenset()  # the buffers that forward writes to
        self._told: set[str] = set()

    @property
    def variables(self) -> list[torch.Tensor]:
        """As `PureStep.variables`."""
        return [slot.tensor.detach() for slot in self._slots]

    def why_never(self) -> str:
        """As `PureStep.why_never`."""
        if any(is_compiled(part) for part in self._module.modules()):
            return "torch.compile: the module runs its own compilation"
        if self._scales:
            return "scaler: the scale of the loss changes from step to step"
        if not self._slots:
            return "a module without parameters"
        if self.most_replicas == 1:
            return ""
        if self._sync_batch_norm and any(isinstance(part, _NORMS) for part in self._module.modules()):
            return "sync_batch_norm: replicas exchange moments in the middle of a step"
        if self._reduction is None and self._known is None:
            return f"a loss that is computed on the merged outputs: {_REMEDY}"
        return ""

    def own_code(self) -> str:
        """As `PureStep.own_code`: what a replay would leave out. Other code is compared with eager steps."""
        return side_effect(self._module, self._loss_fn)

    def prepare(self) -> None:
        """As `PureStep.prepare`."""

    def key(self, context: Context) -> Hashable:
        """As `PureStep.key`."""
        strides = (
            () if all(one.flags.c_contiguous for one in context.batch) else tuple(a.strides for a in context.batch)
        )
        return context.structure.kind, strides

    def rows(self, batch: Sequence[Any], context: Context) -> list[torch.Tensor]:
        """As `PureStep.rows`: the arrays, the tensors that all rows share, and what the loss divides by."""
        structure: Structure = context.structure
        tensors = [_dense(tensor) for tensor in structure.tensors(batch, context.torch_device)]
        if self._known is not None and context.rows.count < context.rows.total:
            whole = structure.target_of(context.batch)
            if whole is not None and self._known.divides(whole):
                tensors.append(self._known.divisor(whole).to(tensors[0].device))
        return tensors

    def compute(
        self, variables: Sequence[torch.Tensor], rows: Sequence[torch.Tensor], context: Context, draws: Draws
    ) -> TorchOutcome:
        """As `PureStep.compute`."""
        refuse_hooks(self._slots)
        draws_of_trace = SharedDraws()  # not those of the step that follows
        draws_of_trace.places = context.structure.draws.places
        context = replace(context, structure=replace(context.structure, draws=draws_of_trace))
        values = self._own_copies(variables)
        alone = context.rows.count == context.rows.total
        running = ReplicaContext(context, context.rows, self._sync_batch_norm, told=self._told)
        running.traced, running.draws_by = True, _NoDraws() if alone and values[0].is_cuda else draws
        lent = LentTensors(self._module, self._slots, values)
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(as_traced())  # around forward alone there is the autocast of the step
            stack.enter_context(lent.lent())
            if not alone:
                stack.enter_context(peers_scope(NoTracedPeers()))
            stack.enter_context(REPEATED_DRAWS)
            stack.enter_context(ReplicaMode(running, ALONE if alone else TOGETHER))
            loss = self._forward(rows if is_fake(variables) else [row.clone() for row in rows], running)
            gradients = gradients_of_leaves(
                running, loss.contribution, [values[i] for i in self.trained], self._accumulate
            )
        buffers = found_in_buffers(
            self._slots, values, variables, lent, self._changed(lent, values, variables), running
        )
        return loss.outcome(gradients, buffers)

    def flatten(self, outcome: TorchOutcome) -> tuple[list[torch.Tensor], OutcomeForm]:
        """As `PureStep.flatten`."""
        reported = outcome.reported.tensors if outcome.reported is not None else []
        return [outcome.sums, *outcome.constants, *reported, *outcome.outputs], outcome.form

    def draw(
        self, draws: Sequence[Draw], variables: Sequence[torch.Tensor], context: Context
    ) -> tuple[list[torch.Tensor], Moved]:
        """As `PureStep.draw`."""
        running = ReplicaContext(context, context.rows)
        if context.rows.count < context.rows.total:
            context.structure.draws.begin()
        return [draw.make(running).contiguous() for draw in draws if isinstance(draw, ReplicaDraw)], []

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """As `PureStep.tracing`. Draws of a trace leave torch's generators as they were."""
        devices = sorted({one.device.index for one in self.variables if one.is_cuda})
        with torch.random.fork_rng(devices):
            try:
                yield
            except NotCapturable as error:
                cause = error.__cause__
                place = self._place(error.__traceback__) or (self._place(cause.__traceback__) if cause else "")
                raise NotCapturable(f"{error}{place}") from error

    def watch(self, watch: Watch) -> None:
        """As `PureStep.watch`."""
        watch_step(watch, self._module, self._slots, self._loss_fn)

    # Parts of the step.

    def _own_copies(self, variables: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors that the module gets: those that it may write to are copies."""
        fake = is_fake(variables)
        values = []
        for i, (slot, variable) in enumerate(zip(self._slots, variables, strict=True)):
            value = (
                variable.detach()
                if fake and (slot.is_parameter or i not in self._written)
                else variable.detach().clone()
            )
            values.append(value.requires_grad_() if slot.is_parameter and slot.tensor.requires_grad else value)
        return values

    def _forward(self, rows: Sequence[torch.Tensor], running: ReplicaContext) -> TracedLoss:
        """Run the module and the loss."""
        context, structure = running.context, running.context.structure
        if structure.has_objects:
            raise NotCapturable("a batch with objects in it that are neither tensors nor plain values")
        count = len(structure.nest.dtypes) + sum(isinstance(leaf, torch.Tensor) for leaf in structure.nest.leaves)
        args, kwargs, targets = structure.nested(rows[:count])
        with structure.autocast.enter():
            if context.rows.count == context.rows.total:
                outputs = self._module(*args, **kwargs)
                loss, reported = split(self._loss_fn(outputs, *targets), None)
                found = TracedLoss(loss, loss.dtype, reported)
            else:
                outputs = with_extremes(self._module(*args, **kwargs), context)
                running.tried = False
                found = self._part(outputs, targets, rows[count] if len(rows) > count else None, context)
        if context.wants_outputs:
            nest, found.outputs = Nest.flatten(outputs, "The module's outputs")
            layouts = structure.layouts_of(outputs, found.outputs)
            if any(one.weights is not None for one in layouts):
                raise NotCapturable("an output that is a mean in which rows do not count alike")
            found.nest = nest, layouts
        return found

    def _part(self, outputs: Any, targets: Sequence[Any], divisor: torch.Tensor | None, context: Context) -> TracedLoss:
        """A replica's contribution to the loss of the whole batch."""
        _, tensors = Nest.flatten(outputs, "The module's outputs")
        if may_overflow(context.structure.autocast, tensors):
            raise NotCapturable("float16 on several devices, where sums of gradients must overflow as on one")
        layouts = context.structure.layouts_of(outputs, tensors)
        parts_fit(layouts, tensors, context.rows)
        share = context.rows.share
        if self._known is not None:
            why = self._known.why_not(outputs, targets, layouts)
            if why:
                raise NotCapturable(f"a loss that is computed on the merged outputs, since {why}: {_REMEDY}")
            loss, _ = split(self._known.part(outputs, targets[0], share, divisor), None)
            return TracedLoss(loss, loss.dtype)
        assert self._reduction is not None
        check_reduction(self._reduction, tensors, layouts)
        loss, reported = split(self._loss_fn(outputs, *targets), self._reduction)
        weight = share if self._reduction == "mean" else 1.0
        return TracedLoss(loss * weight, loss.dtype, reported, weight, loss.detach().double() * weight)

    def _changed(
        self, lent: LentTensors, values: Sequence[torch.Tensor], variables: Sequence[torch.Tensor]
    ) -> list[int]:
        """The numbers of the buffers that forward has changed.

        Raises:
            NotCapturable: it has changed a parameter, or in the trace another buffer than before it.
        """
        written = set(lent.written)
        if is_fake(variables):
            others = sorted(written - self._written)
            written |= self._written
        else:
            written |= {i for i, (one, then) in enumerate(zip(values, variables, strict=True)) if not _equal(one, then)}
            others = sorted(i for i in written if self._slots[i].is_parameter)
            self._written = frozenset(written)
        if others:
            raise NotCapturable(f"`{self._slots[others[0]].name}`, which forward changes")
        return sorted(written)

    def _place(self, trace: TracebackType | None) -> str:
        """The innermost part of the module in a traceback, as the end of a sentence."""
        names = {id(part): name for name, part in self._module.named_modules() if name}
        found = [id(frame.f_locals.get("self")) for frame, _ in traceback.walk_tb(trace)]
        inner = [names[one] for one in found if one in names]
        return f", in the part `{inner[-1]}`" if inner else ""


class _NoDraws:
    """Refuses draws on one GPU, whose own generator makes them in eager steps."""

    def take(self, draw: Draw) -> torch.Tensor:
        """Refused."""
        raise NotCapturable("random draws on a single GPU, which torch's kernels make there")


def is_compiled(part: nn.Module) -> bool:
    """Whether a part of a module is compiled by torch.compile."""
    return type(part).__name__ == "OptimizedModule" or getattr(part, "_compiled_call_impl", None) is not None


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in memory without gaps, its axes in the order that they have."""
    if tensor.is_contiguous():
        return tensor
    order = sorted(range(tensor.ndim), key=lambda axis: (-tensor.stride(axis), axis))
    permuted = tensor.permute(order)
    back = [order.index(axis) for axis in range(tensor.ndim)]
    return tensor if permuted.is_contiguous() else permuted.contiguous().permute(back)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same values, NaNs included."""
    return torch.equal(one, other) or bool(torch.eq(one, other).logical_or(one.isnan() & other.isnan()).all())
