"""Slots of a Keras optimizer in parts, one on each device: the user's variables read and write all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import torch

from fastdp.buffers import Allocator, ArraySpec, FlatBuffers
from fastdp.program.keras.optimizer.accumulation import Accumulator
from fastdp.program.keras.optimizer.slots import Slot
from fastdp.tensors.arrays import settle, tensors_of


class ShardedSlot(keras.Variable):
    """A slot whose elements lie on several devices.

    Its value is put together when somebody reads it, on the first device, and goes back to the devices before the next
    step: so Keras and scripts may write to it as to any variable.
    """

    _place: tuple[SlotParts, int, int] | None

    @property
    def _value(self) -> Any:
        place = vars(self).get("_place")
        return vars(self).get("_own") if place is None else place[0].lend(*place[1:])

    @_value.setter
    def _value(self, value: Any) -> None:
        if vars(self).get("_place") is None:
            self.__dict__["_own"] = value
        else:
            self._value.data.copy_(value)

    def __getstate__(self) -> dict[str, Any]:
        """A copy holds the whole value, on no other device."""
        own = torch.nn.Parameter(self.value.detach().clone(), requires_grad=False)
        return {**vars(self), "_place": None, "_own": own}


class ShardedAccumulator(ShardedSlot, Accumulator):
    """An accumulated gradient whose elements lie on several devices."""

    def __getstate__(self) -> dict[str, Any]:
        """A copy holds the whole value, and no reference to an engine."""
        return {**ShardedSlot.__getstate__(self), "_waiting": None}


class SlotParts:
    """The kinds of slots of an optimizer, cut into parts: one for each replica.

    Args:
        kinds: the optimizer's, laid out as in a flat update.
        gradients: of any replica; slots are cut as they are between a reduce-scatter and an all-gather.
        ranks: the number of replicas.

    The slots' variables become `ShardedSlot`s: the objects stay the same, their class changes. Their values move here
    as soon as all replicas have their part (`make`).
    """

    def __init__(self, kinds: Sequence[Slot], gradients: FlatBuffers, ranks: int) -> None:
        self.kinds, self.ranks = list(kinds), ranks
        self._spans = [gradients.span(number) for number in range(len(gradients.specs))]
        self._shapes = [spec.shape for spec in gradients.specs]
        self.dtypes = [dtype for dtype, buffer in gradients.buffers.items() if buffer.size]
        # By dtype: where a part begins and ends in the flat buffer, its rank, and where it begins there.
        self.places: dict[str, list[tuple[int, int, int, int]]] = {dtype: [] for dtype in self.dtypes}
        self._sizes = {(dtype, rank): 0 for dtype in self.dtypes for rank in range(ranks)}
        for bucket in sorted(gradients.buckets(), key=lambda bucket: bucket.start):
            for rank in range(ranks):
                part, at = bucket.part(rank, ranks), self._sizes[bucket.dtype, rank]
                if part.stop > part.start:
                    self.places[bucket.dtype].append((part.start, part.stop, rank, at))
                    self._sizes[bucket.dtype, rank] += part.stop - part.start
        self.flats: dict[int, FlatBuffers] = {}
        self._tensors: dict[int, list[torch.Tensor]] = {}
        self._lent: dict[tuple[int, int], torch.nn.Parameter] = {}

    def make(self, rank: int, device: Allocator) -> FlatBuffers:
        """Make the part of one replica on its device. With the last one, take the slots' values over."""
        specs = [
            ArraySpec(f"{slot.attribute} {dtype}", (self._sizes[dtype, rank],), dtype)
            for slot in self.kinds
            for dtype in self.dtypes
        ]
        self.flats[rank] = FlatBuffers(specs, device)
        self._tensors[rank] = tensors_of(self.flats[rank])
        if len(self.flats) == self.ranks:
            self.claim()
        return self.flats[rank]

    def tensor(self, rank: int, kind: int, dtype: str) -> torch.Tensor:
        """A replica's elements of one kind and dtype."""
        return self._tensors[rank][kind * len(self.dtypes) + self.dtypes.index(dtype)]

    def claim(self) -> None:
        """Take the values back that somebody has read, or that another engine has taken over. Between steps."""
        if len(self.flats) < self.ranks:
            return
        moved = False
        for at, kind in enumerate(self.kinds):
            for number, variable in enumerate(kind.variables):
                place = vars(variable).get("_place")
                if place is None or place[0] is not self:
                    self._write(at, number, variable._value.detach())
                    _give_place(variable, (self, at, number))
                    moved = True
        if self._lent or moved:
            for (at, number), value in self._lent.items():
                self._write(at, number, value.detach())
            self._lent.clear()
            settle(tensor for tensors in self._tensors.values() for tensor in tensors)

    def lend(self, kind: int, number: int) -> torch.nn.Parameter:
        """One slot whole, until `claim` takes it back."""
        found = self._lent.get((kind, number))
        if found is None:
            dtype, start, stop = self._spans[number]
            whole = torch.empty(stop - start, dtype=getattr(torch, dtype), device=self._tensors[0][0].device)
            for inside, part in self._parts_of(kind, number):
                whole[inside].copy_(part)
            found = torch.nn.Parameter(whole.reshape(self._shapes[number]), requires_grad=False)
            self._lent[kind, number] = found
        return found

    def _write(self, kind: int, number: int, value: torch.Tensor) -> None:
        flat = value.reshape(-1)
        with torch.no_grad():
            for inside, part in self._parts_of(kind, number):
                part.copy_(flat[inside])

    def _parts_of(self, kind: int, number: int) -> list[tuple[slice, torch.Tensor]]:
        """The parts of one slot: where they lie in it, and their memory."""
        dtype, start, stop = self._spans[number]
        found = []
        for low, high, rank, at in self.places.get(dtype, ()):
            first, last = max(low, start), min(high, stop)
            if first < last:
                part = self.tensor(rank, kind, dtype)[at + first - low : at + last - low]
                found.append((slice(first - start, last - start), part))
        return found


def release(variables: Sequence[keras.Variable]) -> None:
    """Make variables whole again, for an optimizer that is not in parts any more. Does nothing for others."""
    for variable in variables:
        if vars(variable).get("_place") is not None:
            whole = torch.nn.Parameter(variable._value.detach().clone(), requires_grad=False)
            vars(variable).update(_place=None, _own=whole)


def _give_place(variable: Any, place: tuple[SlotParts, int, int]) -> None:
    """Let a variable's value lie in parts from now on."""
    vars(variable).pop("_value", None)
    vars(variable).update(_own=None, _place=place)
    variable.__class__ = ShardedAccumulator if isinstance(variable, Accumulator) else ShardedSlot
