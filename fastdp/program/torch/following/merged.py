"""Merges what the replicas' forward passes have written into what one device would have."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from fastdp.program.torch.following.guard import Guard
from fastdp.program.torch.following.writes import MISSING, Known, Place, Written, present, put, writes_of
from fastdp.program.torch.rows.merging import merge
from fastdp.shard import Rows
from fastdp.tensors.row_effects import Effect, Layout

REMEDY = (
    "Return it from forward, which merges outputs; combine the replicas' values in forward by "
    "fastdp.replica.all_reduce or fastdp.replica.all_gather; or use gpus=[0]."
)
IN_BACKWARD = (
    "It was written in backward, perhaps by a hook that keeps a gradient. Let the module return or keep the activation "
    "instead, call retain_grad() on it and read its `grad` after backward, or register the hook there; or use gpus=[0]."
)


@dataclass(frozen=True, slots=True)
class Role:
    """How a value that forward writes depends on the rows. `adds`: it is added to the value before."""

    layout: Layout
    adds: bool = False


Roles = Mapping[tuple[Place, int], Role]
_SAME = Role(Layout(Effect.SAME))


@dataclass(slots=True)
class MergedWrite:
    """A value for the user's module and its copies. `roles` are those of the leaves."""

    spec: Any
    leaves: list[Any]
    roles: list[Role]

    @property
    def has_modes(self) -> bool:
        """Whether there are values in it that are no numbers."""
        return any(leaf is None or isinstance(leaf, (bool, str, Known)) for leaf in self.leaves)

    @property
    def is_own(self) -> bool:
        """Whether each replica that has written keeps what it wrote: the same as the others, or its rows."""
        return all(role.layout.effect in (Effect.SAME, Effect.ROWS) for role in self.roles)


@dataclass(slots=True)
class WriteNotes:
    """What a replica has written in a step.

    Args:
        guard: of the replica's module; None if it writes nothing.
        written: by place.
        rows: the replica's.
        roles: what a trial has shown.
    """

    guard: Guard | None
    written: dict[Place, Written]
    rows: Rows
    roles: Roles

    @property
    def stays_in_process(self) -> bool:
        """What was written cannot be merged with what other processes have written.

        Raises:
            NotImplementedError: something was.
        """
        if self.written:
            raise NotImplementedError(
                f"forward writes {', '.join(sorted({place.name for place in self.written}))}, which several processes "
                "cannot merge. Return it from forward, keep it in a buffer, or train in one process."
            )
        return True


def write_notes(guard: Guard | None, roles: Roles, rows: Rows) -> WriteNotes:
    """What a replica has written since its guard has recorded. Arguments as of `WriteNotes`."""
    written = writes_of(guard) if guard is not None and guard.wrote() else {}
    return WriteNotes(guard, written, rows, roles)


def merge_writes(every: Sequence[WriteNotes], remedy: str = REMEDY) -> dict[Place, MergedWrite]:
    """What the user's module and its copies have after a step.

    Args:
        every: what each replica with rows has written, in rank order.
        remedy: what the error says to do.

    Raises:
        ValueError: the replicas have written what cannot be merged; the message names it.
    """
    places = dict.fromkeys(place for notes in every for place in notes.written)
    return {place: _merge(place, every, remedy) for place in places}


def _merge(place: Place, every: Sequence[WriteNotes], remedy: str) -> MergedWrite:
    found: list[Written] = []
    for notes in every:
        own = notes.written.get(place)
        if own is None and notes.guard is not None:
            own = present(notes.guard, place)
        if own is None or (found and own.spec != found[0].spec):
            raise refused(place.name, "on some devices only, or in another structure than on others", remedy)
        found.append(own)
    rows = [notes.rows for notes in every]
    first = next((one for one in found if one.before is not MISSING), found[0])
    leaves, roles = [], []
    for i, parts in enumerate(zip(*(one.leaves for one in found), strict=True)):
        role = every[0].roles.get((place, i))
        if role is None or role.layout.effect is Effect.SAME:
            if not all(equal(parts[0], part) for part in parts[1:]):
                raise refused(place.name, "to different values on different devices", remedy)
            if role is None and _may_have_rows(parts, rows):
                raise refused(place.name, "to equal values on all devices that may be of each one's rows", remedy)
            role = _SAME
        leaves.append(_merged(parts, role, first.before_at(i), rows))
        roles.append(role)
    return MergedWrite(found[0].spec, leaves, roles)


