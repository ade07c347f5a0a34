"""What the GPU tests share: helpers of this folder, devices of a real GPU, and the seconds that a wait may take.

Without a GPU each test is skipped with the reason (tests/conftest.py). The checks themselves (`*_checks.py`) take
the device that they run on: tests/cuda/test_gpu_tests_on_rig.py runs them without a GPU.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import engine_checks

import fastdp

LIMIT = 30.0


@pytest.fixture
def compute() -> engine_checks.Compute:
    """Applied to the functions of a program. With FASTDP_GPU_COMPUTE=host NumPy computes, on copies in the order of
    CuPy's current stream: for cards that cannot run CuPy's kernels and libraries."""
    if os.environ.get("FASTDP_GPU_COMPUTE") != "host":
        return engine_checks.as_it_is
    import cupy

    return engine_checks.through(cupy.asnumpy, cupy.asarray)


@pytest.fixture
def gpus() -> Iterator[Callable[[int], list]]:
    """`gpus(n)`: n virtual devices on the real GPUs of this machine, closed after the test."""
    from fastdp.runtime import select

    def devices(count: int) -> list:
        fastdp.set_virtual_devices(count, kind="gpu")
        return select.resolve(count)

    yield devices
    gc.collect()
    fastdp.set_virtual_devices(0)


@pytest.fixture
def hosts() -> Iterator[Callable[[int], list]]:
    """`hosts(n)`: n virtual devices in host memory, closed after the test."""
    from fastdp.runtime.host.device import HostDevice

    made: list[HostDevice] = []

    def devices(count: int) -> list:
        made.extend(HostDevice(i) for i in range(count))
        return made[-count:]

    yield devices
    for one in made:
        one.close(LIMIT)
