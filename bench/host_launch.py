"""What does a captured step cost the host, when its thread launches for all GPUs, and when workers do?

On the CUDA of our own (tests/cuda/rig: the real CuPy on cards that are threads), 1, 2, 4 and 8 cards, a program of
three small arrays whose step is graphs (tests/gpu/recorded_program.py): in pieces with collectives between them, or
with the collectives in them. Per step:

    wake-ups   of workers
    calls      of CUDA that enqueue something
    python     microseconds of the processor for Python alone: every call of CUDA is replaced by a function that does
               nothing, and the GPU is always done. The least and the median of the rounds: other work on the machine
               takes caches away. What a further replica adds is told of the least, from 2 cards on, and from 1 on,
               which also counts what a step of several devices has once
    wall       microseconds of a whole step on the rig, by the host thread and by workers in turns, and their ratio. The
               cards are threads on the same cores: only the ratio means anything.

It says nothing about a GPU, except how much Python lies between the calls.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from report import finish, options, print_table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "cuda" / "rig"))

import build_rig  # noqa: E402

COUNTS, FORMS = (1, 2, 4, 8), ("pieces", "whole")
HEADER = (
    "cards",
    "wakes",
    "by workers",
    "calls",
    "by workers",
    "python us",
    "median",
    "wall us",
    "by workers",
    "ratio",
)


def show(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Print the tables; returns microseconds of Python that a further replica adds, by form and first count."""
    each: dict[str, dict[str, float]] = {}
    for form in FORMS:
        rows = []
        for count in COUNTS:
            entry = found[f"{form}-{count}"]
            rows.append(
                (
                    count,
                    *(entry[by][what] for what in ("wake_ups", "calls") for by in ("host", "workers")),
                    entry["python_us"]["min"],
                    entry["python_us"]["median"],
                    entry["host"]["wall_us"]["median"],
                    entry["workers"]["wall_us"]["median"],
                    entry["wall_ratio"],
                )
            )
        python = {count: found[f"{form}-{count}"]["python_us"]["min"] for count in COUNTS}
        last = COUNTS[-1]
        each[form] = {
            f"from {first}": round((python[last] - python[first]) / (last - first), 1) for first in COUNTS[:2]
        }
        title = f"graphs in {form}: a further replica adds {each[form]['from 2']} us of Python"
        print_table(f"{title} ({each[form]['from 1']} from one card on)", HEADER, rows)
    return each


def main() -> None:
    """Measure in a process that has the rig's cards."""
    args = options(__doc__)
    settings = {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "CUDA_MODULE_LOADING": "EAGER", "FASTDP_ALL_REDUCE": "fixed"}
    environment = build_rig.environment(build_rig.built(), COUNTS[-1], **settings)
    folders = os.pathsep.join([str(ROOT / "tests" / "gpu"), environment["PYTHONPATH"]])
    command = [sys.executable, str(Path(__file__).with_name("host_launch_worker.py")), "3" if args.quick else "31"]
    environment["PYTHONPATH"] = folders
    done = subprocess.run(command, env=environment, check=True, timeout=1200, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    finish("host_launch", found, libraries=("cupy-cuda12x",), save=args.save, each_us=show(found))


if __name__ == "__main__":
    main()
