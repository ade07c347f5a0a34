"""What is known of the earlier calls of a window of gradient accumulation."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastdp.program.base import Totals
from fastdp.program.torch.gradients import Found


@dataclass(frozen=True, slots=True)
class Window:
    """The earlier calls of a window of gradient accumulation.

    Attributes:
        calls: their number.
        found: which parameters have a gradient in them.
        losses: the sum of their losses.
    """

    calls: int = 0
    found: Found = field(default_factory=Found)
    losses: float = 0.0

    def with_call(self, totals: Totals) -> Window:
        """The window with another call."""
        found = self.found.with_all(note.found for note in totals.every_note)
        return Window(self.calls + 1, found, self.losses + float(totals.sums[0]))
