"""Snapshots of plain containers: they put back what was in a container, and keep the container itself."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable
from operator import is_
from typing import Any

_CHANGEABLE = (dict, list, set, deque)


def copied(value: Any) -> Any:
    """Copy the containers of a value, at any depth, to compare them later."""
    if isinstance(value, dict):
        return {key: copied(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        copies = list(map(copied, value))
        return copies if isinstance(value, list) else value if all(map(is_, copies, value)) else tuple(copies)
    return copy.copy(value) if isinstance(value, (set, deque)) else value


class Snapshot:
    """A value, and what is in its containers, at any depth.

    Args:
        value: a container or anything else. Others may refer to a container, as torch's handles of hooks do: so
            `restored` is the same object, of the same class and in the same order.
    """

    __slots__ = ("_inner", "_value")

    def __init__(self, value: Any) -> None:
        self._value = value
        self._inner: Any = None
        if isinstance(value, dict):
            self._inner = {key: Snapshot(one) for key, one in value.items()}
        elif isinstance(value, (list, tuple, set, deque)):
            self._inner = [Snapshot(one) for one in value]

    def restored(self) -> Any:
        """The value, with what was in it."""
        if self._inner is None:
            return self._value
        if isinstance(self._value, dict):
            items = {key: one.restored() for key, one in self._inner.items()}
            refill(self._value, items)
        else:
            elements = [one.restored() for one in self._inner]
            if isinstance(self._value, _CHANGEABLE):
                refill(self._value, elements)
        return self._value


def refill(container: Any, content: Any) -> None:
    """Give a container this content, a dict for a dict, if it has another one or another order."""
    if isinstance(container, dict):
        for key in [key for key in container if key not in content]:
            del container[key]
        if list(container) != list(content) or not all(map(is_, container.values(), content.values())):
            container.clear()
            for key, value in content.items():
                container[key] = value
    elif isinstance(container, set):
        if {*map(id, container)} != {*map(id, content)}:
            container.clear()
            container.update(content)
    elif not _are(container, content):
        container.clear()
        container.extend(content)


def _are(some: Iterable[Any], others: list[Any]) -> bool:
    mine = list(some)
    return len(mine) == len(others) and all(map(is_, mine, others))
