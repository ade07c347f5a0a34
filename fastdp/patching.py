"""Puts functions in the place of a library's for as long as somebody needs them, and takes them out again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

_ABSENT = object()  # the owner has no such attribute of its own: it inherits one
_lock = threading.Lock()  # of all patches: they may share places


class _Place:
    """An attribute of a class or module: what its owner had there before, what it was replaced by, and from what."""

    __slots__ = ("attributes", "before", "name", "owner", "replacement", "replacement_of", "source")

    def __init__(self, owner: Any, name: str, replacement_of: Callable[[Any], Any]) -> None:
        self.owner, self.name, self.replacement_of = owner, name, replacement_of
        self.attributes: Mapping[str, Any] = vars(owner)
        self.source = self.before = self.replacement = _ABSENT


class Patch:
    """Replacements in a library, in place while anybody uses the patch: a context manager that any thread may enter.

    Args:
        changes: (owner, name, replacement_of) of each place, in the order in which they are made. The owner is a class
            or a module; `replacement_of(present)` gets what is there, and gives what is to be there.

    The first user puts the replacements in place, and the last takes them out in reverse order. If a change fails,
    those before it are undone, and the error is raised.

    A patch may end before another one that came later to the same place. The later one's replacement then stays on top,
    and in the end leaves behind what was there before both. What code outside of fastdp has put on top stays too.
    Either way a replacement may be called when nobody uses its patch, by the one on top of it: it then has to behave as
    what it replaced.

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
        self._replaced = 0  # so many of the places hold replacements
        self._users = 0

    @property
    def places(self) -> frozenset[tuple[Any, str]]:
        """What the patch changes, as (owner, name), whether it is in place or not."""
        return frozenset((place.owner, place.name) for place in self._places)

    def enter(self) -> None:
        """One more user.

        Raises:
            AttributeError: a place is empty. Nothing has changed then.
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
        """One user less.

        Raises:
            RuntimeError: there is none.
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
        """Put the replacements in place: those of the last time where the same is there to be replaced."""
        for place in self._places:
            place.before = before = place.attributes.get(place.name, _ABSENT)
            if before is _ABSENT or before is not place.source:
                place.replacement = place.replacement_of(getattr(place.owner, place.name))
                place.source = before
            self._replaced += 1  # before it is: an interrupt in between leaves nothing behind
            setattr(place.owner, place.name, place.replacement)

    def _undo(self) -> None:
        """Take out the replacements, the last first."""
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
    """Let the patch on top of a place, if it is one of fastdp's, leave behind in the end what was there before both."""
    for patch in Patch._in_place:
        for place in patch._places[: patch._replaced]:
            if (place.owner, place.name) == (below.owner, below.name) and place.before is below.replacement:
                place.before = below.before
