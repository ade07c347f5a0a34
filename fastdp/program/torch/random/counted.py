"""Uniform and normal numbers on GPUs, where each replica draws for its own rows by a counter."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fastdp.program.torch.replica import ReplicaContext
from fastdp.tensors.random import uniform_tensor


def counted(running: ReplicaContext, shape: Sequence[int], *, by_replica: bool = False) -> torch.Tensor:
    """fp32 numbers in [0, 1), by a counter for each row of the global batch.

    Args:
        running: the replica.
        shape: the shape of the replica's array.
        by_replica: an array that is not made of rows gets different numbers on each replica.
    """
    number, shape, rows = running.next_draw(), tuple(shape), running.rows
    of_rows = bool(shape) and shape[0] >= rows.count and shape[0] % rows.count == 0

    def make(now: ReplicaContext) -> torch.Tensor:
        context = now.context
        own = number + ((context.rank if by_replica else 0) << 32) if not of_rows else number
        count, first = (now.rows.count, now.rows.start) if of_rows else (1, 0)
        return uniform_tensor((context.structure.seed(), own), first, count, shape, context.torch_device)

    return running.draw(make)


def counted_normal(running: ReplicaContext, shape: Sequence[int]) -> torch.Tensor:
    """fp32 numbers of the standard normal distribution, by Box-Muller."""
    radius = torch.sqrt(-2.0 * torch.log1p(-counted(running, shape)))
    return radius * torch.cos(2.0 * math.pi * counted(running, shape))
