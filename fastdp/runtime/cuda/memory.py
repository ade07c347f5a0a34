"""GPU memory that is reused: arrays on a device, pinned staging buffers, pinned arrays for the caller.

The steady state calls no CUDA allocator: cudaMalloc, cudaFree and cudaHostAlloc may wait for all GPUs, and hang while
one of them waits for a collective. Memory that the garbage collector finds is therefore put on a list, and freed
by the next call that allocates anyway.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdp.runtime.cuda import cupy_api
from fastdp.runtime.events import QueueEvent

__all__ = ["Arena", "PinnedPool", "StagingRing", "defer", "run_deferred", "size_class"]

ALIGNMENT = 512  # bytes
PINNED_CACHE_NBYTES = 1 << 30
MOST_VIEWS = 64


def _nbytes(shape: Sequence[int], dtype: Any) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize


# Work that finalizers must not do themselves; any thread may append to it.
_deferred: deque[Callable[[], object]] = deque()


def defer(work: Callable[[], object]) -> None:
    """Defer `work()`, which frees GPU resources, to the next allocation or trim of any GPU's memory."""
    _deferred.append(work)


def run_deferred() -> None:
    """Run the deferred work. Do not call it during a collective: freeing may wait for the GPUs."""
    while _deferred:
        _deferred.popleft()()


class _Block:
    """A block of memory, alive as long as an array or a view uses it."""

    def __init__(self, ptr: int, nbytes: int) -> None:
        self.ptr = ptr
        self.nbytes = nbytes

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """NumPy's protocol, for pinned memory."""
        return {"version": 3, "data": (self.ptr, False), "shape": (self.nbytes,), "typestr": "|u1"}


