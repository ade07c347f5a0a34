"""The processes that train one model together, and what the engine asks of the library that connects them."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastdp.comm.rendezvous import Rendezvous
from fastdp.comm.transport import Transport
from fastdp.comm.turns import Turn

# Set by torchrun for each process that it starts.
RANK, WORLD_SIZE = "RANK", "WORLD_SIZE"

# Why steps run eagerly, for `report()`: each process would choose by its own clock when steps change their form.
SEVERAL = "several processes train together"


def launched() -> tuple[int, int]:
    """This process's rank and the number of processes that torchrun has started; (0, 1) without it.

    Raises:
        ValueError: one of the variables RANK and WORLD_SIZE is missing, or is no fitting number.
    """
    texts = os.environ.get(RANK, ""), os.environ.get(WORLD_SIZE, "")
    if not any(texts):
        return 0, 1
    if not all(text.isdecimal() for text in texts) or not int(texts[0]) < int(texts[1]):
        raise ValueError(
            f"RANK must be a number below WORLD_SIZE, as torchrun sets them. Received: RANK={texts[0]!r}, "
            f"WORLD_SIZE={texts[1]!r}. Start the script by torchrun, or unset both for one process."
        )
    return int(texts[0]), int(texts[1])


class Ending:
    """Whether some process has been told to end (SIGTERM, Ctrl-C). All learn it by the same step, and end behind it.

    Attributes:
        here: this process has been told.
        agreed: one was told, and all know. Set by the engine.
    """

    here = False
    agreed = False


ending = Ending()


def leads() -> bool:
    """Whether this process writes the files, prints and shows progress: process 0, or the only one."""
    return launched()[0] == 0


def several() -> bool:
    """Whether torchrun has started several processes, which then train together."""
    return launched()[1] > 1


class Processes(ABC):
    """Connects this process to the others. All of them make the same calls in the same order.

    Attributes:
        rank: this process's number.
        size: how many there are.

    Every call raises ProcessError if another process failed, ended, or does not come in time.
    """

    rank: int
    size: int

    @abstractmethod
    def gather(self, value: Any, what: str, timeout: float, known: Sequence[object] = ()) -> list[Any]:
        """The values of all processes, by rank. This process's own is the object itself.

        Args:
            value: any nest of arrays, tensors and plain objects.
            what: what is being done, in words: for messages, and compared between the processes.
            timeout: seconds to wait for the others.
            known: objects inside of `value` that every process has in the same order: they are not sent.

        Raises:
            TypeError: a part of `value` cannot be sent.
        """

    @abstractmethod
    def sum(self, array: np.ndarray, dtype: str, *, transport: Transport | None = None) -> Callable[[float, str], None]:
        """Start to replace a vector in host memory by the sum over all processes, with the same bits everywhere.

        Args:
            array: contiguous, not touched until the returned call is over.
            dtype: the name of its dtype, which may be stored as another one ("bfloat16").
            transport: how float32 and float64 travel; None: as they are. What each process gives is rounded once, then
                added in float32 in the order of the processes, and the sum is rounded once.

        Returns:
            `wait(timeout, what)`, which returns when the sum is there.
        """

    @abstractmethod
    def sum_branches(
        self,
        own: Sequence[np.ndarray],
        every: Sequence[Sequence[tuple[int, int]]],
        dtype: str,
        *,
        transport: Transport | None = None,
    ) -> Callable[[float, str], None]:
        """Start to sum vectors of all processes in the tree over their shards (`fastdp.comm.tree`).

        Args:
            own: this process's vectors, each the sum of a branch. The first one becomes the whole sum.
            every: by process, the branches of its vectors. 16-bit vectors are single shards, so that sums are rounded
                once.
            dtype, transport: as in `sum`.

        Returns:
            As `sum` does.
        """

    @abstractmethod
    def copy_first(self, array: np.ndarray) -> Callable[[float, str], None]:
        """Start to replace an array in host memory by that of process 0. Returns as `sum` does."""

    @abstractmethod
    def share(self, array: np.ndarray, bounds: Sequence[int], timeout: float, what: str) -> None:
        """Give all processes each other's rows: process i owns the rows from `bounds[i]` to `bounds[i + 1]`."""

    @abstractmethod
    def fail(self, error: BaseException, step: int) -> None:
        """Tell the others that this process cannot go on with its step. Their waits end with an error that says so."""

    @abstractmethod
    def recover(self, timeout: float) -> None:
        """Before a step: connect again after a step that failed in all processes.

        Raises:
            ProcessError: the processes have failed in different steps, or some are gone.
        """


class ProcessesRendezvous(Rendezvous):
    """A meeting point of the replicas of all processes. This process's threads meet first, and then the processes.

    Args:
        processes: connects them.
        size, timeout, names, turns: of this process's replicas, as in `Rendezvous`.
        known: as in `Processes.gather`.
    """

    def __init__(
        self,
        processes: Processes,
        size: int,
        timeout: float,
        names: Sequence[str],
        known: Sequence[object],
        turns: Sequence[Turn | None] = (),
    ) -> None:
        super().__init__(size, timeout, names, turns)
        self._processes, self._known = processes, known

    def _completed(self, values: list[Any], place: object) -> list[Any]:
        what = " ".join(map(str, place)) if isinstance(place, tuple) else str(place)
        try:
            every = self._processes.gather(values, what, self.timeout, self._known)
        except BaseException as error:
            self.abort(error)
            raise
        return [value for one in every for value in one]
