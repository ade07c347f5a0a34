"""`RowGather`: rows by number out of arrays on this GPU, on its peers and in host memory, by one copy and launch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdp.launch import RowSlice
from fastdp.runtime.cuda import cupy_api
from fastdp.runtime.cuda.batch_layout import ALIGNMENT

# The dtype, scale and offset of the floats that a uint8 array becomes; None: it stays as it is.
Cast = tuple[str, float, float] | None


class RowGather:
    """Where rows come from, and where they lie in a buffer of the GPU.

    Args:
        parts: by owner: its rows of every array, on a GPU whose memory this GPU's kernels reach, or in host memory.
        counts: by owner, how many of the rows it has.
        casts: by array.
        index: int64 row numbers in the owners' arrays, in range, owner by owner.
        places: by entry of `index`, its row in the result; None: in order.
        host_rows: how many rows may come from host memory in batches of this size, for which room is kept.

    Attributes:
        nbytes: that the buffer needs: row numbers and rows from the host, then the result.
        pinned_nbytes, pinned_room: of pinned memory, for this batch and at most.
    """

    def __init__(
        self,
        parts: Sequence[Sequence[Any]],
        counts: Sequence[int],
        casts: Sequence[Cast],
        index: NDArray[np.int64],
        places: NDArray[np.int64] | None = None,
        host_rows: int = 0,
    ) -> None:
        self._parts, self._counts, self._casts = parts, counts, casts
        self._index, self._places = index, places
        self._row_shapes = [array.shape[1:] for array in parts[0]]
        self._dtypes = [np.dtype(a.dtype if cast is None else cast[0]) for a, cast in zip(parts[0], casts, strict=True)]
        rows = len(index)
        self._places_at = index.nbytes if places is not None else 0
        numbers = index.nbytes * (1 if places is None else 2)
        self._host_at: list[list[int]] = []  # by owner and array, of rows that come from the host
        end = numbers
        for arrays, count in zip(parts, counts, strict=True):
            begins = []
            for array in () if cupy_api.is_array(arrays[0]) else arrays:
                begins.append(_aligned(end))
                end = begins[-1] + count * _row_nbytes(array)
            self._host_at.append(begins)
        self.pinned_nbytes = end
        most = sum(_aligned(host_rows * _row_nbytes(array)) for array in parts[0])
        self.pinned_room = max(end, _aligned(numbers) + most if host_rows else 0)
        self._results = [_aligned(self.pinned_room)]
        for shape, dtype in zip(self._row_shapes, self._dtypes, strict=True):
            self._results.append(self._results[-1] + _aligned(rows * math.prod(shape) * dtype.itemsize))
        self.nbytes = self._results[-1]

    def fill(self, pinned: NDArray[np.uint8]) -> None:
        """Put what the GPU needs from the host into pinned memory."""
        index = pinned[: self._index.nbytes].view(np.int64)
        index[:] = self._index
        if self._places is not None:
            pinned[self._places_at : 2 * self._places_at].view(np.int64)[:] = self._places
        first = 0
        for arrays, count, begins in zip(self._parts, self._counts, self._host_at, strict=True):
            numbers = self._index[first : first + count]
            for array, at in zip(arrays if begins else (), begins, strict=True):
                target = pinned[at : at + count * _row_nbytes(array)].view(array.dtype)
                # Row numbers are in range; other modes buffer the output.
                np.take(array, numbers, axis=0, out=target.reshape(count, *array.shape[1:]), mode="clip")
            if begins:
                index[first : first + count] = np.arange(count)  # they lie one behind the other
            first += count

    def launch(self, at: int) -> dict[str, Any]:
        """The arguments of `slice_rows` for a buffer at this address."""
        slices, first, rows = [], 0, len(self._index)
        for arrays, count, begins in zip(self._parts, self._counts, self._host_at, strict=True):
            for i, (array, cast) in enumerate(zip(arrays, self._casts, strict=True)):
                elements = math.prod(array.shape[1:]) * (1 if cast else array.dtype.itemsize)
                if not elements:
                    continue
                # In order, an owner's rows begin behind those of the owners before.
                ahead = first * math.prod(array.shape[1:]) * self._dtypes[i].itemsize if self._places is None else 0
                slices.append(
                    RowSlice(
                        source=at + begins[i] if begins else cupy_api.array_pointer(array),
                        destination=at + self._results[i] + ahead,
                        rows=count,
                        row_elements=elements,
                        source_rows=count if begins else array.shape[0],
                        first_row=first,
                        cast=cast[0] if cast else None,
                        scale=cast[1] if cast else 1.0,
                        offset=cast[2] if cast else 0.0,
                    )
                )
            first += count
        if self._places is None:
            return {"slices": slices, "index": at}
        return {"slices": slices, "index": at, "places": at + self._places_at, "destination_rows": rows}

    def results(self, buffer: Any, ordinal: int) -> list[Any]:
        """The gathered arrays in the buffer. They keep it and the owners' arrays alive."""
        at, rows = cupy_api.array_pointer(buffer), len(self._index)
        return [
            cupy_api.array(at + begin, (rows, *shape), dtype, ordinal, (buffer, self._parts))
            for begin, shape, dtype in zip(self._results, self._row_shapes, self._dtypes, strict=False)
        ]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _row_nbytes(array: Any) -> int:
    return math.prod(array.shape[1:]) * int(array.dtype.itemsize)
