"""Adds up vectors in one fixed binary tree: the order in which the values of shards are added."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def sum_in_tree(values: Sequence[np.ndarray], out: np.ndarray | None = None) -> np.ndarray:
    """The sum of equally long vectors: neighbours first, then neighbouring pairs, and so on.

    Eight vectors are added as `((a + b) + (c + d)) + ((e + f) + (g + h))`. What has no neighbour goes up as it is. One
    vector is returned itself. The order depends on the number of vectors alone, and rounding errors grow with the
    logarithm of that number.

    Args:
        out: receives the sum of several vectors. It may be the first vector, and shares no memory with the others.

    Example:
        >>> sum_in_tree([np.ones(2), np.ones(2), np.ones(2)])
        array([3., 3.])
    """
    if len(values) == 1:
        return values[0]
    half = 1 << (len(values) - 1).bit_length() - 1
    left = sum_in_tree(values[:half], out)
    return np.add(left, sum_in_tree(values[half:]), out=out)
