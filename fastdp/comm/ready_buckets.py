"""Tracks which gradient buckets of a step all replicas have completed while backward goes on."""

from __future__ import annotations

import threading


class ReadyBuckets:
    """Counts, from the workers of all replicas, who has said what.

    Args:
        replicas: how many will announce.
        buckets: how many there are.

    `early` is how many buckets were complete on all replicas while one of them was still at work.
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

    def say(self, rank: int, bucket: int) -> bool:
        """A replica announces a bucket. True for the one that completes it. Saying it again changes nothing."""
        with self._lock:
            return self._take(rank, bucket)

    def end(self, rank: int) -> list[int]:
        """A replica is done, and with it all of its buckets.

        Returns:
            The buckets that are complete by that; none at the end of the last replica, when nothing is early any more.
        """
        with self._lock:
            self._working -= 1
            if not self._working:
                return []
            return [bucket for bucket in sorted(self._open[rank]) if self._take(rank, bucket)]

    def _take(self, rank: int, bucket: int) -> bool:
        """Count one bucket of one replica. Called with the lock held."""
        if bucket not in self._open[rank]:
            return False
        self._open[rank].remove(bucket)
        self._left[bucket] -= 1
        self.early += not self._left[bucket]
        return not self._left[bucket]
