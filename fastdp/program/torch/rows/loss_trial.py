"""Checks that a loss function is the mean or the sum over samples that `reduction=` says, and keeps nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastdp.comm.batch import Batch
from fastdp.program.torch.known_losses import known_loss
from fastdp.program.torch.losses import split
from fastdp.program.torch.replica import ReplicaContext
from fastdp.program.torch.rows.at_size import form_of
from fastdp.program.torch.rows.draws import CannotSplitError
from fastdp.program.torch.rows.hints import refuse_lists
from fastdp.program.torch.rows.inputs import choices_of
from fastdp.program.torch.rows.judge import FAILURES
from fastdp.program.torch.rows.outside import SharedState
from fastdp.program.torch.rows.trial import Trial
from fastdp.shard import Rows
from fastdp.tensors.row_effects import Layout


@dataclass(frozen=True, slots=True)
class DeclaredLoss:
    """A loss function of which each replica computes its own part, and what the user has said of it."""

    function: Callable[..., Any]
    reduction: str


def check_loss(
    module: nn.Module,
    batch: Batch,
    loss: DeclaredLoss,
    layouts: Sequence[Layout] | None,
    rows: tuple[int, int] | None,
    devices: Sequence[Rows],
) -> None:
    """Check what the user has said of a loss function, on a few rows of a batch and on all rows.

    Args:
        module, batch: as in `Trial`.
        loss: the loss function.
        layouts: of the tensors among the outputs; None if all have their rows first.
        rows: the numbers of rows of a trial's parts; None for a trial of all rows alone.
        devices: the rows of the devices.

    A module or a loss function that does not run here is left to the step, and so is one that calls collectives.

    Raises:
        CannotSplitError: the loss is something else, or its function changes what all devices would share.
        ValueError: it would get the whole of a list with one value for each row.
    """
    refuse_lists(batch.structure.values[2], batch.rows, loss.reduction)
    if known_loss(loss.function) is not None:
        return
    shared = SharedState(module, loss.function)
    try:
        with torch.no_grad(), shared.undone():
            if rows is not None:
                first, total = rows[0], sum(rows)
                few = [Rows(0, first, total), Rows(first, total, total)]
                choices = choices_of(batch.rows, total)[:3]
                _check_state(shared, Trial(module, batch, choices[0]), loss, few)
                for chosen in choices:
                    _check_value(Trial(module, batch, chosen), loss, few, layouts)
            _check_value(Trial(module, batch, range(batch.rows)), loss, devices, layouts)
    except CannotSplitError:
        raise
    except (*FAILURES, NotImplementedError):
        return


def _check_state(shared: SharedState, trial: Trial, loss: DeclaredLoss, parts: Sequence[Rows]) -> None:
    """Check that the loss function changes nothing that the devices would share."""
    whole = Rows(0, parts[0].total, parts[0].total)
    try:
        shared.check(lambda: _value(trial, loss, whole), [lambda: _value(trial, loss, parts[0])])
    except CannotSplitError as error:
        raise CannotSplitError(
            f"With reduction={loss.reduction!r} each device calls the loss function: {error} Or leave `reduction` out: "
            "then the loss function is called once, with the outputs of all rows."
        ) from error


def _check_value(trial: Trial, loss: DeclaredLoss, parts: Sequence[Rows], layouts: Sequence[Layout] | None) -> None:
    """Check that the losses of some rows make that of all rows."""
    total = parts[0].total
    whole, _ = _value(trial, loss, Rows(0, total, total))
    found_of = [_value(trial, loss, one) for one in parts]
    forms = [form_of(outputs, layouts) for _, outputs in found_of]
    if any(form != forms[0] for form in forms):
        return  # a step refuses such outputs, and says in what they differ
    every = [value for value, _ in found_of]
    weights = [one.share if loss.reduction == "mean" else 1.0 for one in parts]
    found = sum(value * weight for value, weight in zip(every, weights, strict=True))
    dtype = torch.float64 if all(slot.tensor.dtype == torch.float64 for slot in trial.slots) else torch.float32
    most = max(abs(value) for value in (*every, whole))
    near = abs(found - whole) <= (1e-9 if dtype == torch.float64 and not trial.is_rough else 2e-2) * most
    if near or trial.meets or not math.isfinite(whole):
        return
    raise CannotSplitError(
        f"reduction={loss.reduction!r} says that the loss is the {loss.reduction} over samples, and it is not: for "
        f"{total} rows it is {whole:.6g}, and for {[one.count for one in parts]} of them "
        f"{[float(f'{value:.6g}') for value in every]}, of which the {loss.reduction} is {found:.6g}. Leave "
        "`reduction` out: then the loss is computed on the outputs of all rows, which is right for any loss."
    )


def _value(trial: Trial, loss: DeclaredLoss, rows: Rows) -> tuple[float, Any]:
    """The loss of some rows, and the outputs."""
    found: list[torch.Tensor] = []

    def compute(running: ReplicaContext, given: Any, outputs: Any) -> None:
        running.tried = False
        assert trial.watch is not None
        trial.watch.is_paused = True  # a penalty may use the module's own parameters
        found.append(split(loss.function(outputs, *given[2]), loss.reduction)[0])

    run = trial.run(rows.start, rows.stop, then=compute)
    return float(found[0].detach()), run.outputs
