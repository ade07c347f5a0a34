"""One draw on a replica: its rows of the draw for the whole batch, and what cannot be drawn so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastdp.program.torch.replica import ReplicaContext
from fastdp.program.torch.shared_draws import SharedDraws, memory_order
from fastdp.shard import Rows

Fill = Callable[[torch.Tensor], torch.Tensor]


def drawn(
    running: ReplicaContext, name: str, numbers: Sequence[Any], like: torch.Tensor, fill: Fill, axis: int | None = 0
) -> torch.Tensor:
    """A replica's rows of a draw for the whole batch. Read-only.

    Args:
        running: the replica.
        name, numbers: the function and its numbers, the same on all replicas.
        like: has the shape, dtype and memory layout of the replica's draw.
        fill: fills a tensor with random numbers.
        axis: where the rows are, unless a trial has seen it; None if the draw is the same for all rows.
    """
    number, on_gpu = running.next_draw(), like.is_cuda
    if running.draws_by is None and not on_gpu:
        return _own_rows(running, number, name, numbers, like, fill, axis)
    shape, strides, dtype = tuple(like.shape), like.stride(), like.dtype

    def make(now: ReplicaContext) -> torch.Tensor:
        host = torch.empty_strided(shape, strides, dtype=dtype)
        found = _own_rows(now, number, name, numbers, host, fill, axis)
        return found.to(now.context.torch_device) if on_gpu else found  # GPUs share what the host draws

    return running.draw(make)


def _own_rows(
    running: ReplicaContext,
    number: int,
    name: str,
    numbers: Sequence[Any],
    like: torch.Tensor,
    fill: Fill,
    axis: int | None,
) -> torch.Tensor:
    """A replica's rows of the draw of this number in the step. `like` is in host memory."""
    draws, rows = running.context.structure.draws, running.rows
    if rows.count == rows.total:
        return draws.alone(lambda: fill(torch.empty_like(like)))
    order = memory_order(like)
    if draws.knows(number):
        place = draws.place_of(number, tuple(like.shape), rows)
        axis, order = place.axis, place.order
    shape = list(like.shape)
    per_row = 0 if axis is None else shape[axis] // rows.count
    if axis is not None:
        shape[axis] = per_row * rows.total
    request = (name, *numbers, tuple(shape), like.dtype, axis)
    whole = draws.take(number, running.context.size, request, lambda: fill(_empty(shape, order, like)))
    return whole if axis is None else whole.narrow(axis, per_row * rows.start, per_row * rows.count)


def _empty(shape: Sequence[int], order: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """A tensor whose axes lie in memory in this order, outermost first, as torch's own results do."""
    return torch.empty([shape[axis] for axis in order], dtype=like.dtype, device=like.device).permute(
        [list(order).index(axis) for axis in range(len(shape))]
    )


def row_axis(shape: Sequence[int], rows: Rows, *, mask: bool = False) -> int | None:
    """The axis of a draw that has the rows; None if it is the same for all rows.

    Args:
        shape: of the replica's draw.
        rows: the replica's rows.
        mask: it belongs to activations, which have rows: if not on the first axis, then on another one.
    """
    fits = [axis for axis, size in enumerate(shape) if size >= rows.count and size % rows.count == 0]
    if 0 in fits:
        return 0
    return fits[0] if mask and len(fits) == 1 else None


def refuse_generator(generator: Any) -> None:
    """Refuse a generator of the module's own, of which each replica has a copy.

    Raises:
        NotImplementedError: there is one.
    """
    if generator is not None and generator is not torch.default_generator:
        raise NotImplementedError(
            "A module draws with a torch.Generator of its own, which replicas on several devices cannot share. Leave "
            "`generator` out, and seed torch by torch.manual_seed, or use gpus=[0]."
        )


def is_known(running: ReplicaContext) -> bool:
    """Whether a trial has seen where the rows of the replica's next draw are."""
    draws: SharedDraws = running.context.structure.draws
    return draws.knows(running.draws + 1)


def refuse_one_row(running: ReplicaContext, name: str, shape: Sequence[int]) -> None:
    """Refuse a draw of which nobody can say whether its first axis is the replica's single row.

    Raises:
        NotImplementedError: it is such a draw.
    """
    rows = running.rows
    if rows.count == 1 != rows.total and tuple(shape) == (1,) and not is_known(running):
        raise NotImplementedError(
            f"{name} draws one number where each device has one row of the batch: it may be one number per row or one "
            "for all rows. Use fewer devices than rows, or give the draw of a row a second axis."
        )


PARAMETERS = (
    "{} draws random numbers in a way that depends on the values of the rows, so a replica cannot draw what one device "
    "would. Use another function for it, or gpus=[0]."
)
