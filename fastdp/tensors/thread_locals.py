"""Attributes of `threading.local` objects: the threads of replicas have those of the user's thread."""

from __future__ import annotations

import collections
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class ThreadLocals:
    """What some objects have on the present thread.

    Args:
        objects: the objects.
    """

    __slots__ = ("_kept",)

    def __init__(self, objects: Sequence[threading.local]) -> None:
        self._kept = [(one, dict(vars(one))) for one in objects]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the objects the same attributes on another thread, containers as copies.

        Raises:
            RuntimeError: something has changed them meanwhile.
        """
        if not self._kept:
            yield
            return
        before = [dict(vars(one)) for one, _ in self._kept]
        for one, values in self._kept:
            _put(one, {name: _copied(value) for name, value in values.items()})
        try:
            yield
            for one, values in self._kept:
                _check(vars(one), values)
        finally:
            for (one, _), values in zip(self._kept, before, strict=True):
                _put(one, values)


def _check(now: dict[str, Any], then: dict[str, Any]) -> None:
    for name in {**now, **then}:
        if not _same(now.get(name, _GONE), then.get(name, _GONE)):
            raise RuntimeError(
                f"The module changes the attribute {name!r} of a threading.local in forward, and each device runs in a "
                "thread of its own, which keeps nothing. Keep it on the module (self), return it, or use gpus=[0]."
            )


def _put(local: threading.local, values: dict[str, Any]) -> None:
    """Give a `threading.local` these attributes, on the present thread."""
    vars(local).clear()
    vars(local).update(values)


def _copied(value: Any) -> Any:
    """A value with copies of the containers in it."""
    if type(value) in (list, set, collections.deque):
        return type(value)(map(_copied, value))
    return {key: _copied(one) for key, one in value.items()} if type(value) is dict else value


def _same(value: Any, other: Any) -> bool:
    """Whether two values are the same, by identity of what containers have."""
    if type(value) is not type(other) or type(value) not in (list, set, collections.deque, dict):
        return value is other or (isinstance(value, _PLAIN) and value == other)
    if len(value) != len(other) or (type(value) is dict and list(value) != list(other)):
        return False
    if type(value) is set:  # a copy may have another order
        return bool(value == other)
    pairs = zip(value.values(), other.values(), strict=True) if type(value) is dict else zip(value, other, strict=True)
    return all(_same(one, two) for one, two in pairs)


_PLAIN = (bool, int, float, complex, str, bytes)
_GONE = object()
