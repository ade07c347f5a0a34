"""Notices in microseconds whether what a module holds has changed."""

from __future__ import annotations

import gc
import itertools
import marshal
import operator
import types
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from operator import attrgetter, is_, itemgetter, methodcaller
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fastdp.program.torch.following.contents import (
    ATOMS,
    MADE_BY_TORCH,
    Contents,
    is_empty,
    is_plain,
)
from fastdp.program.torch.following.holders import Holder

_call: Callable[[Any, Any], Any] = getattr(operator, "call", lambda function, value: function(value))
_content, _of_cell = methodcaller("tobytes"), attrgetter("cell_contents")
_KEPT_NBYTES = 1 << 20
_FORMAT = 2  # of marshal: without references, so that the bytes depend on the value alone
# A key is gone, a cell is empty, marshal does not know a value, two tensors are not compared to one truth value.
_NO_ANSWER = (LookupError, ValueError, TypeError, RuntimeError, EOFError)


class Guard:
    """What a module held when the guard was made or `record` was called.

    Plain values are compared by value and type, other values by identity, elements of containers too, and arrays by
    content. The values of tensors are not compared.

    Args:
        contents: what the module holds.
        keeps_values: keep what is in small tensors too.

    Attributes:
        compared: the holders that are not part of a plain value of another one.
    """

    def __init__(self, contents: Contents, *, keeps_values: bool = True) -> None:
        self.contents = contents
        self.keeps_values = keeps_values
        self._before: list[torch.Tensor | None] = []
        self._plain: list[tuple[Holder, Sequence[Any]]] = []
        self._others: list[tuple[Holder, Any]] = []
        covered = _within_plain(contents.holders)
        self.compared = [one for one in contents.holders if not one.shared and id(one.table) not in covered]
        for holder in self.compared:
            for key in _keys(holder):
                if not is_plain(get(holder, key)):
                    self._others.append((holder, key))
                elif self._plain and self._plain[-1][0] is holder:
                    self._plain[-1] = holder, [*self._plain[-1][1], key]
                else:
                    self._plain.append((holder, [key]))
        self._getters = [_getter(holder, keys) for holder, keys in self._plain]
        self._owners = [holder.table for holder, _ in self._plain]
        self._other_getters = [_getter(holder, [key]) for holder, key in self._others]
        self._other_owners = [holder.table for holder, _ in self._others]
        self._sized = [one.table for one in self.compared if isinstance(one.table, dict) and not one.partial]
        self._sequences = [one.table for one in self.compared if not isinstance(one.table, (dict, types.CellType))]
        self._empty = [one.table for one in contents.holders if isinstance(one.table, types.CellType)]
        self._empty = [cell for cell in self._empty if is_empty(cell)]
        self._arrays = [array for _, array in contents.arrays]
        self.record()

    def record(self) -> None:
        """Take the present values for the expected ones. What is looked at stays the same."""
        self._values = self._values_now()
        self._sizes = [*map(len, self._sized)]
        self._in_tables = gc.get_referents(*self.contents.tables)
        self._handles = RemovableHandle.next_id
        self._hooked = [hooks for hooks in self.contents.hooks if hooks]
        self._in_hooks = gc.get_referents(*self._hooked)
        self._objects = [*map(_call, self._other_getters, self._other_owners)]
        self._lengths = [*map(len, self._sequences)]
        self._elements = [*itertools.chain.from_iterable(self._sequences)]
        self._in_arrays = [*map(_content, self._arrays)]
        self.note_versions()

    def forget(self) -> None:
        """Let the next comparison find a change."""
        self._values = b""

    def note_versions(self) -> None:
        """Take the present versions of tensors for those from which writes in place count. Keeps small values."""
        tensors = self.contents.tensors
        self._versions = [tensor._version for _, tensor in tensors]
        if tensors and self.keeps_values:
            self._before = [one.detach().clone() if one.nbytes <= _KEPT_NBYTES else None for _, one in tensors]

    def changed(self) -> bool:
        """Whether something differs from what is expected."""
        try:
            return (
                self._values_now() != self._values
                or [*map(len, self._sized)] != self._sizes
                or gc.get_referents(*self.contents.tables) != self._in_tables
                or self._hooks_changed()
                or (bool(self._objects) and not self._same_objects())
                or (bool(self._sequences) and not self._same_elements())
                or (bool(self._empty) and not all(map(is_empty, self._empty)))
                or (bool(self._arrays) and [*map(_content, self._arrays)] != self._in_arrays)
            )
        except _NO_ANSWER:
            return True

    def structure_changed(self) -> bool:
        """Whether parts, parameters, buffers or hooks were added, removed or replaced."""
        try:
            return gc.get_referents(*self.contents.tables) != self._in_tables or self._hooks_changed()
        except _NO_ANSWER:
            return True

    # What was recorded, for comparisons in detail.

    @cached_property
    def holders(self) -> dict[int, Holder]:
        """The holders by the identity of their tables."""
        return {id(holder.table): holder for holder in self.contents.holders}

    @cached_property
    def numbers(self) -> dict[int, int]:
        """The numbers of what each replica has one of, by identity: the owners of what is held, and given tensors."""
        return {id(one): at for at, one in enumerate(self.known)}

    @cached_property
    def known(self) -> list[Any]:
        """What each replica has one of, in one order."""
        return [*(holder.owner for holder in self.contents.holders), *self.contents.given]

    @cached_property
    def by_name(self) -> dict[str, Holder]:
        """The holders by name."""
        return {holder.name: holder for holder in self.contents.holders}

    def recorded(self) -> Iterator[tuple[Holder, Any, Any]]:
        """Each holder, key and value of the record."""
        for (holder, keys), values in zip(self._plain, marshal.loads(self._values), strict=True):
            for key, value in zip(keys, values if len(keys) > 1 else (values,), strict=True):
                yield holder, key, value
        for (holder, key), value in zip(self._others, self._objects, strict=True):
            yield holder, key, value

    def recorded_elements(self) -> Iterator[tuple[Holder, list[Any]]]:
        """The lists, deques and sets with their elements of the record."""
        at = 0
        for table, length in zip(self._sequences, self._lengths, strict=True):
            yield self.holders[id(table)], self._elements[at : at + length]
            at += length

    def filled_cells(self) -> Iterator[Holder]:
        """The cells of closures that were empty."""
        return (self.holders[id(cell)] for cell in self._empty if not is_empty(cell))

    def changed_arrays(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """The arrays whose content differs, and what it was."""
        for (name, array), content in zip(self.contents.arrays, self._in_arrays, strict=True):
            if _content(array) != content:
                yield name, array, np.frombuffer(content, array.dtype).reshape(array.shape)

    def moved_tensors(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor | None]]:
        """The tensors that were written to in place, and what was in them; None for large ones."""
        for at, ((name, tensor), version) in enumerate(zip(self.contents.tensors, self._versions, strict=True)):
            if tensor._version != version:
                yield name, tensor, self._before[at] if self.keeps_values else None

    def wrote(self) -> bool:
        """Whether something was written since the record, also in place to tensors."""
        return self.changed() or next(self.moved_tensors(), None) is not None

    def keeps_kinds(self) -> bool:
        """Whether there are the same attributes and keys as before, and plain values where these were."""
        try:
            return [*map(len, self._sized)] == self._sizes and len(self._values_now()) > 0
        except _NO_ANSWER:
            return False

    def plain_changes(self) -> list[tuple[Holder, Any, Any]] | None:
        """The holders, keys and values that have changed, if these are all changes and can be assigned; else None."""
        changes = []
        try:
            now = [*map(_call, self._getters, self._owners)]
            for (holder, keys), values, then in zip(self._plain, now, marshal.loads(self._values), strict=True):
                pairs = zip(values, then, strict=True) if len(keys) > 1 else [(values, then)]
                for key, (value, before) in zip(keys, pairs, strict=True):
                    if marshal.dumps(value, _FORMAT) != marshal.dumps(before, _FORMAT):
                        if not _is_assigned(value):
                            return None
                        changes.append((holder, key, value))
        except _NO_ANSWER:
            return None
        before, self._values = self._values, self._values_now()
        alone = not self.changed()
        self._values = before
        return changes if alone else None

    def _values_now(self) -> bytes:
        return marshal.dumps([*map(_call, self._getters, self._owners)], _FORMAT)

    def _hooks_changed(self) -> bool:
        """Whether hooks were added, removed or exchanged. Looks at all tables only after something was hooked."""
        if gc.get_referents(*self._hooked) != self._in_hooks:
            return True
        if RemovableHandle.next_id != self._handles:
            if [hooks for hooks in self.contents.hooks if hooks] != self._hooked:
                return True
            self._handles = RemovableHandle.next_id
        return False

    def _same_objects(self) -> bool:
        return all(map(is_, map(_call, self._other_getters, self._other_owners), self._objects))

    def _same_elements(self) -> bool:
        if [*map(len, self._sequences)] != self._lengths:
            return False
        return all(map(is_, itertools.chain.from_iterable(self._sequences), self._elements))


