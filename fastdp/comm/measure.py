"""Measures the algorithms of the all-reduce on the devices, and finds up to which size each is best."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence

from fastdp.buffers import ArraySpec, Bucket, FlatBuffers
from fastdp.comm.algorithm import Limits
from fastdp.comm.base import Communicator
from fastdp.runtime.queue import QueueDevice, joined

# In bytes of float32. Kernels take no larger buckets where NCCL is there, which then costs them no memory.
SIZES = (4 << 10, 32 << 10, 128 << 10, 512 << 10, 2 << 20, 8 << 20)
MOST_ONE_SHOT_NBYTES = 2 << 20
# All-reduces that are timed together, and such rounds, of which the median counts.
TOGETHER, ROUNDS = 5, 3
# An algorithm takes a size from the one that the built-in limits give it only if it is faster by this much.
GAIN = 0.1

Seconds = dict[tuple[int, str], float]


def measure(
    communicator: Communicator, devices: Sequence[QueueDevice], seconds: float, timeout: float = 10.0
) -> Seconds:
    """Seconds of one all-reduce by size and algorithm. On the host thread, while no step of any engine runs.

    Args:
        communicator: over these devices.
        devices: hold two buffers of the largest size each meanwhile.
        seconds: what may be spent. Connecting and loading, for which the first step would else pay, come on top.
        timeout: seconds that each wait may take.

    Returns:
        The sizes for which all algorithms were timed, smallest first.

    Raises:
        DeviceTimeoutError: an all-reduce did not end in time.
        RuntimeError: one failed.
    """
    count = SIZES[-1] // 4
    flats = [FlatBuffers([ArraySpec("x", (count,), "float32")], device) for device in devices]

    def run(way: str, nbytes: int, times: int) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            communicator.all_reduce_by(way, flats, Bucket("float32", 0, nbytes // 4))
        joined([device.compute.record() for device in devices]).synchronize(timeout)
        communicator.check()
        return (time.perf_counter() - begin) / times

    plan = {nbytes: [way for way in communicator.choice.ways if _may(way, nbytes)] for nbytes in SIZES}
    for way in plan[SIZES[0]]:
        run(way, SIZES[0], 1)
    found: Seconds = {}
    deadline = time.perf_counter() + seconds
    for nbytes, ways in plan.items():
        rounds: dict[str, list[float]] = {way: [] for way in ways}
        for number, way in enumerate(itertools.chain.from_iterable([ways] * (1 + ROUNDS))):
            if time.perf_counter() > deadline:
                return found
            first = number < len(ways)  # it may allocate
            taken = run(way, nbytes, 1 if first else TOGETHER)
            if not first:
                rounds[way].append(taken)
        found |= {(nbytes, way): sorted(times)[len(times) // 2] for way, times in rounds.items()}
    return found


def _may(way: str, nbytes: int) -> bool:
    """One-shot's memory is as large as the bucket, and its work grows with the ranks."""
    return way != "one-shot" or nbytes <= MOST_ONE_SHOT_NBYTES


def best_limits(found: Mapping[tuple[int, str], float], built_in: Limits) -> Limits:
    """The limits of size with which the measured all-reduces take the least time, relative to the best of each size.

    They lie at measured sizes, or are the built-in ones, which stay unless others are faster by a tenth at some size:
    noise should not choose. Without measurements the built-in limits stay.

    Example:
        >>> best_limits({(4096, "one-shot"): 9e-6, (4096, "two-shot"): 2e-5, (4096, "nccl"): 4e-5}, Limits(-1, -1))
        Limits(one_shot=4096, two_shot=4096)
    """
    sizes = sorted({nbytes for nbytes, _ in found})
    if not sizes:
        return built_in
    best = {nbytes: min(t for (size, _), t in found.items() if size == nbytes) for nbytes in sizes}

    def cost(limits: Limits) -> float:
        total = 0.0
        for nbytes in sizes:
            ratio = found.get((nbytes, limits.way(nbytes)), float("inf")) / best[nbytes]
            total += ratio if ratio > 1 + GAIN else 1.0
        return total

    borders = (-1, *sizes)
    others = [Limits(a, b) for a, b in itertools.combinations_with_replacement(borders, 2)]
    # The first of equally good ones counts: the built-in, then those that leave most to NCCL.
    return min([built_in, *others], key=cost)
