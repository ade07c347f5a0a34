"""Keeps the tensors of a user's model or optimizer in flat buffers, and notices assignments by other code."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from operator import methodcaller
from typing import Any, Generic, TypeVar

import torch

from fastdp.buffers import Allocator, ArraySpec, Home
from fastdp.tensors.arrays import tensors_of
from fastdp.tensors.threads import intra_op_threads

_POINTER = methodcaller("data_ptr")


class Adopted(ABC):
    """The tensors of an owner, in flat buffers. They keep their identity; their storage becomes views of `home`.

    Args:
        specs: the specs of the tensors, in the order of `present`.
        device: the device whose memory holds the buffers.
        lent: tensors whose place is in other homes already, by number; see `Homes.lent`.
    """

    def __init__(
        self, specs: Sequence[ArraySpec], device: Allocator, lent: Mapping[int, tuple[Home, int]] | None = None
    ) -> None:
        self.home = Home(specs, device, lent)
        self._tensors = tensors_of(self.home.variables)
        # Compared at each step. None for empty tensors, which have no storage.
        self._pointers = [tensor.data_ptr() if tensor.numel() else None for tensor in self._tensors]
        self._has_empty = None in self._pointers
        self._marks: list[Any] = []
        if self._adopt(self.present()):
            self.home.advance()

    @property
    def places(self) -> Sequence[Hashable]:
        """What identifies each tensor's place in its owner, as long as this object lives; empty if none is shared."""
        return ()

    @abstractmethod
    def present(self) -> list[torch.Tensor]:
        """The owner's current tensors.

        Raises:
            RuntimeError: the owner has other tensors than before.
        """

    @abstractmethod
    def marks(self, present: list[torch.Tensor]) -> list[Any]:
        """Marks that any assignment changes: the version of each present tensor, and further signs of assignments."""

    @abstractmethod
    def check(self, value: torch.Tensor, kept: torch.Tensor) -> None:
        """Raise if one of the present tensors, `value`, cannot be moved to its place `kept`."""

    def _adopt(self, present: list[torch.Tensor]) -> bool:
        """Move values whose storage is not in the buffers (any more) into them; True if there were any."""
        # Most often all lie where they should: compared without Python for each of them.
        if not self._has_empty and list(map(_POINTER, present)) == self._pointers:
            return False
        elsewhere = [
            (value, tensor)
            for value, tensor, pointer in zip(present, self._tensors, self._pointers, strict=True)
            if pointer is not None and value.data_ptr() != pointer
        ]
        for value, tensor in elsewhere:
            self.check(value, tensor)
        if elsewhere:
            # One core: a pool of helper threads for so little would have to end before the replicas run.
            with torch.no_grad(), intra_op_threads(1):
                torch._foreach_copy_([tensor for _, tensor in elsewhere], [value for value, _ in elsewhere])
            for value, tensor in elsewhere:
                value.data = tensor
        return bool(elsewhere)

    def changed(self) -> bool:
        """Whether other code assigned a tensor since `note()`. Assigned values are moved into the buffers.

        Raises:
            RuntimeError, NotByRowsError: as `present` and `check` do.
        """
        present = self.present()
        return self._adopt(present) or self._marks != self.marks(present)

    def note(self) -> None:
        """Remember the current state of the tensors."""
        self._marks = self.marks(self.present())


Kind = TypeVar("Kind", bound=Adopted)


class Homes(Generic[Kind]):
    """One home per owner, shared by all engines that use the owner, for as long as it lives.

    Owners may have tensors in common, such as a module and a part of it: these lie in the home that was made first.
    """

    def __init__(self) -> None:
        self._homes: weakref.WeakKeyDictionary[Any, tuple[object, Kind]] = weakref.WeakKeyDictionary()

    def of(self, owner: Any, tensors: object, make: Callable[[], Kind]) -> Kind:
        """The owner's home. It is made by `make` if there is none, or only one of other tensors.

        Args:
            owner: a model or an optimizer.
            tensors: identifies the owner's tensors; equal as long as they are the same.
            make: makes the home, which must not refer to the owner.
        """
        found = self._homes.get(owner)
        if found is None or found[0] != tensors:
            found = self._homes[owner] = (tensors, make())
        return found[1]

    def lent(
        self, places: Sequence[Hashable], specs: Sequence[ArraySpec], device: Allocator
    ) -> dict[int, tuple[Home, int]]:
        """The tensors that lie in the home of another owner already, by number: that home, and the number there.

        Args:
            places: what identifies the tensors' places, as `Adopted.places`.
            specs: their specs. A tensor whose place has become one of another shape or dtype is not lent.
            device: the device of the new home. Only homes in the same memory lend.
        """
        wanted = {place: number for number, place in enumerate(places) if specs[number].size}
        found: dict[int, tuple[Home, int]] = {}
        for _, adopted in self._homes.values():
            home = adopted.home
            if home.device.space == device.space:
                for at, place in enumerate(adopted.places):
                    number = wanted.get(place)
                    if number is not None and number not in found and _fits(specs[number], home.variables.specs[at]):
                        found[number] = home, at
        return found


def _fits(spec: ArraySpec, other: ArraySpec) -> bool:
    """Whether an array may take the other's place."""
    return (spec.shape, spec.dtype) == (other.shape, other.dtype)