def _is_assigned(value: Any) -> bool:
    """Whether a plain value cannot be changed, so that copies may have the same object."""
    return type(value) in ATOMS or (type(value) is tuple and all(map(_is_assigned, value)))


def _keys(holder: Holder) -> Sequence[Any]:
    """What a holder has, as far as it is looked up by keys."""
    if isinstance(holder.table, types.CellType):
        return () if is_empty(holder.table) else (None,)
    return holder.keys


def get(holder: Holder, key: Any, *default: Any) -> Any:
    """What a holder has under a key, or the default."""
    table = holder.table
    if isinstance(table, types.CellType):
        return default[0] if default and is_empty(table) else table.cell_contents
    return table.get(key, *default) if default else table[key]


def same_plain(value: Any, other: Any) -> bool:
    """Whether two values are plain, and the same ones of the same types."""
    if not (is_plain(value) and is_plain(other)):
        return False
    return marshal.dumps(value, _FORMAT) == marshal.dumps(other, _FORMAT)


def is_made_by_torch(holder: Holder, key: Any) -> bool:
    """Whether an attribute is one that torch itself keeps on every module."""
    return isinstance(holder.owner, nn.Module) and key in MADE_BY_TORCH


def _within_plain(holders: Sequence[Holder]) -> set[int]:
    """The identities of the containers in plain values, which are compared with these."""
    found: set[int] = set()

    def add(value: Any) -> None:
        if type(value) not in ATOMS:
            found.add(id(value))
            for one in value.values() if isinstance(value, dict) else value:
                add(one)

    for holder in holders:
        for key in _keys(holder) if not holder.shared else ():
            value = get(holder, key)
            if type(value) not in ATOMS and is_plain(value):
                add(value)
    return found


def _getter(holder: Holder, keys: Sequence[Any]) -> Callable[[Any], Any]:
    return _of_cell if isinstance(holder.table, types.CellType) else itemgetter(*keys)
