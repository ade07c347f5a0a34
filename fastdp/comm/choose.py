"""Which collectives some devices have."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from fastdp.buckets import Bucket, FlatBuffers
from fastdp.comm.host import HostCommunicator


class Communicator(Protocol):
    """Collectives over some devices, ordered after their compute streams; compute enqueued later waits."""

    def prepare(self, buckets: Sequence[Bucket]) -> None:
        """Have the memory that these buckets need. Between steps."""

    def all_reduce(
        self,
        sources: Sequence[FlatBuffers],
        targets: Sequence[FlatBuffers],
        buckets: Sequence[Bucket],
        once: Callable[[], object] | None = None,
    ) -> None:
        """Sum the buckets of `sources` into each of `targets`; all get the same bits."""

    def reduce_scatter(
        self,
        sources: Sequence[FlatBuffers],
        targets: Sequence[FlatBuffers],
        buckets: Sequence[Bucket],
        once: Callable[[], object] | None = None,
    ) -> None:
        """Sum the buckets of `sources` into `targets`, in each its own rank's part alone; the rest is undefined."""

    def all_gather(self, buffers: Sequence[FlatBuffers], buckets: Sequence[Bucket]) -> None:
        """Copy each rank's own part of the buckets to all others' buffers."""

    def broadcast(self, buffers: Sequence[FlatBuffers]) -> None:
        """Copy the first device's buffers to all others."""

    def once(self, work: Callable[[], object]) -> None:
        """Run `work()` on the first device's worker, between what was enqueued and what comes."""

    def check(self) -> None:
        """Raise RuntimeError if a collective failed without a word. When the step is over."""


# Connecting GPUs takes a while: models on the same devices share it.
_connected: weakref.WeakValueDictionary[tuple[int, ...], Any] = weakref.WeakValueDictionary()


def communicator(devices: Sequence[Any], timeout: float = 60.0) -> Communicator:
    """The collectives of these devices, in their order.

    Raises:
        ValueError: GPUs together with virtual devices in host memory.
        RuntimeError: GPUs that cannot work together as the process is set up; see fastdp.comm.cuda.
    """
    on_gpu = {device.on_gpu for device in devices}
    if len(on_gpu) > 1:
        raise ValueError(f"Devices must be all GPUs or all in host memory. Received: {list(devices)}")
    if not on_gpu.pop():
        return HostCommunicator(devices)
    key = tuple(map(id, devices))
    found: Communicator | None = _connected.get(key)
    if found is None:
        # Not imported above: it needs CuPy, which is there where GPUs are.
        found = _connected[key] = importlib.import_module("fastdp.comm.cuda").CudaCommunicator(devices, timeout)
    return found
