"""Turns an index into row numbers by NumPy's rules for the first axis."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = int | range | NDArray[np.int64]


def split_key(key: Any, ndim: int) -> tuple[Any, tuple[Any, ...]]:
    """Split an index into the part for the rows and the parts for the fetched block.

    `ndim` is the number of axes of the array. A leading Ellipsis is expanded, so that the first part always
    addresses axis 0.

    Raises:
        IndexError: the index addresses more axes than there are.

    Example:
        >>> split_key((slice(4), 0), ndim=3)
        (slice(None, 4, None), (0,))
        >>> split_key((Ellipsis, 0), ndim=3)
        (slice(None, None, None), (slice(None, None, None), 0))
    """
    parts = key if isinstance(key, tuple) else (key,)
    if not parts:
        return slice(None), ()
    if parts[0] is not Ellipsis:
        return parts[0], parts[1:]
    rest = parts[1:]
    hidden = ndim - sum(_axes(part) for part in rest)
    if hidden < 0:
        raise IndexError(f"expected an index over at most {ndim} axes, got {key!r}: drop {-hidden} of its parts")
    if hidden == 0:
        return rest[0], (*rest[1:], Ellipsis)
    return slice(None), (slice(None),) * (hidden - 1) + rest


def _axes(part: Any) -> int:
    """The number of axes that one part of an index consumes."""
    if part is None:
        return 0
    array = np.asarray(part) if isinstance(part, (list, np.ndarray)) else None
    return array.ndim if array is not None and array.dtype == bool else 1


def parse_rows(key: Any, count: int) -> Rows:
    """Turn the row part of an index into rows of `[0, count)`.

    Returns an int for one row, a range for a slice (clamped to the rows that exist, as NumPy does) and an
    int64 array for index lists and masks, in the requested order and with repetitions.

    Raises:
        IndexError: a row does not exist, a mask has a wrong length, or `key` is not an index.

    Example:
        >>> parse_rows(-1, 10), parse_rows(slice(None, None, -4), 10), parse_rows([3, -1, 3], 10)
        (9, range(9, -1, -4), array([3, 9, 3]))
    """
    if isinstance(key, slice):
        return range(count)[key]
    if isinstance(key, (list, range)) or (isinstance(key, np.ndarray) and key.ndim > 0):
        return _parse_array(key, count)
    if isinstance(key, (bool, np.bool_)):
        raise _not_an_index(key)
    try:
        row = operator.index(key)
    except TypeError:
        raise _not_an_index(key) from None
    if not -count <= row < count:
        raise _out_of_range(row, count)
    return row % count


def _parse_array(key: Any, count: int) -> NDArray[np.int64]:
    """Convert a list, range or array of indices or booleans to non-negative rows."""
    array = np.asarray(key)
    if array.size == 0 and not isinstance(key, np.ndarray):
        array = array.astype(np.int64)
    if array.dtype == bool:
        if array.shape != (count,):
            raise IndexError(
                f"expected a boolean index of shape ({count},), one value per row, got shape {array.shape}: index "
                "further axes in a second part, as in data[mask, :, 0]"
            )
        return np.flatnonzero(array).astype(np.int64)
    if array.dtype.kind not in "iu":
        raise _not_an_index(key)
    outside = (array < -count) | (array >= count)
    if outside.any():
        raise _out_of_range(int(array[outside][0]), count)
    rows = array.astype(np.int64)
    return np.where(rows < 0, rows + count, rows)


def _out_of_range(row: int, count: int) -> IndexError:
    return IndexError(f"expected rows from {-count} to {count - 1}, got row {row}: there are {count} rows")


def _not_an_index(key: Any) -> IndexError:
    return IndexError(
        f"expected an int, a slice, or a list or array of ints or booleans as row index, got {key!r} "
        f"of type {type(key).__name__}: convert it, for example by np.asarray(key, dtype=int)"
    )


def read_rows(data: Any, rows: range | NDArray[np.int64], first_row: int = 0) -> NDArray[Any]:
    """Read rows of an array that supports slices and increasing, unique index lists, such as an `h5py.Dataset`.

    `rows` (a range, or 1-D non-negative ints in any order, repeated or not) counts from `first_row` of
    `data`. Returns a new C-contiguous array that the caller owns, shape `(len(rows),) + data.shape[1:]`, rows
    in the requested order. Each row is read once; dense lists are read as one slice.

    Example:
        >>> read_rows(np.arange(10) * 10, np.array([3, 1, 3]), first_row=2)
        array([50, 30, 50])
    """
    if len(rows) == 0:
        return np.asarray(data[0:0])
    if isinstance(rows, range):
        low, high, step = min(rows), max(rows), abs(rows.step)
        block = np.asarray(data[first_row + low : first_row + high + 1 : step])
        return block if rows.step > 0 else np.ascontiguousarray(block[::-1])
    unique, order = np.unique(rows, return_inverse=True)
    low, span = int(unique[0]), int(unique[-1] - unique[0]) + 1
    if span <= 2 * len(unique):
        return np.asarray(data[first_row + low : first_row + low + span])[rows - low]
    block = np.asarray(data[first_row + unique])
    return block if len(unique) == len(rows) and np.array_equal(unique, rows) else block[order.reshape(-1)]


def block_of(rows: Rows, rest: tuple[Any, ...]) -> tuple[range | NDArray[np.int64], tuple[Any, ...]]:
    """The rows to read for an index, as one axis, and what to take of the block of them; () for the block as it is.

    Args:
        rows, rest: from `parse_rows` and `split_key`.
    """
    if isinstance(rows, int):
        return range(rows, rows + 1), (0, *rest)
    if isinstance(rows, range):
        return rows, (slice(None), *rest) if rest else ()
    whole = not rest and rows.ndim == 1  # not indexed again, which would copy it
    return rows.reshape(-1), () if whole else (np.arange(rows.size).reshape(rows.shape), *rest)
