"""Tests that are run on the rig, in a process of its own (test_gpu_tests_on_rig.py), and what they look at there."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

ON_RIG = "torch_on_rig" in sys.modules
collect_ignore_glob = [] if ON_RIG else ["test_*.py"]

if ON_RIG:
    from fastdp.runtime.cuda import cupy_api, memory
    from fastdp.runtime.cuda.device import CudaDevice

COUNTED = ("malloc", "free", "hostAlloc", "freeHost", "deviceEnablePeerAccess", "streamDestroy")


class Allocation(NamedTuple):
    """Memory that is not freed; `card` is None for pinned host memory."""

    address: int
    nbytes: int
    card: int | None


class Cards:
    """The rig's cards, during one test.

    Attributes:
        calls: how often CUDA was called, by CuPy's names, as far as COUNTED has them.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self.calls: Counter[str] = Counter()
        for name in COUNTED:
            patch.setattr(cupy_api.cudart, name, self._counting(name, getattr(cupy_api.cudart, name)))
        self.count = cupy_api.device_count()
        self._before = set(self._allocations())
        self._made: list[Any] = []

    def _counting(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            self.calls[name] += 1
            return call(*arguments)

        return counted

    def devices(self, count: int, cards: int | None = None) -> list[Any]:
        """Devices on the first cards, closed after the test."""
        over = cards or self.count
        return self.on([i % over for i in range(count)])

    def on(self, ordinals: list[int]) -> list[Any]:
        """Devices on these cards, closed after the test."""
        more = [CudaDevice(i, card, virtual=len(set(ordinals)) < len(ordinals)) for i, card in enumerate(ordinals)]
        self._made += more
        return more

    def close(self) -> None:
        """Close the devices; no memory may be left."""
        self.hold(False)
        if "keras" in sys.modules:
            sys.modules["keras"].backend.clear_session()
        gc.collect()
        for device in self._made:
            device.close(20.0)
        gc.collect()
        memory.run_deferred()
        for device in self._made:
            device.arena.trim()
            device.pinned.close()
        assert self.alive() == []

    def hold(self, held: bool) -> None:
        """While it is held no work begins."""
        self._library.rigHold(int(held))

    def alive(self) -> list[Allocation]:
        """What was allocated in this test and is not freed."""
        return [one for one in self._allocations() if one not in self._before]

    def _allocations(self) -> list[Allocation]:
        found, base, nbytes, card = [], ctypes.c_size_t(), ctypes.c_size_t(), ctypes.c_int()
        places = ctypes.byref(base), ctypes.byref(nbytes), ctypes.byref(card)
        while self._library.rigAllocation(len(found), *places):
            found.append(Allocation(base.value, nbytes.value, None if card.value < 0 else card.value))
        return found

    @property
    def peers(self) -> set[tuple[int, int]]:
        """Which card reaches which other."""
        pairs = [(a, b) for a in range(self.count) for b in range(self.count)]
        return {pair for pair in pairs if self._library.rigReaches(*pair)}

    def part_all(self) -> None:
        """Let no card reach another."""
        for card, peer in self.peers:
            with cupy_api.on(card):
                cupy_api.cudart.check_status(self._library.cudaDeviceDisablePeerAccess(peer))


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cards]:
    """The cards of the rig. After the test nothing may be allocated that was not before."""
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        found = Cards(patch)
        yield found
        monkeypatch.undo()
        found.close()


@pytest.fixture
def runtime() -> Any:
    """CUDA's calls as functions."""
    return cupy_api
