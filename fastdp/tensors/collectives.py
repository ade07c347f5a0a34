"""Collectives between the replicas of a step, with gradients: what torch code on one replica asks of the others.

The gradient rule: each replica differentiates its contribution to the loss, and the sum over replicas is the gradient
of one device. So the backward pass of a value that all replicas get adds up the gradients of all replicas.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

from fastdp.comm.context import Context
from fastdp.shard import Rows
from fastdp.tensors.compiled import not_compiled

REDUCTIONS = ("sum", "mean", "max", "min")
_thread = threading.local()


class Peers(Protocol):
    """The replicas of a step, as one of them sees them: its rank, their number, and its rows."""

    @property
    def rank(self) -> int: ...

    @property
    def count(self) -> int: ...

    @property
    def rows(self) -> Rows: ...

    def all_reduce(self, tensor: torch.Tensor, op: str) -> torch.Tensor:
        """The sum, the mean (weighted by rows), the maximum or the minimum of all replicas' tensors."""

    def all_gather(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        """All replicas' tensors, one after the other along an axis."""


@not_compiled
def peers() -> Peers | None:
    """The replicas of the step that the calling thread works for; None outside of any step."""
    return getattr(_thread, "peers", None)


@contextmanager
def peers_scope(among: Peers | None) -> Iterator[None]:
    """Let the calling thread's collectives meet these replicas."""
    before = peers()
    _thread.peers = among
    try:
        yield
    finally:
        _thread.peers = before


class NoPeers:
    """Refuses collectives.

    Args:
        why: the message.
    """

    def __init__(self, why: str) -> None:
        self._why = why

    @property
    def rank(self) -> int:
        """Refused."""
        raise NotImplementedError(self._why)

    @property
    def count(self) -> int:
        """Refused."""
        raise NotImplementedError(self._why)

    @property
    def rows(self) -> Rows:
        """Refused."""
        raise NotImplementedError(self._why)

    def all_reduce(self, tensor: torch.Tensor, op: str) -> torch.Tensor:
        """Refused."""
        raise NotImplementedError(self._why)

    def all_gather(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        """Refused."""
        raise NotImplementedError(self._why)


class StepPeers:
    """The replicas of a step. Every meeting is named by its number among the thread's meetings, and by its shape."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._meetings = 0

    @property
    def rank(self) -> int:
        """The replica's rank."""
        return self._context.rank

    @property
    def count(self) -> int:
        """The number of replicas."""
        return self._context.size

    @property
    def rows(self) -> Rows:
        """The replica's rows."""
        return self._context.rows

    @not_compiled
    def all_reduce(self, tensor: torch.Tensor, op: str) -> torch.Tensor:
        """As in `Peers`."""
        if self._context.size == 1:
            return tensor
        shape = tuple(tensor.shape)
        place = self._place(f"all_reduce of the {op} of a tensor of shape {shape}")
        with torch._C.DisableTorchFunction():  # no mode counts or changes what a collective does
            return reduced(tensor, op, self._context, place)

    @not_compiled
    def all_gather(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        """As in `Peers`."""
        if self._context.size == 1:
            return tensor
        place = self._place(f"all_gather along axis {axis} of a tensor with {tensor.ndim} axes")
        with torch._C.DisableTorchFunction():
            return gathered(tensor, axis, self._context, place)

    def _place(self, what: str) -> str:
        self._meetings += 1
        return f"{what} (collective {self._meetings} of the pass)"


def reduced(tensor: torch.Tensor, op: str, context: Context, place: str) -> torch.Tensor:
    """The replicas' tensors reduced by `op`, one of `REDUCTIONS`. The result is bitwise equal on all replicas."""
    if op in ("max", "min"):
        found: torch.Tensor = _Extreme.apply(tensor, op, context, place)
        return found
    if op == "sum":
        total: torch.Tensor = _Sum.apply(tensor, context, place)
        return total
    wide = tensor if tensor.is_floating_point() or tensor.is_complex() else tensor.double()
    mean: torch.Tensor = _Sum.apply(wide * context.rows.share, context, place)
    return mean if wide is tensor else mean.round().to(tensor.dtype)


def gathered(tensor: torch.Tensor, axis: int, context: Context, place: str) -> torch.Tensor:
    """The replicas' tensors in rank order, one after the other along `axis`. Their lengths may differ."""
    whole: torch.Tensor = _Gather.apply(tensor, axis % max(1, tensor.ndim), context, place)
    return whole


def _exchange(context: Context, value: torch.Tensor, place: object) -> list[torch.Tensor]:
    """All replicas' values, in rank order."""
    return context.exchange(value, place)


def added(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of tensors in their order; of booleans, whether any is true."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


class _Sum(torch.autograd.Function):
    """The sum of all replicas' tensors."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, context: Context, place: str) -> torch.Tensor:
        """Exchange the tensors."""
        ctx.context, ctx.place = context, place
        return added(_exchange(context, tensor.detach(), place))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Sum the gradients of all replicas."""
        return added(_exchange(ctx.context, gradient, ("the gradient of", ctx.place))), None, None


class _Extreme(torch.autograd.Function):
    """The elementwise maximum or minimum of all replicas' tensors."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, op: str, context: Context, place: str) -> torch.Tensor:
        """Exchange the tensors."""
        parts = torch.stack(list(_exchange(context, tensor.detach(), place)))
        found = parts.amax(0) if op == "max" else parts.amin(0)
        ctx.context, ctx.place = context, place
        ctx.save_for_backward((tensor == found).to(torch.float64) / (parts == found).sum(0))
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """The gradients of all replicas, in equal parts to those that have the extreme."""
        (part,) = ctx.saved_tensors
        total = added(_exchange(ctx.context, gradient, ("the gradient of", ctx.place)))
        return total * part.to(total.dtype), None, None, None


class _Gather(torch.autograd.Function):
    """The tensors of all replicas, in order."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: int, context: Context, place: str) -> torch.Tensor:
        """Exchange the tensors."""
        parts = _exchange(context, tensor.detach(), place)
        ctx.context, ctx.place, ctx.axis = context, place, axis
        if not tensor.ndim:
            ctx.start = context.rank
            return torch.stack(list(parts))
        ctx.start, ctx.length = sum(part.shape[axis] for part in parts[: context.rank]), tensor.shape[axis]
        return torch.cat(list(parts), axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """Sum the gradients of this replica's part over all replicas."""
        parts = _exchange(ctx.context, gradient, ("the gradient of", ctx.place))
        if not hasattr(ctx, "length"):
            return added([part[ctx.start] for part in parts]), None, None, None
        return added([part.narrow(ctx.axis, ctx.start, ctx.length) for part in parts]), None, None, None
