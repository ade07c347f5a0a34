"""How long is a training step on one card: fastdp on 1, 2, 4 and 8 virtual GPUs, Keras on torch and JAX, torch's ways?

    python bench/gpu/steps.py --seconds 200 mlp resnet50-bf16-32

The cases are those of bench/gpu/cases.py. Each way is a separate process (bench/gpu/worker.py) that builds, captures or
compiles, and warms up. The ways then take turns, one round each; results are medians over the rounds. If not all ways
fit on the card together, they run in groups, with torch eager in each. A round trains a few batches from host memory,
and is timed by the wall clock until its last loss is on the host. Virtual GPUs share one card, so several of them show
the cost of the engine, not the gain of several cards.

fastdp on one device is also timed with a half, a quarter and an eighth of a batch, for the sum of the parts of 2, 4 and
8 replicas, and for fastdp plan. `fed` and `resident` are the engine's steps without Keras's loop, on a
batch in host memory and on the card; `bare` is the replica's work without the engine.

After each round, the medians so far of each way are appended to FASTDP_GPU_LOG, so that an interrupted run keeps them;
the last line of a way counts. A way that fails or times out is skipped with its reason.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.gpu.card import emit
from bench.gpu.cases import CASES, Case
from fastdp.benchmark.process import Process, WayError
from fastdp.benchmark.rounds import ratio, spread

WORKER = Path(__file__).parent / "worker.py"
COUNTS = (1, 2, 4, 8)
RESERVE_SECONDS = 12.0  # part of a case's time reserved for its rounds and for ending its processes
ROUND_SECONDS = 60.0
# The only ways to run in cases that fill the card.
FEW = {
    "resnet50-bf16-256": ("torch eager", "fastdp 1 BEST", "Keras torch", "torch compiled", "fastdp 1 eager"),
}
COMPILED = ("fastdp 1 compiled", "fastdp 1 compiled graph")
# Ways to omit per case: they take long and add little information.
WITHOUT = {
    "resnet50-tf32-32": ("torch DDP, 1 process", *COMPILED, "1 row", "fastdp 2 BEST", "fastdp 4 BEST"),
    "xception-bf16-64": (*COMPILED, "torch DDP, 1 process", "torch graph", "fastdp 1 traced"),
}


@dataclass(frozen=True)
class Way:
    """One way to train: the worker to start, and the fields of its lines.

    `part` divides a batch's rows; 0 means one row. `how` is fastdp's kind of step: eager, traced, compiled, graph, step
    graph.
    """

    title: str
    worker: str
    library: str
    devices: int = 1
    how: str = ""
    part: int = 1
    backend: str = "torch"
    needs: tuple[str, ...] = ("torch",)

    def rows(self, case: Case) -> int:
        """Rows of one batch."""
        return case.rows // self.part if self.part else 1

    def command(self, name: str, steps: int) -> list[str]:
        """The worker of this way, for a case and so many steps in a round."""
        return [sys.executable, str(WORKER), self.worker, name, str(steps)]

    def environment(self) -> dict[str, str]:
        """Variables that the worker needs before it imports anything."""
        environment = {"KERAS_BACKEND": self.backend, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        if self.devices > 1:  # take effect only before CUDA starts, and Keras starts CUDA when it builds the model
            environment |= {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "CUDA_MODULE_LOADING": "EAGER"}
        return environment


def best_how() -> str:
    """The kind of fastdp's steps on several devices: graphs, or traced steps on a CPU, which has no graphs."""
    return "traced" if os.environ.get("FASTDP_BENCH_DEVICE") == "cpu" else "graph"


def _fastdp(devices: int, how: str, part: int = 1, rest: str = "") -> Way:
    """fastdp with a Keras model."""
    title = (
        f"fastdp {devices} {how}" + {0: ", 1 row", 1: ""}.get(part, f", rows/{part}") + (f", {rest}" if rest else "")
    )
    worker = f"fastdp/{devices}:{how}:{part}" + (f":{rest}" if rest else "")
    return Way(title, worker, "fastdp", devices, how, part, needs=("torch", "keras"))


