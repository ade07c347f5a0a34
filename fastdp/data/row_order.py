"""Orders of rows for an epoch: one that mixes rows and yet reads each chunk of a file only once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WINDOW_CHUNKS = 16
WINDOW_NBYTES = 256 << 20


def mixing_window(chunk_nbytes: int) -> int:
    """The chunks among which rows are mixed: 16, or fewer if they have more than 256 MiB; at least 2."""
    return max(2, min(WINDOW_CHUNKS, WINDOW_NBYTES // max(1, chunk_nbytes)))


def chunk_order(
    num_rows: int, chunk_rows: int, generator: np.random.Generator, window: int = WINDOW_CHUNKS, first_row: int = 0
) -> NDArray[np.int64]:
    """A random order of rows in which the rows of a chunk stay near each other.

    Whole chunks are put in a random order; then each row moves back by a random part of a window of chunks. So a row is
    mixed with the rows of about `window` chunks before and after its own, and at most `window` chunks plus those of one
    batch are in use at any time. Rows far apart in the file meet because chunks are permuted; rows of one chunk never
    lie further apart than the window. A window of 1 mixes neighboring chunks, a large one comes near to a uniform
    order.

    Args:
        num_rows: the rows to be ordered.
        chunk_rows: rows of a chunk.
        generator: draws the order.
        window: chunks among which rows are mixed, at least 1.
        first_row: the row of the data set that is row 0 here; chunks are counted from the data set's first row.

    Returns:
        Each number from 0 to `num_rows - 1` once.

    Raises:
        ValueError: `chunk_rows` or `window` is below 1.
    """
    if chunk_rows < 1 or window < 1:
        raise ValueError(f"chunk_rows and window must be at least 1, got {chunk_rows} and {window}")
    chunks = (np.arange(num_rows) + first_row) // chunk_rows
    first = int(chunks[0]) if num_rows else 0
    count = int(chunks[-1]) - first + 1 if num_rows else 0
    place = generator.permutation(count)[chunks - first]
    return np.argsort(place + window * generator.random(num_rows), kind="stable").astype(np.int64)
