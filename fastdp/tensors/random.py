"""Random numbers indexed by the row of the global batch: a counter-based generator (Philox).

Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) is counter-based: each row of an
array has its own stretch of counters, so a replica computes the numbers of its own rows, and of no others, and
all splits of the batch agree.
"""

from __future__ import annotations

import threading

import numpy as np

_PER_BLOCK = 8  # fp32 numbers of one counter


def uniform_rows(key: tuple[int, int], first: int, count: int, per_row: int) -> np.ndarray:
    """fp32 numbers in [0, 1) of the shape `(count, per_row)`: rows `first` to `first + count` of an endless array.

    Args:
        key: names the array; two numbers of up to 64 bits.
        first, count: which rows.
        per_row: numbers in a row.
    """
    blocks = -(-per_row // _PER_BLOCK)
    philox = np.random.Philox(key=[number & 0xFFFFFFFFFFFFFFFF for number in key], counter=first * blocks)
    drawn = np.random.Generator(philox).random((count, blocks * _PER_BLOCK), dtype=np.float32)
    return drawn[:, :per_row]


# Whoever reads or forks torch's global generator inside a step holds this.
global_generator = threading.RLock()
