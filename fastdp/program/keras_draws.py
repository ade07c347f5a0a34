"""Which random draws are by rows: told by how the first axis of a draw's shape follows the number of rows."""

from __future__ import annotations

import sys
from collections import Counter
from types import CodeType
from typing import Any

from keras.src.random.seed_generator import SeedGenerator

# A place in the code that draws: the seed's identity and the stack of the model's call.
Site = tuple[int, tuple[tuple[CodeType, int], ...]]


class DrawSites:
    """What the draws of a model's call looked like with different numbers of rows.

    A shape such as (2, 4) does not say whether its 2 are the replica's rows. The model is tried on two rows and on
    one before it is trained: a first axis that stayed 2 is none of rows, one that became 1 is, and 8 that became 4
    are four for each row. Shared by the replicas of a program.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[Site, int], dict[int, int]] = {}

    def per_row(self, size: int, rows: int, seed: Any, met: Counter[Site]) -> int:
        """How many entries of the first axis belong to each row: 0 if it is not by rows.

        Args:
            size: the first axis of the draw.
            rows: of the replica.
            seed: what the draw is seeded with.
            met: how often this call of the model has come by each place.
        """
        site = _site(seed)
        seen = self._seen.setdefault((site, met[site]), {})
        met[site] += 1
        seen[rows] = size
        if len(seen) == 1:  # nothing to compare with: what has as many entries as rows is by rows
            return 1 if size == rows else 0
        factor = size // rows
        return factor if all(other == factor * count for count, other in list(seen.items())) else 0


def _site(seed: Any) -> Site:
    """Where the model draws: the frames from the draw up to the call of the model."""
    frame = sys._getframe(2)
    stack: list[tuple[CodeType, int]] = []
    while frame is not None and _is_drawing(frame.f_globals.get("__name__", "")):
        frame = frame.f_back  # type: ignore[assignment]
    while frame is not None and not frame.f_globals.get("__name__", "").startswith("fastdp.program."):
        stack.append((frame.f_code, frame.f_lasti))
        frame = frame.f_back  # type: ignore[assignment]
    return id(seed) if isinstance(seed, SeedGenerator) else 0, tuple(stack)


def _is_drawing(module: str) -> bool:
    """Whether a frame belongs to the draw itself."""
    return module.startswith(("fastdp.program.keras_random", "keras.src.random", "keras.src.backend.torch.random"))
