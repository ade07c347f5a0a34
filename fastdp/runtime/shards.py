"""Gives each shard of the global batch a device to run on: a part of one of the devices that `gpus=` means.

With `shards=8` every step has eight replicas, whatever the number of devices: one for each shard, on a *part* of a
device. Each has a worker, streams, weights and gradients of its own. So all that is summed, drawn, normalized or
decided by replica is so by shard, and the number of devices changes where a shard runs, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastdp.options import Options
from fastdp.runtime.environment import WANTED, ask_for
from fastdp.runtime.queue import QueueDevice
from fastdp.runtime.select import resolve
from fastdp.shard import split_rows

# Our all-reduce kernels, the only ones on GPUs that add in a tree, sum the buffers of so many replicas.
MOST_ON_GPUS = 8


def resolve_devices(
    gpus: Any, options: Options, caller: str = "fastdp.wrap", process: tuple[int, int] = (0, 1)
) -> tuple[list[QueueDevice], Options]:
    """The devices that `gpus` means, or their parts if `options.shards` is set, with the options for these devices.

    Args:
        process: as in `on_shards`.

    Raises:
        ValueError: any problem with `gpus` or `shards`.
    """
    return on_shards(resolve(gpus, caller=caller), options, process)


def on_shards(
    devices: Sequence[QueueDevice], options: Options, process: tuple[int, int] = (0, 1)
) -> tuple[list[QueueDevice], Options]:
    """A device for each shard, in the order of the rows, and `options` with `merge_device` as an index into them.

    Returns both as they are without `options.shards`, and for devices that are parts already.

    Args:
        devices: devices of their own. Each gets neighbouring shards, the first ones one more if they do not divide.
        process: this process's number, and how many there are with as many devices each, which share the shards.

    Raises:
        ValueError: more devices than shards; more shards than GPUs can add up.
    """
    if options.shards is None or any(device.part_of is not None for device in devices):
        return list(devices), options
    rank, processes = process
    _check(devices, options.shards, processes)
    parts: list[QueueDevice] = []
    merge_device = options.merge_device
    if devices[0].on_gpu and options.shards > len(devices):
        ask_for(*WANTED)
    every = split_rows(options.shards, len(devices) * processes)
    for number, rows in enumerate(every[rank * len(devices) : (rank + 1) * len(devices)]):
        if number == options.merge_device:
            merge_device = len(parts)
        parts += [part_of_device(devices[number], place) for place in range(rows.count)]
    return parts, replace(options, merge_device=merge_device)


def part_of_device(device: QueueDevice, place: int) -> QueueDevice:
    """The part of a device that runs the shard at this place among its own. Made on first use, and after a fork."""
    while place >= len(device.parts):
        device.parts.append(_new_part(device, len(device.parts)))
    if device.parts[place].cut_short:
        device.parts[place] = _new_part(device, place)
    return device.parts[place]


def _new_part(device: QueueDevice, place: int) -> QueueDevice:
    part = device.part(f"{device.name} (part {place})")
    part.part_of = device
    return part


def _check(devices: Sequence[QueueDevice], shards: int, processes: int) -> None:
    """Check that there is work for each device, and a sum over all shards."""
    if len(devices) * processes > shards:
        several = f" in each of {processes} processes" if processes > 1 else ""
        raise ValueError(
            f"`shards` must be at least the number of devices, so that each has work. Received: shards={shards} for "
            f"{len(devices)} devices{several}. Use fewer devices (gpus={max(1, shards // processes)}). More shards "
            "give other bits: keep their number for a run that goes on."
        )
    if devices[0].on_gpu and shards > MOST_ON_GPUS:
        raise ValueError(f"`shards` must be at most {MOST_ON_GPUS} on GPUs. Received: shards={shards}")
