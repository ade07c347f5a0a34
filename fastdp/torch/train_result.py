"""`TrainResult`: what a call of a train step gives besides the loss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from fastdp.engine.step import StepResult
from fastdp.program.torch.batch import outputs_from_arrays
from fastdp.program.torch.losses import whole
from fastdp.program.torch.passes import Notes
from fastdp.program.torch.update import Applied


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a call of a `TrainStep` gave. The caller owns all of it.

    Attributes:
        loss: of the global batch before the update, as the call returned it.
        losses: what `loss_fn` returned, with the numbers of the global batch: the loss, or a tuple, list or dict in
            which it is. All numbers are tensors without axes, on the CPU, without gradient.
        outputs: the module's outputs for the global batch, detached, on the CPU; None without `outputs=True`.
        grad_norm: the norm of the gradient of the global batch, or of the whole window, before clipping: a tensor
            without axes on the CPU. None without `grad_norm=True` or `clip_grad_norm`, and in calls without an update.
        updated: whether the call changed the weights. Calls within a window of `accumulate` do not.
        skipped: whether the update was skipped since the loss or the gradient was not finite (`skip_nonfinite=True`,
            or a scaler). A scaler asks for each optimizer; some may have made their update, and some not.
    """

    loss: torch.Tensor
    losses: Any
    outputs: Any
    grad_norm: torch.Tensor | None
    updated: bool
    skipped: bool

    def after(self, applied: Applied) -> TrainResult:
        """The result with what an update after the call tells."""
        norm, updated, skipped = _told(applied)
        return replace(self, grad_norm=norm, updated=updated, skipped=skipped)


def read_result(step: StepResult, applied: Applied | None, *, outputs: bool) -> TrainResult:
    """Read the engine's result of a step.

    Args:
        step: the engine's result.
        applied: what the update tells; None if there was none.
        outputs: whether outputs were merged.
    """
    notes: Notes = step.notes
    loss = torch.tensor(step.sums[0], dtype=notes.loss_dtype, device="cpu")
    losses = loss if notes.reported is None else whole([one.reported for one in step.every_note], loss)
    merged = outputs_from_arrays(step.outputs, notes.outputs) if outputs and notes.outputs is not None else None
    return TrainResult(loss, losses, merged, *_told(applied))


def _told(applied: Applied | None) -> tuple[torch.Tensor | None, bool, bool]:
    """The gradient's norm, whether weights have changed, and whether the update was skipped."""
    if applied is None:
        return None, False, False
    norm = None if applied.grad_norm is None else applied.grad_norm.cpu()
    return norm, applied.updated, applied.skipped