def ways_of(name: str) -> list[Way]:
    """The ways of a case, in the order in which they start and take turns: those that the goals need come first."""
    best = best_how()
    ways = [
        Way("torch eager", "torch/eager", "torch"),
        _fastdp(1, best),
        *(_fastdp(1, best, 1, rest) for rest in ("fed", "resident", "bare")),
        Way("Keras torch", "keras/fit", "keras", needs=("torch", "keras")),
        Way("Keras JAX", "keras/fit", "keras", backend="jax", needs=("jax", "keras")),
        _fastdp(8, best),
        _fastdp(1, best, 8),
        Way("torch compiled", "torch/compiled", "torch"),
        _fastdp(1, "compiled graph" if best == "graph" else "compiled"),
        _fastdp(1, "eager"),
        *([_fastdp(1, "traced")] if best == "graph" else []),
        *(_fastdp(count, best) for count in (2, 4)),
        *(_fastdp(1, best, part) for part in (2, 4, 0)),
        Way("torch graph", "torch/graph", "torch"),
        Way("torch DDP, 1 process", "torch/ddp", "torch"),
    ]
    if name == "mlp":
        ways += [Way(f"fastdp torch {n}", f"torch/facade-{n}", "fastdp torch", n, "eager") for n in (1, 8)]
        ways += [_fastdp(count, "step graph") for count in (2, 8) if best == "graph"]
    named = [title.replace("BEST", best) for title in FEW.get(name, ())]
    without = [title.replace("BEST", best) for title in WITHOUT.get(name, ())]
    if named:
        return [way for way in ways if way.title in named]
    kept = f"fastdp 1 {best}"
    return [way for way in ways if way.title == kept or not way.title.endswith(tuple(without) or "\0")]


def waves(ways: Sequence[Way], at_once: int) -> list[list[Way]]:
    """Split the ways into groups that fit on the card; each group includes the first way, which is the baseline."""
    if len(ways) <= at_once:
        return [list(ways)]
    base, others = ways[0], ways[1:]
    return [[base, *others[place : place + at_once - 1]] for place in range(0, len(others), at_once - 1)]


def measure(name: str, ways: Sequence[Way], seconds: float) -> None:
    """Measure all ways on one case within `seconds`."""
    case, ends = CASES[name], time.monotonic() + seconds
    groups = waves(ways, case.at_once)
    for place, group in enumerate(groups):
        left = ends - time.monotonic()
        if left < 2 * RESERVE_SECONDS:
            for way in group[1:]:
                emit(skipped=f"{name}: {way.title}", reason="no time was left for it")
            continue
        measure_wave(name, group, left / (len(groups) - place))
    print(f"{case.title}: over", flush=True)


def measure_wave(name: str, ways: Sequence[Way], seconds: float) -> None:
    """Start the ways of one group, and let them take turns."""
    ends = time.monotonic() + seconds
    running = start(name, ways, seconds - RESERVE_SECONDS)
    try:
        take_turns(name, running, ends)
    finally:
        with ThreadPoolExecutor(max(1, len(running))) as pool:
            list(pool.map(lambda process: process.close(5.0), running.values()))


def start(name: str, ways: Sequence[Way], seconds: float) -> dict[Way, Process]:
    """Start all ways in parallel; emits a line of facts for each, and returns those that are ready in time."""
    case, running, ends = CASES[name], {}, time.monotonic() + seconds

    def begin(way: Way) -> None:
        missing = [library for library in way.needs if importlib.util.find_spec(library) is None]
        left = ends - time.monotonic()
        if missing or left < 1:
            reason = f"{' and '.join(missing)} not installed" if missing else "no time was left to start it"
            emit(skipped=f"{name}: {way.title}", reason=reason)
            return
        try:
            running[way] = Process(way.command(name, case.steps), way.environment(), left)
        except WayError as error:
            emit(skipped=f"{name}: {way.title}", reason=str(error))
            return
        emit(what="ready", case=name, way=way.title, **of_way(way, case), **running[way].facts)

    with ThreadPoolExecutor(max(2, os.cpu_count() or 2)) as pool:
        for found in [pool.submit(begin, way) for way in ways]:
            found.result()
    return {way: running[way] for way in ways if way in running}


