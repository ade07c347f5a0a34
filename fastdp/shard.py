"""Splits a global batch into rows per replica, and parameters into buckets. Integers only."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

FIRST_BUCKET_NBYTES = 1 << 20
BUCKET_NBYTES = 25 << 20


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows `[start, stop)` of a global batch of `total` rows that belong to one replica."""

    start: int
    stop: int
    total: int

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.stop - self.start

    @property
    def share(self) -> float:
        """This replica's part of the global batch, in (0, 1]."""
        return self.count / self.total


def split_rows(total: int, parts: int) -> list[Rows]:
    """Split `total` rows among at most `parts` replicas, in row order.

    Row counts differ by at most one, larger counts first. With fewer rows than replicas there are fewer
    parts, so no part is empty.

    Raises:
        ValueError: `total` or `parts` is below 1.

    Example:
        >>> [rows.count for rows in split_rows(11, 4)]
        [3, 3, 3, 2]
    """
    if total < 1:
        raise ValueError(f"`total` must be at least 1 row. Received: total={total}")
    if parts < 1:
        raise ValueError(f"`parts` must be at least 1 replica. Received: parts={parts}")
    parts = min(parts, total)
    size, larger = divmod(total, parts)
    bounds = [0]
    for part in range(parts):
        bounds.append(bounds[-1] + size + (part < larger))
    return [Rows(start, stop, total) for start, stop in itertools.pairwise(bounds)]


@lru_cache(maxsize=1024)
def dealt_rows(total: int, parts: int, cuts: tuple[int, ...] = ()) -> tuple[Rows, ...]:
    """`split_rows` as a tuple, cached: most batches have the same size. `cuts`: as in `Deal`."""
    if not cuts:
        return tuple(split_rows(total, parts))
    shares = split_rows(total, parts)
    if any(share.count < pieces for share, pieces in zip(shares, cuts, strict=False)) or len(shares) < parts:
        return tuple(split_rows(total, sum(cuts)))  # else later shares would run on devices of earlier ones
    pairs = zip(shares, cuts, strict=True)
    cut = [(share.start, part) for share, pieces in pairs for part in split_rows(share.count, pieces)]
    return tuple(Rows(start + part.start, start + part.stop, total) for start, part in cut)


@dataclass(frozen=True, slots=True)
class Deal:
    """How the rows of a batch are dealt: evenly in `shares`, some of which are cut into further parts.

    Args:
        shares: the number of equal shares.
        cuts: by share, the number of parts that it is cut into; empty where none is cut.

    Example:
        >>> [rows.count for rows in Deal(2, (1, 2)).rows(8)]
        [4, 2, 2]
    """

    shares: int
    cuts: tuple[int, ...] = ()

    @property
    def parts(self) -> int:
        """The number of parts of a batch with enough rows."""
        return sum(self.cuts) if self.cuts else self.shares

    def rows(self, total: int) -> tuple[Rows, ...]:
        """The rows of each part, none empty. Evenly over all parts where a share has fewer rows than cuts."""
        return dealt_rows(total, self.shares, self.cuts)

    def limited(self, most: int) -> Deal:
        """The same for at most so many parts: without cuts where there are more."""
        return self if self.parts <= most else Deal(most)


def rank_range(length: int, rank: int, ranks: int, align: int = 1) -> tuple[int, int]:
    """The elements of `range(length)` that belong to one rank between a reduce-scatter and an all-gather.

    All ranks have the same number of elements, a multiple of `align`, as NCCL requires; the last rank also has
    the remainder.

    Example:
        >>> [rank_range(23, rank, 3, align=4) for rank in range(3)]
        [(0, 4), (4, 8), (8, 23)]
    """
    size = length // ranks // align * align
    return rank * size, length if rank + 1 == ranks else (rank + 1) * size


def plan_buckets(
    nbytes: Sequence[int], first: int = FIRST_BUCKET_NBYTES, cap: int = BUCKET_NBYTES
) -> list[tuple[int, int]]:
    """Group consecutive arrays of the given sizes into buckets `[start, stop)` of about `cap` bytes.

    The first bucket is small (`first` bytes), so that its reduction can start early. An array larger
    than the limit gets its own bucket; arrays are never split.

    Example:
        >>> plan_buckets([4, 4, 4, 4], first=4, cap=8)
        [(0, 1), (1, 3), (3, 4)]
    """
    buckets: list[tuple[int, int]] = []
    start, filled, limit = 0, 0, first
    for index, size in enumerate(nbytes):
        if index > start and filled + size > limit:
            buckets.append((start, index))
            start, filled, limit = index, 0, cap
        filled += size
    if start < len(nbytes):
        buckets.append((start, len(nbytes)))
    return buckets
