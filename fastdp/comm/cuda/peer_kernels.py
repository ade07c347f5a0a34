"""Launches our all-reduce kernels over peer memory for all ranks, and holds the memory that they need."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdp.buffers import Bucket, FlatBuffers, storage_dtype
from fastdp.comm.algorithm import KERNEL_DTYPES
from fastdp.launch import (
    SIGNALS_NBYTES,
    PeerGroup,
    all_reduce_one_shot,
    all_reduce_two_shot,
    coresident_blocks,
    reduce_scatter,
)
from fastdp.launch.args import PACK_NBYTES
from fastdp.launch.loader import BoundLaunches, Kernels
from fastdp.runtime.cuda import cupy_api
from fastdp.runtime.cuda.device import CudaDevice
from fastdp.runtime.cuda.streams import CudaStream

FLAG_NBYTES = 4  # of a rank's error flag


@dataclass
class _PeerRank:
    """One rank's memory for the kernels. The error flag is copied to `seen` after each use."""

    staging: Any
    signals: Any
    error: Any
    seen: np.ndarray

    @functools.cached_property
    def error_at(self) -> int:
        """The address of `error`."""
        return cupy_api.array_pointer(self.error)

    @functools.cached_property
    def seen_at(self) -> int:
        """The address of `seen`."""
        return int(self.seen.ctypes.data)


