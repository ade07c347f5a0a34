"""`RowParts`: which device keeps which rows of a data set that is sharded, and the rows of a batch by owner."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastdp.launch.reference import slice_rows
from fastdp.shard import Rows, split_rows


class RowParts:
    """Equal shares of consecutive rows, larger ones first, as a batch is dealt. With few rows some are empty.

    Args:
        total: rows of the data set.
        owners: the names of the owners, in the order of their rows.

    Attributes:
        rows: the rows by owner.
    """

    def __init__(self, total: int, owners: Sequence[str]) -> None:
        shares = split_rows(total, len(owners))
        shares += [Rows(total, total, total)] * (len(owners) - len(shares))
        self.rows = dict(zip(owners, shares, strict=True))
        self._starts = np.array([share.start for share in shares])
        self._stops = np.array([share.stop for share in shares])

    def by_owner(self, index: NDArray[np.int64]) -> tuple[dict[str, NDArray[np.int64]], NDArray[np.int64] | None]:
        """Row numbers of a batch by owner, counted from its first row; owners without any are left out.

        Returns:
            The numbers, and where their rows go: by number, owner by owner, its row in the batch. None: in order.
        """
        owner = np.searchsorted(self._stops, index, side="right")
        local = index - self._starts[owner]
        counts = np.bincount(owner, minlength=len(self._stops))
        places = None
        if not (owner[1:] >= owner[:-1]).all():
            places = np.argsort(owner, kind="stable")
            local = local[places]
        numbers = np.split(local, np.cumsum(counts)[:-1])
        return {name: found for name, found in zip(self.rows, numbers, strict=True) if len(found)}, places

    def take(
        self, array: np.ndarray, index: NDArray[np.int64], target: np.ndarray, scale: float = 1.0, offset: float = 0.0
    ) -> None:
        """Gather rows in host memory, from each owner's part of an array in turn; `target` as for `slice_rows`."""
        numbers, places = self.by_owner(index)
        first = 0
        for name, local in numbers.items():
            share, count = self.rows[name], len(local)
            part = array[share.start : share.stop]
            to = np.arange(first, first + count) if places is None else places[first : first + count]
            slice_rows(part, target, index=local, places=to, rows=count, scale=scale, offset=offset)
            first += count
