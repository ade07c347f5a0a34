"""The command `devices`: lists what `gpus=` counts, how GPUs are linked, and what is missing to use them."""

from __future__ import annotations

import argparse

from fastdp.runtime.select import VIRTUAL_DEVICES_VARIABLE, devices
from fastdp.runtime.topology import DeviceInfo, driver, peer_matrix, problems


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command takes no arguments."""


def run(options: argparse.Namespace) -> int:
    """Print a line per device, the driver, the links between GPUs, and problems with their remedies."""
    found = devices()
    for device in found:
        print(_line(device))
    gpus = [device for device in found if device.kind == "cuda"]
    installed = driver()
    if installed is not None:
        print(f"driver {installed.version}, CUDA {installed.cuda[0]}.{installed.cuda[1]}")
    if len(gpus) > 1:
        for device, row in zip(gpus, peer_matrix(gpus), strict=True):
            for other, path in zip(gpus, row, strict=True):
                if path:
                    print(f"{device.index} -> {other.index}: {path}")
    if len(gpus) == len(found):  # a user of virtual devices did not ask for GPUs
        for problem in problems():
            print(problem)
    if not found:
        print(f"To try fastdp without a GPU: {VIRTUAL_DEVICES_VARIABLE}=4 python -m fastdp devices")
    return 0


def _line(device: DeviceInfo) -> str:
    """The line that describes one device."""
    facts = [device.kind, f"{device.memory_nbytes / 2**30:.1f} GiB" if device.memory_nbytes else "host memory"]
    if device.compute_capability is not None:
        facts.append("compute capability {}.{}".format(*device.compute_capability))
    if device.link:
        facts.append(device.link)
    if device.nvlinks:
        facts.append(f"{device.nvlinks} NVLinks")
    return f"{device.index}: {device.name} ({', '.join(facts)})"
