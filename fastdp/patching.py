"""Replaces functions of a library while somebody needs the replacements, and restores them afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

_ABSENT = object()  # the owner itself lacks the attribute and inherits one
_lock = threading.Lock()  # shared by all patches, which may change the same places


class _Place:
    """A patched attribute of a class or module: its value before, its replacement, and the value that was replaced."""

    __slots__ = ("attributes", "before", "name", "owner", "replacement", "replacement_of", "source")

    def __init__(self, owner: Any, name: str, replacement_of: Callable[[Any], Any]) -> None:
        self.owner, self.name, self.replacement_of = owner, name, replacement_of
        self.attributes: Mapping[str, Any] = vars(owner)
        self.source = self.before = self.replacement = _ABSENT


class Patch:
    """Replacements in a library, active while the patch has users: a context manager that any thread may enter.

    Args:
        changes: (owner, name, replacement_of) of each place, in the order of patching. The owner is a class or a
            module. `replacement_of(present)` gets the present value and returns its replacement.

    The first user puts the replacements in place. The last one removes them in reverse order. If a change fails, the
    changes before it are undone and the error is raised.

    A patch may end before a later patch of the same place. The later replacement then stays on top, and its end
    restores the value from before both. A replacement that code outside fastdp put on top stays too. In both cases the
    replacement on top may call one whose patch has no users: that one must then behave as the original.

    Example:
        >>> import math
        >>> with Patch([(math, "floor", lambda floor: lambda x: -floor(-x))]):
        ...     math.floor(0.5)
        1
        >>> math.floor(0.5)
        0
    """

    _in_place: ClassVar[list[Patch]] = []

    def __init__(self, changes: Iterable[tuple[Any, str, Callable[[Any], Any]]]) -> None:
        self._places = [_Place(*change) for change in changes]
        self._replaced = 0  # how many of the places hold replacements
        self._users = 0

    @property
    def places(self) -> frozenset[tuple[Any, str]]:
        """The (owner, name) of each place that the patch changes, active or not."""
        return frozenset((place.owner, place.name) for place in self._places)

    def enter(self) -> None:
        """Add a user.

        Raises:
            AttributeError: an owner lacks the attribute. Nothing is changed.
        """
        with _lock:
            if not self._users:
                Patch._in_place.append(self)
                try:
                    self._put()
                except BaseException:
                    self._undo()
                    raise
            self._users += 1

    def leave(self) -> None:
        """Remove a user.

        Raises:
            RuntimeError: the patch has no users.
        """
        with _lock:
            if not self._users:
                raise RuntimeError("a patch was left more often than it was entered")
            self._users -= 1
            if not self._users:
                self._undo()

    def __enter__(self) -> None:
        self.enter()

    def __exit__(self, *error: object) -> None:
        self.leave()

    def _put(self) -> None:
        """Put the replacements in place. An earlier replacement is reused where it replaces the same value again."""
        for place in self._places:
            place.before = before = place.attributes.get(place.name, _ABSENT)
            if before is _ABSENT or before is not place.source:
                place.replacement = place.replacement_of(getattr(place.owner, place.name))
                place.source = before
            self._replaced += 1  # before the change itself, so that an interrupt in between is undone too
            setattr(place.owner, place.name, place.replacement)

    def _undo(self) -> None:
        """Remove the replacements, the last first."""
        Patch._in_place.remove(self)
        while self._replaced:
            place = self._places[self._replaced - 1]
            if place.attributes.get(place.name, _ABSENT) is not place.replacement:
                _pass_on(place)
            elif place.before is _ABSENT:
                delattr(place.owner, place.name)
            else:
                setattr(place.owner, place.name, place.before)
            self._replaced -= 1


def _pass_on(below: _Place) -> None:
    """If another patch lies on top of this place, let it restore the value from before both when it ends."""
    for patch in Patch._in_place:
        for place in patch._places[: patch._replaced]:
            if (place.owner, place.name) == (below.owner, below.name) and place.before is below.replacement:
                place.before = below.before
