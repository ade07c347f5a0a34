"""What devices do in a forked child: it has their memory, and none of their threads."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Forked(Protocol):
    """Something with threads."""

    def after_fork(self) -> None:
        """Called in a forked child, which has one thread: the one that forked."""


_known: weakref.WeakSet[Forked] = weakref.WeakSet()


def watch(one: Forked) -> None:
    """Have `after_fork` called in children of this process, as long as the object lives."""
    _known.add(one)


def _in_child() -> None:
    for one in list(_known):
        one.after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_in_child)
