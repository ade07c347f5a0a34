"""The modules that replicas run: the user's own on the first device, and copies of it on the others.

The user's module stays a plain torch module: its parameters and buffers keep their identity, and their
storage becomes views of the first replica's memory. So the first replica is the user's module itself, with its hooks
and attributes. The others are copies, so that threads share none of these. A copy shares its device's flat memory: only
the module's structure is copied. Copies run on scratch buffers, and the user's buffers get their values back when a
step fails, so that a failed step has changed nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from fastdp.buffers import Allocator
from fastdp.program.torch.following.exchanged import exchanged
from fastdp.program.torch.following.guard import Guard
from fastdp.program.torch.following.writes import restore, writes_of
from fastdp.program.torch.views import View, movable_views
from fastdp.tensors.adopted import Adopted, Homes
from fastdp.tensors.arrays import spec_of
from fastdp.tensors.row_effects import Effect

_shape = attrgetter("shape")


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
    """A module's tensors, whose storage lies in flat buffers.

    Args:
        slots: where they are.
        device: whose memory has the buffers.
        views: what the module holds besides in their memory. It moves with them.
    """

    def __init__(self, slots: list[Slot], device: Allocator, views: Sequence[View] = ()) -> None:
        self.slots = slots
        self._views: list[tuple[weakref.ref[torch.Tensor], int]] = []
        self._kinds = [(slot.tensor.dtype, slot.tensor.shape) for slot in slots]
        self._released: dict[int, torch.Tensor] = {}
        self._seen: tuple[list[int], list[int], list[torch.Size]] = ([], [], [])
        specs = [spec_of(slot.name, slot.tensor) for slot in slots]
        super().__init__(specs, device, _homes.lent(self.places, specs, device))
        for view in views:
            view.tensor.data = view.of(slots[view.number].tensor)
            self._views.append((weakref.ref(view.tensor), view.number))

    @property
    def places(self) -> list[tuple[int, str]]:
        """The table and the key of each tensor. Modules that share a part share its tables."""
        return [(id(slot.table), slot.key) for slot in self.slots]

    def present(self) -> list[torch.Tensor]:
        """The module's tensors.

        Raises:
            RuntimeError: a tensor was removed, or replaced by one of another shape or dtype.
        """
        values = []
        for index, (slot, (dtype, shape)) in enumerate(zip(self.slots, self._kinds, strict=True)):
            value = self._released.get(index, slot.table.get(slot.key))
            if value is None or value.shape != shape or value.dtype != dtype:
                now = "is gone" if value is None else f"is now {value.dtype} of shape {tuple(value.shape)}"
                raise RuntimeError(
                    f"`{slot.name}` of the module was {dtype} of shape {tuple(shape)} when it was "
                    f"wrapped, and {now}. Wrap the changed module again."
                )
            if value.is_meta:
                raise RuntimeError(
                    f"`{slot.name}` of the module is on the device meta now and has no values. Give it some: "
                    "module.to_empty(device='cpu'), and load_state_dict."
                )
            if slot.is_parameter and not isinstance(value, nn.Parameter):
                raise RuntimeError(
                    f"`{slot.name}` of the module is a tensor in place of its parameter now, as in "
                    "torch.func.functional_call, which several devices do not see. Run the module itself that way: "
                    "model.module."
                )
            values.append(value)
        return values

    def _adopt(self, present: list[torch.Tensor]) -> bool:
        """As in `Adopted`. A tensor with new storage (`p.data = x`) has left its views the old values."""
        pointers, kept = self._pointers, []
        for ref, number in self._views:
            view = ref()
            if view is not None and present[number].data_ptr() != pointers[number]:
                view.data = view.data.clone()
            elif view is not None:
                kept.append((ref, number))
        self._views = kept
        return super()._adopt(present)

    def release(self, index: int, last: torch.Tensor) -> None:
        """No longer keep a buffer that forward has replaced by one of another shape. `last` is the one kept so far."""
        self._released[index] = last

    def check(self, value: torch.Tensor, kept: torch.Tensor) -> None:
        """Does nothing: `present` has checked all tensors."""

    def changed(self) -> bool:
        """Whether a tensor was replaced, or lies elsewhere, since the last call. Such tensors are moved back.

        Writes to the tensors in their place are not asked for: the engine copies or compares them.
        """
        try:
            if self._looks() == self._seen:
                return False
        except (KeyError, TypeError):  # a tensor is gone
            pass
        moved = self._adopt(self.present())
        self._seen = self._looks()
        return moved

    def _looks(self) -> tuple[list[int], list[int], list[torch.Size]]:
        """The identity, place and shape of each tensor that is kept."""
        kept = self._released
        if kept:
            values = [slot.table[slot.key] for i, slot in enumerate(self.slots) if i not in kept]
        else:
            values = [slot.table[slot.key] for slot in self.slots]
        return [*map(id, values)], [*map(torch.Tensor.data_ptr, values)], [*map(_shape, values)]

    def marks(self, present: list[torch.Tensor]) -> list[Any]:
        """None: see `changed`."""
        return []


_homes: Homes[AdoptedSlots] = Homes()


def adopted(module: nn.Module, device: Allocator) -> AdoptedSlots:
    """The adopted tensors of a module."""
    slots = slots_of(module)
    # Tables by identity: a part that took the place of another one may have tensors of the same names and shapes.
    tensors = [(slot.name, id(slot.table), slot.tensor.dtype, slot.tensor.shape) for slot in slots]

    def make() -> AdoptedSlots:
        return AdoptedSlots(slots, device, movable_views(module, slots))

    return _homes.of(module, tensors, make)


@dataclass(slots=True)
class Buffer:
    """A buffer of a replica: the tensor that forward sees, and one with its value from before the step.

    `before` is the memory of record for a copy. For the user's module `work` is, and `before` a snapshot.
    """

    index: int
    slot: Slot
    work: torch.Tensor
    before: torch.Tensor
    own: bool = False  # forward has resized it: from then on it is private to the replica
    replaced: bool = False  # a step has put another tensor in its place, and no trial


@dataclass(slots=True)
class ReplicaModule:
    """The module that a replica runs over its memory. `parameters` are in the order of the module's slots.

    `adopted` is None for a copy. The user's own module has the tensors that it adopts, and `pending` buffers if
    forward may have changed some in a step that is not over. `guard` notices what forward writes besides; None if the
    module has no copies.
    """

    module: nn.Module
    parameters: list[torch.Tensor]
    buffers: list[Buffer]
    adopted: AdoptedSlots | None = None
    pending: bool = False
    guard: Guard | None = None
    _busy: bool = False

    @contextmanager
    def passes(self, replaced: Collection[int] | None = None) -> Iterator[None]:
        """Hold this while passes run. Buffers begin with their values of record, and get them back on failure.

        Args:
            replaced: where backward comes later, the indices of buffers in whose place forward is known to put other
                tensors. It gets copies of these: their memory has the new values by then, and the graph may need the
                old ones. Where forward writes in place, whoever else holds the tensor must see it.
        """
        kept = [one for one in self.buffers if not one.own]
        copied = [] if replaced is None else [one for one in kept if one.replaced or one.index in replaced]
        if self.adopted is None:
            # Not counted as changes: graphs of earlier forward passes may need these buffers with their present values.
            _copy_all([one.work.data for one in kept], [one.before for one in kept])
            for one in kept:
                one.slot.table[one.slot.key] = one.work
            for one in copied:
                one.slot.table[one.slot.key] = one.work.clone()
            yield
            return
        for one in kept:
            one.work = one.slot.tensor
        _copy_all([one.before for one in kept], [one.work for one in kept])
        for one in copied:
            one.slot.table[one.slot.key] = one.work.clone()
        self.pending = self._busy = True
        try:
            yield
        except BaseException:
            self.restore_buffers()
            raise
        finally:
            self._busy = False

    @contextmanager
    def with_buffers(self, values: Mapping[int, torch.Tensor]) -> Iterator[None]:
        """While the block runs, buffers are copies of these values, by their indices, whoever else holds them."""
        present = [(one, one.slot.tensor) for one in self.buffers if one.index in values]
        copies = {tensor: values[one.index].clone() for one, tensor in present}
        holders = self.guard.contents.holders if self.guard is not None else ()
        with exchanged(holders, copies):
            try:
                for one, tensor in present:
                    one.slot.table[one.slot.key] = copies[tensor]
                yield
            finally:
                for one, tensor in present:
                    one.slot.table[one.slot.key] = tensor

    def restore_buffers(self) -> None:
        """Give the user's buffers their values from before the step. Their versions do not count this."""
        if self.adopted is None:
            return
        for one in self.buffers:
            if not self._resized(one):
                one.slot.table[one.slot.key] = one.work
                one.work.data.copy_(one.before)
        self.pending = False

    def outdate(self, names: Collection[str]) -> None:
        """Let graphs fail that need these buffers, if forward has replaced them, which no trial has seen. They get
        other values before backward; in the next passes forward gets copies."""
        with torch.no_grad():
            for one in self.buffers:
                if one.slot.name in names and one.slot.tensor is not one.work and not one.replaced:
                    one.work.copy_(one.work)  # counted as a change, as torch does for writes in place
                    one.replaced = True

    def restore_written(self) -> None:
        """Give attributes and whatever else the module holds their values from before the step."""
        if self.guard is not None and self.guard.wrote():
            restore(self.guard, writes_of(self.guard))

    def undo(self) -> None:
        """Restore the buffers after a failure, unless a thread that was given up still runs passes."""
        if self.pending and not self._busy:
            self.restore_buffers()

    def changed_buffers(self, always: Collection[int] = ()) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """The indices of the buffers that forward has changed, with their values now and before.

        Those in `always` are included though nothing has changed them.
        """
        for one in self.buffers:
            if self._resized(one):
                continue
            value = one.slot.tensor
            if value is not one.work or one.index in always or not torch.equal(value, one.before):
                yield one.index, value.detach(), one.before

    def keep_buffers(self) -> None:
        """Take the buffers of the user's module as forward has left them."""
        for one in self.buffers:
            if not self._resized(one) and one.slot.tensor is not one.work:
                one.work.data.copy_(one.slot.tensor)
                one.slot.table[one.slot.key] = one.work

    def name_of(self, index: int) -> str:
        """The name of a buffer."""
        return next(one.slot.name for one in self.buffers if one.index == index)

    def by_index(self, effects: Mapping[str, Effect]) -> dict[int, Effect]:
        """Effects of buffers by index, from those by name."""
        return {one.index: effects[one.slot.name] for one in self.buffers if one.slot.name in effects}

    def index_of(self, tensor: torch.Tensor) -> int | None:
        """The index of the buffer whose tensor forward sees; None if it is no buffer."""
        return next((one.index for one in self.buffers if one.work is tensor), None)

    def _resized(self, one: Buffer) -> bool:
        """Whether forward has ever given the buffer another shape or dtype, or removed it."""
        value = one.slot.table.get(one.slot.key)
        if not one.own and (value is None or value.shape != one.before.shape or value.dtype != one.before.dtype):
            one.own = True
            if self.adopted is not None:
                self.adopted.release(one.index, one.work)
        return one.own


def _copy_all(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy tensors to others."""
    if targets:
        with torch.no_grad():
            torch._foreach_copy_(targets, sources)


def users_own(module: nn.Module, kept: AdoptedSlots) -> ReplicaModule:
    """The user's module as the replica that lives in its memory."""
    slots = kept.slots
    parameters = [slot.tensor for slot in slots if slot.is_parameter]
    buffers = [
        Buffer(index, slot, slot.tensor, slot.tensor.detach().clone())
        for index, slot in enumerate(slots)
        if not slot.is_parameter
    ]
    return ReplicaModule(module, parameters, buffers, kept)
