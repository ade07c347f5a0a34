"""Copies tensors between the devices of a replica, in the order of the engine's streams.

Torch copies between two GPUs on the current stream of the one that is copied from. On the worker of the other device
that is none of the engine's streams, so copies take a *lane*: a stream of the worker's own on the other GPU, which
waits for the worker's compute stream first, and which that one waits for afterwards. The other GPU's own work goes on
meanwhile.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

_lanes = threading.local()


def arrived(value: torch.Tensor, device: Any) -> torch.Tensor:
    """A tensor where `device` computes: itself on the card where it is, and in host memory; elsewhere a detached copy.

    To be called on the worker of `device`, whose compute stream already waits for what made the tensor; that stream,
    and no other, then waits for the copy. Memory of torch's that another stream reads is not used anew before that
    stream has come so far.
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