class PeerKernels:
    """The kernels of ranks that can access each other's memory; several ranks may share a card.

    Args:
        devices: one per rank.

    One thread makes all launches of a collective, on the ranks' communication streams.
    """

    def __init__(self, devices: Sequence[CudaDevice]) -> None:
        self._devices = list(devices)
        self._ranks: list[_PeerRank] = []
        self._groups: list[PeerGroup] = []

    @property
    def memory(self) -> object:
        """An object that identifies the memory currently in use, and keeps it alive."""
        return self._ranks

    def prepare(self, buckets: Sequence[tuple[Bucket, str]]) -> None:
        """Make staging large enough for these (bucket, algorithm) pairs. Between steps, since it may allocate."""
        needed = 0
        for bucket, way in buckets:
            if way == "one-shot":
                needed = max(needed, bucket.nbytes)
            elif way == "two-shot":
                needed = max(needed, -(-bucket.nbytes // len(self._devices)) + PACK_NBYTES)
            elif way == "kernel":
                needed = max(needed, PACK_NBYTES)  # stages nothing, but needs the signals
        half = -(-needed // PACK_NBYTES) * PACK_NBYTES
        if needed and not (self._groups and self._groups[0].half_nbytes >= half):
            self._allocate(half)

    def run(self, targets: Sequence[FlatBuffers], bucket: Bucket, way: str) -> None:
        """Reduce one bucket by one launch per rank."""
        self._run([device.kernels for device in self._devices], targets, bucket, way)

    def bound(self, targets: Sequence[FlatBuffers], bucket: Bucket, way: str) -> list[list[Callable[[], None]]]:
        """The launches of `run` by rank, to be made many times as long as `memory` is the same object.

        Each is made while the rank's device is current.
        """
        bound = [BoundLaunches(device.kernels) for device in self._devices]
        self._run(bound, targets, bucket, way)
        return [one.made for one in bound]

    def _run(
        self, kernels: Sequence[Kernels | BoundLaunches], targets: Sequence[FlatBuffers], bucket: Bucket, way: str
    ) -> None:
        addresses, n = [address_of(target, bucket) for target in targets], bucket.stop - bucket.start
        for rank, (device, group) in enumerate(zip(self._devices, self._groups, strict=True)):
            more: dict[str, Any] = {"y": addresses[rank], "n": n, "dtype": bucket.dtype, "stream": stream_of(device)}
            if way == "one-shot":
                all_reduce_one_shot(kernels[rank], group, x=addresses[rank], **more)
            elif way == "two-shot":
                all_reduce_two_shot(kernels[rank], group, inputs=addresses, **more)
            else:
                reduce_scatter(kernels[rank], group, inputs=addresses, **more)

    def show_errors(self, streams: Sequence[CudaStream]) -> None:
        """Enqueue copies of the ranks' error flags to the host for `given_up`, once, after the last launch.

        Does nothing before the first bucket is reduced by these kernels.

        Args:
            streams: by rank, those that follow the last launch.
        """
        for stream, memory in zip(streams, self._ranks, strict=False):
            cupy_api.copy_async(memory.seen_at, memory.error_at, FLAG_NBYTES, stream.handle)

    def given_up(self) -> list[int]:
        """The ranks that gave up waiting for another. Called when the GPUs are done with the step."""
        return [rank for rank, memory in enumerate(self._ranks) if memory.seen[0]]

    def recover(self) -> bool:
        """Reset signals and error flags after ranks gave up waiting; whether any had. Called when all are idle."""
        flags = [device.to_host(memory.error) for device, memory in zip(self._devices, self._ranks, strict=False)]
        if not any(flag[0] for flag in flags):  # read from the GPUs, since a failed step has not copied them
            return False
        for device, memory in zip(self._devices, self._ranks, strict=True):
            for array in (memory.signals, memory.error):
                device.copy(array, np.zeros(array.shape, array.dtype))
            memory.seen[0] = 0
        return True

    def _allocate(self, half: int) -> None:
        """Allocate two halves of staging, signals and an error flag for each rank."""
        for device in self._devices:
            _launch_each_alone(device)
        self._ranks = [
            _PeerRank(
                device.zeros((2 * half,), np.dtype(np.uint8)),
                device.zeros((SIGNALS_NBYTES,), np.dtype(np.uint8)),
                device.zeros((1,), np.dtype(np.uint32)),
                device.pinned.empty((1,), np.dtype(np.uint32)),
            )
            for device in self._devices
        ]
        for memory in self._ranks:
            memory.seen[0] = 0
        cards = [device.ordinal for device in self._devices]
        shared = max(cards.count(card) for card in cards)
        blocks = min(coresident_blocks(device.kernels.sm_count, shared) for device in self._devices)
        self._groups = [
            PeerGroup(
                rank=rank,
                staging=tuple(cupy_api.array_pointer(one.staging) for one in self._ranks),
                staging_nbytes=2 * half,
                signals=tuple(cupy_api.array_pointer(one.signals) for one in self._ranks),
                error=cupy_api.array_pointer(self._ranks[rank].error),
                max_blocks=blocks,
                tree=any(one.part_of is not None for one in self._devices),
            )
            for rank in range(len(self._devices))
        ]


def _launch_each_alone(device: CudaDevice) -> None:
    """Launch each kernel once for a single rank. CUDA may load a kernel at its first launch, and loading may wait for a
    running kernel, which could be one that waits for this launch."""
    memory = [device.zeros((nbytes,), np.dtype(np.uint8)) for nbytes in (2 * PACK_NBYTES, SIGNALS_NBYTES, 4, 4)]
    staging, signals, error, x = map(cupy_api.array_pointer, memory)
    group = PeerGroup(0, (staging,), 2 * PACK_NBYTES, (signals,), error, 1)
    for dtype in KERNEL_DTYPES:
        more: dict[str, Any] = {"y": x, "n": 1, "dtype": dtype, "stream": stream_of(device)}
        all_reduce_one_shot(device.kernels, group, x=x, **more)
        all_reduce_two_shot(device.kernels, group, inputs=[x], **more)
        reduce_scatter(device.kernels, group, inputs=[x], **more)
    device.read(memory[-1], device.communication)  # waits


def stream_of(device: CudaDevice) -> int:
    """The handle of a rank's communication stream."""
    stream = device.communication
    assert isinstance(stream, CudaStream)
    return stream.handle


def address_of(flat: FlatBuffers, bucket: Bucket) -> int:
    """Where a bucket begins in device memory."""
    return cupy_api.array_pointer(flat.buffers[bucket.dtype]) + bucket.start * storage_dtype(bucket.dtype).itemsize
