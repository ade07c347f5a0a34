"""Mean and variance of a batch that lies on several replicas.

Over replicas r with n_r values each, mean m_r and variance v_r, the law of total variance gives

    n = sum n_r,   mean = sum n_r m_r / n,   variance = sum n_r (v_r + (m_r - mean)^2) / n

`combine` evaluates it from the sums of n_r, n_r m_r and n_r (v_r + m_r^2) in float64, where the cancellation in the
difference of squares is too small for float32 statistics to notice. The backward pass of the synchronized moments
needs one more exchange, of the gradients of mean and variance, since every value of the global batch affects both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastdp.tensors.replica_sums import ReplicaSum


@dataclass(slots=True)
class Moments:
    """Mean and (biased) variance per channel, and the number of values behind them."""

    mean: torch.Tensor
    variance: torch.Tensor
    count: float

    def sums(self) -> np.ndarray:
        """Count, sums and sums of squares as float64, to be added up over replicas."""
        mean = self.mean.detach().double().cpu().numpy().ravel()
        square = self.variance.detach().double().cpu().numpy().ravel() + mean * mean
        return np.concatenate([[self.count], self.count * mean, self.count * square])


def combine(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the global batch from the summed `Moments.sums()`, as float64 vectors.

    A batch without values (all of it masked) has mean and variance 0.
    """
    count = max(float(sums[0]), np.finfo(np.float64).tiny)
    channels = (len(sums) - 1) // 2
    mean = sums[1 : 1 + channels] / count
    variance = np.maximum(sums[1 + channels :] / count - mean * mean, 0.0)
    return mean, variance


def unbiased(count: float) -> float:
    """The factor that turns a biased variance over `count` values into the unbiased estimate."""
    return count / max(count - 1, 1)


def count_of(inputs: torch.Tensor, mask: torch.Tensor | None, axes: Sequence[int]) -> float:
    """The number of values per channel in moments over these axes.

    Args:
        inputs: the values, with channels last if there is a mask.
        mask: which values count. It has the axes of `inputs` without the last; some may have length 1.
        axes: all axes except the channels.
    """
    if mask is None:
        return float(math.prod(inputs.shape[axis] for axis in axes))
    per_entry = inputs[..., 0].numel() / mask.numel()  # a mask entry may stand for several values
    return float(mask.sum()) * per_entry


def _count(inputs: torch.Tensor, mask: torch.Tensor | None, axes: Sequence[int]) -> torch.Tensor:
    """As `count_of`, as a float64 vector of one: without a wait for the device, and in a graph."""
    if mask is None:
        return torch.full((1,), count_of(inputs, mask, axes), dtype=torch.float64, device=inputs.device)
    return mask.sum().double().reshape(1) * (inputs[..., 0].numel() / mask.numel())


def global_moments(
    inputs: torch.Tensor,
    mask: torch.Tensor | None,
    axes: Sequence[int],
    summed: ReplicaSum,
    place: str,
    sum_dtype: torch.dtype | None = None,
    epsilon: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of the global batch, differentiable, in the dtype of the inputs.

    Args:
        inputs, mask, axes: as in `count_of`.
        summed: adds up the tensors that all replicas pass, in rank order. Every replica makes the same calls.
        place: names the layer, for the sums.
        sum_dtype: the dtype of sums over a replica's values; None for the dtype of the inputs.
        epsilon: added to the number of values before sums are divided by it.
    """
    mean, variance = _GlobalMoments.apply(inputs, mask, tuple(axes), summed, place, sum_dtype, epsilon)
    return mean, variance


class _GlobalMoments(torch.autograd.Function):
    """Mean and variance over all replicas' values."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        mask: torch.Tensor | None,
        axes: tuple[int, ...],
        summed: ReplicaSum,
        place: str,
        sum_dtype: torch.dtype | None,
        epsilon: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add up counts and sums, then sums of squares about the global mean, so that nothing cancels."""
        weights = None if mask is None else mask.unsqueeze(-1).to(inputs.dtype).expand(inputs.shape)
        values = inputs if weights is None else inputs * weights
        own = torch.cat([_count(inputs, mask, axes), values.sum(axes, dtype=sum_dtype).double()])
        count, *sums = summed(own, f"the sums of {place}").split([1, own.numel() - 1])
        total = (count + epsilon).clamp_min(torch.finfo(torch.float64).tiny)
        mean = sums[0] / total
        shape = [1 if axis in axes else size for axis, size in enumerate(inputs.shape)]
        centered = inputs - mean.to(inputs.dtype).reshape(shape)
        if weights is not None:
            centered = centered * weights
        squares = (centered * centered).sum(axes, dtype=sum_dtype).double()
        variance = summed(squares, f"the squares of {place}") / total
        ctx.save_for_backward(centered, weights)
        ctx.total, ctx.shape, ctx.summed, ctx.place = total, shape, summed, place
        # The mean of (x - mean), which is not zero if epsilon makes the mean differ from sum / count.
        ctx.off_center = mean * (epsilon / total) if epsilon else None
        return mean.to(inputs.dtype), variance.to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None, None, None]:
        """d mean / dx is 1/n, d variance / dx is 2 (x - mean)/n, each times the gradients of all replicas' losses."""
        centered, weights = ctx.saved_tensors
        total = ctx.total.reshape(())  # without an axis it leaves the dtype of the gradients
        sums = ctx.summed(torch.stack(gradients), f"the gradients of {ctx.place}") / total
        of_mean, of_variance = (one.reshape(ctx.shape) for one in sums)
        if ctx.off_center is not None:
            of_mean = of_mean - 2.0 * of_variance * ctx.off_center.to(of_variance.dtype).reshape(ctx.shape)
        first = of_mean.expand(centered.shape) if weights is None else of_mean * weights
        return first + 2.0 * centered * of_variance, None, None, None, None, None, None
