"""Variables that steps assign though no replica holds them: of a loss, of an inner optimizer, of a script."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import torch

Assigned = Sequence[tuple[keras.Variable, torch.Tensor]]


class ForeignVariables:
    """Gives such variables the values that the first replica has computed, when the step is over on all replicas.

    Until then the others may read them.
    """

    def __init__(self) -> None:
        self._assigned: list[tuple[keras.Variable, torch.Tensor]] = []

    def note(self, assigned: Assigned) -> None:
        """Note what the first replica has assigned."""
        self._assigned += assigned

    def end(self, *, failed: bool) -> None:
        """Called by the host thread at the end of a step. A failed one leaves all variables unchanged."""
        assigned, self._assigned = self._assigned, []
        if not failed:
            assign(assigned)


def assign(assigned: Assigned) -> None:
    """Give variables their values, in place."""
    with torch.no_grad():
        for variable, value in assigned:
            variable._value.copy_(value)
