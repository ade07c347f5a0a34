"""List the devices that `gpus=` counts."""

from __future__ import annotations

import argparse

from fastdp.device import VIRTUAL_DEVICES_VARIABLE, devices


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(options: argparse.Namespace) -> int:
    """Print one line per device."""
    found = devices()
    for device in found:
        memory = f"{device.memory_nbytes / 2**30:.1f} GiB" if device.memory_nbytes else "host memory"
        print(f"{device.index}: {device.name} ({device.kind}, {memory})")
    if not found:
        print("No NVIDIA GPU is visible (no driver, or CUDA_VISIBLE_DEVICES hides them).")
        print(f"To try fastdp without one: {VIRTUAL_DEVICES_VARIABLE}=4 python -m fastdp devices")
    return 0
