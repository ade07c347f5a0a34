"""Keeps the failure of an optimization from ending a step: it is told once, and the step runs without it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch

Tensors = Sequence[torch.Tensor]


class Attempt:
    """A context for work that training can do without. What it ends with is in `error`, and is not raised.

    Tracing, compiling, loading what was compiled and recording CUDA graphs run much of torch, of the operating system
    and of the user's model on values that are none, and raise whatever these raise: the classes are not known, so all
    errors are kept. None is lost by that. The same code of the user's runs in the step itself, which is never within an
    attempt, and raises there if it means it. What asks Python to end (KeyboardInterrupt, SystemExit) passes.

    Example:
        >>> with Attempt() as attempt:
        ...     raise OSError("no space left")
        >>> attempt.why
        'OSError: no space left'
    """

    def __init__(self) -> None:
        self.error: Exception | None = None

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> bool:
        if not isinstance(error, Exception):
            return False
        self.error = error
        return True

    @property
    def why(self) -> str:
        """Class and text of the error in one line; empty where there was none."""
        return in_words(self.error) if self.error is not None else ""


def in_words(error: BaseException) -> str:
    """Class and text of an error in one line that can be printed."""
    said = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())
    return f"{type(error).__name__}: {said[:300]}" if said else type(error).__name__


class Compiled:
    """A compiled step, with the traced one behind it.

    Args:
        run: the compiled graph. Its last result says whether an index was out of range
            (`fastdp.capture.graph.indices`).
        traced: the same step as it was traced, which raises for such an index.
        results: how many the traced one gives.

    A call that fails, or gives something else than was compiled, is made by the traced step, and all later ones are;
    `failed` says why, empty as long as that has not happened. From any number of threads.
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
        # It only writes gradients, which the traced step writes again.
        return self._traced(*arguments)
