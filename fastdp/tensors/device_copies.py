"""Copies tensors between the devices of a replica, in the order of the engine's streams.

Torch copies between two GPUs on the current stream of the source GPU. On the worker of the target device that is none
of the engine's streams. So copies take a *lane*: a stream on the source GPU that belongs to the worker. The lane first
waits for the worker's compute stream, which afterwards waits for the lane. The source GPU's own work goes on meanwhile.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from fastdp.runtime.queue import QueueDevice

_lanes = threading.local()


def arrived(value: torch.Tensor, device: QueueDevice) -> torch.Tensor:
    """A tensor on `device`: the tensor itself if it is there already, else a detached copy.

    Call it on the worker of `device`, whose compute stream already waits for the work that makes the tensor. Only that
    stream then waits for the copy. Torch does not reuse memory that another stream reads before that stream is done.
    """
    target = torch.device(device.torch_device)
    if value.device == target:
        if value.is_cuda:
            value.record_stream(torch.cuda.current_stream(target))
        return value
    if not value.is_cuda or target.type != "cuda":
        return value.detach().to(target)
    compute, lane = torch.cuda.current_stream(target), _lane(value.device)
    lane.wait_stream(compute)
    with torch.cuda.stream(lane):
        copied = value.detach().to(target, non_blocking=True)
    compute.wait_stream(lane)
    value.record_stream(lane)
    return copied


def _lane(device: torch.device) -> Any:
    """This thread's stream for copies from a GPU."""
    lanes = _lanes.__dict__.setdefault("by_device", {})
    if device not in lanes:
        lanes[device] = torch.cuda.Stream(device)
    return lanes[device]
