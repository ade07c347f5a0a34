"""Keeps the decoded chunks of which rows are still to come, up to a number of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

from numpy.typing import NDArray

from fastdp.runtime import forks

CACHE_NBYTES = 64 << 20


class ChunkCache:
    """Decoded chunks by number; those that were used longest ago go first.

    Args:
        nbytes: the most that is kept.
    """

    def __init__(self, nbytes: int = CACHE_NBYTES) -> None:
        self._limit = nbytes
        self._held = 0
        self._chunks: OrderedDict[int, NDArray[Any]] = OrderedDict()
        self._lock = threading.Lock()
        forks.watch(self)

    @property
    def limit(self) -> int:
        """The most bytes that are kept."""
        return self._limit

    def keep_at_least(self, nbytes: int) -> None:
        """Raise the limit to this many bytes; it is never lowered."""
        with self._lock:
            self._limit = max(self._limit, nbytes)

    def get(self, cell: int) -> NDArray[Any] | None:
        """A chunk, or None."""
        with self._lock:
            chunk = self._chunks.get(cell)
            if chunk is not None:
                self._chunks.move_to_end(cell)
            return chunk

    def put(self, cell: int, chunk: NDArray[Any]) -> None:
        """Keep a chunk, which nobody may change from now on. One larger than the limit is not kept."""
        with self._lock:
            if chunk.nbytes > self._limit or cell in self._chunks:
                return
            self._chunks[cell] = chunk
            self._held += chunk.nbytes
            while self._held > self._limit:
                _, old = self._chunks.popitem(last=False)
                self._held -= old.nbytes

    def after_fork(self) -> None:
        """A lock that another thread held stays locked in a forked child."""
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Drop all chunks."""
        with self._lock:
            self._chunks.clear()
            self._held = 0
