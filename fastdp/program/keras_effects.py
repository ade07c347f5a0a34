"""Side effects of a forward pass: `add_loss` terms and variables that the model assigns.

On one device they see the whole batch; a replica sees its rows. To put the replicas' values together one
must know how a value depends on the rows, which no framework says: `ops.mean(x)` and `ops.sum(x)` are both
a scalar. So it is found out by trying, once: the model runs on a row a, a row b, and both. With f the value
(of a variable: how far it moved),

    f(ab) = (f(a) + f(b)) / 2    a mean over rows: replicas are averaged by their share of the rows
    f(ab) =  f(a) + f(b)         a sum: replicas are added up
    f(ab) =  f(a) = f(b)         the same on all replicas (seeds, counters of steps)

During the trial, draws are indexed by row as always, and BatchNormalization uses its moving statistics, so
that nothing else mixes rows.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import keras
import torch

from fastdp.errors import ReplicaError
from fastdp.warn import warn_user

TOLERANCE = 1e-4
MIXED_TOLERANCE = 1e-3


class NotByRowsError(ValueError):
    """A model that no dealing out of rows computes as one device does. The message says what to do."""


def refusal(error: NotByRowsError | ReplicaError) -> str:
    """Why a model cannot go by rows, if that is what a step has failed with, before anything changed.

    Raises:
        ReplicaError: it has failed with something else.
    """
    cause = error.__cause__ if isinstance(error, ReplicaError) else error
    if not isinstance(cause, NotByRowsError):
        raise error
    return str(cause)


class Effect(enum.Enum):
    """How a value depends on the rows of the batch."""

    SAME = "the same for all rows"
    MEAN = "a mean over rows"
    SUM = "a sum over rows"
    UNKNOWN = "neither a mean nor a sum over rows"
    UNDECIDED = "zero for the rows tried"


def classify(a: torch.Tensor, b: torch.Tensor, both: torch.Tensor) -> Effect:
    """How a value depends on rows, from its values on row a, row b, and both."""
    a, b, both = (value.detach().double() for value in (a, b, both))
    scale = TOLERANCE * max(float(v.abs().max()) if v.numel() else 0.0 for v in (a, b, both))
    if scale == 0.0:
        return Effect.UNDECIDED

    def close(left: torch.Tensor, right: torch.Tensor) -> bool:
        return bool((left - right).abs().max() <= scale)

    is_mean, is_sum = close(both, (a + b) / 2), close(both, a + b)
    if is_mean and is_sum:
        return Effect.UNDECIDED
    if is_mean:
        return Effect.SAME if close(a, b) else Effect.MEAN
    return Effect.SUM if is_sum else Effect.UNKNOWN


def check_loss(effect: Effect, index: int) -> None:
    """Refuse an `add_loss` term that no combination of the replicas' values gives exactly.

    Raises:
        NotByRowsError: the term is neither a mean nor a sum over rows.
    """
    if effect is Effect.UNKNOWN:
        raise NotByRowsError(
            f"The add_loss() term {index} of this model is {effect.value}, so its value on the whole batch cannot "
            "be put together from the replicas' rows. Compute it in `loss=` or in `compute_loss`, which fastdp "
            "runs on the merged outputs, or use gpus=[0]."
        )


def warn_variable(effect: Effect, variable: keras.Variable) -> Effect:
    """Say once that a variable's replicas are averaged for want of better knowledge."""
    if effect is not Effect.UNKNOWN:
        return effect
    warn_user(
        f"The variable {variable.path} is assigned during the forward pass, and the assigned value is {effect.value}. "
        "fastdp assigns the replicas' mean, weighted by their rows, which may differ from one device."
    )
    return Effect.MEAN


def check_outputs(name: str, alone: Sequence[torch.Tensor], both: Sequence[torch.Tensor]) -> None:
    """A model's outputs for one row and for two have rows along their first axis, or no axes.

    Raises:
        NotByRowsError: one has neither.
    """
    for i, (one, two) in enumerate(zip(alone, both, strict=True)):
        if (one.shape[0] * 2 == two.shape[0]) if one.ndim and two.ndim else one.ndim == two.ndim:
            continue
        raise NotByRowsError(
            f"Output {i} of the model {name!r} has shape {tuple(one.shape)} for one row of the batch and "
            f"{tuple(two.shape)} for two. Rows must lie along the first axis of each output, so that the outputs of "
            "devices can be put together, for a single row too: ops.squeeze() without axis takes that axis away."
        )


def warn_mixed_rows(
    model: keras.Model, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], both: Sequence[torch.Tensor]
) -> None:
    """Warn of a model whose outputs for a row depend on the other rows of the batch.

    A replica sees its own rows only, so such a model gives other results on several devices. Compared are its
    outputs for rows a and b alone with those for both.
    """
    if mixes_rows(a, b, both):
        warn_user(
            f"The outputs of {model.name!r} for a row depend on the other rows of the batch, or are drawn at "
            "random outside of keras.random. Each device sees its own rows only, so results differ from one "
            "device. BatchNormalization knows about devices (sync_batch_norm=True); other layers must not mix."
        )


def mixes_rows(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], both: Sequence[torch.Tensor]) -> bool:
    """Whether the outputs for rows a and b together differ from those for each alone."""
    for alone_a, alone_b, together in zip(a, b, both, strict=True):
        if not together.ndim or not together.is_floating_point() or together.shape[0] != 2 * alone_a.shape[0]:
            continue
        apart = torch.cat([alone_a, alone_b]).double()
        tolerance = MIXED_TOLERANCE * max(1.0, float(apart.abs().max())) if apart.numel() else 0.0
        if together.dtype.itemsize < 4:
            tolerance *= 20.0
        if apart.shape == together.shape and bool(((apart - together.double()).abs() > tolerance).any()):
            return True
    return False
