"""`profile_batch` of the TensorBoard callback: a trace of the steps of some batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdp.tracing.trace import Trace
from fastdp.warn import warn_user


class Profile:
    """Records a trace of the batches that are asked for, once in each `fit`.

    Args:
        asked: as Keras takes it: 0, the number of a batch (from 1), or a pair of them.
        folder: of the trace.

    Attributes:
        batches: the first and the last batch; None for none.

    Raises:
        ValueError: `asked` is none of these.
    """

    def __init__(self, asked: Any, folder: Path) -> None:
        self.batches = profiled_batches(asked)
        self._folder = folder
        self._trace: Trace | None = None

    def begin(self, batch: int) -> None:
        """A batch begins. The first one that is asked for begins the trace.

        Raises:
            OSError: the file cannot be written.
        """
        if self.batches is not None and batch == self.batches[0]:
            self._folder.mkdir(parents=True, exist_ok=True)
            last = f"_{self.batches[1]}" if self.batches[1] > batch else ""
            self._trace = Trace(self._folder / f"trace_batch_{batch}{last}.json").start()

    def end(self, batch: int) -> None:
        """A batch is over. The last one ends the trace."""
        if self.batches is not None and batch == self.batches[1]:
            self.close()

    def check(self, batches: int) -> None:
        """Warn at the end of `fit` if it had too few batches to begin."""
        if self.batches is not None and batches < self.batches[0]:
            warn_user(
                f"TensorBoard(profile_batch=...) has recorded nothing: it asks for batch {self.batches[0]}, and this "
                f"fit() had {batches}, counted over all epochs."
            )

    def close(self) -> None:
        """Write the trace, if one is being recorded."""
        trace, self._trace = self._trace, None
        if trace is None:
            return
        trace.close()
        if not trace.steps:
            warn_user(
                f"{trace.path} has no steps: a trace is of the steps that fastdp runs, and these were plain Keras's. "
                "Wrap the model by fastdp.wrap, or use torch.profiler.profile() around fit()."
            )


def profiled_batches(asked: Any) -> tuple[int, int] | None:
    """The first and the last batch to profile, counted from 1; None for none. Takes what Keras takes.

    Raises:
        ValueError: it is neither a number nor a pair of numbers, or they are not in order.
    """
    try:
        parts = asked.split(",") if isinstance(asked, str) else asked
        numbers = [int(part) for part in parts] if isinstance(parts, (list, tuple)) else [int(parts)]
    except (TypeError, ValueError, OverflowError):
        numbers = []
    is_pair = len(numbers) == 2 and 0 < numbers[0] <= numbers[1]
    if not is_pair and (len(numbers) != 1 or numbers[0] < 0):
        raise ValueError(
            "`profile_batch` must be 0, the number of a batch (from 1), or a pair of them: (10, 20). "
            f"Received: {asked!r}."
        )
    return (numbers[0], numbers[-1]) if numbers[0] else None
