"""Captured passes of one model by kind of call, each kind with a guard of its own.

A training step is one thing that runs again and again. Calls differ: in evaluation or training mode, under autocast or
not, with other arguments. What one kind reads, or what keeps it from being captured, says nothing about another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Any, Generic

from fastdp.capture.shapes import CapturedT
from fastdp.capture.steps import Captures

# Further kinds run eagerly: perhaps each call is of another one.
MOST_KINDS = 16


class CapturesByKind(Generic[CapturedT]):
    """The captured passes of each kind of call.

    Args:
        make: makes the captures of a new kind: `make(kind)`.

    As with `Captures`, one thread at a time uses it.
    """

    def __init__(self, make: Callable[[Any], Captures[CapturedT]]) -> None:
        self._make = make
        self._known: dict[Hashable, tuple[str, Captures[CapturedT]]] = {}

    def of(self, kind: Hashable, label: str) -> Captures[CapturedT] | None:
        """The captures of a kind; None if there are too many kinds. `label` names it in the report."""
        found = self._known.get(kind)
        if found is None:
            if len(self._known) >= MOST_KINDS:
                return None
            found = self._known[kind] = label, self._make(kind)
        return found[1]

    @property
    def report(self) -> list[dict[str, Any]]:
        """The entries of all kinds, each with the `mode` that its label is."""
        found = [{"mode": label} | entry for label, captures in self._known.values() for entry in captures.report]
        if len(self._known) >= MOST_KINDS:
            found.append({"how": "eager", "why": f"further kinds of calls than these {MOST_KINDS}"})
        return found

    @property
    def compiling(self) -> bool:
        """As `Captures.compiling`, of any kind."""
        return any(captures.compiling for _, captures in self._known.values())

    def wait(self, timeout: float | None = None) -> None:
        """As `Captures.wait`, of all kinds together."""
        deadline = None if timeout is None else time.monotonic() + timeout
        for _, captures in self._known.values():
            captures.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
