"""Brings what the user has changed in a module to its copies before each step, and what forward has written back."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastdp.program.torch.following.contents import Contents
from fastdp.program.torch.following.copies import Copied, remake, replicate
from fastdp.program.torch.following.graphs import PassWrites
from fastdp.program.torch.following.guard import Guard, get
from fastdp.program.torch.following.holders import Holder
from fastdp.program.torch.following.kinds import kind_of
from fastdp.program.torch.following.merged import MergedWrite, Roles, WriteNotes, assign
from fastdp.program.torch.following.readers import read_by
from fastdp.program.torch.following.writes import Place, restore, writes_of
from fastdp.program.torch.module import ReplicaModule, Slot, slots_of
from fastdp.program.torch.rows.outside import StepWatch
from fastdp.program.torch.rows.plain import keeps_rows_apart
from fastdp.program.torch.views import views_in


class Following:
    """The copies of a module, and what the module held when they were made.

    Args:
        module: the user's own.
        slots: its parameters and buffers, which stay the same.

    Attributes:
        remade: how often the copies were made anew.
        user: the user's own module as a replica.
    """

    def __init__(self, module: nn.Module, slots: list[Slot]) -> None:
        self._module, self._slots = module, slots
        self._kept = [(slot.name, slot.table, slot.key) for slot in slots]
        self._parts = dict(module.named_modules())
        self._guard: Guard | None = None
        self._copies: list[tuple[ReplicaModule, Copied]] = []
        self._kinds: dict[Any, int] = {}
        self._kind: int | None = None
        self._checked: dict[int, Roles] = {}  # found not to be read by the loss function
        self.user: ReplicaModule | None = None
        self.remade = 0
        self._viewed: list[tuple[int, int]] = []
        self._changes = 0

    @property
    def changes(self) -> int:
        """A number that another one takes the place of when what the module holds is changed."""
        return self._changes + (self._guard is not None and self._guard.wrote())

    def replicate(self, variables: list[torch.Tensor]) -> ReplicaModule:
        """A copy of the module that follows it. Arguments and errors as of `fastdp.program.torch.following.copies`."""
        if self._guard is None:
            self._guard = Guard(self.contents())
        replica, copied = replicate(self._module, self._slots, variables, self._guard.contents)
        self._copies.append((replica, copied))
        self._viewed = self._views()
        self._show()
        return replica

    def forget_copies(self) -> None:
        """Forget all copies, since others are made."""
        self._changes = self.changes
        self._copies, self._guard, self._kind, self.user = [], None, None, None

    def contents(self) -> Contents:
        """What the module holds now."""
        return Contents(self._module, [slot.tensor for slot in self._slots if slot.table.get(slot.key) is not None])

    def outside(self, loss_fn: Any) -> StepWatch | None:
        """A watch over what the module and its copies share; None if it needs none."""
        if self._guard is None or keeps_rows_apart(self._module):
            return None
        return StepWatch(self._module, self.contents(), loss_fn)

    @property
    def kind(self) -> int:
        """A number that is the same for modules that run in the same way, as far as what they hold tells."""
        if self._kind is None or self._guard is None:
            guard = self._guard or Guard(self.contents())
            self._kind = self._kinds.setdefault(kind_of(guard), len(self._kinds))
        return self._kind

    # Before a step.

    def follow(self) -> None:
        """Make the copies what the module is now.

        Raises:
            RuntimeError: a parameter or a buffer was added, removed or moved to another part.
            ValueError: something in the module cannot be copied, or is shared by all copies.
        """
        guard = self._guard
        if guard is None:
            return
        self._changes = self.changes
        if self._viewed and self._viewed != self._views():
            self._remake()
            return
        if guard.changed():
            self._kind = None
            changes = guard.plain_changes()
            if changes is None:
                self._remake()
                return
            numbers = {id(holder): at for at, holder in enumerate(guard.contents.holders)}
            for _, copied in self._copies:
                for holder, key, value in changes:
                    _assign(copied.guard, numbers[id(holder)], key, value)
                copied.guard.record()
            guard.record()
        self._refuse_shared(guard.contents)
        self._copy_tensors(guard.contents)

    def _remake(self) -> None:
        """Make the copies anew."""
        self._check_slots()
        contents = self.contents()
        self._refuse_shared(contents)
        made = [remake(replica, self._module, self._slots, contents) for replica, _ in self._copies]
        self._copies = [(replica, copied) for (replica, _), copied in zip(self._copies, made, strict=True)]
        self._guard, self._kind = Guard(contents), None
        self._viewed = self._views()
        self._show()
        self.remade += 1

    def _views(self) -> list[tuple[int, int]]:
        """Which tensors are views of which parameters, by identity and number. The copies have such views too."""
        slots = [slot for slot in self._slots if slot.table.get(slot.key) is not None]
        tensors = self._guard.contents.tensors if self._guard is not None else ()
        return [(id(view.tensor), view.number) for view in views_in([tensor for _, tensor in tensors], slots)]

    def _show(self) -> None:
        """Give the replicas the guards by which they notice what forward writes."""
        writes = not keeps_rows_apart(self._module)
        if self.user is not None:
            self.user.guard = self._guard if writes else None
        for replica, copied in self._copies:
            copied.guard.keeps_values = False
            replica.guard = copied.guard if writes else None

    def _copy_tensors(self, contents: Contents) -> None:
        """Copy the values of tensors that are neither parameters nor buffers, whoever has written to them."""
        if not contents.tensors:
            return
        sources = [tensor.detach() for _, tensor in contents.tensors]
        with torch.no_grad():
            for _, copied in self._copies:
                torch._foreach_copy_([tensor.data for _, tensor in copied.guard.contents.tensors], sources)
        for guard in self._guards():
            guard.note_versions()

    def _guards(self) -> list[Guard]:
        """Of the user's module and its copies, in rank order."""
        assert self._guard is not None
        return [self._guard, *(copied.guard for _, copied in self._copies)]

    def _refuse_shared(self, contents: Contents) -> None:
        if contents.refused and self._copies:
            raise ValueError(
                f"All devices would share {contents.refused}. Register the hook on the module or on its parts, which "
                "each device has a copy of, or use gpus=[0]."
            )
        if contents.unfollowed and self._copies:
            raise ValueError(
                f"The module keeps {contents.unfollowed}, whose changes its copies on other devices cannot follow. "
                "Make it a list, a tensor or a NumPy array."
            )

    # After a step.

    def finish(
        self, every: Sequence[WriteNotes], merged: Mapping[Place, MergedWrite], graphs: Mapping[Any, Any]
    ) -> None:
        """Give the user's module and its copies what forward has written, merged. Arguments as of `assign`."""
        if self._guard is None or not merged:
            return
        self._changes += 1
        assign(self._guards(), every, merged, graphs)
        keep = not self._retarget(merged) and all(guard.keeps_kinds() for guard in self._guards())
        if keep:
            for guard in self._guards():
                guard.record()
        else:
            for guard in self._guards():
                guard.contents.look_again()
            self._guard = Guard(self._guard.contents)
            for _, copied in self._copies:
                copied.guard = Guard(copied.guard.contents, keeps_values=False)
            self._show()
        if not keep or any(write.has_modes for write in merged.values()):
            self._kind = None

    def _retarget(self, merged: Mapping[Place, MergedWrite]) -> bool:
        """Look into containers that forward has made, from now on. Whether there are any."""
        found = False
        for place, write in merged.items():
            if place.kind != "value" or write.spec.is_leaf():
                continue
            for guard in self._guards():
                holder = guard.by_name[place.holder]
                guard.contents.retarget(_name_below(holder, place.key), get(holder, place.key))
            found = True
        return found

    def undo(self) -> None:
        """Give the user's module what it held before a step that failed. The copies are made anew."""
        if self._guard is None or not any(guard.wrote() for guard in self._guards()):
            return
        self.restore()
        self._guard.forget()

    def restore(self) -> None:
        """Give the user's module what it held when the copies were made or a step had ended."""
        if self._guard is not None and self._guard.wrote():
            restore(self._guard, writes_of(self._guard))

    def take_back(self, writes: PassWrites) -> None:
        """Give the user's module what it held before a pass that has written this. `restore` ends it."""
        if self._guard is not None and writes.every:
            written = writes.every[0].written  # by the user's module, which is the first replica's
            restore(self._guard, {place: written[place] for place in writes.merged if place in written})

    def check_reader(self, loss_fn: Any, roles: Roles) -> None:
        """Check that the loss function of a step does not read what the step's forward passes write.

        Raises:
            ValueError: it does.
        """
        if loss_fn is None or not roles or self._guard is None or id(roles) in self._checked:
            return
        place = read_by(loss_fn, self._module, self._guard, dict.fromkeys(place for place, _ in roles))
        if place is not None:
            raise ValueError(
                f"The loss function reads `{place.name}`, which forward sets: on several devices each one has its own "
                "rows' value while the step runs. Return it from forward, and take it from the outputs in the loss "
                "function; or write the loop: loss = loss_fn(model(x), y); loss.backward()."
            )
        self._checked[id(roles)] = roles

    # Parameters and buffers stay.

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


def _name_below(holder: Holder, key: Any) -> str:
    """The name that a walk gives to what a holder has under a key."""
    if isinstance(holder.table, types.CellType):
        return holder.name
    if holder.owner is holder.table and not holder.partial:
        return f"{holder.name}[{key!r}]"
    return str(key) if holder.partial or not holder.name else f"{holder.name}.{key}"


def _assign(guard: Guard, number: int, key: Any, value: Any) -> None:
    """Assign a plain value in a copy; nothing where the copy shares it."""
    holder = guard.contents.holders[number]
    if holder.shared:
        return
    if isinstance(holder.table, types.CellType):
        holder.table.cell_contents = value
    else:
        holder.table[key] = value
