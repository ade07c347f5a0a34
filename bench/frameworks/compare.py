"""How many samples per second does each way of data-parallel training make, on the same model, data and machine?

Compares fastdp on 1 and 2 virtual devices with compiled steps, Keras's `fit` on torch, JAX and TensorFlow,
keras.distribution's DataParallel over two host devices, MirroredStrategy over two logical CPUs, and plain torch in
one process and in two with DistributedDataParallel over gloo. Models and ways are those of `fastdp bench`. All train by
SGD with momentum on the same global batches. Each peer is a separate process that builds, compiles and warms up before
anything is timed. The peers then take turns, one round each; results are medians over the rounds.

Peers on two devices normalize each device's rows, except JAX, which normalizes the whole batch. A peer that fails or
times out is recorded with the reason, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.frameworks.cases import CASES, Case
from bench.frameworks.table import draw, markdown
from bench.report import RESULTS, result_line, result_name
from fastdp.benchmark.process import Process, WayError
from fastdp.benchmark.request import Request
from fastdp.benchmark.rounds import ratio, spread
from fastdp.benchmark.ways import environment, missing
from fastdp.benchmark.worker import command


@dataclass(frozen=True)
class Peer:
    """One way to train, as `fastdp bench` has it: the fields of its request."""

    title: str
    library: str
    framework: str = "keras"
    devices: int = 1
    kind: str = "cpu"
    mode: str = "auto"

    def start(self, case: Case, timeout: float) -> Process:
        """Start the process that trains a case.

        Raises:
            WayError: a library is missing, or the process failed.
        """
        request = Request(
            target=case.target,
            framework=self.framework,
            library=self.library,
            devices=self.devices,
            kind=self.kind,
            mode=self.mode,
            batch=case.rows,
            optimizer="sgd",
        )
        why = missing(request)
        if why:
            raise WayError(why)
        return Process(command(request), environment(request), timeout)


# "auto" reaches fastdp's compiled steps after training a shape for long enough; here they are compiled at once.
PEERS = {
    "fastdp-1": Peer("fastdp, 1 device", "fastdp", kind="virtual", mode="compiled"),
    "fastdp-2": Peer("fastdp, 2 devices", "fastdp", devices=2, kind="virtual", mode="compiled"),
    "keras-torch": Peer("Keras torch, fit", "keras"),
    "keras-jax": Peer("Keras JAX, fit", "keras-jax"),
    "keras-jax-2": Peer("Keras JAX, DataParallel on 2", "keras-jax", devices=2),
    "keras-tf": Peer("Keras TensorFlow, fit", "keras-tensorflow"),
    "keras-tf-2": Peer("Keras TensorFlow, Mirrored on 2", "keras-tensorflow", devices=2),
    "torch": Peer("torch, 1 process", "torch", "torch"),
    "torch-ddp-2": Peer("torch, DDP of 2 processes", "ddp", "torch", devices=2),
}


def measure(model: str, peers: Mapping[str, Peer], asked: argparse.Namespace) -> dict[str, Any]:
    """Measure all peers on one model: samples per second, the ratio to fastdp, and the reasons of failures."""
    case = CASES[model]
    steps = asked.steps or case.steps
    running, failed = _start(model, peers, asked)
    seconds: dict[str, list[float]] = {name: [] for name in running}
    try:
        for number in range(asked.rounds):
            for name in list(running):
                try:
                    seconds[name].append(running[name].round(steps, asked.timeout).seconds)
                except WayError as error:
                    failed[name] = str(error)
                    seconds.pop(name)
                    running.pop(name).close(0.0)
            rates = ", ".join(f"{name} {steps * case.rows / values[-1]:,.0f}" for name, values in seconds.items())
            say(f"{model}: round {number + 1} of {asked.rounds}: samples/s: {rates}")
        facts = {name: process.facts for name, process in running.items()}
    finally:
        for process in running.values():
            process.close()
    for name, reason in failed.items():
        say(f"{model}: {name} failed: {reason}")
    rates_of = {name: [steps * case.rows / value for value in values] for name, values in seconds.items()}
    return {
        "title": case.title,
        "rows": case.rows,
        "steps_per_round": steps,
        "rounds": asked.rounds,
        "samples_per_second": {name: spread(values, 5) for name, values in rates_of.items()},
        "speed_of_fastdp_2_to": {
            name: ratio(values, seconds["fastdp-2"]) for name, values in seconds.items() if "fastdp-2" in seconds
        },
        "facts": facts,
        "failed": failed,
    }


def _start(
    model: str, peers: Mapping[str, Peer], asked: argparse.Namespace
) -> tuple[dict[str, Process], dict[str, str]]:
    """Start all peers, one per core at a time; returns those that are ready, and the failures of the others."""
    running: dict[str, Process] = {}
    failed: dict[str, str] = {}

    def start(name: str) -> None:
        began = time.perf_counter()
        try:
            running[name] = peers[name].start(CASES[model], asked.start_timeout)
            say(f"{model}: {name} is ready after {time.perf_counter() - began:.1f} s")
        except WayError as error:
            failed[name] = str(error)

    with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
        list(pool.map(start, peers))
    return {name: running[name] for name in peers if name in running}, failed


def say(line: str) -> None:
    """Print progress with the time since the start."""
    print(f"[{time.perf_counter() - BEGAN:6.1f} s] {line}", flush=True)


BEGAN = time.perf_counter()
LIBRARIES = ("keras", "torch", "jax", "jaxlib", "tensorflow-cpu", "tensorflow")


def parse(arguments: Sequence[str] | None, peers: Mapping[str, Peer]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(CASES), default=tuple(CASES), metavar="MODEL")
    parser.add_argument("--peers", nargs="+", choices=tuple(peers), default=tuple(peers), metavar="PEER")
    parser.add_argument("--rounds", type=_count, default=5, help="default: 5")
    parser.add_argument("--steps", type=_count, help="steps of a round (default: the model's own)")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds that one round may take (default: 120)")
    parser.add_argument("--start-timeout", type=float, default=420.0, help="and the start of a peer (default: 420)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where JSON, table and picture go")
    return parser.parse_args(arguments)


def _count(text: str) -> int:
    """Parse a whole number from 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def main(arguments: Sequence[str] | None = None, peers: Mapping[str, Peer] = PEERS) -> int:
    """Measure every model and write the results after each; returns 1 if every peer failed."""
    asked = parse(arguments, peers)
    chosen = {name: peers[name] for name in asked.peers}
    titles = {name: peer.title for name, peer in chosen.items()}
    asked.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for model in asked.models:
        results[model] = measure(model, chosen, asked)
        line = result_line("peers", results, libraries=LIBRARIES, unit="samples per second", titles=titles)
        name = result_name("peers", line)
        (asked.out / f"{name}.json").write_text(json.dumps(line, indent=1) + "\n", encoding="utf-8")
        (asked.out / f"{name}.md").write_text(markdown(line), encoding="utf-8")
        draw(line, asked.out / f"{name}.png")
    print(markdown(line))
    print(f"Wrote {asked.out / name}.json, .md and .png")
    return 0 if any(result["samples_per_second"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
