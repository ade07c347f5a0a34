"""Memory of outputs that are merged on a GPU: the caller's until it drops them, then used again."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from typing import Any

import numpy as np

from fastdp.runtime.cuda import cupy_api
from fastdp.runtime.cuda.memory import Arena, size_class

# Unused bytes that each device keeps for later.
OUTPUT_CACHE_NBYTES = 1 << 30


class _Owner:
    """Alive as long as an array of the caller, or a view of it, uses the memory."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory


class _Returned:
    """Collects blocks from the garbage collector, in any thread, without calling CUDA."""

    def __init__(self) -> None:
        self.open = True
        self.found: deque[Any] = deque()

    def put(self, memory: Any) -> None:
        """Take a block back, or leave it to its arena if the pool is closed."""
        if self.open:
            self.found.append(memory)


class _Idle:
    """A block that no array uses, and the event that ends its use by work that its caller enqueued."""

    def __init__(self, memory: Any, event: int) -> None:
        self.memory = memory
        self._event = event

    def ready(self) -> bool:
        """Whether the block may be written; never waits."""
        if self._event and cupy_api.event_done(self._event):
            self.drop_event()
        return not self._event

    def drop_event(self) -> None:
        """Destroy the event."""
        event, self._event = self._event, 0
        if event:
            cupy_api.event_destroy(event)


class OutputPool:
    """Arrays on one GPU owned by the caller; the memory is reused when an array and all its views are gone.

    Args:
        arena: where the memory comes from.
        cache_nbytes: how much unused memory is kept for later.

    A block is reused once all work has run that was enqueued on CUDA's default stream before its last array was
    dropped. Torch and CuPy use this stream by default, and blocking streams synchronize with it. Code that reads an
    array on a non-blocking stream must keep a reference until that work is done. Neither a GPU nor a thread waits for a
    block: one that is not ready is skipped. The steady state therefore cycles through a few blocks and allocates none.
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
            MemoryError, RuntimeError: as in `Arena.empty`.
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
        """Return unused blocks to the arena, and each other block when its arrays are gone. Idempotent."""
        with self._lock:
            self._returned.open = False
            self._returned.found.clear()
            for blocks in self._idle.values():
                for block in blocks:
                    block.drop_event()
            self._idle.clear()

    def _collect(self) -> None:
        """Take back blocks of dead arrays, and return what exceeds the cache to the arena."""
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
