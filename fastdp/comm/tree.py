"""Adds up vectors in one fixed binary tree: the order in which the values of shards are added."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

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


def branches(count: int, first: int, last: int) -> list[tuple[int, int]]:
    """The largest branches of the tree over `count` values that lie in `[first, last)`, in order, as `(start, stop)`.

    The sum of a branch by `sum_in_tree` is the one that the whole tree has there.

    Example:
        >>> branches(8, 3, 8)
        [(3, 4), (4, 8)]
    """
    found: list[tuple[int, int]] = []

    def visit(start: int, stop: int) -> None:
        if first <= start and stop <= last:
            found.append((start, stop))
        elif start < last and first < stop:
            middle = start + (1 << (stop - start - 1).bit_length() - 1)
            visit(start, middle)
            visit(middle, stop)

    visit(0, count)
    return found


def join_branches(
    sums: Mapping[tuple[int, int], np.ndarray], count: int, add: Callable[..., np.ndarray] = np.add
) -> np.ndarray:
    """The sum of the tree over `count` values, of which some branches are there; these are all values together."""

    def joined(start: int, stop: int) -> np.ndarray:
        if (start, stop) in sums:
            return sums[start, stop]
        middle = start + (1 << (stop - start - 1).bit_length() - 1)
        return add(joined(start, middle), joined(middle, stop))

    return joined(0, count)
