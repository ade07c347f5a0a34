"""What the comparisons of captured steps and passes with eager ones share: draws that are made twice, and buffers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fastdp.capture.agreement import disagreement
from fastdp.capture.joint import CapturedJoint
from fastdp.capture.pure_step import Draw
from fastdp.capture.trace import Captured
from fastdp.comm.context import Context
from fastdp.program.torch.module import Slot
from fastdp.program.torch.passes import State


class KeptDraws:
    """Makes the draws of an eager pass, and keeps them for its captured form.

    A replica that is alone in its step draws as plain torch does: its captured form repeats that.
    """

    def __init__(self, context: Context) -> None:
        self._before = torch.get_rng_state() if context.size == 1 else None
        self._outcomes: list[torch.Tensor] = []

    def take(self, draw: Draw) -> torch.Tensor:
        """Make the draw."""
        self._outcomes.append(draw().contiguous())
        return self._outcomes[-1]

    def of(
        self, captured: Captured[Any] | CapturedJoint, variables: Sequence[torch.Tensor], context: Context
    ) -> tuple[list[torch.Tensor], str]:
        """The draws for the captured form, and what differs; empty if nothing does."""
        draws, why = self._outcomes, ""
        if self._before is not None:
            after = torch.get_rng_state()
            torch.set_rng_state(self._before)
            draws = captured.repeat_draws(variables, context)
            why = "" if torch.equal(torch.get_rng_state(), after) else "the random numbers that it draws"
            torch.set_rng_state(after)
        return draws, "the number of random draws" if len(draws) != captured.drawn else why


@contextmanager
def keeping_draws(state: State, context: Context) -> Iterator[KeptDraws]:
    """Keep the draws of an eager pass of a replica for its captured form."""
    kept = KeptDraws(context)
    state.draws_by = kept if context.size > 1 else None
    try:
        yield kept
    finally:
        state.draws_by = None


def buffers_differ(
    slots: Sequence[Slot], found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], *, rough: bool
) -> str:
    """What differs between the buffers that a captured pass and an eager one have left; empty if nothing does.

    Args:
        slots: the module's parameters and buffers.
        found, expected: the values of all of them.
        rough: as in `disagreement`.
    """
    changed = [i for i, slot in enumerate(slots) if not slot.is_parameter]
    names = [f"the buffer `{slots[i].name}`" for i in changed]
    return disagreement([found[i] for i in changed], [expected[i] for i in changed], names, rough=rough)
