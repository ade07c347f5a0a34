"""How outputs, `add_loss` terms and assigned variables depend on the rows of a batch.

On one device they see the whole batch; a replica sees its rows. To put the replicas' values together one
must know how a value depends on the rows, which no framework says: `ops.mean(x)` and `ops.sum(x)` are both
a scalar, and (2, 2) may be two rows of two numbers or a number for each pair of rows. So it is found out by trying,
once: the model runs on some rows, on the others, and on all of them. With f the value (of a variable: how far it
moved) of n rows,

    f(ab) = [f(a), f(b)] along one axis               rows: replicas' values are put behind each other
    f(ab) = (n_a f(a) + n_b f(b)) / (n_a + n_b)       a mean over rows: replicas are averaged by their share of the rows
    f(ab) = f(a) + f(b)                               a sum: replicas are added up
    f(ab) = f(a) = f(b)                               the same on all replicas (seeds, counters of steps)
    f(ab) = max(f(a), f(b)), or min                   an extreme: of the replicas' values

The two parts have unequal numbers of rows where there are enough, so that neither a median is taken for a mean nor an
axis of two for two rows. During the trial, draws are indexed by row as always, and BatchNormalization uses its moving
statistics, so that nothing else mixes rows.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fastdp.errors import ReplicaError

TOLERANCE = 1e-4
MIXED_TOLERANCE = 1e-3
# Where it is known how far off rounding may be: what is allowed in any case, and how many times the noise.
ROUNDING_TOLERANCE = 5e-6
NOISE_FACTOR = 10.0
# Of numbers that are all but zero: what is left where others cancel.
ROUNDING = 1e-6


class NotByRowsError(ValueError):
    """A model that no dealing out of rows computes as one device does. The message says what to do."""


class UndecidedError(NotByRowsError):
    """A step shows what the rows that were tried had not shown. Nothing has changed: the question is asked again."""


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

    ROWS = "rows along one axis"
    SAME = "the same for all rows"
    MEAN = "a mean over rows"
    SUM = "a sum over rows"
    LARGEST = "the largest over rows"
    SMALLEST = "the smallest over rows"
    AFFINE = "a sum over rows and a part that is there without rows"
    FIRST = "of all rows, computed by the first replica"
    UNKNOWN = "neither a mean nor a sum over rows"
    UNDECIDED = "zero for the rows tried"


@dataclass(frozen=True, slots=True)
class Layout:
    """How a tensor depends on the rows.

    Args:
        effect: ROWS, or how a value without rows is put together from the replicas'.
        axis: the first axis that is as long as there are rows, times `per_row`; None where none is.
        stacks: whether that is the only axis whose length depends on the rows.

    Of an UNKNOWN one that stacks the shape is that of rows, and the values mix them.
    """

    effect: Effect
    axis: int | None = None
    per_row: int = 1
    stacks: bool = False

    @property
    def is_local(self) -> bool:
        """Whether a replica has of it what one device has: its rows of it, or all of it."""
        return self.effect in (Effect.ROWS, Effect.SAME)


ROWS_FIRST = Layout(Effect.ROWS, 0, 1, True)
MEAN_SCALAR = Layout(Effect.MEAN)


def layout_of(
    parts: Sequence[torch.Tensor],
    whole: torch.Tensor,
    rows: Sequence[int],
    noise: Callable[[], float] | None = None,
) -> Layout:
    """How a tensor depends on rows: by its whole shapes, and all its values.

    Args:
        parts: the tensor for each part of some rows, in order.
        whole: the tensor for all these rows.
        rows: how many rows each part has.
        noise: how far off rounding may be, where that is known. Asked only if it matters.
    """
    if any(part.ndim != whole.ndim or part.dtype != whole.dtype for part in parts):
        return Layout(Effect.UNKNOWN)
    total = sum(rows)
    unequal = [axis for axis, size in enumerate(whole.shape) if any(part.shape[axis] != size for part in parts)]
    if not unequal:
        effect = classify(parts, whole, rows)
        return Layout(Effect.SAME if effect is Effect.UNDECIDED else effect)
    for axis in unequal:
        per_row = whole.shape[axis] // total
        sizes = [part.shape[axis] for part in parts]
        if per_row and whole.shape[axis] == per_row * total and sizes == [per_row * count for count in rows]:
            stacks = unequal == [axis]
            apart = stacks and values_agree(torch.cat(list(parts), axis), whole, noise)
            return Layout(Effect.ROWS if apart else Effect.UNKNOWN, axis, per_row, stacks)
    return Layout(Effect.UNKNOWN)


def values_agree(found: torch.Tensor, expected: torch.Tensor, noise: Callable[[], float] | None = None) -> bool:
    """Whether two tensors of one shape are the same but for rounding; whole numbers exactly, if without noise."""
    if not expected.is_floating_point():
        return bool((found == expected).all()) or (noise is not None and noise() > 0.0)
    found, expected = found.detach().double(), expected.detach()
    tolerance = MIXED_TOLERANCE if noise is None else ROUNDING_TOLERANCE
    tolerance = tolerance if expected.dtype.itemsize >= 4 else 20 * MIXED_TOLERANCE
    expected = expected.double()
    finite = expected[torch.isfinite(expected)].abs()
    scale = float(finite.max()) if finite.numel() else 0.0

    def close(atol: float) -> bool:
        return torch.allclose(found, expected, rtol=0.0, atol=max(atol, ROUNDING), equal_nan=True)

    return close(tolerance * scale) or (noise is not None and close(NOISE_FACTOR * noise()))


def classify(parts: Sequence[torch.Tensor], whole: torch.Tensor, rows: Sequence[int] = (1, 1)) -> Effect:
    """How a value without rows depends on them, from its values on parts of the rows, and on all of them."""
    values = [part.detach().double() for part in parts]
    whole = whole.detach().double()
    scale = TOLERANCE * max(float(v.abs().max()) if v.numel() else 0.0 for v in (*values, whole))
    if scale == 0.0:
        return Effect.UNDECIDED

    def close(found: torch.Tensor) -> bool:
        return bool((found - whole).abs().max() <= scale)

    shares = zip(values, rows, strict=True)
    is_mean, is_sum = close(sum(value * count for value, count in shares) / sum(rows)), close(sum(values))
    if is_mean and is_sum:
        return Effect.UNDECIDED
    if is_mean:
        return Effect.SAME if all(close(value) for value in values) else Effect.MEAN
    if is_sum:
        return Effect.SUM
    stacked = torch.stack(values)
    if close(stacked.amax(0)):
        return Effect.LARGEST
    return Effect.SMALLEST if close(stacked.amin(0)) else Effect.UNKNOWN


def mixes_rows(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], both: Sequence[torch.Tensor]) -> bool:
    """Whether any output for rows a and b together is not that for each alone, put behind each other."""
    return any(layout_of((x, y), xy, (1, 1)).effect is Effect.UNKNOWN for x, y, xy in zip(a, b, both, strict=True))
