"""Random numbers indexed by the row of the global batch: a counter-based generator (Philox).

Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) is counter-based: each row of an
array has its own range of counters. So a replica computes only the numbers of its own rows, and all splits of the
batch agree. Other generators draw for the whole batch, and each replica keeps its rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fastdp.runtime.forks import LongLock
from fastdp.shard import Rows

_PER_BLOCK = 8  # fp32 numbers of one counter

# Held while code inside a step reads or forks torch's global generator.
global_generator = LongLock()


def uniform_rows(key: tuple[int, int], first: int, count: int, per_row: int) -> np.ndarray:
    """fp32 numbers in [0, 1) of shape `(count, per_row)`: rows `first` to `first + count` of an endless array.

    Args:
        key: identifies the array; two numbers of up to 64 bits.
        first, count: the first row and the number of rows.
        per_row: numbers per row.
    """
    blocks = -(-per_row // _PER_BLOCK)
    philox = np.random.Philox(key=[number & 0xFFFFFFFFFFFFFFFF for number in key], counter=first * blocks)
    drawn = np.random.Generator(philox).random((count, blocks * _PER_BLOCK), dtype=np.float32)
    return drawn[:, :per_row]


def uniform_tensor(key: tuple[int, int], first: int, count: int, shape: Sequence[int], device: Any) -> torch.Tensor:
    """The numbers of `uniform_rows` for `count` rows as a tensor of this shape, on a torch device."""
    per_row = math.prod(shape) // max(1, count)
    return torch.from_numpy(uniform_rows(key, first, count, per_row)).reshape(tuple(shape)).to(device)


def whole_shape(shape: Sequence[int], per_row: int, rows: Rows) -> tuple[int, ...]:
    """The shape of a replica's draw, extended to the rows of the global batch.

    Args:
        shape: the shape of the replica's draw.
        per_row: how many entries of its first axis belong to each row.
        rows: the replica's rows.
    """
    return (rows.total * per_row, *(int(size) for size in shape[1:]))


def own_rows(drawn: Any, per_row: int, rows: Rows) -> Any:
    """A view of a replica's rows of a draw of shape `whole_shape`; the whole draw if `per_row` is 0."""
    return drawn[rows.start * per_row : rows.stop * per_row] if per_row else drawn
