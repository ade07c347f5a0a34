"""Chooses the communicator for some devices."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Sequence
from typing import Any

from fastdp.comm.base import Communicator
from fastdp.comm.host.communicator import HostCommunicator
from fastdp.runtime.queue import QueueDevice

# Connecting GPUs takes a while, so models on the same devices share a communicator.
_connected: weakref.WeakValueDictionary[tuple[int, ...], Any] = weakref.WeakValueDictionary()


def communicator(devices: Sequence[QueueDevice], timeout: float = 60.0) -> Communicator:
    """The communicator of these devices, in their order.

    Raises:
        ValueError: GPUs are mixed with virtual devices in host memory.
        RuntimeError: the process's settings keep GPUs from working together; see fastdp.comm.cuda.communicator.
    """
    on_gpu = {device.on_gpu for device in devices}
    if len(on_gpu) > 1:
        raise ValueError(f"Devices must be all GPUs or all in host memory. Received: {list(devices)}")
    if not on_gpu.pop():
        return HostCommunicator(devices)
    key = tuple(map(id, devices))
    found: Communicator | None = _connected.get(key)
    if found is None:
        # Imported here, since it needs CuPy, which is installed only with GPUs.
        found = _connected[key] = importlib.import_module("fastdp.comm.cuda.communicator").CudaCommunicator(
            devices, timeout
        )
    return found
