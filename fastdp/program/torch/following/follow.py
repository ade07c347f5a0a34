"""Brings what the user has changed in a module to its copies, before each step."""

from __future__ import annotations

import copy
import types
from typing import Any

import torch
from torch import nn

from fastdp.program.torch.following.contents import Contents
from fastdp.program.torch.following.copies import Copied, remake, replicate
from fastdp.program.torch.following.guard import Guard
from fastdp.program.torch.module import ReplicaModule, Slot, slots_of


class Following:
    """The copies of a module, and what the module held when they were made.

    Args:
        module: the user's own.
        slots: its parameters and buffers, which stay the same.

    Attributes:
        remade: how often the copies were made anew.
    """

    def __init__(self, module: nn.Module, slots: list[Slot]) -> None:
        self._module, self._slots = module, slots
        self._kept = [(slot.name, slot.table, slot.key) for slot in slots]
        self._parts = dict(module.named_modules())
        self._guard: Guard | None = None
        self._copies: list[tuple[ReplicaModule, Copied]] = []
        self.remade = 0

    def replicate(self, variables: list[torch.Tensor]) -> ReplicaModule:
        """A copy of the module that follows it. Arguments and errors as of `fastdp.program.torch.following.copies`."""
        if self._guard is None:
            self._guard = Guard(self.contents())
        self._copies.append(replicate(self._module, self._slots, variables, self._guard.contents))
        return self._copies[-1][0]

    def contents(self) -> Contents:
        """What the module holds now."""
        return Contents(self._module, [slot.tensor for slot in self._slots if slot.table.get(slot.key) is not None])

    def follow(self) -> None:
        """Make the copies what the module is now.

        Raises:
            RuntimeError: a parameter or a buffer was added, removed or moved to another part.
            ValueError: something in the module cannot be copied, or is shared by all copies.
        """
        guard = self._guard
        if guard is None:
            return
        if guard.changed():
            changes = guard.plain_changes()
            if changes is None:
                self._remake()
                return
            places = {id(holder): at for at, holder in enumerate(guard.contents.holders)}
            for holder, key, value in changes:
                for _, copied in self._copies:
                    _assign(copied.tables[places[id(holder)]], key, value)
            guard.record()
        self._refuse_shared(guard.contents)
        self._copy_tensors(guard.contents)

    def absorb(self) -> None:
        """After a step: take what forward has left in the user's module for what it holds."""
        guard = self._guard
        if guard is None or not guard.changed() or guard.structure_changed():
            return
        if guard.keeps_kinds():
            guard.record()
        else:
            guard.contents.look_again()
            self._guard = Guard(guard.contents)

    def _remake(self) -> None:
        """Make the copies anew."""
        self._check_slots()
        contents = self.contents()
        self._refuse_shared(contents)
        made = [remake(replica, self._module, self._slots, contents) for replica, _ in self._copies]
        self._copies = [(replica, copied) for (replica, _), copied in zip(self._copies, made, strict=True)]
        self._guard = Guard(contents)
        self.remade += 1

    def _copy_tensors(self, contents: Contents) -> None:
        """Copy the values of tensors that are neither parameters nor buffers, whoever has written to them."""
        if not contents.tensors:
            return
        sources = [tensor.detach() for _, tensor in contents.tensors]
        with torch.no_grad():
            for _, copied in self._copies:
                torch._foreach_copy_([tensor.data for tensor in copied.tensors], sources)

    def _refuse_shared(self, contents: Contents) -> None:
        if contents.refused and self._copies:
            raise ValueError(
                f"All devices would share {contents.refused}. Register the hook on the module or on its parts, which "
                "each device has a copy of, or use gpus=[0]."
            )

    def _check_slots(self) -> None:
        """Check that the module has the parameters and buffers that it had."""
        now = [(slot.name, slot.table, slot.key) for slot in slots_of(self._module)]
        if len(now) == len(self._kept) and all(
            a[0] == b[0] and a[1] is b[1] for a, b in zip(now, self._kept, strict=True)
        ):
            return
        before = {name: id(table) for name, table, _ in self._kept}
        after = {name: id(table) for name, table, _ in now}
        name = next(name for name in (*after, *before) if before.get(name) != after.get(name))
        how = "is new" if name not in before else "is gone" if name not in after else "was replaced"
        raise RuntimeError(
            f"The parts of `{self._changed_part(name)}` were changed since the module was wrapped: `{name}` {how}. Its "
            "replicas and optimizers have the old parameters. Wrap the changed module again, and make the train step "
            "anew."
        )

    def _changed_part(self, name: str) -> str:
        """The part that has changed, of those that a parameter or a buffer of this name lies in."""
        present, prefix, found = dict(self._module.named_modules()), "", "model"
        for key in name.split(".")[:-1]:
            prefix = f"{prefix}.{key}" if prefix else key
            if prefix not in present or present[prefix] is not self._parts.get(prefix):
                break
            found = prefix
        return found


def _assign(table: Any, key: Any, value: Any) -> None:
    """Assign a plain value in a copy; nothing where the copy shares it."""
    if isinstance(table, types.CellType):
        table.cell_contents = value
    elif table is not None:
        table[key] = copy.copy(value)
