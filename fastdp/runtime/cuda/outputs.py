"""Memory of outputs that are merged on a GPU: the caller's until it drops them, then used again."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from typing import Any

import numpy as np

from fastdp.runtime.cuda import cupy_api
from fastdp.runtime.cuda.memory import Arena, size_class

# Bytes that nobody uses and that are kept for later, for each device.
OUTPUT_CACHE_NBYTES = 1 << 30


class _Owner:
    """Alive as long as an array of the caller's, or a view of one, lies in the memory."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory


class _Returned:
    """Where the garbage collector puts what it finds, in any thread: no call of CUDA is made there."""

    def __init__(self) -> None:
        self.open = True
        self.found: deque[Any] = deque()

    def put(self, memory: Any) -> None:
        """Take a block back, or leave it to its arena if the pool is closed."""
        if self.open:
            self.found.append(memory)


class _Idle:
    """A block that no array uses, and the event after which no work that its caller enqueued does."""

    def __init__(self, memory: Any, event: int) -> None:
        self.memory = memory
        self._event = event

    def ready(self) -> bool:
        """Whether it may be written; never waits."""
        if self._event and cupy_api.event_done(self._event):
            self.drop_event()
        return not self._event

    def drop_event(self) -> None:
        """Give the event back."""
        event, self._event = self._event, 0
        if event:
            cupy_api.event_destroy(event)


class OutputPool:
    """Arrays on one GPU that belong to the caller, whose memory is used again when they and all their views are gone.

    Args:
        arena: whose memory it is.
        cache_nbytes: how much that nobody uses is kept for later.

    A block is written again once the work has run that its caller enqueued on CUDA's default stream before the last
    array was dropped: it is what torch and CuPy use unless told otherwise, and blocking streams wait for each other
    through it. Who reads an array on a non-blocking stream keeps it until that work is over. No GPU and no thread waits
    for a block: one that is not ready is left for the next time. So a steady state has a few, and allocates none.
    """

    def __init__(self, arena: Arena, cache_nbytes: int = OUTPUT_CACHE_NBYTES) -> None:
        self._arena = arena
        self._cache_nbytes = cache_nbytes
        self._lock = threading.Lock()
        self._returned = _Returned()
        self._idle: dict[int, list[_Idle]] = {}  # by size

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """An uninitialized cupy.ndarray. Called by any worker.

        Raises:
            MemoryError, RuntimeError: as `Arena.empty`.
        """
        nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        size = size_class(max(1, nbytes))
        with self._lock:
            self._collect()
            blocks = self._idle.get(size, [])
            found = next((block for block in blocks if block.ready()), None)
            if found is not None:
                blocks.remove(found)
                memory = found.memory
            else:
                memory = self._arena.empty((size,), np.dtype(np.uint8))
        owner = _Owner(memory)
        weakref.finalize(owner, self._returned.put, memory).atexit = False
        return cupy_api.array(cupy_api.array_pointer(memory), shape, dtype, self._arena.device, owner)

    def close(self) -> None:
        """Give all blocks that nobody uses back to the arena, and those in use when their arrays go. Idempotent."""
        with self._lock:
            self._returned.open = False
            self._returned.found.clear()
            for blocks in self._idle.values():
                for block in blocks:
                    block.drop_event()
            self._idle.clear()

    def _collect(self) -> None:
        """Take in what came back, and give what is more than the cache holds to the arena."""
        while self._returned.found:
            memory = self._returned.found.popleft()
            with cupy_api.on(self._arena.device):
                event = cupy_api.event_create()
                cupy_api.event_record(event, cupy_api.DEFAULT_STREAM)
            self._idle.setdefault(memory.nbytes, []).append(_Idle(memory, event))
        kept = sum(size * len(blocks) for size, blocks in self._idle.items())
        for size in sorted(self._idle, reverse=True):
            for block in [block for block in self._idle[size] if kept > self._cache_nbytes and block.ready()]:
                if kept > self._cache_nbytes:
                    self._idle[size].remove(block)
                    kept -= size
