"""`TorchPureStep`: the training step of a torch module as captured steps ask for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastdp.capture.pure_step import Draws, ReplicaTensors
from fastdp.capture.watch import Watch
from fastdp.comm.context import Context
from fastdp.errors import NotCapturable
from fastdp.program.torch.batch import Structure, with_extremes
from fastdp.program.torch.capture.guard import refuse_hooks, side_effect, watch_pass
from fastdp.program.torch.capture.outcome import OutcomeForm, TorchOutcome
from fastdp.program.torch.capture.pure_pass import PurePass
from fastdp.program.torch.capture.step_parts import TracedLoss, found_in_buffers, gradients_of_leaves, is_fake
from fastdp.program.torch.half import may_overflow
from fastdp.program.torch.known_losses import known_loss
from fastdp.program.torch.loss import LossFunction, check_reduction
from fastdp.program.torch.losses import split
from fastdp.program.torch.module import Slot
from fastdp.program.torch.nest import Nest
from fastdp.program.torch.replica import ReplicaContext
from fastdp.program.torch.rows.declared import parts_fit

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_REMEDY = 'pass reduction="mean" (or "sum") to train_step if the loss is the mean (or the sum) over samples'


class TorchPureStep(PurePass):
    """Implements `PureStep` with `TorchOutcome` as its outcome.

    Args:
        module, slots, replicas, sync_batch_norm, devices: as in `PurePass`.
        trained: the numbers of the parameters that can have a gradient.
        loss_fn, reduction, accumulate: as in `TorchProgram`.
        scales: a gradient scaler scales the loss.
    """

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
        super().__init__(module, slots, replicas, sync_batch_norm=sync_batch_norm, devices=devices)
        self.trained = list(trained)
        self._loss_fn, self._reduction = loss_fn, reduction
        self._accumulate, self._scales = accumulate, scales
        self._known = known_loss(loss_fn) if reduction is None else None

    def why_never(self) -> str:
        """As `PureStep.why_never`."""
        why = super().why_never()
        if why:
            return why
        if self._scales:
            return "scaler: the scale of the loss changes from step to step"
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

    def rows(self, batch: Sequence[Any], context: Context) -> list[torch.Tensor]:
        """As `PurePass.rows`, then what the loss divides by."""
        tensors = super().rows(batch, context)
        if self._known is not None and context.rows.count < context.rows.total:
            whole = context.structure.target_of(context.batch)
            if whole is not None and self._known.divides(whole):
                tensors.append(self._known.divisor(whole).to(tensors[0].device))
        return tensors

    def compute(
        self, variables: Sequence[torch.Tensor], rows: Sequence[torch.Tensor], context: Context, draws: Draws
    ) -> TorchOutcome:
        """As `PureStep.compute`."""
        refuse_hooks(self._slots)
        with torch.enable_grad(), self.lent_pass(variables, context, draws) as ran:
            loss = self._forward(rows if is_fake(variables) else [row.clone() for row in rows], ran.running)
            leaves, part = [ran.values[i] for i in self.trained], 1.0 / self._accumulate
            gradients = gradients_of_leaves(
                ran.running, [loss.contribution], leaves, lambda roots: [torch.full_like(roots[0], part)]
            )
        buffers = found_in_buffers(
            self._slots, ran.values, variables, ran.lent, self._changed(ran, variables), ran.running
        )
        return loss.outcome(gradients, buffers)

    def flatten(self, outcome: TorchOutcome) -> tuple[list[torch.Tensor], OutcomeForm]:
        """As `PureStep.flatten`."""
        reported = outcome.reported.tensors if outcome.reported is not None else []
        return [outcome.sums, *outcome.constants, *reported, *outcome.outputs], outcome.form

    def watch(self, watch: Watch) -> None:
        """As `PureStep.watch`."""
        watch_pass(watch, self._module, self._slots, self._loss_fn)

    # Parts of the step.

    def _forward(self, rows: Sequence[torch.Tensor], running: ReplicaContext) -> TracedLoss:
        """Run the module and the loss."""
        context = running.context
        structure: Structure = context.structure
        args, kwargs, targets = self._nested(rows, structure)
        divisor = rows[structure.count] if len(rows) > structure.count else None
        with structure.autocast.enter():
            if context.rows.count == context.rows.total:
                outputs = self._module(*args, **kwargs)
                loss, reported = split(self._loss_fn(outputs, *targets), None)
                found = TracedLoss(loss, loss.dtype, reported)
            else:
                outputs = with_extremes(self._module(*args, **kwargs), context)
                running.tried = False
                found = self._part(outputs, targets, divisor, context)
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
