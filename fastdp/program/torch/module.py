"""Copies a torch module for each replica, over the engine's memory.

The user's module stays a plain torch module: its parameters and buffers keep their identity, and their
storage becomes views of the first replica's memory. Replicas are always copies, also on the first device, so
that threads do not share hooks, caches and `training` flags. A copy shares its device's flat memory: only the
module's structure is copied. Replicas run on scratch copies of the buffers, so that a failed step has changed
nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastdp.buffers import Allocator
from fastdp.program.torch.batch import PLAIN
from fastdp.tensors.adopted import Adopted, Homes
from fastdp.tensors.arrays import spec_of


@dataclass(slots=True)
class Slot:
    """Where a module keeps a tensor: `table[key]`, under the dotted `name` of its state dict."""

    name: str
    table: dict[str, Any]
    key: str
    is_parameter: bool

    @property
    def tensor(self) -> torch.Tensor:
        """The present tensor."""
        return self.table[self.key]


def slots_of(module: nn.Module) -> list[Slot]:
    """All parameters and buffers, each tensor once (tied ones under their first name)."""
    seen: set[int] = set()
    found = []
    for prefix, owner in module.named_modules():
        for table in (owner._parameters, owner._buffers):
            for key, tensor in table.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    name = f"{prefix}.{key}" if prefix else key
                    found.append(Slot(name, table, key, table is owner._parameters))
    return found


class AdoptedSlots(Adopted):
    """A module's tensors, whose storage lies in flat buffers."""

    def __init__(self, slots: list[Slot], device: Allocator) -> None:
        self.slots = slots
        self._kinds = [(slot.tensor.dtype, slot.tensor.shape) for slot in slots]
        super().__init__([spec_of(slot.name, slot.tensor) for slot in slots], device)

    def present(self) -> list[torch.Tensor]:
        """The module's tensors.

        Raises:
            RuntimeError: a tensor was removed, or replaced by one of another shape or dtype.
        """
        values = []
        for slot, (dtype, shape) in zip(self.slots, self._kinds, strict=True):
            value = slot.table.get(slot.key)
            if value is None or value.shape != shape or value.dtype != dtype:
                now = "is gone" if value is None else f"is now {value.dtype} of shape {tuple(value.shape)}"
                raise RuntimeError(
                    f"`{slot.name}` of the module was {dtype} of shape {tuple(shape)} when it was "
                    f"wrapped, and {now}. Wrap the changed module again."
                )
            values.append(value)
        return values

    def check(self, value: torch.Tensor, kept: torch.Tensor) -> None:
        """Does nothing: `present` has checked all tensors."""

    def marks(self, present: list[torch.Tensor]) -> list[tuple[int, int]]:
        """The identities and versions of the tensors."""
        return [(id(value), value._version) for value in present]


_homes: Homes[AdoptedSlots] = Homes()


def adopted(module: nn.Module, device: Allocator) -> AdoptedSlots:
    """The adopted tensors of a module."""
    slots = slots_of(module)
    return _homes.of(module, [slot.name for slot in slots], lambda: AdoptedSlots(slots, device))


@dataclass(slots=True)
class _Scratch:
    """A buffer of a replica: the tensor that it runs on, and its value of record in the flat memory."""

    index: int
    slot: Slot
    work: torch.Tensor
    record: torch.Tensor
    own: bool = False  # forward has resized it: from then on it is private to the replica


@dataclass(slots=True)
class ReplicaModule:
    """A replica's copy of the module over its memory. `parameters` are in the order of the module's slots."""

    module: nn.Module
    parameters: list[torch.Tensor]
    variables: list[torch.Tensor]
    scratch: list[_Scratch]
    by_id: dict[int, int] = field(default_factory=dict)

    def refresh_buffers(self) -> None:
        """Reset the buffers to their values of record, at the beginning of a step."""
        for one in self.scratch:
            if not one.own:
                one.work.copy_(one.record)
                one.slot.table[one.slot.key] = one.work

    def changed_buffers(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The indices and new values of the buffers that forward has changed."""
        for one in self.scratch:
            value = one.slot.table[one.slot.key]
            if one.own or value is None:
                continue
            if value.shape != one.record.shape or value.dtype != one.record.dtype:
                one.own = True
            elif value is not one.work or not torch.equal(value, one.record):
                yield one.index, value.detach()

    def index_of(self, tensor: torch.Tensor) -> int | None:
        """The index of the buffer whose tensor forward sees; None if it is no buffer."""
        return self.by_id.get(id(tensor))


def replicate(module: nn.Module, slots: list[Slot], variables: list[torch.Tensor]) -> ReplicaModule:
    """A copy of the module over `variables`, one for each slot. Copies the structure and the buffers.

    Raises:
        ValueError: something in the module cannot be copied.
    """
    memo: dict[int, Any] = {}
    parameters, scratch = [], []
    for slot, variable in zip(slots, variables, strict=True):
        if slot.is_parameter:
            memo[id(slot.tensor)] = nn.Parameter(variable, requires_grad=slot.tensor.requires_grad)
            parameters.append(memo[id(slot.tensor)])
        else:
            memo[id(slot.tensor)] = variable.clone()
    for owner in module.modules():
        for value in owner.__dict__.values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:  # left by the last forward pass
                memo[id(value)] = value.detach().clone()
    try:
        replica = copy.deepcopy(module, memo)
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"The module {type(module).__name__} cannot be copied, and each device needs a copy of it: {error}. "
            "Keep what cannot be copied (locks, open files, generators) out of its attributes, or define "
            "__deepcopy__ on its class."
        ) from error
    for index, (slot, own) in enumerate(zip(slots, slots_of(replica), strict=True)):
        if not slot.is_parameter:
            scratch.append(_Scratch(index, own, own.tensor, variables[index]))
    by_id = {id(one.work): one.index for one in scratch}
    return ReplicaModule(replica, parameters, variables, scratch, by_id)


class Attributes:
    """Copies plain attributes of a module's parts (`training`, a dropout's `p`) to the replicas."""

    def __init__(self, module: nn.Module) -> None:
        self._names, self._parts = zip(*module.named_modules(), strict=True)
        self._known = self._now()
        self._structure = self._structure_now()

    def follow(self, replicas: list[nn.Module]) -> None:
        """Apply the changes of the user's module since the last call to the replicas.

        Raises:
            RuntimeError: a part, a parameter or a buffer was added or removed, or a part was replaced.
        """
        for name, before, structure in zip(self._names, self._structure, self._structure_now(), strict=True):
            if before != structure:
                raise RuntimeError(
                    f"The parts of `{name or 'model'}` were changed since the module was wrapped, and its replicas "
                    "have the old ones. Wrap the changed module again, and make the train step anew."
                )
        now = self._now()
        if now == self._known:
            return
        for replica in replicas:
            for part, values, known in zip(replica.modules(), now, self._known, strict=True):
                for name, value in values.items():
                    if name not in known or known[name] != value:
                        part.__dict__[name] = value
        self._known = now

    def _structure_now(self) -> list[tuple[dict[str, Any], list[str], list[str]]]:
        """For each part: its direct parts, and the names of its parameters and buffers."""
        return [(dict(part._modules), list(part._parameters), list(part._buffers)) for part in self._parts]

    def _now(self) -> list[dict[str, Any]]:
        return [{k: v for k, v in part.__dict__.items() if isinstance(v, PLAIN)} for part in self._parts]
