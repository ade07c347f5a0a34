"""`Running`: what Keras and torch need while the replicas of a Keras program run."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING

from fastdp.program.keras.patches import replica_aware
from fastdp.runtime.scopes import Scopes
from fastdp.tensors.threads import replicas_run

if TYPE_CHECKING:
    from fastdp.program.keras.program import KerasProgram


class Running(AbstractContextManager[None]):
    """Held by the host thread around a step: patches, the cores of torch, the template's state, and draws.

    A class rather than a generator over a stack of contexts, whose Python takes longer than a small step's engine.

    Args:
        program: whose replicas run.
        threads: cores for each.
    """

    __slots__ = ("_program", "_scopes", "_threads")

    def __init__(self, program: KerasProgram, threads: int) -> None:
        self._program, self._threads = program, threads
        self._scopes = Scopes()

    def __enter__(self) -> None:
        try:
            self._scopes.enter(replica_aware())
            self._scopes.enter(replicas_run(self._threads))
            state = self._program.template_state
            if state is not None:
                self._scopes.enter(state())
            self._program.begun()
        except BaseException as error:
            self._scopes.leave(error)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._program.draws.end(failed=kind is not None)
            self._program.foreign.end(failed=kind is not None)
            self._program.later.end(failed=kind is not None)
        except BaseException as failure:
            self._scopes.leave(failure)
            raise
        self._scopes.leave(error)
