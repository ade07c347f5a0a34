"""What all benchmarks share beside the rounds of `fastdp.benchmark`: arguments, tables, and the JSON line."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdp.benchmark.machine import hardware, versions

RESULTS = Path(__file__).parent / "results"


def options(description: str | None) -> argparse.Namespace:
    """The arguments of every benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write the result to bench/results/")
    parser.add_argument("--quick", action="store_true", help="few rounds: to see that it works, not to measure")
    return parser.parse_args()


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a plain table: the first column left-aligned, the others right-aligned."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    print(f"\n{title}")
    for row in cells:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([row[0].ljust(len(first)), *others]))


def finish(question: str, results: Any, *, libraries: Sequence[str] = ("numpy",), save: bool, **more: Any) -> None:
    """Print the JSON line; with `save`, also write it to bench/results/."""
    line = result_line(question, results, libraries=libraries, **more)
    if save:
        path = RESULTS / (result_name(question, line) + ".json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(line, indent=1) + "\n", encoding="utf-8")
        print(f"\nWrote {path}")
    print(json.dumps(line))


def result_line(question: str, results: Any, *, libraries: Sequence[str] = ("numpy",), **more: Any) -> dict[str, Any]:
    """A result with its environment: hardware, versions of the installed libraries, commit, date."""
    return {
        "question": question,
        "results": results,
        **more,
        "hardware": hardware(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "versions": versions(("numpy", *libraries)),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def result_name(question: str, line: Mapping[str, Any]) -> str:
    """The name of a result file without extension: question, hardware, year and month."""
    machine = re.sub(r"[^a-z0-9]+", "-", f"{line['hardware']['cpu']}-{os.cpu_count()}-cores".lower())
    return f"{question}_{machine}_{time.strftime('%Y%m')}"


def _commit() -> str:
    """The commit, with `+changes` if fastdp/ or bench/ differ from it; `unknown` outside git."""
    revision = _git("rev-parse", "--short", "HEAD")
    if revision.returncode:
        return "unknown"
    changed = _git("diff", "--quiet", "HEAD", "--", "fastdp", "bench").returncode
    return revision.stdout.strip() + ("+changes" if changed else "")


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["git", *arguments], cwd=Path(__file__).parent.parent, check=False, capture_output=True, text=True
    )
