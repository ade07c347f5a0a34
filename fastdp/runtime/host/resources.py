"""The cores that replicas share, and host memory that one step frees for the next.

glibc's malloc returns large arrays to the system when they are freed. A step that allocates them again pays for
clearing and mapping every page: 5,600 pages per step for a small convolutional network with 128 rows, a third of its
time (docs/log.md). Virtual devices allocate such arrays in every step, so the process keeps freed memory.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import platform
from collections.abc import Mapping

import numpy as np

# The number of cores that this process may use; the devices that compute on them share them.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

# Parameters of mallopt (glibc's malloc.h) and their values in bytes.
_SETTINGS = {
    -3: 1 << 30,  # M_MMAP_THRESHOLD: arrays below 1 GiB come from the heap, not from a separate mapping
    -1: (1 << 31) - 1,  # M_TRIM_THRESHOLD: free memory at the heap's end is returned only beyond 2 GiB
    -2: 64 << 20,  # M_TOP_PAD: a heap grows by at least this much, and keeps this much when trimmed
}
# Work on less memory than this is over before further threads help: they have to be woken, or made, first.
SEVERAL_THREADS_NBYTES = 16 << 20
# Arrays of at least this size come from the system instead of malloc.
LARGE_NBYTES = 4 << 20


def large_memory(nbytes: int) -> np.ndarray:
    """Zeroed bytes for long-lived arrays, in pages that the system zeroes when they are first touched.

    The mapping does not ask for huge pages. Many virtual machines return free memory to their host, huge pages first,
    so touching huge pages is slow: 0.9 of the 2.3 seconds until the end of a ResNet50's first step, while they make
    steps less than one percent faster (docs/log.md). Large NumPy arrays ask for huge pages, so they are not used here.
    The memory returns to the system when the array is freed.
    """
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return np.zeros(nbytes, np.uint8)
    return np.frombuffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)


@functools.cache
def keep_freed_memory() -> bool:
    """Make malloc keep freed memory; returns whether it does. Runs once and affects the whole process.

    Does not change the user's own settings (any MALLOC_... variable, or glibc.malloc in GLIBC_TUNABLES), other C
    libraries, or allocators that replace malloc.
    """
    if platform.libc_ver()[0] != "glibc" or has_own_settings(os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(setting, nbytes) == 1 for setting, nbytes in _SETTINGS.items())


def has_own_settings(environment: Mapping[str, str]) -> bool:
    """Whether the environment configures malloc."""
    tunables = environment.get("GLIBC_TUNABLES", "")
    return "glibc.malloc" in tunables or any(name.startswith("MALLOC_") for name in environment)
