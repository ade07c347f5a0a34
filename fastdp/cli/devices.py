"""The command `devices`: lists what `gpus=` counts, how GPUs are linked, and what is missing to use them.

    fastdp devices
    fastdp devices --json
    fastdp devices --measure
    FASTDP_VIRTUAL_DEVICES=4 fastdp devices

Each missing part comes with the command that installs it.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fastdp import settings
from fastdp.buffers import Bucket
from fastdp.cli.arguments import add_json
from fastdp.cli.output import print_json, print_sentence
from fastdp.cli.status import FAILED, OK
from fastdp.comm.measure import Seconds
from fastdp.comm.select import communicator
from fastdp.comm.tuning import measured_anew
from fastdp.runtime.select import devices, resolve
from fastdp.runtime.topology import driver, peer_matrix, problems

# Libraries that fastdp works without, what needs them, and how to get them.
_LIBRARIES = {
    "torch": ("Keras models and torch modules", "pip install torch"),
    "keras": ("Keras models and fastdp demo", "pip install 'fastdp[keras]' (Python 3.11 or newer)"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--measure` and `--json`."""
    parser.add_argument(
        "--measure",
        action="store_true",
        help="measure how long all devices take to add up gradients, and use what is fastest for each size from now on",
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Print a line per device, the driver, the links between GPUs, and what is missing with its remedy."""
    found = _found()
    if not options.json:
        _print(found)
    measured, status = None, OK
    if options.measure and found["devices"]:
        measured = _measured(resolve(None))
        status = FAILED if measured is None else OK
        if not options.json:
            _print_measured(measured)
    if options.json:
        print_json({**found, "measured": measured})
    return status


def _found() -> dict[str, Any]:
    """All that is known of the devices, as in `--json`."""
    known = devices()
    gpus = [device for device in known if device.kind == "cuda"]
    installed = driver()
    missing = [
        f"{library} is not installed, which {what} need. Install it with: {line}"
        for library, (what, line) in _LIBRARIES.items()
        if importlib.util.find_spec(library) is None
    ]
    return {
        "devices": [asdict(device) for device in known],
        "driver": installed and {"version": installed.version, "cuda": "{}.{}".format(*installed.cuda)},
        "paths": peer_matrix(gpus) if len(gpus) > 1 else [],
        # A user of virtual devices did not ask for GPUs.
        "problems": [*(problems() if len(gpus) == len(known) else []), *missing],
    }


def _print(found: Mapping[str, Any]) -> None:
    """The same as text."""
    for device in found["devices"]:
        print(_line(device))
    if found["driver"]:
        print(f"driver {found['driver']['version']}, CUDA {found['driver']['cuda']}")
    for index, row in enumerate(found["paths"]):
        for other, path in enumerate(row):
            if path:
                print(f"{index} -> {other}: {path}")
    for problem in found["problems"]:
        print_sentence(problem)
    if not found["devices"]:
        print_sentence('Without a GPU, gpus="auto" and fastdp run --gpus auto run on one device on the CPU.')
        print(f"To try several: {settings.VIRTUAL_DEVICES}=4 fastdp devices")


def _line(device: Mapping[str, Any]) -> str:
    """The line that describes one device."""
    memory = device["memory_nbytes"]
    facts = [device["kind"], f"{memory / 2**30:.1f} GiB" if memory else "host memory"]
    if device["compute_capability"] is not None:
        facts.append("compute capability {}.{}".format(*device["compute_capability"]))
    if device["link"]:
        facts.append(device["link"])
    if device["nvlinks"]:
        facts.append(f"{device['nvlinks']} NVLinks")
    return f"{device['index']}: {device['name']} ({', '.join(facts)})"


def _measured(all_devices: Sequence[Any]) -> dict[str, Any] | None:
    """What all-reduces of all devices take; None, after a warning, if that failed."""
    if len(all_devices) < 2:
        return {"devices": len(all_devices), "sizes": [], "decides": "one device adds nothing up"}
    comm = communicator(all_devices)
    seconds = measured_anew(comm, all_devices)
    if seconds is None:
        return None
    decides = comm.choice.asked if comm.choice.tunable else "nothing to choose between"
    return {
        "devices": len(all_devices),
        "decides": decides,
        "sizes": [
            {
                "nbytes": nbytes,
                "used": comm.how(Bucket("float32", 0, nbytes // 4)),
                "seconds": {way: taken for (size, way), taken in seconds.items() if size == nbytes},
            }
            for nbytes in sorted({size for size, _ in seconds})
        ],
    }


def _print_measured(measured: Mapping[str, Any] | None) -> None:
    """The same as a table."""
    if measured is None:
        return
    if measured["devices"] < 2:
        print("Nothing to measure: one device adds nothing up.")
        return
    print(f"\nall-reduce of float32 over {measured['devices']} devices: microseconds (GB/s); * is used")
    seconds = {(one["nbytes"], way): taken for one in measured["sizes"] for way, taken in one["seconds"].items()}
    for line in table(seconds, {one["nbytes"]: one["used"] for one in measured["sizes"]}):
        print(line)
    if measured["decides"] == "measured":
        print("Kept for these devices: models wrapped from now on use it.")
    elif measured["decides"] in settings.ALL_REDUCES:
        print(f"{settings.ALL_REDUCE}={measured['decides']} decides, not these figures.")
    else:
        print("There is nothing to choose between on these devices.")


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
