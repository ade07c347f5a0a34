"""Computes parts of an operation's rows at once, each on one core, in place of one operation on several.

A recurrent layer's threads would meet at every time step. There they lose more than they bring, and where other work
takes one of the cores, each meeting waits for it. Parts of the rows meet once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TypeVar

import torch

from fastdp.runtime.host.job_threads import JobThreads, thread_count
from fastdp.tensors.threads import cores_of_parts, end_pool, openmp

Result = TypeVar("Result")

# A part has at least so many rows and multiply-adds: to wake a thread takes some tenths of a millisecond.
LEAST_ROWS = 8
LEAST_WORK = 1 << 24

# Below this many multiply-adds per time step's recurrent product, one thread is faster than several that synchronize
# at every step. docs/log.md has the measurements.
SMALL_STEP = 1 << 22

_THREADS = JobThreads(thread_count(), "fastdp-rows")


def parts_of(rows: int, work: int) -> int:
    """Into how many parts rows are cut that take `work` multiply-adds together: as many as torch has cores, at most."""
    return max(1, min(cores_of_parts(), rows // LEAST_ROWS, work // LEAST_WORK))


def is_small(rows: int, units: int, gates: int = 4) -> bool:
    """Whether a time step is too small to pay for synchronizing several threads."""
    return rows * units * gates * units < SMALL_STEP


def at_once(function: Callable[[int], Result], count: int, *, one_core: bool = True) -> list[Result]:
    """`function(0)` to `function(count - 1)`, each on one core, in this thread and others.

    As many run at once as torch has cores. The others have no modes of torch's, and record gradients: hand in detached
    tensors. The first error is raised.

    Args:
        one_core: whether a single one has one core too; else it has all.
    """
    if count == 1:
        with _one_core() if one_core else nullcontext():
            return [function(0)]
    found: dict[int, Result] = {}

    def compute(part: int) -> None:
        with _one_core():
            found[part] = function(part)

    end_pool()  # helpers of OpenMP that wait awake for this thread's next operation would hold the other cores
    _THREADS.run([partial(compute, part) for part in range(count)], cores_of_parts())
    return [found[part] for part in range(count)]


_set_cores: Callable[[int], object] = openmp("omp_set_num_threads") or torch.set_num_threads
_get_cores: Callable[[], int] = openmp("omp_get_max_threads") or torch.get_num_threads


@contextmanager
def _one_core() -> Iterator[None]:
    """OpenMP uses one core in this thread. Torch's own setting would be one of the process, which others read."""
    before = _get_cores()
    _set_cores(1)
    try:
        yield
    finally:
        _set_cores(before)
