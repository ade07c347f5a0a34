"""Finds out which random draws are by rows, from how their shapes follow the number of rows."""

from __future__ import annotations

import sys
from collections import Counter
from types import CodeType
from typing import Any

from keras.src.random.seed_generator import SeedGenerator

from fastdp.program.keras.rows.effects import NotByRowsError

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
        self._rest: dict[tuple[Site, int], dict[int, tuple[int, ...]]] = {}  # the other axes, of trials

    def per_row(self, shape: tuple[int, ...], rows: int, seed: Any, met: Counter[Site], trial: bool = False) -> int:
        """How many entries of the first axis belong to each row: 0 if it is not by rows.

        Args:
            shape: of the draw; its first axis is asked about.
            rows: of the replica.
            seed: what the draw is seeded with.
            met: how often this call of the model has come by each place.
            trial: the model is tried on two rows and on one of them, with all else the same.

        Raises:
            NotByRowsError: in a trial, where another axis follows the number of rows.
        """
        size = shape[0]
        site = _site(seed)
        seen = self._seen.setdefault((site, met[site]), {})
        met[site] += 1
        seen[rows] = size
        if trial:
            rest = self._rest.setdefault((site, met[site]), {})
            rest[rows] = shape[1:]
            _check_other_axes(shape, rest)
        if len(seen) == 1:  # nothing to compare with: what has as many entries as rows is by rows
            return 1 if size == rows else 0
        factor = size // rows
        return factor if all(other == factor * count for count, other in list(seen.items())) else 0


def _check_other_axes(shape: tuple[int, ...], rest: dict[int, tuple[int, ...]]) -> None:
    """Refuse a draw that one device makes in a shape of which a replica's rows are no slice of whole rows."""
    if len(set(rest.values())) > 1:
        raise NotByRowsError(
            f"The model draws random numbers in the shape {shape}, of which another axis than the first follows the "
            "number of rows of the batch, so no device can draw what belongs to its rows. Draw in a shape that begins "
            "with the rows, and has them in no other axis, or train the model itself on one device (model.fit)."
        )


def _site(seed: Any) -> Site:
    """Where the model draws: the frames from the draw up to the call of the model."""
    frame = sys._getframe(2)
    stack: list[tuple[CodeType, int]] = []
    while frame is not None and _is_drawing(frame.f_globals.get("__name__", "")):
        frame = frame.f_back  # type: ignore[assignment]
    while frame is not None and not frame.f_globals.get("__name__", "").startswith(
        ("fastdp.program.", "fastdp.capture.", "fastdp.tensors.")
    ):
        stack.append((frame.f_code, frame.f_lasti))
        frame = frame.f_back  # type: ignore[assignment]
    return id(seed) if isinstance(seed, SeedGenerator) else 0, tuple(stack)


def _is_drawing(module: str) -> bool:
    """Whether a frame belongs to the draw itself."""
    own = ("fastdp.program.keras.random.", "fastdp.program.keras.replica", "fastdp.tensors.function_mode")
    return module.startswith((*own, "keras.src.random", "keras.src.backend.torch.random"))
