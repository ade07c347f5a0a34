"""Converts changes of tensors in a step to float64 numbers, which are added up over the replicas, and back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def movement(value: torch.Tensor, before: torch.Tensor, weight: float) -> np.ndarray:
    """How much a replica changed each element of a tensor, times the replica's weight, as a float64 vector.

    Complex elements are two numbers each. Differences of integers are exact.
    """
    moved = (wide(value.detach()) - wide(before.detach())).double() * weight
    return moved.cpu().numpy().ravel()


def moved_length(tensor: torch.Tensor) -> int:
    """The length of a tensor's `movement`."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def move(target: torch.Tensor, moved: np.ndarray) -> None:
    """Change a tensor's elements in place by the sum of all replicas' `movement`. Integers are rounded."""
    before = wide(target)
    change = torch.from_numpy(moved).to(target.device).reshape(before.shape)
    new = before + (change if before.is_floating_point() else change.round().to(before.dtype))
    target.copy_(torch.view_as_complex(new) if target.is_complex() else new)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's numbers as float64 or int64; complex ones are pairs of them."""
    if tensor.is_complex():
        return torch.view_as_real(tensor.to(torch.complex128).resolve_conj())
    return tensor.to(torch.float64 if tensor.is_floating_point() else torch.int64)


def like(numbers: np.ndarray, tensor: torch.Tensor) -> torch.Tensor:
    """float64 numbers as a tensor with the device, dtype and shape of `tensor`."""
    return torch.from_numpy(numbers).to(tensor.device, tensor.dtype).reshape(tensor.shape)


def weighted_sum(parts: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """The weighted sum of tensors without axes."""
    return torch.stack([part * weight for part, weight in zip(parts, weights, strict=True)]).sum()
