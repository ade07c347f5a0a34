"""What all benchmarks share: rounds that alternate, spread, the machine, and the JSON line."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import fastdp

RESULTS = Path(__file__).parent / "results"


def options(description: str | None) -> argparse.Namespace:
    """The arguments of every benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write the result to bench/results/")
    parser.add_argument("--quick", action="store_true", help="few rounds: to see that it works, not to measure")
    return parser.parse_args()


def alternate(steps: Mapping[Any, Callable[[], object]], *, rounds: int, seconds: float) -> dict[Any, list[float]]:
    """Seconds per call of each step, one value per round.

    In every round each step runs for about `seconds` (at least once), one step after the other, so that
    other load on the machine affects all of them. The first round warms up and is dropped.
    """
    times: dict[Any, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            began, count = time.perf_counter(), 0
            while not count or time.perf_counter() - began < seconds:
                step()
                count += 1
            times[name].append((time.perf_counter() - began) / count)
    return {name: values[1:] for name, values in times.items()}


def spread(values: Sequence[float], digits: int = 6) -> dict[str, float]:
    """Median, quartiles and extremes."""
    quarters = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    named = {"min": min(values), "q1": quarters[0], "median": quarters[1], "q3": quarters[2], "max": max(values)}
    return {name: float(f"{value:.{digits}g}") for name, value in named.items()}


def ratio(slow: Sequence[float], base: Sequence[float]) -> float:
    """The median over rounds of `slow / base`, each pair from the same round."""
    return round(statistics.median(a / b for a, b in zip(slow, base, strict=True)), 3)


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
        "versions": _versions(libraries),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def result_name(question: str, line: Mapping[str, Any]) -> str:
    """The name of a result file without extension: question, hardware, year and month."""
    machine = re.sub(r"[^a-z0-9]+", "-", f"{line['hardware']['cpu']}-{os.cpu_count()}-cores".lower())
    return f"{question}_{machine}_{time.strftime('%Y%m')}"


def hardware() -> dict[str, Any]:
    """The operating system's name of the processor, and the number of cores."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
        model = found.group(1).strip() if found else model
    return {"cpu": model, "cores": os.cpu_count()}


def _versions(libraries: Sequence[str]) -> dict[str, str]:
    found = {"python": platform.python_version(), "fastdp": fastdp.__version__}
    for name in dict.fromkeys(("numpy", *libraries)):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


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
