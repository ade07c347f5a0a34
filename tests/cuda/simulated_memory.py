"""Memory of the simulated CUDA: allocations at real addresses, who touched which bytes when, and races.

Freed memory is kept and poisoned until the simulation ends, so that a stale pointer is found and harms nothing.
"""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np
from clocks import Clock

FRESH, FREED = 0xCD, 0xDD
ALIGNMENT = 512

Range = tuple[int, int]  # first address, length in bytes


class SimulationError(AssertionError):
    """A use of CUDA that on a GPU would race, hang, crash or be slow in silence."""


class RaceError(SimulationError):
    """Two accesses to the same bytes, one of them a write, that nothing orders."""


class AddressError(SimulationError):
    """Memory that is not CUDA's, was freed, or is in use and being freed."""


class PeerError(SimulationError):
    """A GPU touches another one's memory without peer access."""


@dataclass(slots=True)
class Access:
    """One access that later ones are compared with."""

    actor: Hashable
    time: int
    lo: int
    hi: int
    write: bool
    name: str


@dataclass(eq=False)
class Allocation:
    """What malloc (device is an ordinal) or hostAlloc (device is None) gave."""

    lo: int
    nbytes: int
    device: int | None
    backing: np.ndarray
    site: str
    freed: str = ""
    accesses: list[Access] = field(default_factory=list)

    @property
    def place(self) -> str:
        return "pinned host memory" if self.device is None else f"memory of GPU {self.device}"


def view(address: int, count: int, dtype) -> np.ndarray:
    """`count` elements at an address of this process."""
    dtype = np.dtype(dtype)
    if not count:
        return np.empty(0, dtype)
    return np.frombuffer((ctypes.c_char * (count * dtype.itemsize)).from_address(address), dtype)


class Memory:
    """All allocations, by address."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._allocations: list[Allocation] = []

    def allocate(self, nbytes: int, device: int | None, site: str) -> Allocation:
        """New poisoned memory; at least one byte, so that addresses differ."""
        backing = np.full(max(nbytes, 1) + 2 * ALIGNMENT, FRESH, np.uint8)
        lo = -(-backing.ctypes.data // ALIGNMENT) * ALIGNMENT
        allocation = Allocation(lo, nbytes, device, backing, site)
        at = bisect.bisect(self._starts, lo)
        self._starts.insert(at, lo)
        self._allocations.insert(at, allocation)
        return allocation

    def release(self, address: int, device: bool, completed: Clock, site: str) -> None:
        """Mark it freed; its accesses must be over."""
        kind = "cudaFree" if device else "cudaFreeHost"
        found = self._find(address)
        if found is None or found.lo != address or (found.device is not None) != device:
            raise AddressError(f"{kind}({address:#x}) at {site}: not what an allocation of that kind gave")
        if found.freed:
            raise AddressError(f"{kind}({address:#x}) at {site}: freed already at {found.freed}")
        for access in found.accesses:
            if completed.get(access.actor, 0) < access.time:
                raise AddressError(
                    f"{kind} at {site} of {found.place} allocated at {found.site}: nobody has waited for {access.name}"
                )
        found.freed = site
        view(found.lo, found.nbytes, np.uint8)[:] = FREED

    def alive(self) -> list[Allocation]:
        """What was never freed."""
        return [allocation for allocation in self._allocations if not allocation.freed]

    def find(self, piece: Range, name: str) -> Allocation:
        """The living allocation that holds a range."""
        lo, nbytes = piece
        found = self._find(lo)
        if found is None or lo + nbytes > found.lo + found.nbytes:
            raise AddressError(
                f"{name} touches {nbytes} bytes at {lo:#x}, which are not inside one allocation of CUDA (pageable host "
                "memory makes an asynchronous copy synchronous, and a kernel fails on it)"
                + (f"; the nearest is {found.nbytes} bytes of {found.place} from {found.site}" if found else "")
            )
        if found.freed:
            raise AddressError(f"{name} touches {found.place} allocated at {found.site} and freed at {found.freed}")
        return found

    def _find(self, address: int) -> Allocation | None:
        at = bisect.bisect(self._starts, address) - 1
        if at < 0:
            return None
        found = self._allocations[at]
        return found if address < found.lo + max(found.nbytes, 1) else None

    def touch(self, piece: Range, write: bool, actor: Hashable, clock: Clock, name: str) -> None:
        """Note an access that happens now, at clock[actor], and compare it with those before it."""
        lo, nbytes = piece
        if not nbytes:
            return
        hi = lo + nbytes
        allocation = self.find(piece, name)
        kept = []
        for old in allocation.accesses:
            if old.lo >= hi or old.hi <= lo:
                kept.append(old)
                continue
            ordered = clock.get(old.actor, 0) >= old.time
            if not ordered and (write or old.write):
                raise RaceError(
                    f"{name} {'writes' if write else 'reads'} bytes {max(lo, old.lo) - allocation.lo} to "
                    f"{min(hi, old.hi) - allocation.lo} of {allocation.place} allocated at {allocation.site}, and "
                    f"nothing orders it after {old.name}, which {'writes' if old.write else 'reads'} them"
                )
            # Whatever is ordered after the new access is ordered after the old one too.
            if not (ordered and lo <= old.lo and old.hi <= hi and (write or not old.write)):
                kept.append(old)
        kept.append(Access(actor, clock.get(actor, 0), lo, hi, write, name))
        allocation.accesses = kept
