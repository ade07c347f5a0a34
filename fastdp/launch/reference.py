"""NumPy references of the kernels in kernels/*.cu: the same results, bit for bit, on host arrays.

The tests compare the kernels with these, and virtual devices may run them. All arithmetic is fp32 with one rounding at
the end. bfloat16 arrays are uint16 arrays of bits, or have ml_dtypes's bfloat16 dtype if that is installed. In this
module uint16 always means bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdp.bfloat16 import from_bfloat16, to_bfloat16
from fastdp.launch import args as ka
from fastdp.shard import rank_range

__all__ = [
    "all_reduce",
    "concat_rows",
    "reduce_scatter",
    "slice_rows",
    "to_float32",
]

Array = NDArray[Any]
_SILENT: dict[str, Any] = {"all": "ignore"}  # kernels do not warn of overflow and NaN


def to_float32(x: Array) -> NDArray[np.float32]:
    """Convert any of the kernels' element types to fp32 exactly."""
    x = _bits(x)
    return from_bfloat16(x) if x.dtype == np.uint16 else x.astype(np.float32)


def _bits(x: Array) -> Array:
    """The array itself, or a view of the bits of a bfloat16 array."""
    return x.view(np.uint16) if x.dtype.name == "bfloat16" else x


def _from_float32(x: Array, dtype: np.dtype[Any]) -> Array:
    """Round fp32 to an element type."""
    return to_bfloat16(x) if dtype == np.uint16 else x.astype(dtype)


def slice_rows(
    source: Array,
    destination: Array,
    *,
    first_row: int = 0,
    index: Array | None = None,
    places: Array | None = None,
    rows: int | None = None,
    scale: float = 1.0,
    offset: float = 0.0,
) -> bool:
    """Copy rows of one array into `destination`. The kernel does so for all arrays of a batch.

    Args:
        source: (rows, ...).
        destination: (rows wanted, ...), of the source's dtype. If the source is uint8 it may be of a float type, and
            gets x * scale + offset.
        first_row: the first row of the source, or the first entry of the index and of the places.
        index: int64 row numbers for a shuffled gather.
        places: with an index, the rows of the destination where they go; None: in order.
        rows: how many rows are copied; None: as many as the destination has.

    Returns: whether a row number or a place was out of range. Such rows are left unchanged.
    """
    count = len(destination) if rows is None else rows
    numbers, to = np.arange(first_row, first_row + count), np.arange(count)
    if places is not None:
        to = places[numbers]
    if index is not None:
        numbers = index[numbers]
    valid = (numbers >= 0) & (numbers < len(source)) & (to >= 0) & (to < len(destination))
    taken, to = _bits(source)[numbers[valid]], to[valid]
    target = _bits(destination)
    if taken.dtype == target.dtype:
        target[to] = taken
    else:
        values = taken.astype(np.float32) * np.float32(scale) + np.float32(offset)
        with np.errstate(**_SILENT):
            target[to] = _from_float32(values, target.dtype)
    return not valid.all()


def concat_rows(source: Array, destination: Array, *, destination_row: int) -> None:
    """Copy one replica's rows to their place in the merged array. The kernel does so for all outputs."""
    destination[destination_row : destination_row + len(source)] = source


def all_reduce(inputs: Sequence[Array], *, scale: float = 1.0, tree: bool = False) -> Array:
    """The sum over ranks, in fp32, times scale. Every rank gets it from either all-reduce.

    Args:
        tree: add neighbours first, then neighbouring pairs, and so on, instead of in rank order.
    """
    sums = [to_float32(x) for x in inputs]
    with np.errstate(**_SILENT):
        while len(sums) > 1:
            ahead = len(sums) // 2 * 2 if tree else 2
            pairs = [sums[at] + sums[at + 1] for at in range(0, ahead, 2)]
            sums = pairs + sums[ahead:]
        total = sums[0]
        return _from_float32(total * np.float32(scale), _bits(inputs[0]).dtype)


def reduce_scatter(
    inputs: Sequence[Array], output: Array, rank: int, *, scale: float = 1.0, tree: bool = False
) -> None:
    """Write the rank's part of the sum over ranks into the output. shard.rank_range defines the parts."""
    first, last = rank_range(output.size, rank, len(inputs), ka.PART_NBYTES // output.itemsize)
    output[first:last] = all_reduce([x[first:last] for x in inputs], scale=scale, tree=tree)
