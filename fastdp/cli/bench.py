"""The command `bench`: runs the benchmarks of a checkout; each prints a table and ends with one JSON line."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "bench"
QUESTIONS = ("virtual_devices", "first_step", "driver_overhead", "all_reduce")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark to run and whether to save its result."""
    parser.add_argument("question", nargs="?", choices=(*QUESTIONS, "all"), default="all", help="default: all")
    parser.add_argument("--save", action="store_true", help="write the result to bench/results/")
    parser.add_argument("--quick", action="store_true", help="few rounds: to see that it works, not to measure")


def run(options: argparse.Namespace) -> int:
    """Run each benchmark in its own process, so that none inherits another's threads and memory."""
    if not (FOLDER / "virtual_devices.py").is_file():
        print(
            f"fastdp bench: the benchmarks belong to a checkout of fastdp, and there is no {FOLDER}. "
            "Clone the repository and run this command there.",
            file=sys.stderr,
        )
        return 1
    flags = [flag for flag, wanted in (("--save", options.save), ("--quick", options.quick)) if wanted]
    worst = 0
    for question in QUESTIONS if options.question == "all" else (options.question,):
        worst = max(worst, abs(subprocess.call([sys.executable, str(FOLDER / f"{question}.py"), *flags])))
    return worst
