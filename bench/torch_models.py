"""What do seven torch models cost per step with fastdp, by comparison with plain torch, torch.compile and DDP?

The models of examples/pytorch/, at the sizes of `torch_model_cases.py`. The ways:

    torch               the loop on the plain module, one process, all cores
    torch-compile       the same, with torch.compile around each module
    ddp-2               the same under DistributedDataParallel, two processes over gloo, half of the cores each
    fastdp-1-step       `train_step` on one device, eager; -loop: the loop on the wrapped module; -captured and
                        -captured-loop: both with compile="inductor", measured once all batch shapes are compiled
    fastdp-2-...        the same on two virtual devices

Each way is a process of its own that builds the model and warms up before anything is timed. The ways take turns, one
round each; ratios are medians over the rounds. The goals are printed with what was found. How busy the machine was with
other work is measured before each model, while all processes wait.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.report import RESULTS, result_line, result_name
from bench.torch_model_cases import CASES
from fastdp.benchmark.noise import Noise
from fastdp.benchmark.process import Process, WayError
from fastdp.benchmark.rounds import ratio, spread, turns

WAYS = (
    *("torch", "torch-compile", "ddp-2"),
    *("fastdp-1-step", "fastdp-1-loop", "fastdp-1-captured", "fastdp-1-captured-loop"),
    *("fastdp-2-step", "fastdp-2-loop", "fastdp-2-captured", "fastdp-2-captured-loop"),
)
LONG_STEP = 0.010  # seconds: from here on a second device must not cost more than a tenth


@dataclass(frozen=True)
class Goal:
    """The time of `way` divided by that of `base` must not be above `limit`, on models for which `holds` is true."""

    name: str
    way: str
    base: str
    limit: float

    def holds(self, seconds: Mapping[str, list[float]]) -> bool:
        """Whether the goal is set for a model with these times."""
        medians = {way: statistics.median(values) for way, values in seconds.items()}
        if self.way not in medians or self.base not in medians:
            return False
        if self.limit < 1.0:  # where Inductor helps: torch.compile gains as much
            return medians.get("torch-compile", 0.0) <= self.limit * medians["torch"]
        return self.base not in ("fastdp-1-step", "fastdp-1-captured") or medians[self.base] >= LONG_STEP


GOALS = (
    Goal("1 device, step : torch", "fastdp-1-step", "torch", 1.05),
    Goal("1 device, loop : torch", "fastdp-1-loop", "torch", 1.05),
    Goal("captured : torch", "fastdp-1-captured", "torch", 0.9),
    Goal("captured : torch.compile", "fastdp-1-captured", "torch-compile", 1.1),
    Goal("2 devices, step : DDP", "fastdp-2-step", "ddp-2", 1.0),
    Goal("2 devices, loop : DDP", "fastdp-2-loop", "ddp-2", 1.0),
    Goal("2 devices, captured : DDP", "fastdp-2-captured", "ddp-2", 1.0),
    Goal("2 devices, captured loop : DDP", "fastdp-2-captured-loop", "ddp-2", 1.0),
    Goal("2 devices : 1 device", "fastdp-2-step", "fastdp-1-step", 1.1),
    Goal("2 devices : 1 device, captured", "fastdp-2-captured", "fastdp-1-captured", 1.1),
)


def measure(name: str, ways: Sequence[str], rounds: int, steps: int, timeout: float) -> dict[str, Any]:
    """Measure one model: milliseconds per step of each way, ratios, goals, and the reasons of failures."""
    noise = Noise()
    for _ in range(10):
        noise.sample()
    busy = noise.busy_cores
    running, failed = start(name, ways, steps, timeout)
    seconds: dict[str, list[float]] = {way: [] for way in running}
    try:
        for _, way in turns(running, rounds):
            try:
                seconds[way].append(running[way].round(steps, timeout).seconds / steps)
            except WayError as error:
                failed[way] = str(error)
                seconds.pop(way)
                running.pop(way).close(0.0)
    finally:
        with ThreadPoolExecutor(max(1, len(running))) as pool:
            list(pool.map(Process.close, running.values()))
    say(f"{name}: " + ", ".join(f"{way} {1e3 * statistics.median(found):.1f} ms" for way, found in seconds.items()))
    for way, reason in failed.items():
        say(f"{name}: {way} failed: {reason}")
    return {
        "title": CASES[name].title,
        "rows": CASES[name].rows,
        "steps_per_round": steps,
        "rounds": rounds,
        "cores_busy_with_other_work": None if busy is None else round(busy, 2),
        "milliseconds": {way: spread([1e3 * value for value in found], 4) for way, found in seconds.items()},
        "time_to_torch": {way: ratio(found, seconds["torch"]) for way, found in seconds.items() if "torch" in seconds},
        "goals": [
            {"goal": goal.name, "limit": goal.limit, "ratio": ratio(seconds[goal.way], seconds[goal.base])}
            for goal in GOALS
            if goal.holds(seconds)
        ],
        "failed": failed,
    }


def start(name: str, ways: Sequence[str], steps: int, timeout: float) -> tuple[dict[str, Process], dict[str, str]]:
    """Start all ways, two at a time; returns those that are ready, and the failures of the others."""
    running: dict[str, Process] = {}
    failed: dict[str, str] = {}
    worker = Path(__file__).with_name("torch_models_worker.py")

    def begin(way: str) -> None:
        try:
            running[way] = Process([sys.executable, str(worker), way, name, str(steps)], {}, 3 * timeout)
        except WayError as error:
            failed[way] = str(error)

    with ThreadPoolExecutor(2) as pool:
        list(
            pool.map(begin, sorted(ways, key=lambda way: not ("compile" in way or "captured" in way)))
        )  # the longest first
    return {way: running[way] for way in ways if way in running}, failed


def markdown(line: Mapping[str, Any]) -> str:
    """The result as a page: milliseconds, ratios to plain torch, goals, failures, and the environment."""
    results = line["results"]
    titles = [result["title"].split(":")[0] for result in results.values()]
    parts = ["# Seven torch models: plain torch, torch.compile, DDP and fastdp\n"]
    for what, key, show in (
        ("milliseconds per step, median", "milliseconds", lambda found: f"{found['median']:.2f}"),
        ("time : plain torch", "time_to_torch", lambda found: f"{found:.2f}"),
    ):
        rows = [
            [way, *(show(r[key][way]) if way in r[key] else "failed" for r in results.values())]
            for way in WAYS
            if any(way in r[key] or way in r["failed"] for r in results.values())
        ]
        parts.append(_table([what, *titles], rows))
    parts.append(_table(["goal, at most", *titles], _goal_rows(results)))
    parts += [f"- {r['title']}: {way} failed: {why}\n" for r in results.values() for way, why in r["failed"].items()]
    machine, versions = line["hardware"], ", ".join(f"{name} {version}" for name, version in line["versions"].items())
    loads = ", ".join(str(result["cores_busy_with_other_work"]) for result in results.values())
    parts.append(
        "Models: " + "; ".join(result["title"] for result in results.values()) + ".\n\n"
        f"{machine['cpu']}, {machine['cores']} cores. Cores busy with other work before each model: {loads}. Rounds "
        f"that took turns: {', '.join(sorted({str(r['rounds']) for r in results.values()}))}. Ratios are medians over "
        f"the rounds. {versions}; commit {line['commit']}, {line['date']}.\n"
    )
    return "\n".join(parts)


def _goal_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """For each goal and model: the ratio, and whether it is met; empty where the goal is not set."""
    rows = []
    for goal in GOALS:
        cells = []
        for result in results.values():
            found = [one["ratio"] for one in result["goals"] if one["goal"] == goal.name]
            cells.append(f"{found[0]:.2f} {'met' if found[0] <= goal.limit else 'NOT MET'}" if found else "")
        rows.append([f"{goal.name}, {goal.limit}", *cells])
    return rows


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def say(line: str) -> None:
    """Print progress with the time since the start."""
    print(f"[{time.perf_counter() - BEGAN:6.1f} s] {line}", flush=True)


BEGAN = time.perf_counter()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(CASES), default=tuple(CASES), metavar="MODEL")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, metavar="WAY")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds of a round; a third of those of the start")
    parser.add_argument("--save", action="store_true", help="write JSON and table to bench/results/")
    parser.add_argument("--quick", action="store_true", help="two rounds of two steps: to see that it works")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every model, print, save."""
    asked = parse(arguments)
    rounds = 2 if asked.quick else asked.rounds
    results = {
        name: measure(name, asked.ways, rounds, 2 if asked.quick else CASES[name].steps, asked.timeout)
        for name in asked.models
    }
    line = result_line("torch_models", results, libraries=("torch",), unit="milliseconds per step")
    print(f"\n{markdown(line)}")
    if asked.save:
        path = RESULTS / result_name("torch_models", line)
        path.with_suffix(".json").write_text(json.dumps(line, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(markdown(line), encoding="utf-8")
        print(f"Wrote {path}.json and .md")
    print(json.dumps(line))


if __name__ == "__main__":
    main()
