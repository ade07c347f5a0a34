"""What forward has written to attributes, containers, closures, and tensors that are no buffers."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from fastdp.program.torch.following.contents import ATOMS
from fastdp.program.torch.following.guard import Guard, get, is_made_by_torch, same_plain
from fastdp.program.torch.following.holders import Holder
from fastdp.tensors import pytree

_VALUES = frozenset((*ATOMS, torch.dtype, torch.device, set, frozenset, range, slice))
MISSING = object()


class Place(NamedTuple):
    """Where something was written.

    Attributes:
        holder: the name of the holder, or of the tensor or array.
        kind: "value" under the `key`; "gone", what was under the `key`; "more", elements at the end of a list; "all",
            the elements of a list, deque or set; "tensor" and "array", written to in place.
        key: the name of an attribute or the key of a dict; None for all else.
    """

    holder: str
    kind: str
    key: Any = None

    @property
    def name(self) -> str:
        """The name for messages."""
        holder = self.holder.split(" #")[0]
        if self.key is None:
            return holder or "the module"
        if isinstance(self.key, str) and self.key.isidentifier() and holder.isidentifier():
            return f"{holder}.{self.key}"
        return f"{holder}[{self.key!r}]" if holder else str(self.key)


@dataclass(slots=True)
class Known:
    """A value that is the same thing on all replicas: a part of each one's module, or what they share."""

    token: int
    value: Any


@dataclass(slots=True)
class Written:
    """What a replica wrote.

    Attributes:
        spec, leaves: the value as a nest of tensors, arrays, plain values and `Known`.
        before: the value before, or the elements of a list; MISSING if there was none.
    """

    spec: Any
    leaves: list[Any]
    before: Any = MISSING

    @classmethod
    def of(cls, value: Any, guard: Guard, before: Any = MISSING) -> Written:
        """What was written, on the replica of this guard."""
        leaves, spec = pytree.tree_flatten(value, guard.numbers)
        return cls(spec, [_leaf(one, guard) for one in leaves], before)

    def before_at(self, number: int) -> Any:
        """What was in the place of a leaf before; MISSING if nothing was, or a nest of another structure."""
        if self.before is MISSING:
            return MISSING
        leaves, spec = pytree.tree_flatten(self.before)
        return leaves[number] if spec == self.spec else MISSING


def _leaf(value: Any, guard: Guard) -> Any:
    if id(value) in guard.numbers:
        return Known(guard.numbers[id(value)], value)
    if isinstance(value, (torch.Tensor, np.ndarray)) or type(value) in _VALUES:
        return value
    if isinstance(value, np.generic):
        return np.asarray(value)
    return Known(id(value), value)


def writes_of(guard: Guard) -> dict[Place, Written]:
    """What was written since the guard has recorded, on a replica: the user's module or a copy."""
    found = {place: Written.of(value, guard, before) for place, before, value in _values(guard)}
    for name, tensor, then in guard.moved_tensors():
        found[Place(name, "tensor")] = Written.of(tensor.detach(), guard, MISSING if then is None else then)
    for name, array, before in guard.changed_arrays():
        found[Place(name, "array")] = Written.of(array, guard, before)
    return found


def _values(guard: Guard) -> Iterator[tuple[Place, Any, Any]]:
    """Places, values before and values of what was written to holders."""
    for holder, key, before in guard.recorded():
        now = get(holder, key, MISSING)
        if now is MISSING:
            yield Place(holder.name, "gone", key), before, None
        elif now is not before and not same_plain(now, before):
            yield from _changed(guard, holder, key, before, now)
    for holder in guard.compared:
        if isinstance(holder.table, dict) and not holder.partial:
            known = set(holder.keys)
            for key in [key for key in holder.table if key not in known and not is_made_by_torch(holder, key)]:
                yield Place(holder.name, "value", key), MISSING, holder.table[key]
    for holder, elements in guard.recorded_elements():
        yield from _elements(holder, elements, list(holder.table))
    for holder in guard.filled_cells():
        yield Place(holder.name, "value"), MISSING, get(holder, None)


def _changed(guard: Guard, holder: Holder, key: Any, before: Any, now: Any) -> Iterator[tuple[Place, Any, Any]]:
    """A value that differs from the one before. A container that is still the same one is looked into."""
    inside = guard.holders.get(id(now))
    if inside is None or type(now) is not type(before):
        yield Place(holder.name, "value", key), before, now
    elif not isinstance(now, dict):
        yield from _elements(inside, list(before), list(now))
    else:
        for one in [one for one in before if one not in now]:
            yield Place(inside.name, "gone", one), before[one], None
        for one, value in list(now.items()):
            if one not in before:
                yield Place(inside.name, "value", one), MISSING, value
            elif not same_plain(value, before[one]):
                yield from _changed(guard, inside, one, before[one], value)


def _elements(holder: Holder, before: list[Any], now: list[Any]) -> Iterator[tuple[Place, Any, Any]]:
    """What has changed among the elements of a list, deque or set."""
    if isinstance(holder.table, set):
        if set(before) != set(now):
            yield Place(holder.name, "all"), [set(before)], [set(now)]
    elif len(now) < len(before) or not all(a is b or same_plain(a, b) for a, b in zip(now, before, strict=False)):
        yield Place(holder.name, "all"), before, now
    elif len(now) > len(before):
        yield Place(holder.name, "more"), [], now[len(before) :]


def present(guard: Guard, place: Place) -> Written | None:
    """What a replica has at a place that only others have written to; None if nothing."""
    if place.kind in ("tensor", "array"):
        known: Sequence[tuple[str, Any]] = guard.contents.tensors if place.kind == "tensor" else guard.contents.arrays
        return next((Written.of(value, guard) for name, value in known if name == place.holder), None)
    holder = guard.by_name.get(place.holder)
    if holder is None or place.kind == "gone":
        return None
    if place.kind == "more":
        return Written.of([], guard)
    if place.kind == "all":
        return Written.of([set(holder.table)] if isinstance(holder.table, set) else list(holder.table), guard)
    value = get(holder, place.key, MISSING)
    return None if value is MISSING else Written.of(value, guard)


def put(guard: Guard, place: Place, value: Any, own: Written | None) -> None:
    """Write a value at a place of a replica that has written `own` there, if anything.

    Args:
        guard: of the replica.
        place: the place.
        value: the value; MISSING for none.
        own: what the replica itself has written.
    """
    if place.kind in ("tensor", "array"):
        for name, tensor in guard.contents.tensors if place.kind == "tensor" else ():
            if name == place.holder and value is not MISSING:
                tensor.data.copy_(value)
        for name, array in guard.contents.arrays if place.kind == "array" else ():
            if name == place.holder:
                array[...] = value
        return
    table = guard.by_name[place.holder].table
    if isinstance(table, types.CellType):
        if value is not MISSING:
            table.cell_contents = value
    elif place.kind in ("value", "gone"):
        if value is MISSING:
            table.pop(place.key, None)
        else:
            table[place.key] = value
    elif isinstance(table, set):
        table.clear()
        table.update(*value)
    else:
        kept = [] if place.kind == "all" else list(table)[: len(table) - (own.spec.num_children if own else 0)]
        table.clear()
        table.extend([*kept, *value])


def restore(guard: Guard, written: dict[Place, Written]) -> None:
    """Give a replica the values from before it wrote these."""
    for place, own in written.items():
        put(guard, place, own.before, own)
