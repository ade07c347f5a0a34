"""`--find-batch`: the largest batch that fits into memory, and the one with the best throughput."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

GROWTH = 0.02  # a larger batch is faster if it gains more than this part
EQUAL = 0.01  # the smallest batch within this part of the best throughput is the best one
FLAT = 3  # doublings without gain, after which host memory is not filled further
FINE = 16  # the largest batch is found to a sixteenth
SLOW_SECONDS = 10.0  # a step that takes longer ends the search
MEMORY_PART = 0.8  # of the free host memory that a batch may take


@dataclass(frozen=True)
class Tried:
    """What a batch size gave.

    Attributes:
        batch: rows of the global batch.
        samples_per_second: None if it failed.
        reason: why it failed.
        no_memory: whether it failed for want of memory, so that a smaller one may fit.
        step_seconds: seconds of a step.
        nbytes: peak host memory of the process; None where it is not known, or does not matter.
    """

    batch: int
    samples_per_second: float | None = None
    reason: str = ""
    no_memory: bool = False
    step_seconds: float = 0.0
    nbytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """For the result: the batch, with its throughput or the reason of its failure."""
        if self.samples_per_second is None:
            return {"batch": self.batch, "reason": self.reason}
        return {"batch": self.batch, "samples_per_second": float(f"{self.samples_per_second:.6g}")}


class BatchSearch:
    """Doubles the batch while it fits, then halves the interval between the largest that fits and one that does not.

    Args:
        attempt: trains some steps with a batch of so many rows, and tells what came of it.
        step: batches are multiples of it: the number of devices.
        free_nbytes: host memory that may be filled; a batch that would take more, by what the smaller ones took, is not
            tried. None where devices have a memory of their own, whose end is an error.

    In host memory the search also ends when three doublings in a row were no faster: there, a batch that fills the
    machine serves nobody.
    """

    def __init__(self, attempt: Callable[[int], Tried], *, step: int = 1, free_nbytes: int | None = None) -> None:
        self._attempt, self._step, self._free = attempt, step, free_nbytes
        self.tried: list[Tried] = []
        self.ended = ""

    def run(self, start: int) -> dict[str, Any]:
        """Search from a batch of about so many rows.

        Returns: `tried`, each with `batch` and `samples_per_second` or `reason`; `largest`, the largest batch that ran,
        and `best`, the smallest one within a hundredth of the best throughput, None where none ran; and why the search
        `ended`.
        """
        fits = self._shrink(self._multiple(start))
        if fits is not None:
            failed = self._grow(fits)
            if failed is not None:
                self._narrow(self._largest(), failed)
        return {
            "tried": [one.to_dict() for one in sorted(self.tried, key=lambda one: one.batch)],
            "largest": self._largest() if fits is not None else None,
            "best": best_of(self.tried),
            "ended": self.ended,
        }

    def _multiple(self, batch: int) -> int:
        """The nearest multiple of the step, from one step on."""
        return max(1, round(batch / self._step)) * self._step

    def _try(self, batch: int) -> Tried:
        """Try a batch, unless it is known that it needs more memory than there is."""
        wanted = self._predicted(batch)
        if wanted is not None and self._free is not None and wanted > MEMORY_PART * self._free:
            reason = f"would take about {wanted / 1e9:.1f} GB of the {self._free / 1e9:.1f} GB of free host memory"
            found = Tried(batch, reason=reason, no_memory=True)
        else:
            found = self._attempt(batch)
        self.tried.append(found)
        return found

    def _predicted(self, batch: int) -> float | None:
        """The memory that a batch would take, on the line through the two largest that ran; None if there are none."""
        known = sorted((one.batch, one.nbytes) for one in self.tried if one.nbytes is not None)[-2:]
        if len(known) < 2:
            return None
        (small, less), (large, more) = known
        return more + (batch - large) * max(0.0, (more - less) / (large - small))

    def _shrink(self, batch: int) -> int | None:
        """The first batch that fits, by halves from the given one; None if not even one step does."""
        while True:
            found = self._try(batch)
            if found.samples_per_second is not None:
                return batch
            if not found.no_memory or batch == self._step:
                self.ended = found.reason
                return None
            batch = self._multiple(batch // 2)

    def _grow(self, batch: int) -> int | None:
        """Double the batch until it does not fit, and return that one; None where something else ended the search."""
        if any(one.no_memory for one in self.tried):
            return min(one.batch for one in self.tried if one.no_memory)
        flat = 0
        while True:
            before = max(one.samples_per_second or 0.0 for one in self.tried)
            batch *= 2
            found = self._try(batch)
            if found.samples_per_second is None:
                self.ended = found.reason
                return batch if found.no_memory else None
            flat = 0 if found.samples_per_second > (1 + GROWTH) * before else flat + 1
            if found.step_seconds > SLOW_SECONDS:
                self.ended = f"a step takes longer than {SLOW_SECONDS:g} seconds"
                return None
            if self._free is not None and flat >= FLAT:
                self.ended = f"{FLAT} doublings in a row were no faster"
                return None

    def _narrow(self, fits: int, failed: int) -> None:
        """Halve the interval between a batch that fits and one that does not, to a sixteenth."""
        while failed - fits > max(self._step, fits // FINE):
            middle = self._multiple((fits + failed) // 2)
            if not fits < middle < failed:
                break
            if self._try(middle).samples_per_second is None:
                failed = middle
            else:
                fits = middle
        self.ended = next(one.reason for one in self.tried if one.batch == failed)

    def _largest(self) -> int:
        return max(one.batch for one in self.tried if one.samples_per_second is not None)


def best_of(tried: Sequence[Tried]) -> int | None:
    """The smallest batch within a hundredth of the best throughput; None if none ran."""
    rates = {one.batch: one.samples_per_second for one in tried if one.samples_per_second is not None}
    enough = (1 - EQUAL) * max(rates.values(), default=0.0)
    return min((batch for batch, rate in rates.items() if rate >= enough), default=None)
