"""Notices in microseconds whether what a module holds has changed."""

from __future__ import annotations

import gc
import itertools
import marshal
import operator
import types
from collections.abc import Callable, Sequence
from operator import attrgetter, is_, itemgetter, methodcaller
from typing import Any

from torch.utils.hooks import RemovableHandle

from fastdp.program.torch.following.contents import ATOMS, Contents, Holder, is_empty, is_plain

_call: Callable[[Any, Any], Any] = getattr(operator, "call", lambda function, value: function(value))
_content, _of_cell = methodcaller("tobytes"), attrgetter("cell_contents")
_FORMAT = 2  # of marshal: without references, so that the bytes depend on the value alone
# A key is gone, a cell is empty, marshal does not know a value, two tensors are not compared to one truth value.
_NO_ANSWER = (LookupError, ValueError, TypeError, RuntimeError)


class Guard:
    """What a module held when the guard was made or `record` was called.

    Plain values are compared by value and type, other values by identity, elements of containers too, and arrays by
    content. The values of tensors are not compared.

    Args:
        contents: what the module holds.
    """

    def __init__(self, contents: Contents) -> None:
        self.contents = contents
        self._plain: list[tuple[Holder, Sequence[Any]]] = []
        self._others: list[tuple[Holder, Any]] = []
        for holder in contents.holders:
            for key in _keys(holder) if holder.compared else ():
                if not is_plain(_get(holder, key)):
                    self._others.append((holder, key))
                elif self._plain and self._plain[-1][0] is holder:
                    self._plain[-1] = holder, [*self._plain[-1][1], key]
                else:
                    self._plain.append((holder, [key]))
        self._getters = [_getter(holder, keys) for holder, keys in self._plain]
        self._owners = [holder.table for holder, _ in self._plain]
        self._other_getters = [_getter(holder, [key]) for holder, key in self._others]
        self._other_owners = [holder.table for holder, _ in self._others]
        self._sized = [one.table for one in contents.holders if isinstance(one.table, dict) and not one.partial]
        self._sequences = [
            one.table for one in contents.holders if one.compared and not isinstance(one.table, (dict, types.CellType))
        ]
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


def _get(holder: Holder, key: Any) -> Any:
    return _of_cell(holder.table) if isinstance(holder.table, types.CellType) else holder.table[key]


def _getter(holder: Holder, keys: Sequence[Any]) -> Callable[[Any], Any]:
    return _of_cell if isinstance(holder.table, types.CellType) else itemgetter(*keys)
