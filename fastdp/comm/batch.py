"""A global batch: its rows counted and checked once, in host memory or on the devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from fastdp.shard import Rows


@runtime_checkable
class Resident(Protocol):
    """A batch whose rows are on the devices already (fastdp.data.device_dataset)."""

    def rows_on(self, device: Any, rows: Rows) -> list[Any]:
        """The device's rows of every array, ordered before what its compute stream gets later."""


@runtime_checkable
class ResidentArray(Protocol):
    """One array of such a batch, whose values nobody has fetched."""

    def batch_of(self, arrays: Sequence[Any]) -> Any:
        """The batch that has these arrays, a `Resident`; None where they are not all of one."""


def count_rows(arrays: Sequence[np.ndarray], names: Sequence[str] | None = None) -> int:
    """The number of rows that all arrays of a batch have.

    Raises:
        ValueError: no array, an array without a first axis, arrays of unequal length, or no rows.
    """
    counts = {array.shape[0] if array.ndim else 0 for array in arrays}
    if len(counts) == 1 and 0 not in counts:
        return counts.pop()
    labels = names or [f"array {i}" for i in range(len(arrays))]
    if not arrays:
        raise ValueError("A batch needs at least one array. Received an empty batch.")
    scalars = [label for label, array in zip(labels, arrays, strict=True) if array.ndim == 0]
    if scalars:
        raise ValueError(
            f"Every array of a batch needs rows along its first axis, but {scalars} have no axis. Pass one "
            "value per row (for one constant, np.full(rows, value))."
        )
    rows = {label: array.shape[0] for label, array in zip(labels, arrays, strict=True)}
    if len(set(rows.values())) > 1:
        raise ValueError(f"All arrays of a batch must have the same number of rows. Received: {rows}")
    (total,) = set(rows.values())
    if total == 0:
        raise ValueError(f"A batch must have at least one row. Received: {rows}")
    return total
