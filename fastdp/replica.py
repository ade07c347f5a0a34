"""Collectives that a model's forward pass may call: values of all replicas, with gradients.

    from fastdp import replica

    def forward(self, x):
        keys = replica.all_gather(self.encoder(x))       # the keys of the global batch, on every replica
        count = replica.all_reduce(mask.sum())           # a count over the global batch

On one device, outside of fastdp, and in plain torch every function is the identity, so the same module runs anywhere.
All replicas must make the same calls in the same order: a path must not depend on the values of a replica's own rows.
The backward pass adds up the gradients of all replicas, so a loss computed from collected values on every replica has
one device's gradient. The functions work in torch modules that `fastdp.wrap` runs. In the layers of Keras models on
several devices they raise NotImplementedError.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastdp.shard import Rows
from fastdp.tensors.collectives import REDUCTIONS, peers

if TYPE_CHECKING:
    import torch

__all__ = ["all_gather", "all_reduce", "count", "rank", "rows"]


def all_gather(tensor: torch.Tensor, axis: int = 0) -> torch.Tensor:
    """The tensors of all replicas, in the order of the rows, one after the other along an axis.

    Args:
        tensor: of any dtype. Its length along `axis` may differ between replicas, the other lengths must not. Without
            axes, the result has one: an entry for each replica.
        axis: the axis.

    Returns:
        A new tensor, equal on all replicas; on one device `tensor` itself.

    Raises:
        TypeError: `tensor` is not a torch tensor.
        RuntimeError: the replicas call different collectives; the message names both.

    Example:
        >>> all_gather(torch.ones(4, 2)).shape  # doctest: +SKIP
        torch.Size([4, 2])
    """
    _check(tensor)
    among = peers()
    return tensor if among is None else among.all_gather(tensor, axis)


def all_reduce(tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
    """The sum, mean, maximum or minimum of all replicas' tensors.

    Args:
        tensor: of any numeric dtype, with the same shape on all replicas.
        op: "sum"; "mean", weighted by the replicas' rows, so that the mean of `x.mean(0)` is the mean over the global
            batch; "max"; or "min".

    Returns:
        A new tensor, equal on all replicas; on one device `tensor` itself. The gradient of an extreme goes to the
        replicas that have it, in equal parts.

    Raises:
        ValueError: an unknown `op`.
        TypeError, RuntimeError: as in `all_gather`.

    Example:
        >>> loss = all_reduce(loss_of_tokens.sum()) / all_reduce(mask.sum())  # doctest: +SKIP
    """
    _check(tensor)
    if op not in REDUCTIONS:
        raise ValueError(f"`op` must be one of {REDUCTIONS}. Received: op={op!r}")
    among = peers()
    return tensor if among is None else among.all_reduce(tensor, op)


def rank() -> int:
    """The number of the replica that the calling thread runs, from 0; 0 outside of a step."""
    among = peers()
    return 0 if among is None else among.rank


def count() -> int:
    """The number of replicas that take part in the step; 1 outside of a step."""
    among = peers()
    return 1 if among is None else among.count


def rows() -> Rows | None:
    """The replica's rows of the global batch (`start`, `stop`, `total`, `count`); None outside of a step."""
    among = peers()
    return None if among is None else among.rows


def _check(tensor: object) -> None:
    if not hasattr(tensor, "is_floating_point"):
        raise TypeError(f"`tensor` must be a torch tensor. Received: {tensor!r} (of type {type(tensor).__name__})")
