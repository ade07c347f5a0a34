"""Converts changes of tensors in a step to float64 numbers, which are added up over the replicas, and back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def movement(value: torch.Tensor, before: torch.Tensor, weight: float) -> np.ndarray:
    """How much a replica changed each element of a tensor, times the replica's weight, as a float64 vector."""
    moved = (value.detach().double() - before.detach().double()) * weight
    return moved.cpu().numpy().ravel()


def move(target: torch.Tensor, moved: np.ndarray) -> None:
    """Change a tensor's elements in place by the sum of all replicas' `movement`. Integers are rounded."""
    new = target.double() + torch.from_numpy(moved).to(target.device).reshape(target.shape)
    target.copy_(new if target.is_floating_point() else new.round())


def like(numbers: np.ndarray, tensor: torch.Tensor) -> torch.Tensor:
    """float64 numbers as a tensor with the device, dtype and shape of `tensor`."""
    return torch.from_numpy(numbers).to(tensor.device, tensor.dtype).reshape(tensor.shape)


def weighted_sum(parts: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """The weighted sum of tensors without axes."""
    return torch.stack([part * weight for part, weight in zip(parts, weights, strict=True)]).sum()
