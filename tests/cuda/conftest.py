"""The simulated CUDA of tests/cuda: `fake_cuda(count=2, ...)` starts one, and its end checks what is left behind."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "rig"))

import build_rig
from fake_cupy import installed
from gpus import Gpus
from rig_runs import Rig
from simulation import Simulation
from small_buckets import make_buckets_small

from fastdp.launch import cubin, nvrtc


@pytest.fixture
def fake_cuda(monkeypatch) -> Iterator[Callable[..., Simulation]]:
    """Starts a simulated CUDA for the rest of the test; the arguments are Simulation's.

    At the end of the test there must be no violation that the test has not taken out of `violations`, nothing left
    to run, and nothing left allocated. Kernels are not compiled: a module is its file's name.
    """
    started: list[Simulation] = []
    with contextlib.ExitStack() as stack:
        monkeypatch.setattr(cubin, "cubin", lambda name, architecture, compiler=None: name.encode())
        monkeypatch.setattr(nvrtc, "load", lambda newest_major=None, architecture=None: None)
        for name in (
            "CUDA_DEVICE_MAX_CONNECTIONS",
            "CUDA_LAUNCH_BLOCKING",
            "CUDA_MODULE_LOADING",
            "NCCL_GRAPH_MIXING_SUPPORT",
        ):
            monkeypatch.setenv(name, "")  # so that it is given back
            monkeypatch.delenv(name)

        def start(count: int = 2, **options: object) -> Simulation:
            started.append(stack.enter_context(installed(Simulation(count, **options))))
            return started[-1]

        yield start
        for sim in started:
            gc.collect()
            if "fastdp.runtime.cuda.memory" in sys.modules:
                sys.modules["fastdp.runtime.cuda.memory"].run_deferred()
            assert not sim.violations, sim.violations
            assert sim.check_end() == []


@pytest.fixture
def gpus(fake_cuda, monkeypatch) -> Iterator[Callable[..., Gpus]]:
    """`gpus(count, ...)` starts a simulated CUDA of so many cards, with Simulation's arguments. The devices that a test
    made on it are closed, and their memory is given back."""
    boxes: list[Gpus] = []

    def start(count: int, **options: object) -> Gpus:
        boxes.append(Gpus(fake_cuda(count, **options), monkeypatch))
        return boxes[-1]

    yield start
    for box in boxes:
        box.close()


@pytest.fixture
def box(gpus) -> Gpus:
    """One card of a simulated CUDA."""
    return gpus(1)


@pytest.fixture(scope="module")
def shared_traces() -> Iterator[None]:
    """Steps of these tests that compute the same are traced once: what follows a trace is tested here."""
    from shared_traces import share_traces

    with pytest.MonkeyPatch.context() as patch:
        share_traces(patch)
        yield


@pytest.fixture(params=[False, True], ids=["one bucket", "several buckets"])
def small_buckets(request, monkeypatch):
    """Buckets so small that each model has several of them, or one."""
    if request.param:
        make_buckets_small(monkeypatch)
    return request.param


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """The rig, built if it is not there yet."""
    try:
        made = Rig(build_rig.built())
    except build_rig.NotToBeHad as why:
        pytest.skip(str(why))
    yield made
    made.close()
