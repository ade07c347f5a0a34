"""Steps on virtual devices find the memory that the steps before them freed."""

from __future__ import annotations

import platform
import subprocess
import sys

import numpy as np
import pytest

from fastdp.runtime.host.device import ALIGNMENT, HostDevice
from fastdp.runtime.host.resources import LARGE_NBYTES, has_own_settings

SCRIPT = """
import resource, sys, threading
import numpy as np
from fastdp.runtime.host.device import HostDevice

def work():
    for _ in range(3):
        arrays = [np.ones(1 << 17) for _ in range(32)]  # 1 MiB each: NumPy gets larger ones as huge pages
        del arrays

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

device = HostDevice(0)
for run in (work, lambda: (device.compute.enqueue(work), device.synchronize(60))):
    run()
    before = faults()
    run()
    print(faults() - before)
device.close()
"""


def page_faults(**environment: str) -> list[int]:
    """Pages mapped anew by work that allocates 96 MiB, on the main thread and on a device's worker."""
    made = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=True, env=environment
    )
    return [int(line) for line in made.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only GNU's malloc is told to keep memory")
def test_memory_of_a_step_is_kept_for_the_next():
    kept, given_back = page_faults(), page_faults(MALLOC_TRIM_THRESHOLD_="131072")
    assert len(kept) == len(given_back) == 2
    assert all(pages < 1000 for pages in kept), kept  # of 24,576 that are written
    assert all(pages > 20_000 for pages in given_back), given_back  # the user's own setting is respected


@pytest.mark.parametrize(
    ("environment", "own"),
    [
        ({}, False),
        ({"PATH": "/bin", "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F"}, False),
        ({"MALLOC_ARENA_MAX": "1"}, True),
        ({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1000"}, True),
    ],
)
def test_settings_of_the_user_are_recognized(environment, own):
    assert has_own_settings(environment) is own


@pytest.mark.parametrize("nbytes", [1, LARGE_NBYTES - 1, LARGE_NBYTES, 3 * LARGE_NBYTES + 5])
def test_memory_of_any_size_is_aligned_zero_and_the_arrays_own(nbytes):
    device = HostDevice(0)
    first, second = (device.zeros((nbytes,), np.dtype(np.uint8)) for _ in range(2))
    for array in (first, second):
        assert array.ctypes.data % ALIGNMENT == 0
        assert array.shape == (nbytes,)
        assert not array.any()
    first[...] = 7
    assert not second.any()
    assert device.empty((nbytes, 2), np.dtype(np.float64)).shape == (nbytes, 2)
    device.close()
