"""The cores that replicas share, and host memory that one step frees for the next.

GNU's malloc gives large arrays back to the system when they are freed, and a step that allocates them again has each of
their pages cleared and mapped anew: 5,600 pages a step for a small convolutional network of 128 rows, a third of its
time (docs/log.md). Virtual devices compute in such arrays, step after step, so this process keeps them.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import platform
from collections.abc import Mapping

import numpy as np

# The cores that this process may use, shared out among the devices that compute on them.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

# From GNU's malloc.h: which setting, and its value in bytes.
_SETTINGS = {
    -3: 1 << 30,  # M_MMAP_THRESHOLD: arrays below 1 GiB come from the heap, not from a mapping of their own
    -1: (1 << 31) - 1,  # M_TRIM_THRESHOLD: the heap's free end is given back only beyond 2 GiB
    -2: 64 << 20,  # M_TOP_PAD: a heap grows, and is kept, by this much at least
}
# From here on memory is asked of the system, and not of malloc.
LARGE_NBYTES = 4 << 20


def large_memory(nbytes: int) -> np.ndarray:
    """Bytes, all zero, for what lasts: pages of the system's that are zeroed when they are first touched.

    They are not asked to be huge. In a virtual machine that gives free memory back to its host, as many do, huge pages
    are what was given back, and touching them is slow: 0.9 of the 2.3 seconds to the end of a ResNet50's first step,
    where steps are not a per cent faster for them (docs/log.md). NumPy's own large arrays ask for them, so they are not
    used here. The memory goes back to the system with the array.
    """
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return np.zeros(nbytes, np.uint8)
    return np.frombuffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)


@functools.cache
def keep_freed_memory() -> bool:
    """Let this process's malloc keep what is freed; whether it does. Once, and for the whole process.

    Settings of the user's own are left alone: any variable MALLOC_..., or glibc.malloc in GLIBC_TUNABLES. So are other
    C libraries, and allocators that take malloc's place.
    """
    if platform.libc_ver()[0] != "glibc" or has_own_settings(os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(setting, nbytes) == 1 for setting, nbytes in _SETTINGS.items())


def has_own_settings(environment: Mapping[str, str]) -> bool:
    """Whether the user has set how malloc behaves."""
    tunables = environment.get("GLIBC_TUNABLES", "")
    return "glibc.malloc" in tunables or any(name.startswith("MALLOC_") for name in environment)
