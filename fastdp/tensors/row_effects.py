"""How outputs, `add_loss` terms and assigned variables depend on the rows of a batch.

On one device these values see the whole batch; on a replica they see only its rows. To combine the replicas' values,
fastdp must know how a value depends on the rows, and no framework says that: `ops.mean(x)` and `ops.sum(x)` are both
scalars, and (2, 2) may be two rows of two numbers or one number per pair of rows. So fastdp tries the model once: on
some rows, on the other rows, and on all of them. Let f be the value for n rows (for a variable, its change):

    f(ab) = [f(a), f(b)] along one axis               rows: concatenate the replicas' values
    f(ab) = (n_a f(a) + n_b f(b)) / (n_a + n_b)       a mean over rows: average, weighted by the number of rows
    f(ab) = f(a) + f(b)                               a sum: add the replicas' values
    f(ab) = f(a) = f(b)                               the same on all replicas (seeds, step counters)
    f(ab) = max(f(a), f(b)), or min                   an extreme of the replicas' values

The two parts have different numbers of rows if there are enough rows. Otherwise a median could pass for a mean, and an
axis of length two for two rows. During the trial, draws are indexed by row as always, and BatchNormalization uses its
moving statistics, so that nothing else mixes rows.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastdp.errors import ReplicaError
from fastdp.shard import Rows

TOLERANCE = 1e-4
MIXED_TOLERANCE = 1e-3
# If the rounding noise is known: the tolerance that is always allowed, and the allowed multiple of the noise.
ROUNDING_TOLERANCE = 5e-6
NOISE_FACTOR = 10.0
# Absolute tolerance for numbers near zero, where larger terms cancel.
ROUNDING = 1e-6


class NotByRowsError(ValueError):
    """Splitting the batch by rows cannot give what one device computes. The message says what to do."""


class UndecidedError(NotByRowsError):
    """A step shows an effect that the trial's rows did not show. Nothing has changed; the model is tried again."""


def refusal(error: NotByRowsError | ReplicaError) -> str:
    """The reason why a model cannot be split by rows, from the error of a step that failed before changing anything.

    Raises:
        ReplicaError: `error` itself, if its cause is something else.
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
    LARGEST = "the maximum over rows"
    SMALLEST = "the minimum over rows"
    AFFINE = "a sum over rows plus a part that does not depend on rows"
    FIRST = "of all rows, computed by the first replica"
    UNKNOWN = "neither a mean nor a sum over rows"
    UNDECIDED = "zero for the rows tried"


@dataclass(frozen=True, slots=True)
class Layout:
    """How a tensor depends on the rows.

    Args:
        effect: ROWS, or how a value without rows is combined from the replicas' values.
        axis: the first axis of length `per_row` times the number of rows; None if there is none.
        per_row: entries along `axis` for each row.
        stacks: whether `axis` is the only axis whose length depends on the rows.
        weights: of a mean, what each row counts; None if all count alike.

    If `effect` is UNKNOWN and `stacks` is true, the shape is split by rows but the values mix rows.
    """

    effect: Effect
    axis: int | None = None
    per_row: int = 1
    stacks: bool = False
    weights: Any = None

    def share(self, rows: Rows) -> float:
        """What the values of some rows count in a mean over all of them."""
        return rows.share if self.weights is None else float(self.weights.share(rows))

    @property
    def is_local(self) -> bool:
        """Whether a replica holds the same numbers as one device: its rows of the tensor, or all of it."""
        return self.effect in (Effect.ROWS, Effect.SAME)


ROWS_FIRST = Layout(Effect.ROWS, 0, 1, True)
MEAN_SCALAR = Layout(Effect.MEAN)


def layout_of(
    parts: Sequence[torch.Tensor],
    whole: torch.Tensor,
    rows: Sequence[int],
    noise: Callable[[], float] | None = None,
) -> Layout:
    """How a tensor depends on the rows, judged by its shapes and all its values.

    Args:
        parts: the tensor for each part of the rows, in order.
        whole: the tensor for all rows.
        rows: the number of rows of each part.
        noise: returns the size of rounding errors, if known. Called only if it matters.
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
    """Whether two tensors of equal shape agree up to rounding; integers must be equal unless there is noise."""
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
    """How a value without a row axis depends on the rows, from its values for parts of the rows and for all."""
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
