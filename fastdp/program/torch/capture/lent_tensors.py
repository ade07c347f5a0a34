"""Lets a module run on other tensors than its own, and says which of them forward has changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastdp.errors import NotCapturable
from fastdp.program.torch.module import Slot

# What a recurrent layer keeps of its weights besides its parameters; it makes them anew when those are others.
_WEIGHTS_OF_RNN = ("_flat_weights", "_flat_weight_refs")


class LentTensors:
    """Tensors in the place of a module's own, one for each of its slots.

    Args:
        module: the module.
        slots: its parameters and buffers.
        tensors: in their order.

    Within `lent()` the module has these tensors, tied ones in each of their places. `written` then lists the numbers of
    those that the module has changed or replaced.
    """

    def __init__(self, module: nn.Module, slots: Sequence[Slot], tensors: Sequence[torch.Tensor]) -> None:
        self._module = module
        self._slots, self._tensors = slots, tensors
        self._versions = [tensor._version for tensor in tensors]
        self._present: list[torch.Tensor | None] = list(tensors)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """The module has the tensors; afterwards it has its own again."""
        numbers = {id(slot.tensor): i for i, slot in enumerate(self._slots)}
        places: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        weights: list[tuple[dict[str, Any], str, Any]] = []
        for part in self._module.modules():
            for table in (part._parameters, part._buffers):
                places += [(table, key, one) for key, one in table.items() if one is not None and id(one) in numbers]
            if isinstance(part, nn.RNNBase):
                weights += [(part.__dict__, name, part.__dict__[name]) for name in _WEIGHTS_OF_RNN]
        try:
            for table, key, own in places:
                table[key] = self._tensors[numbers[id(own)]]
            yield
            self._present = [slot.table.get(slot.key) for slot in self._slots]
        finally:
            for table, key, own in places:
                table[key] = own
            for attributes, name, value in weights:
                attributes[name] = value

    @property
    def written(self) -> list[int]:
        """The numbers of the tensors that the module has written to or replaced."""
        found: Any = zip(self._tensors, self._present, self._versions, strict=True)
        return [i for i, (lent, now, then) in enumerate(found) if now is not lent or lent._version != then]

    @property
    def replaced(self) -> frozenset[int]:
        """The numbers of the tensors in whose places the module has put others."""
        return frozenset(
            i for i, (lent, now) in enumerate(zip(self._tensors, self._present, strict=True)) if now is not lent
        )

    def value(self, number: int) -> torch.Tensor:
        """The tensor that the module has left in a place.

        Raises:
            NotCapturable: it has none, or one of another shape or dtype.
        """
        lent, now = self._tensors[number], self._present[number]
        if now is None or now.shape != lent.shape or now.dtype != lent.dtype:
            raise NotCapturable(f"the buffer `{self._slots[number].name}`, whose shape or dtype forward changes")
        return now.detach()