class _Usage:
    """Current and peak memory of all arenas of a card, in bytes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._nbytes = 0
        self.peak = 0

    def change(self, nbytes: int) -> None:
        """Add `nbytes`, which may be negative."""
        with self._lock:
            self._nbytes += nbytes
            self.peak = max(self.peak, self._nbytes)


_usage: defaultdict[int, _Usage] = defaultdict(_Usage)  # by card


class Arena:
    """The memory of one device, from plain cudaMalloc, which peers and NCCL can access.

    Args:
        device: the CUDA ordinal.

    Attributes:
        allocations: number of allocations from CUDA; constant in the steady state.

    The next `empty`, `trim` or `close` frees memory whose arrays are gone. The owner of an arena must not drop an
    array before the GPU is done with it.
    """

    def __init__(self, device: int) -> None:
        self.device = device
        self.allocations = 0
        self._closed = False
        self._dead: deque[int] = deque()  # the garbage collector appends to it, in any thread
        self._finalizers: dict[int, weakref.finalize[Any, Any]] = {}
        self._sizes: dict[int, int] = {}
        self._usage = _usage[device]

    @property
    def peak_nbytes(self) -> int:
        """Peak memory of all arenas of this card together, in this process."""
        return self._usage.peak

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """An uninitialized cupy.ndarray, 512-byte aligned, that owns its memory together with its views.

        Raises:
            MemoryError: the device has not enough free memory; the message says how much is free.
            RuntimeError: the arena is closed.
        """
        if self._closed:
            raise RuntimeError(f"The memory of GPU {self.device} is closed; wrap the model again to use it anew.")
        self.trim()
        nbytes = _nbytes(shape, dtype)
        base = self._malloc(nbytes + ALIGNMENT)
        self.allocations += 1
        self._sizes[base] = nbytes + ALIGNMENT
        self._usage.change(self._sizes[base])
        block = _Block(-(-base // ALIGNMENT) * ALIGNMENT, nbytes)
        self._finalizers[base] = weakref.finalize(block, self._dead.append, base)
        self._finalizers[base].atexit = False  # process exit frees all memory
        return cupy_api.array(block.ptr, shape, dtype, self.device, block)

    def trim(self) -> None:
        """Free memory that no array uses any more. Waits for the device if there is such memory."""
        run_deferred()
        while self._dead:
            base = self._dead.popleft()
            del self._finalizers[base]
            cupy_api.free(base)
            self._usage.change(-self._sizes.pop(base))

    def close(self) -> None:
        """Free everything; remaining arrays become invalid. Idempotent."""
        self._closed = True
        for finalizer in list(self._finalizers.values()):
            finalizer()
        self.trim()

    def _malloc(self, nbytes: int) -> int:
        try:
            return cupy_api.malloc(self.device, nbytes)
        except cupy_api.CudaError as error:
            if "MemoryAllocation" not in str(error):
                raise
            free, total = cupy_api.memory_info(self.device)
            raise MemoryError(
                f"GPU {self.device} has no room for {nbytes:,} bytes: {free:,} of {total:,} are free. Use a smaller "
                "batch_size, a smaller model or more GPUs, and see what else runs on it with nvidia-smi."
            ) from error


class Slot:
    """One buffer of the ring."""

    def __init__(self) -> None:
        self.ptr = 0
        self.nbytes = 0
        self.in_use_until: QueueEvent | None = None


class StagingRing:
    """A ring of pinned buffers for copying host batches to GPUs: one is filled while copies read from the others.

    Args:
        slots: number of buffers.
        timeout: seconds that `take` waits for a buffer.

    Attributes:
        allocations: number of allocations from CUDA; constant after the largest batch.
        address: that of the buffer taken last.
        slots, turn: the buffers, and the number of the one that is taken next.

    One thread at a time takes and releases buffers, in the same order.

    Example:
        >>> rows = ring.take(batch.nbytes)  # doctest: +SKIP
        >>> rows[:] = batch.view(np.uint8).ravel()  # doctest: +SKIP
        >>> ...  # enqueue the copies to the GPUs                  # doctest: +SKIP
        >>> ring.release(joined(events))  # doctest: +SKIP
    """

    def __init__(self, slots: int = 2, timeout: float = 60.0) -> None:
        if slots < 1:
            raise ValueError(f"slots={slots}: expected at least 1")
        self.allocations = 0
        self._timeout = timeout
        self.slots = [Slot() for _ in range(slots)]
        self.turn = 0
        self._taken: deque[Slot] = deque()
        self._views: dict[tuple[int, int], NDArray[np.uint8]] = {}  # of the present buffers, by address and length
        self.address = 0

    @property
    def room(self) -> int:
        """Size in bytes of the smallest buffer, which `take` serves without an allocation."""
        return min(slot.nbytes for slot in self.slots)

    def reserve(self, nbytes: int) -> None:
        """Grow all buffers to `nbytes`, once no copy reads from them. No buffer may be taken.

        Raises:
            fastdp.errors.DeviceTimeoutError: as in `take`.
        """
        for slot in self.slots:
            if slot.nbytes < nbytes:
                self._wait(slot)
                self._resize(slot, nbytes)

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        """`nbytes` of pinned memory for the caller to fill; no copy reads from it any more.

        Raises:
            RuntimeError: all buffers are taken and none was released.
            fastdp.errors.DeviceTimeoutError: the GPUs still read from the buffer after `timeout` seconds.
        """
        if len(self._taken) == len(self.slots):
            raise RuntimeError(f"all {len(self.slots)} staging buffers are taken: release one with its event first")
        number = self.turn
        slot = self.slots[number]
        self._wait(slot)
        self.turn = (number + 1) % len(self.slots)
        if slot.nbytes < nbytes:
            self._resize(slot, nbytes)
        self._taken.append(slot)
        self.address = slot.ptr
        return self.view(number, nbytes) if nbytes else np.empty(0, np.uint8)

    @property
    def all_free(self) -> bool:
        """Whether no buffer is taken."""
        return not self._taken

    def pass_on(self, until: QueueEvent) -> None:
        """Take the next buffer while no copy reads from it, and release it until the event, of which each has one."""
        slots, turn = self.slots, self.turn
        slots[turn].in_use_until = until
        self.turn = turn + 1 if slots[turn] is not slots[-1] else 0

    def view(self, number: int, nbytes: int) -> NDArray[np.uint8]:
        """The first bytes of a buffer."""
        at = self.slots[number].ptr
        view = self._views.get((at, nbytes))
        if view is None:
            if len(self._views) >= MOST_VIEWS:
                self._views.clear()
            view = self._views[at, nbytes] = np.asarray(_Block(at, nbytes))
        return view

    def release(self, event: QueueEvent) -> None:
        """Release the buffer taken first; it stays in use until `event` is done.

        Raises:
            RuntimeError: no buffer is taken.
        """
        if not self._taken:
            raise RuntimeError("no staging buffer is taken: call take() first")
        self._taken.popleft().in_use_until = event

    def recover(self) -> None:
        """Release buffers that a failed copy has left taken. Only while nothing runs."""
        self._taken.clear()

    def close(self) -> None:
        """Wait until the buffers are unused, and free them. Idempotent."""
        for slot in self.slots:
            self._wait(slot)
            self._resize(slot, 0)
        self._taken.clear()

    def _wait(self, slot: Slot) -> None:
        """Wait until no copy reads from the buffer. The engine reports a failed step's error; its buffer is free."""
        if slot.in_use_until is not None:
            slot.in_use_until.finish(self._timeout)
            slot.in_use_until = None

    def _resize(self, slot: Slot, nbytes: int) -> None:
        if slot.ptr:
            self._views.clear()
            cupy_api.host_free(slot.ptr)
            slot.ptr = slot.nbytes = 0
        if nbytes:
            slot.ptr = cupy_api.host_alloc(size_class(nbytes))
            slot.nbytes = size_class(nbytes)
            self.allocations += 1


