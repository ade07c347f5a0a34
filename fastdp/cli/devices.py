"""The command `devices`: lists what `gpus=` counts, how GPUs are linked, and what is missing to use them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from fastdp.buffers import Bucket
from fastdp.comm.algorithm import VARIABLE
from fastdp.comm.measure import Seconds
from fastdp.comm.select import communicator
from fastdp.comm.tuning import measured_anew
from fastdp.runtime.select import VIRTUAL_DEVICES_VARIABLE, devices, resolve
from fastdp.runtime.topology import DeviceInfo, driver, peer_matrix, problems


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--measure`."""
    parser.add_argument(
        "--measure",
        action="store_true",
        help="measure how long all devices take to add up gradients, and use what is fastest for each size from now on",
    )


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
    if options.measure and found:
        return _measure(resolve(None))
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


def _measure(all_devices: Sequence[Any]) -> int:
    """Measure the all-reduce of all devices and print a table; the status is 1 if that failed."""
    if len(all_devices) < 2:
        print("Nothing to measure: one device adds nothing up.")
        return 0
    comm = communicator(all_devices)
    print(f"\nall-reduce of float32 over {len(all_devices)} devices: microseconds (GB/s); * is used")
    seconds = measured_anew(comm, all_devices)
    if seconds is None:
        return 1
    for line in table(seconds, {nbytes: comm.how(Bucket("float32", 0, nbytes // 4)) for nbytes, _ in seconds}):
        print(line)
    asked = comm.choice.asked
    if not comm.choice.tunable:
        print("There is nothing to choose between on these devices.")
    elif asked != "measured":
        print(f"{VARIABLE}={asked} decides, not these figures.")
    else:
        print("Kept for these devices: models wrapped from now on use it.")
    return 0


def table(seconds: Seconds, used: Mapping[int, str]) -> list[str]:
    """The lines of a table: a row for each size, a column for each algorithm, the one that is used marked by a star."""
    ways = list(dict.fromkeys(way for _, way in seconds))
    lines = [f"{'size':>8}" + "".join(f"{way:>22}" for way in ways)]
    for nbytes in sorted({nbytes for nbytes, _ in seconds}):
        size = f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KiB"
        line = f"{size:>8}"
        for way in ways:
            taken = seconds.get((nbytes, way))
            star = "* " if way == used[nbytes] else ""
            cell = f"{star}{taken * 1e6:.1f} ({nbytes / taken / 1e9:.2f})" if taken else "-"
            line += f"{cell:>22}"
        lines.append(line)
    return lines
