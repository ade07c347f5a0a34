"""Things that hold values of a module and can be changed: attributes, containers, closures, globals."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastdp.capture.reach import slots_of_class


@dataclass(slots=True)
class Holder:
    """Something that holds values and can be changed.

    Attributes:
        name: where it is, for messages; empty for the module itself.
        table: a dict, also one of attributes or of globals; a list, deque or set; or the cell of a closure.
        keys: of a dict, those that are looked at.
        owner: the object whose attributes `table` has; `table` itself otherwise.
        partial: a dict that may have other keys, which nobody looks at.
        shared: all copies share it with the module.
    """

    name: str
    table: Any
    keys: Sequence[Any]
    owner: Any
    partial: bool = False
    shared: bool = False

    def twin(self, copies: dict[int, Any]) -> Any:
        """The table of the owner's copy; None if the copy shares it. `copies` are by the identity of what is copied."""
        other = copies.get(id(self.owner), self.owner)
        if other is self.owner:
            return None
        if self.owner is self.table:
            return other
        return Slots(other) if isinstance(self.table, Slots) else vars(other)


class _Attributes(dict[str, Any]):
    """Attributes of an owner as a mapping. A subclass has `__iter__`, `__getitem__`, `get` and `__contains__`."""

    def __init__(self, owner: Any) -> None:
        super().__init__()
        self._owner = owner

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self._owner, name, value)

    def pop(self, name: str, default: Any = None) -> Any:
        if name in self:
            delattr(self._owner, name)

    def __len__(self) -> int:
        return len(list(iter(self)))

    def items(self) -> Any:
        return [(name, self[name]) for name in self]


class Slots(_Attributes):
    """The attributes of an object that are in slots of its class, as the mapping that they would be without slots."""

    def __getitem__(self, name: str) -> Any:
        try:
            return getattr(self._owner, name)
        except AttributeError as error:
            raise KeyError(name) from error

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self._owner, name, default)

    def __iter__(self) -> Iterator[str]:
        names = (name for cls in type(self._owner).__mro__ for name in slots_of_class(cls))
        return (name for name in names if hasattr(self._owner, name))

    def __contains__(self, name: object) -> bool:
        return name in list(iter(self))


class ClassAttributes(_Attributes):
    """The attributes of a class that are no functions, as a mapping."""

    def __getitem__(self, name: str) -> Any:
        return vars(self._owner)[name]

    def get(self, name: str, default: Any = None) -> Any:
        return vars(self._owner).get(name, default)

    def __iter__(self) -> Iterator[str]:
        held = list(vars(self._owner).items())
        return (name for name, one in held if not (name.startswith(("__", "_abc_")) or isinstance(one, CODE)))

    def __contains__(self, name: object) -> bool:
        return name in vars(self._owner)


CODE = (types.FunctionType, staticmethod, classmethod, property, functools.cached_property)
