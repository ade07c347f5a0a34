"""BatchNormalization on replicas: moments of the global batch, and moving statistics that follow them.

Over replicas r with n_r values each, mean m_r and variance v_r, the law of total variance gives

    n = sum n_r,   mean = sum n_r m_r / n,   variance = sum n_r (v_r + (m_r - mean)^2) / n

`combine` evaluates it as sums of n_r, n_r m_r and n_r (v_r + m_r^2) in float64, where the difference of
squares costs nothing that float32 statistics would notice. The backward pass of the synchronized moments
needs one more exchange, of the gradients of mean and variance: every value of the global batch moves the
same two numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import torch

from fastdp.comm.context import Context


@dataclass(slots=True)
class Moments:
    """Mean and variance per channel, and the number of values that they were taken over."""

    mean: torch.Tensor
    variance: torch.Tensor
    count: float

    def sums(self) -> np.ndarray:
        """Count, sums and sums of squares: what is added up over replicas. float64."""
        mean = self.mean.double().cpu().numpy().ravel()
        square = self.variance.double().cpu().numpy().ravel() + mean * mean
        return np.concatenate([[self.count], self.count * mean, self.count * square])


def combine(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the global batch from the summed `Moments.sums()`, as float64 vectors.

    A batch without values (all of it masked) has mean and variance 0, as in Keras.
    """
    count = max(float(sums[0]), np.finfo(np.float64).tiny)
    channels = (len(sums) - 1) // 2
    mean = sums[1 : 1 + channels] / count
    variance = np.maximum(sums[1 + channels :] / count - mean * mean, 0.0)
    return mean, variance


def statistics(layer: keras.layers.Layer) -> list[keras.Variable]:
    """The statistics that a BatchNormalization layer moves; none of others, or of one with a `call` of its own."""
    if type(layer).call is not keras.layers.BatchNormalization.call or layer.moving_mean is None:
        return []
    if layer.renorm:
        return [layer.renorm_mean, layer.renorm_stddev, layer.moving_mean, layer.moving_stddev, layer.moving_variance]
    return [layer.moving_mean, layer.moving_variance]


def moved_statistics(
    layer: keras.layers.BatchNormalization, values: Sequence[torch.Tensor], mean: np.ndarray, variance: np.ndarray
) -> list[torch.Tensor]:
    """`statistics(layer)` after a batch with this mean and variance (float64 vectors), as Keras moves them.

    In the variables' own precision, as Keras does it.
    """

    def moved(value: torch.Tensor, batch: np.ndarray, momentum: float) -> torch.Tensor:
        new = torch.from_numpy(batch).to(value.device, value.dtype).reshape(value.shape)
        return value * momentum + new * (1.0 - momentum)

    if not layer.renorm:
        return [moved(value, new, layer.momentum) for value, new in zip(values, (mean, variance), strict=True)]
    deviation = np.sqrt(variance + layer.epsilon)
    moving_deviation = moved(values[3], deviation, layer.momentum)
    return [
        moved(values[0], mean, layer.renorm_momentum),
        moved(values[1], deviation, layer.renorm_momentum),
        moved(values[2], mean, layer.momentum),
        moving_deviation,
        torch.relu(moving_deviation * moving_deviation - layer.epsilon),
    ]


def local_moments(
    moments: tuple[torch.Tensor, torch.Tensor],
    inputs: torch.Tensor,
    mask: torch.Tensor | None,
    axes: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Keras's own moments of a replica's rows, and their count."""
    return (*moments, _count(inputs, mask, axes))


def global_moments(
    inputs: torch.Tensor, mask: torch.Tensor | None, axes: Sequence[int], context: Context
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Moments of the global batch, differentiable; `count` is still the replica's own."""
    mean, variance = _GlobalMoments.apply(inputs, mask, tuple(axes), context)
    return mean, variance, _count(inputs, mask, axes)


def _count(inputs: torch.Tensor, mask: torch.Tensor | None, axes: Sequence[int]) -> float:
    """How many values per channel the moments are taken over."""
    if mask is None:
        return float(np.prod([inputs.shape[axis] for axis in axes]))
    per_entry = inputs[..., 0].numel() / mask.numel()  # a mask entry may stand for several values
    return float(mask.sum()) * per_entry


class _GlobalMoments(torch.autograd.Function):
    """Mean and variance over all replicas' values."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, mask: torch.Tensor | None, axes: tuple[int, ...], context: Context
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums are exchanged twice: the second time about the global mean, so nothing cancels."""
        weights = None if mask is None else mask.unsqueeze(-1).to(inputs.dtype).expand(inputs.shape)
        values = inputs if weights is None else inputs * weights
        count = _count(inputs, mask, axes)
        parts = context.exchange((count, values.sum(axes)))
        total = max(sum(part[0] for part in parts), torch.finfo(torch.float64).tiny)
        mean = sum(part[1].double() for part in parts) / total
        shape = [1 if axis in axes else size for axis, size in enumerate(inputs.shape)]
        centered = inputs - mean.to(inputs.dtype).reshape(shape)
        if weights is not None:
            centered = centered * weights
        squares = context.exchange((centered * centered).sum(axes))
        variance = sum(square.double() for square in squares) / total
        ctx.save_for_backward(centered, weights)
        ctx.total, ctx.shape, ctx.context = total, shape, context
        return mean.to(inputs.dtype), variance.to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """d/dx of mean is 1/n, of variance 2 (x - mean)/n, times the gradients of all replicas' losses."""
        centered, weights = ctx.saved_tensors
        parts = ctx.context.exchange(tuple(gradients))
        of_mean = sum(part[0] for part in parts).reshape(ctx.shape) / ctx.total
        of_variance = sum(part[1] for part in parts).reshape(ctx.shape) / ctx.total
        first = of_mean.expand(centered.shape) if weights is None else of_mean * weights
        return first + 2.0 * centered * of_variance, None, None, None