def of_way(way: Way, case: Case) -> dict[str, Any]:
    """The fields that identify a way's lines."""
    return {"library": way.library, "devices": way.devices, "how": way.how, "rows": way.rows(case), "of": case.rows}


def take_turns(name: str, running: dict[Way, Process], ends: float) -> dict[Way, list[float]]:
    """Run rounds in turns while there is time, and emit a line for each way after each round.

    Returns: seconds per step of each way, one value per round.
    """
    case = CASES[name]
    times: dict[Way, list[float]] = {way: [] for way in running}
    for number in range(case.rounds + 1):  # the first warms up
        for way in list(running):
            left = ends - time.monotonic()
            if left < 1:
                emit(skipped=f"{name}: round {number} of {case.rounds}", reason="its time is over")
                return times
            try:
                seconds = running[way].round(case.steps, min(left, ROUND_SECONDS)).seconds / case.steps
            except WayError as error:
                emit(skipped=f"{name}: {way.title}", reason=str(error))
                running.pop(way).close(0.0)
                continue
            if number:
                times[way].append(seconds)
        for way in running:
            if times[way]:
                emit(**step_line(name, way, times[way], _base(times)))
    return times


def _base(times: Mapping[Way, list[float]]) -> list[float] | None:
    """The times of torch eager, which is the baseline."""
    return next((values for way, values in times.items() if way.title == "torch eager" and values), None)


def step_line(name: str, way: Way, seconds: Sequence[float], base: Sequence[float] | None) -> dict[str, Any]:
    """The line with one way's times so far."""
    case = CASES[name]
    comparable = base is not None and len(base) == len(seconds) and way.rows(case) == case.rows
    return {
        "what": "step",
        "case": name,
        "way": way.title,
        **of_way(way, case),
        "rounds": len(seconds),
        "milliseconds": spread([1e3 * value for value in seconds], 4),
        "samples_per_second": round(way.rows(case) / statistics.median(seconds), 1),
        "of_torch_eager": ratio(seconds, base) if base is not None and comparable else None,
        "clock": "wall, to the last loss on the host",
    }


def card_is_missing() -> str:
    """The reason why nothing can be measured, or empty. A separate process checks, since this one uses no card."""
    if os.environ.get("FASTDP_BENCH_DEVICE") == "cpu":
        return ""
    for library in ("torch", "cupy"):
        if importlib.util.find_spec(library) is None:
            return f"{library} is not installed"
    asked = [sys.executable, "-c", "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 3)"]
    try:
        return "torch sees no GPU" if subprocess.run(asked, timeout=120, check=False).returncode else ""
    except subprocess.TimeoutExpired:
        return "torch took longer than 120 seconds to look for a GPU"


def main() -> int:
    """Measure the requested cases in sequence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=tuple(CASES), metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--seconds", type=float, default=600.0, help="for all cases together")
    parser.add_argument("--ways", nargs="*", default=[], metavar="TITLE", help="some of the ways only")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes of the ways end too
    missing = card_is_missing()
    if missing:
        emit(skipped="steps", reason=missing)
        return 0
    ends = time.monotonic() + asked.seconds
    for place, name in enumerate(asked.cases):
        left = ends - time.monotonic()
        if left < 2 * RESERVE_SECONDS:
            emit(skipped=name, reason="no time was left for it")
            continue
        ways = [way for way in ways_of(name) if not asked.ways or way.title in asked.ways]
        measure(name, ways, left / (len(asked.cases) - place))
    return 0


if __name__ == "__main__":
    sys.exit(main())