def _may_have_rows(parts: Sequence[Any], rows: Sequence[Rows]) -> bool:
    """Whether each device's tensor has an axis that is as long as the device has rows."""
    if len(parts) == 1 or not isinstance(parts[0], (torch.Tensor, np.ndarray)):
        return False
    return any(
        all(part.shape[at] == one.count for part, one in zip(parts, rows, strict=True)) for at in range(parts[0].ndim)
    )


def _merged(parts: Sequence[Any], role: Role, before: Any, rows: Sequence[Rows]) -> Any:
    """The leaf of the whole batch, without its graph."""
    first = parts[0]
    if role.layout.effect is Effect.SAME:
        return first.detach() if isinstance(first, torch.Tensor) else first
    tensors = [as_tensor(part).detach() for part in parts]
    tensors = [part.to(tensors[0].device) for part in tensors]
    if role.adds:
        base = as_tensor(before).detach().to(tensors[0].device)
        found = base + sum(part - base for part in tensors)
    else:
        found = merge(tensors, role.layout, rows)
    if isinstance(first, torch.Tensor):
        return found.clone() if found is tensors[0] else found
    return found.numpy() if isinstance(first, np.ndarray) else type(first)(found.item())


def assign(
    guards: Sequence[Guard], every: Sequence[WriteNotes], merged: Mapping[Place, MergedWrite], graphs: Mapping[Any, Any]
) -> None:
    """Write merged values to the user's module, whose guard comes first, and to its copies.

    Args:
        guards: of the user's module and its copies, in rank order.
        every: as in `merge_writes`.
        merged: what it returned.
        graphs: tensors of autograd's graph in place of leaves, by place and number, for the user's module.
    """
    for rank, guard in enumerate(guards):
        notes = every[rank] if rank < len(every) else None
        for place, value in merged.items():
            own = notes.written.get(place) if notes is not None else None
            if rank and own is not None and value.is_own:
                continue
            if place.kind == "gone":
                put(guard, place, MISSING, own)
                continue
            leaves = [
                graphs.get((place, i), leaf) if rank == 0 else _for_copy(leaf, role, guard)
                for i, (leaf, role) in enumerate(zip(value.leaves, value.roles, strict=True))
            ]
            leaves = [leaf.value if isinstance(leaf, Known) else leaf for leaf in leaves]
            put(guard, place, pytree.tree_unflatten(leaves, value.spec), own)


def _for_copy(leaf: Any, role: Role, guard: Guard) -> Any:
    """A leaf for a copy of the module."""
    if isinstance(leaf, Known):
        return guard.known[leaf.token] if leaf.token < len(guard.known) else leaf.value
    if isinstance(leaf, torch.Tensor):
        return leaf if role.layout.effect is Effect.ROWS else leaf.clone()
    return copy.copy(leaf)


def as_tensor(value: Any) -> torch.Tensor:
    """A tensor, array or number as a tensor; numbers in double precision."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value if value.flags.writeable else value.copy())
    return torch.tensor(value, dtype=_WIDE.get(type(value)))


_WIDE = {float: torch.float64, complex: torch.complex128}


def equal(value: Any, other: Any) -> bool:
    """Whether two leaves are the same."""
    if isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor):
        value, other = value.detach(), other.detach().to(value.device)
        if value.dtype != other.dtype or value.shape != other.shape:
            return False
        return torch.equal(value, other) or bool(((value == other) | ((value != value) & (other != other))).all())
    if isinstance(value, np.ndarray) and isinstance(other, np.ndarray):
        return value.dtype == other.dtype and np.array_equal(value, other)
    if isinstance(value, Known) and isinstance(other, Known):
        return value.token == other.token
    if isinstance(value, (torch.Tensor, np.ndarray, Known)) or type(value) is not type(other):
        return False
    return bool(value == other or (value != value and other != other))


def refused(name: str, how: str, remedy: str = REMEDY) -> ValueError:
    """The error for what forward writes and several devices cannot merge."""
    return ValueError(f"The module sets `{name}` {how}. {remedy}")
