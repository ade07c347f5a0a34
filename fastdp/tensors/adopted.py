"""Tensors of a user's model or optimizer whose storage lives in flat buffers, and who else changes them."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch

from fastdp.buffers import Allocator, ArraySpec, Home
from fastdp.tensors.arrays import tensors_of


class Adopted(ABC):
    """The tensors of an owner, in flat buffers. They keep their identity; their storage becomes views of `home`.

    Args:
        specs: the specs of the tensors, in the order of `present`.
        device: the device whose memory holds the buffers.
    """

    def __init__(self, specs: Sequence[ArraySpec], device: Allocator) -> None:
        self.home = Home(specs, device)
        self._tensors = tensors_of(self.home.variables)
        # Asked at each step: an empty tensor has no place of its own.
        self._pointers = [tensor.data_ptr() if tensor.numel() else None for tensor in self._tensors]
        self._marks: list[Any] = []
        self._adopt(self.present())

    @abstractmethod
    def present(self) -> list[torch.Tensor]:
        """The owner's tensors as they are now.

        Raises:
            RuntimeError: the owner has other ones than it had.
        """

    @abstractmethod
    def marks(self, present: list[torch.Tensor]) -> list[Any]:
        """What an assignment by anybody changes: of each of the present tensors its version, and what else tells."""

    @abstractmethod
    def check(self, value: torch.Tensor, kept: torch.Tensor) -> None:
        """Refuse one of the present tensors that cannot be moved to its place `kept`."""

    def _adopt(self, present: list[torch.Tensor]) -> bool:
        """Move values whose storage is not ours (any more) into the buffers; True if there were any."""
        moved = False
        for value, tensor, pointer in zip(present, self._tensors, self._pointers, strict=True):
            if pointer is not None and value.data_ptr() != pointer:
                self.check(value, tensor)
                with torch.no_grad():
                    tensor.copy_(value)
                    value.data = tensor
                moved = True
        return moved

    def changed(self) -> bool:
        """Whether somebody else assigned a tensor since `note()`. What was assigned is in the buffers then.

        Raises:
            RuntimeError, NotByRowsError: as `present` and `check` do.
        """
        present = self.present()
        return self._adopt(present) or self._marks != self.marks(present)

    def note(self) -> None:
        """Remember the tensors as they are now."""
        self._marks = self.marks(self.present())


Kind = TypeVar("Kind", bound=Adopted)


class Homes(Generic[Kind]):
    """One home per owner, shared by all engines that use the owner, for as long as it lives."""

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
