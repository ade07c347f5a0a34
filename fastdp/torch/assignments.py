"""Sees what modules keep in attributes while they run: replicas would keep that of their own rows."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_TABLES = frozenset(vars(nn.Module()))
_CONTAINERS = (list, dict, set, deque)


class KeepsValuesError(RuntimeError):
    """A module assigns an attribute in forward that it did not assign in the calls before."""


class Assignments:
    """What a module's parts assign to attributes in a call, and which containers they change.

    Numbers that grow by equal amounts in each call are counters: every replica counts the same calls. Anything else
    that forward leaves in an attribute is a value of the rows that it saw.

    Attributes:
        steps: by class and attribute: the amounts by which numbers have grown, in order.
        kept: the name of an attribute that got another kind of value, or whose container was changed, if there is one.
    """

    def __init__(self) -> None:
        self.steps: dict[tuple[type, str], list[float]] = {}
        self.kept: str | None = None

    def note(self, part: nn.Module, name: str, value: Any) -> None:
        """Called before `part.name = value`."""
        before = part.__dict__.get(name)
        if _is_number(before) and _is_number(value):
            self.steps.setdefault((type(part), name), []).append(value - before)
        else:
            self.keep(type(part), name)

    def keep(self, kind: type, name: str) -> None:
        """Note that an attribute has got a value, or has been changed."""
        self.kept = self.kept or f"{kind.__name__}.{name}"

    def agrees_with(self, before: Assignments | None) -> bool:
        """Whether nothing was kept, and numbers have grown as in the call before."""
        if self.kept is not None:
            return False
        if not self.steps:
            return True
        return before is not None and self.steps == before.steps and all(all(steps) for steps in self.steps.values())

    @property
    def first(self) -> str:
        """The name of an attribute that was assigned."""
        return self.kept or next(f"{kind.__name__}.{name}" for kind, name in self.steps)


class _Refusing(Assignments):
    """Lets replicas count on, and refuses other assignments."""

    def __init__(self, allowed: Assignments) -> None:
        super().__init__()
        self._allowed = frozenset(allowed.steps)

    def note(self, part: nn.Module, name: str, value: Any) -> None:
        """Called before `part.name = value`.

        Raises:
            KeepsValuesError: it is no number that the module counts in each call.
        """
        if (type(part), name) not in self._allowed or not _is_number(value):
            raise KeepsValuesError(f"forward assigns the attribute {type(part).__name__}.{name}")


_watching: list[Assignments] = []  # one, or none


@contextmanager
def watched(parts: Sequence[nn.Module]) -> Iterator[Assignments]:
    """Note what the parts of a module assign, in any thread."""
    found, before = Assignments(), _contents(parts)
    _watching.append(found)
    try:
        yield found
    finally:
        _watching.pop()
        after = _contents(parts)
        for (at, name), elements in after.items():
            if not _same(before.get((at, name)), elements):
                found.keep(type(parts[at]), name)


@contextmanager
def refused(allowed: Assignments) -> Iterator[None]:
    """Refuse assignments but those of counters, which the calls before have made too.

    A refused assignment raises `KeepsValuesError` where it is made.
    """
    _watching.append(_Refusing(allowed))
    try:
        yield
    finally:
        _watching.pop()


def noticing(original: Callable[[nn.Module, str, Any], None]) -> Callable[[nn.Module, str, Any], None]:
    """`Module.__setattr__` that tells whoever watches, but not of parameters, buffers and what torch itself assigns."""

    def __setattr__(self: nn.Module, name: str, value: Any) -> None:
        if _watching and not torch.compiler.is_compiling():
            caller = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
            tables = (self.__dict__.get("_parameters", ()), self.__dict__.get("_buffers", ()))
            if caller not in ("torch", "fastdp") and not any(name in table for table in tables):
                _watching[-1].note(self, name, value)
        original(self, name, value)

    return __setattr__


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _contents(parts: Sequence[nn.Module]) -> dict[tuple[int, str], list[Any]]:
    """The elements of containers, tensors and plain objects that parts have as attributes, by part and name."""
    found = {}
    for at, part in enumerate(parts):
        for name, value in vars(part).items():
            if name in _TABLES:
                continue
            if isinstance(value, torch.Tensor):
                found[at, name] = [value, value._version]
            elif isinstance(value, dict):
                found[at, name] = [*value.keys(), *value.values()]
            elif isinstance(value, _CONTAINERS):
                found[at, name] = list(value)
            elif _is_users(type(value)) and not callable(value):
                found[at, name] = list(getattr(value, "__dict__", {}).values())
    return found


def _is_users(kind: type) -> bool:
    """Whether a class is neither Python's nor torch's."""
    return kind.__module__.partition(".")[0] not in ("builtins", "torch", "functools", "types", "numpy")


def _same(before: list[Any] | None, after: list[Any]) -> bool:
    """Whether two lists hold the same objects."""
    if before is None or len(before) != len(after):
        return False
    return all(a is b or (type(a) is int and a == b) for a, b in zip(before, after, strict=True))
