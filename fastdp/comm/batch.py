"""A global batch: its arrays, its rows and who gets which, each found out once, in host memory or on the devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, final, runtime_checkable

import numpy as np

from fastdp.runtime.queue import QueueDevice
from fastdp.shard import Deal, Rows

# The shape of a row and the dtype of each array.
Shapes = tuple[tuple[tuple[int, ...], str], ...]


@runtime_checkable
class Resident(Protocol):
    """A batch whose rows are on the devices already (fastdp.data.device_dataset)."""

    def rows_on(self, device: QueueDevice, rows: Rows) -> list[Any]:
        """The device's rows of every array, ordered before later work on its compute stream."""


@runtime_checkable
class ResidentArray(Protocol):
    """One array of a resident batch, whose values have not been copied to the host."""

    def batch_of(self, arrays: Sequence[Any]) -> Any:
        """The `Resident` batch that these arrays belong to; None if they do not all belong to one."""


@final
class Batch:
    """A global batch. Iterating over it, indexing and `len` give its arrays.

    Args:
        arrays: a list of arrays with rows along the first axis, or a `Resident`. Read, never written.
        structure: handed to the program as `Context.structure`.
        rows: the number of rows. `Batch.of` counts them and checks the arrays.

    Attributes:
        shards: the rows of each replica; empty before `deal`.
    """

    __slots__ = ("_deal", "_shapes", "arrays", "rows", "shards", "structure")

    def __init__(self, arrays: Any, structure: Any, rows: int) -> None:
        self.arrays = arrays
        self.structure = structure
        self.rows = rows
        self.shards: Sequence[Rows] = ()
        self._deal = Deal(0)
        self._shapes: Shapes | None = None

    @classmethod
    def of(
        cls, arrays: Any, structure: Any = None, names: Callable[[], Sequence[str]] | None = None, hint: str = ""
    ) -> Batch:
        """Make a batch of arrays, and check that they have the same number of rows.

        Args:
            arrays, structure: as above.
            names: returns a name for each array. Called for error messages only.
            hint: the end of the message about unequal numbers of rows.

        Raises:
            ValueError: no array, an array without a first axis, arrays of unequal length, or no rows.
        """
        counts = {array.shape[0] if array.ndim else 0 for array in arrays}
        if len(counts) == 1 and 0 not in counts:
            return cls(arrays, structure, counts.pop())
        raise ValueError(_why_not(arrays, names() if names is not None else (), hint))

    def __len__(self) -> int:
        """The number of arrays."""
        return len(self.arrays)

    def __getitem__(self, place: int) -> Any:
        """One of the arrays."""
        return self.arrays[place]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.arrays)

    def deal(self, parts: int | Deal) -> Sequence[Rows]:
        """Split the rows over at most `parts` replicas, evenly or as a `Deal` says. Kept for the next call."""
        deal = parts if isinstance(parts, Deal) else Deal(parts)
        if deal != self._deal:
            self._deal, self.shards = deal, deal.rows(self.rows)
        return self.shards

    @property
    def shapes(self) -> Shapes:
        """The shape of a row and the dtype of each array. Computed on first use."""
        if self._shapes is None:
            self._shapes = tuple([(array.shape[1:], array.dtype.str) for array in self.arrays])
        return self._shapes


def count_rows(arrays: Sequence[np.ndarray], names: Sequence[str] = ()) -> int:
    """The number of rows of arrays. Raises as `Batch.of` does, with these names of the arrays in messages."""
    return Batch.of(arrays, None, lambda: names).rows


def _why_not(arrays: Sequence[np.ndarray], names: Sequence[str], hint: str) -> str:
    """The error message for arrays that do not form a batch."""
    if not arrays:
        return "A batch needs at least one array. Received an empty batch."
    labels = names or [f"array {i}" for i in range(len(arrays))]
    scalars = [label for label, array in zip(labels, arrays, strict=True) if array.ndim == 0]
    if scalars:
        return (
            f"Every array of a batch needs rows along its first axis, but {scalars} have no axis. Pass one "
            "value per row (for one constant, np.full(rows, value))."
        )
    rows = {label: array.shape[0] for label, array in zip(labels, arrays, strict=True)}
    if len(set(rows.values())) > 1:
        return f"All arrays of a batch must have the same number of rows. Received: {rows}{hint}"
    return f"A batch must have at least one row. Received: {rows}"
