"""What a run's parts were before a checkpoint was loaded into them, to be given back where that fails midway."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastdp.checkpoint import nest
from fastdp.checkpoint.generators import read_generators, write_generators


class Before:
    """Copies of the states of parts, in host memory, and of the process's generators.

    Args:
        parts: objects with `state_dict` and `load_state_dict`.
        tensors: as in `nest.pack`.

    Raises:
        TypeError: a state is no plain data, so it could not be saved either.
    """

    def __init__(self, parts: Sequence[Any], tensors: nest.Tensors | None) -> None:
        self._tensors = tensors
        self._states = [(part, nest.pack(part.state_dict(), tensors)) for part in parts]
        self._generators = read_generators()

    def give_back(self) -> None:
        """Make all parts and generators what they were."""
        for part, packed in self._states:
            part.load_state_dict(nest.unpack(packed, self._tensors))
        write_generators(self._generators)
