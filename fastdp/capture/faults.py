"""Keeps the failure of an optimization from ending a step: it is told once, and the step runs without it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch

Tensors = Sequence[torch.Tensor]


class Attempt:
    """A context for optional work. It stores an exception in `error` instead of raising it.

    Tracing, compiling, loading artifacts and recording CUDA graphs run much of torch, the operating system and the
    user's model (on fake values), and raise whatever these raise. The classes are not known, so every exception is
    caught. No error of the user's code is lost: the step itself runs the same code outside of any attempt and raises
    there. KeyboardInterrupt and SystemExit pass through.

    Args:
        through: exceptions that pass through too.

    Example:
        >>> with Attempt() as attempt:
        ...     raise OSError("no space left")
        >>> attempt.why
        'OSError: no space left'
    """

    def __init__(self, through: type[Exception] | tuple[type[Exception], ...] = ()) -> None:
        self.error: Exception | None = None
        self._through = through

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> bool:
        if not isinstance(error, Exception) or isinstance(error, self._through):
            return False
        self.error = error
        return True

    @property
    def why(self) -> str:
        """Class and text of the error in one line; empty without an error."""
        return in_words(self.error) if self.error is not None else ""


def in_words(error: BaseException) -> str:
    """Class and text of an error in one printable line."""
    said = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())
    return f"{type(error).__name__}: {said[:300]}" if said else type(error).__name__


class Compiled:
    """A compiled step that falls back to the traced one. Thread-safe.

    Args:
        run: the compiled graph. Its last result says whether an index was out of range
            (`fastdp.capture.graph.indices`).
        traced: the traced step, which raises an error for such an index.
        results: the number of results of the traced step.

    If a call fails or returns a wrong number of results, the traced step repeats it and serves all later calls.
    `failed` then says why; until then it is empty.
    """

    def __init__(self, run: Callable[..., Tensors], traced: Callable[..., Tensors], results: int) -> None:
        self._run, self._traced, self._results = run, traced, results
        self._lock = threading.Lock()
        self.failed = ""

    def __call__(self, *arguments: torch.Tensor) -> Tensors:
        """The results of the step."""
        if self.failed:
            return self._traced(*arguments)
        with Attempt() as attempt:
            *results, wrong = self._run(*arguments)
            if len(results) != self._results:
                raise ValueError(f"the compiled step gave {len(results)} results, not {self._results}")
            if not wrong.item():
                return results
        if attempt.error is not None:
            with self._lock:
                self.failed = self.failed or f"the compiled step failed with {attempt.why}"
        # The compiled step has only written gradients, which the traced step overwrites.
        return self._traced(*arguments)
