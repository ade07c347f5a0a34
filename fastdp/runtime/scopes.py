"""`Scopes`: contexts that are entered one after another and left together, the last one first."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TypeVar

T = TypeVar("T")


class Scopes:
    """What `contextlib.ExitStack` does for contexts that suppress no error, in a fraction of its Python.

    It is entered several times in each step, where a small model's step takes a millisecond.
    """

    __slots__ = ("_entered",)

    def __init__(self) -> None:
        self._entered: list[AbstractContextManager[object]] = []

    def enter(self, scope: AbstractContextManager[T]) -> T:
        """Enter a context that lasts until `leave`, and return its value."""
        value = scope.__enter__()
        self._entered.append(scope)
        return value

    def leave(self, error: BaseException | None = None) -> None:
        """Leave all contexts, also if one of them fails. They see the error, and cannot suppress it."""
        if self._entered:
            try:
                self._entered.pop().__exit__(
                    None if error is None else type(error), error, None if error is None else error.__traceback__
                )
            finally:
                self.leave(error)
