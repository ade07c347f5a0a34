"""What tensors become in a step, as float64 numbers that are added up over the replicas, and back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def movement(value: torch.Tensor, before: torch.Tensor, weight: float) -> np.ndarray:
    """By how much a replica moved each element of a tensor, times the replica's weight: a float64 vector."""
    moved = (value.detach().double() - before.detach().double()) * weight
    return moved.cpu().numpy().ravel()


def move(target: torch.Tensor, moved: np.ndarray) -> None:
    """Move a tensor's elements by the sum of all replicas' `movement`, in place; whole numbers are rounded."""
    new = target.double() + torch.from_numpy(moved).to(target.device).reshape(target.shape)
    target.copy_(new if target.is_floating_point() else new.round())


def like(numbers: np.ndarray, tensor: torch.Tensor) -> torch.Tensor:
    """float64 numbers as a tensor of the device, dtype and shape of another."""
    return torch.from_numpy(numbers).to(tensor.device, tensor.dtype).reshape(tensor.shape)


def weighted_sum(parts: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """The sum of tensors without axes, each times its weight."""
    return torch.stack([part * weight for part, weight in zip(parts, weights, strict=True)]).sum()
