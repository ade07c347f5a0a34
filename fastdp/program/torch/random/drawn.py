"""One draw on a replica: its rows of the draw for the whole batch, and what cannot be drawn so."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from fastdp.errors import NotCapturable
from fastdp.program.torch.replica import ReplicaContext
from fastdp.program.torch.shared_draws import DrawPlace, SharedDraws, Site, memory_order
from fastdp.shard import Rows

Fill = Callable[[torch.Tensor], torch.Tensor]


def drawn(
    running: ReplicaContext,
    name: str,
    numbers: Sequence[Any],
    like: torch.Tensor,
    fill: Fill,
    axis: int | None = 0,
    generator: torch.Generator = torch.default_generator,
) -> torch.Tensor:
    """A replica's rows of a draw for the whole batch. Read-only.

    Args:
        running: the replica.
        name, numbers: the function and its numbers, the same on all replicas.
        like: has the shape, dtype and memory layout of the replica's draw.
        fill: fills a tensor with random numbers.
        axis: where the rows are, unless a trial has seen it; None if the draw is the same for all rows.
        generator: what `fill` uses.
    """
    number, on_gpu, rows = running.next_draw(), like.is_cuda, running.rows
    if running.traced and generator is not torch.default_generator:
        raise NotCapturable("a torch.Generator of the module's own")
    shape, strides, dtype, order = tuple(like.shape), like.stride(), like.dtype, memory_order(like)
    if rows.count != rows.total:
        place = place_of(running, number, shape)
        if place is not None:
            axis, order = place.axis, place.order
        elif not running.tried:
            refuse_ambiguous(name, shape, axis, rows)
    request = _Request(number, (name, *numbers), shape, dtype, axis, order, How.of(running, generator))
    if running.draws_by is None and not on_gpu:
        return request.own_rows(running, like, fill)

    def make(now: ReplicaContext) -> torch.Tensor:
        found = request.own_rows(now, torch.empty_strided(shape, strides, dtype=dtype), fill)
        return found.to(now.context.torch_device) if on_gpu else found  # GPUs share what the host draws

    return running.draw(make)


@dataclass(slots=True)
class How:
    """How a draw is made: by which generator, and whether backward may repeat it, or repeats it now."""

    generator: torch.Generator
    repeatable: bool
    repeats: bool

    @classmethod
    def of(cls, running: ReplicaContext, generator: torch.Generator) -> How:
        """How a replica draws now.

        Raises:
            NotImplementedError: a checkpointed part draws from a generator of its own.
        """
        if (running.repeatable or running.repeats) and generator is not torch.default_generator:
            raise NotImplementedError(
                "A part that torch.utils.checkpoint runs again in backward draws from a torch.Generator of its own, "
                "whose numbers torch does not repeat there. Leave `generator` out, or draw outside of the part."
            )
        return cls(generator, running.repeatable > 0, running.repeats)

    def outcome(
        self, running: ReplicaContext, number: int, request: tuple[Any, ...] | None, draw: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """What a draw for the whole batch gives, or has given where it is repeated. Read-only.

        Args:
            running: the replica.
            number: of the draw.
            request: what is drawn, the same on all replicas; None if only this replica draws it.
            draw: makes the draw.
        """
        draws: SharedDraws = running.context.structure.draws
        replicas = 1 if request is None else running.context.here
        if self.repeats:
            return draws.repeat(number, replicas, draw)
        if request is None:
            return draws.alone(number, draw, self.generator, repeatable=self.repeatable)
        return draws.take(number, replicas, request, draw, self.generator, repeatable=self.repeatable)


@dataclass(slots=True)
class _Request:
    """A draw of a replica: its number in the step, function, shape, and where it has rows."""

    number: int
    function: tuple[Any, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    axis: int | None
    order: tuple[int, ...]
    how: How

    def own_rows(self, running: ReplicaContext, like: torch.Tensor, fill: Fill) -> torch.Tensor:
        """A replica's rows of the draw. `like` is in host memory."""
        rows, axis = running.rows, self.axis
        if rows.count == rows.total:
            return self.how.outcome(running, self.number, None, lambda: fill(torch.empty_like(like)))
        shape = list(self.shape)
        per_row = 0 if axis is None else shape[axis] // rows.count
        if axis is not None:
            shape[axis] = per_row * rows.total
        request = (*self.function, tuple(shape), self.dtype, axis)
        whole = self.how.outcome(running, self.number, request, lambda: fill(_empty(shape, self.order, like)))
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


def pop_generator(kwargs: dict[str, Any]) -> torch.Generator:
    """Take the generator out of the arguments of a random function: a module's own, or torch's."""
    return kwargs.pop("generator", None) or torch.default_generator


def place_of(running: ReplicaContext, number: int, shape: Sequence[int]) -> DrawPlace | None:
    """Where the rows are in a draw of a module that was tried; None for torch's own modules and for loss functions.

    Args:
        running: the replica.
        number: of the draw.
        shape: of the replica's draw.

    Raises:
        RuntimeError: the trial has seen no such draw.
    """
    draws: SharedDraws = running.context.structure.draws
    if running.repeats:
        return draws.repeated_places.get(number)
    if not is_known(running):
        return None
    place = draws.place_of(number, call_site(), tuple(shape), running.rows)
    if running.repeatable:
        draws.repeated_places[number] = place
    return place


def is_known(running: ReplicaContext) -> bool:
    """Whether a trial has seen the draws that the replica makes now."""
    draws: SharedDraws = running.context.structure.draws
    return running.tried and draws.tried


def call_site() -> Site:
    """The innermost line of the module's own code that draws; None if torch's own parts do."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        kind = _kinds.get(module)
        if kind is None:
            kind = _kinds[module] = _kind_of(module)
        if kind == "caller":
            return None
        if kind == "own":
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
    return None


_kinds: dict[str, str] = {}  # of modules, looked up for each frame on the stack at each draw


def _kind_of(module: str) -> str:
    """Whether code of a module runs the user's module, is passed through on the way to it, or is the user's own."""
    if module.startswith(_CALLERS):
        return "caller"
    return "passed through" if module.partition(".")[0] in _PASSED_THROUGH else "own"


_CALLERS = tuple(f"fastdp.program.torch.{name}" for name in ("passes", "loop", "rows.trial", "capture"))
_PASSED_THROUGH = ("fastdp", "torch", "contextlib", "functools")


def refuse_ambiguous(name: str, shape: Sequence[int], axis: int | None, rows: Rows) -> None:
    """Refuse a draw of a loss function whose shape does not tell where its rows are.

    Raises:
        NotImplementedError: an axis besides the one taken for the rows may have them.
    """
    fits = [at for at, size in enumerate(shape) if size >= rows.count and size % rows.count == 0]
    if len(fits) > 1 or (fits and axis is None):
        raise NotImplementedError(
            f"{name} in the loss function draws {tuple(shape)} numbers for the {rows.count} rows of a device, which "
            "does not tell the axis of the rows. Use reduction=None, which computes the loss on the merged outputs, "
            "or draw in the module."
        )


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
