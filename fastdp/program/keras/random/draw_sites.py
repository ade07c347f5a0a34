"""Finds out which random draws are by rows, from how their shapes follow the number of rows."""

from __future__ import annotations

import sys
from collections import Counter
from types import CodeType
from typing import Any

from keras.src.random.seed_generator import SeedGenerator

from fastdp.tensors.row_effects import NotByRowsError

# A place in the code that draws: the seed's id and the stack of the model's call.
Site = tuple[int, tuple[tuple[CodeType, int], ...]]


class DrawSites:
    """The shapes of the draws in a model's call, for different numbers of rows.

    A shape such as (2, 4) does not reveal whether its 2 are the replica's rows. Before training, the model is tried on
    two rows and on one. A first axis that stays 2 is not the rows; one that becomes 1 is; and 8 that becomes 4 has four
    entries for each row. The replicas of a program share this object.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[Site, int], dict[int, int]] = {}
        self._rest: dict[tuple[Site, int], dict[int, tuple[int, ...]]] = {}  # the other axes, of trials

    def per_row(self, shape: tuple[int, ...], rows: int, seed: Any, met: Counter[Site], trial: bool = False) -> int:
        """The number of entries on the first axis for each row; 0 if the draw is not by rows.

        Args:
            shape: shape of the draw.
            rows: number of rows of the replica.
            seed: seed of the draw.
            met: how often this call of the model has reached each place.
            trial: whether this is a trial: the model runs on two rows and on one of them, with all else the same.

        Raises:
            NotByRowsError: in a trial, if another axis depends on the number of rows.
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
        if len(seen) == 1:  # nothing to compare with: by rows if there are as many entries as rows
            return 1 if size == rows else 0
        factor = size // rows
        return factor if all(other == factor * count for count, other in list(seen.items())) else 0


def _check_other_axes(shape: tuple[int, ...], rest: dict[int, tuple[int, ...]]) -> None:
    """Refuse a draw whose shape depends on the number of rows in another axis than the first."""
    if len(set(rest.values())) > 1:
        raise NotByRowsError(
            f"The model draws random numbers in the shape {shape}, whose size along an axis other than the first "
            "depends on the number of rows of the batch, so no device can draw the part for its own rows. Draw in a "
            "shape that has the rows along its first axis only, or train the model itself on one device (model.fit)."
        )


def _site(seed: Any) -> Site:
    """The place where the model draws: the frames from the draw up to the call of the model."""
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
    """Whether a module's frames belong to the draw itself."""
    own = ("fastdp.program.keras.random.", "fastdp.program.keras.replica", "fastdp.tensors.function_mode")
    return module.startswith((*own, "keras.src.random", "keras.src.backend.torch.random"))