class PinnedPool:
    """Pinned arrays owned by the caller; the memory returns to the pool when an array and all its views are gone.

    Args:
        cache_nbytes: how much unused memory is kept for later.

    Attributes:
        allocations: number of allocations from CUDA; constant in the steady state.

    Code that enqueues a copy to or from such an array must keep a reference until the copy is done.
    """

    def __init__(self, cache_nbytes: int = PINNED_CACHE_NBYTES) -> None:
        self.allocations = 0
        self._cache_nbytes = cache_nbytes
        self._lock = threading.Lock()
        self._closed = False
        self._returned: deque[tuple[int, int]] = deque()  # the garbage collector appends to it, in any thread
        self._free: dict[int, list[int]] = {}  # addresses by size

    def empty(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """An uninitialized NumPy array in pinned memory.

        Raises:
            RuntimeError: the pool is closed.
        """
        if self._closed:
            raise RuntimeError("the pool of pinned memory is closed")
        nbytes = _nbytes(shape, dtype)
        if not nbytes:
            return np.empty(shape, dtype)
        size = size_class(nbytes)
        with self._lock:  # workers of several devices allocate from the device on which outputs are merged
            self._collect()
            ready = self._free.get(size)
            if ready:
                ptr = ready.pop()
            else:
                ptr = cupy_api.host_alloc(size)
                self.allocations += 1
        block = _Block(ptr, nbytes)
        weakref.finalize(block, self._returned.append, (ptr, size)).atexit = False
        return np.asarray(block).view(dtype).reshape(shape)

    def close(self) -> None:
        """Free unused memory. Call again once the remaining arrays are gone."""
        self._closed = True
        self._cache_nbytes = 0
        with self._lock:
            self._collect()

    def _collect(self) -> None:
        """Take back memory of dead arrays, and free what exceeds the cache."""
        while self._returned:
            ptr, size = self._returned.popleft()
            self._free.setdefault(size, []).append(ptr)
        kept = sum(size * len(ptrs) for size, ptrs in self._free.items())
        for size in sorted(self._free, reverse=True):
            while kept > self._cache_nbytes and self._free[size]:
                cupy_api.host_free(self._free[size].pop())
                kept -= size


def size_class(nbytes: int) -> int:
    """Round nbytes up by at most an eighth (or 4 KiB), so that similar sizes share memory."""
    step = max(4096, 1 << max(0, (nbytes - 1).bit_length() - 4))
    return -(-nbytes // step) * step
