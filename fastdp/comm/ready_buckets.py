"""Tracks which gradient buckets of a step all replicas have completed while backward goes on."""

from __future__ import annotations

import threading


class ReadyBuckets:
    """Counts the buckets that the workers of all replicas announce.

    Args:
        replicas: the number of replicas that announce buckets.
        buckets: the number of buckets.

    `early` counts the buckets that were complete on all replicas while one replica was still at work.
    """

    def __init__(self, replicas: int, buckets: int) -> None:
        self.early = 0
        self._lock = threading.Lock()
        self._working = replicas
        self._left = [replicas] * buckets
        self._open = [set(range(buckets)) for _ in range(replicas)]

    @property
    def working(self) -> int:
        """How many replicas are still at work."""
        return self._working

    def incomplete(self) -> list[list[int]]:
        """By bucket, the replicas that have not completed it."""
        return [[rank for rank, left in enumerate(self._open) if bucket in left] for bucket in range(len(self._left))]

    def say(self, rank: int, bucket: int) -> bool:
        """Announce a bucket of a replica. True if that completes it on all replicas. Repeated calls change nothing."""
        with self._lock:
            return self._take(rank, bucket)

    def end(self, rank: int) -> list[int]:
        """Note that a replica is done, and so has completed all of its buckets.

        Returns:
            The buckets that this completes on all replicas; none for the last replica, when nothing is early any more.
        """
        with self._lock:
            self._working -= 1
            if not self._working:
                return []
            return [bucket for bucket in sorted(self._open[rank]) if self._take(rank, bucket)]

    def _take(self, rank: int, bucket: int) -> bool:
        """Count a bucket of a replica; True if that completes it. Called with the lock held."""
        if bucket not in self._open[rank]:
            return False
        self._open[rank].remove(bucket)
        self._left[bucket] -= 1
        self.early += not self._left[bucket]
        return not self._left[bucket]
