"""Random draws that the replicas of a step share: each is made once, for all rows, from torch's own generator.

The draws of a step are numbered. The replica that comes first makes a draw as one device would, for the rows of the
whole batch; the others get the same outcome, and each takes its rows. So draws leave torch's generator in the order of
one device, whatever replica is ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastdp.shard import Rows
from fastdp.tensors.random import global_generator


@dataclass(slots=True)
class _Draw:
    """A draw that some replicas have not taken yet."""

    request: tuple[Any, ...]
    left: int
    outcome: torch.Tensor


@dataclass(frozen=True, slots=True)
class DrawPlace:
    """Where the rows of a draw are.

    Args:
        axis: the axis of the rows; None if all rows share the draw.
        order: the axes in the order of memory, outermost first.
    """

    axis: int | None
    order: tuple[int, ...]


def memory_order(tensor: torch.Tensor) -> tuple[int, ...]:
    """The axes of a tensor in the order of memory, outermost first."""
    # An axis of length one has the stride of the axis around it, so a single row stands inside that axis.
    return tuple(sorted(range(tensor.ndim), key=lambda axis: (-tensor.stride(axis), tensor.shape[axis] == 1)))


class SharedDraws:
    """The draws of one step. Called on the threads of all its replicas.

    Attributes:
        places: where the rows are in the draws that a trial has seen, by number.
    """

    def __init__(self) -> None:
        self.places: Mapping[int, DrawPlace] = {}
        self._draws: dict[int, _Draw] = {}
        self._state: torch.Tensor | None = None

    def begin(self) -> None:
        """Called by each replica when its pass begins: from now on only shared draws may use torch's generator."""
        with global_generator:
            if self._state is None:
                self._state = torch.get_rng_state()

    def knows(self, number: int) -> bool:
        """Whether it is known where the rows of a draw are."""
        return number in self.places

    def place_of(self, number: int, shape: tuple[int, ...], rows: Rows) -> DrawPlace:
        """Where the rows are in a draw that is known.

        Args:
            number: of the draw among those of the replica.
            shape: of the replica's draw.
            rows: the replica's rows.

        Raises:
            RuntimeError: a draw of this shape has no rows there.
        """
        place = self.places[number]
        axis = place.axis
        if axis is not None and (len(shape) <= axis or not shape[axis] or shape[axis] % rows.count):
            raise RuntimeError(
                f"Draw {number} of the step has shape {shape} for {rows.count} rows, and had its rows on axis {axis} "
                f"when fastdp tried the module on a few rows: the module takes another path now. {_REMEDY}"
            )
        return place

    def take(
        self, number: int, replicas: int, request: tuple[Any, ...], draw: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """The outcome of a replica's draw for the whole batch. Read-only.

        Args:
            number: of the draw among those of the replica.
            replicas: how many replicas take it.
            request: the function, its numbers and the shape for the whole batch: the same on all replicas.
            draw: makes the draw, if no other replica has.

        Raises:
            RuntimeError: another replica has asked for something else, or something else has used the generator.
        """
        with global_generator:
            found = self._draws.get(number)
            if found is None:
                found = self._draws[number] = _Draw(request, replicas, self.alone(draw))
            elif found.request != request:
                raise RuntimeError(
                    f"The replicas draw different random numbers: draw {number} of the step is "
                    f"{_told(found.request)} on one and {_told(request)} on another, for all rows. {_REMEDY}"
                )
            found.left -= 1
            if not found.left:
                del self._draws[number]
            return found.outcome

    def alone(self, draw: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Make a draw that no other replica takes.

        Raises:
            RuntimeError: something else has used the generator.
        """
        with global_generator:
            self._check_untouched()
            outcome = draw()
            self._state = torch.get_rng_state()
            return outcome

    def end(self) -> None:
        """Called when all replicas have ended.

        Raises:
            RuntimeError: a replica made fewer draws than another, or something else has used the generator.
        """
        if self._draws:
            number, draw = next(iter(self._draws.items()))
            raise RuntimeError(
                f"The replicas draw different random numbers: draw {number} of the step, {_told(draw.request)} for all "
                f"rows, was made on some of them only. {_REMEDY}"
            )
        self._check_untouched()

    def _check_untouched(self) -> None:
        if self._state is not None and not torch.equal(torch.get_rng_state(), self._state):
            raise RuntimeError(
                "The module used torch's random generator in a way that fastdp does not see, so the replicas do not "
                "draw what one device would: from compiled code or an extension, or by a method of a generator; or "
                "another thread of this process drew from it meanwhile. Draw by torch's functions, or use gpus=[0]."
            )


_REMEDY = (
    "A draw must not depend on the values of some rows: not whether it is made, nor its shape. Draw for all rows and "
    "select afterwards, or use gpus=[0]."
)


def _told(request: tuple[Any, ...]) -> str:
    name, *rest = request
    return f"{name} {tuple(rest)}"
