"""Random numbers indexed by the row of the global batch: a counter-based generator (Philox).

Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) is counter-based: each row of an
array has its own stretch of counters, so a replica computes the numbers of its own rows, and of no others, and
all splits of the batch agree. What is drawn by another generator is drawn for the whole batch, and each replica keeps
its rows.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fastdp.shard import Rows

_PER_BLOCK = 8  # fp32 numbers of one counter

# Whoever reads or forks torch's global generator inside a step holds this.
global_generator = threading.RLock()


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


def uniform_tensor(key: tuple[int, int], first: int, count: int, shape: Sequence[int], device: Any) -> torch.Tensor:
    """The numbers of `uniform_rows` for `count` rows as a tensor of this shape, on a device of torch's."""
    per_row = math.prod(shape) // max(1, count)
    return torch.from_numpy(uniform_rows(key, first, count, per_row)).reshape(tuple(shape)).to(device)


def whole_shape(shape: Sequence[int], per_row: int, rows: Rows) -> tuple[int, ...]:
    """The shape of a replica's draw with the rows of the global batch.

    Args:
        shape: of the replica's draw.
        per_row: how many entries of its first axis belong to each row.
        rows: the replica's.
    """
    return (rows.total * per_row, *(int(size) for size in shape[1:]))


def own_rows(drawn: Any, per_row: int, rows: Rows) -> Any:
    """A replica's rows of a draw that was made in the `whole_shape`: a view; all of it where `per_row` is 0."""
    return drawn[rows.start * per_row : rows.stop * per_row] if per_row else drawn
