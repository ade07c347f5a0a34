"""How many samples per second does each way of data-parallel training make, on the same model, data and machine?

Compares fastdp on 1 and 2 virtual devices with compiled steps, Keras's `fit` on torch, JAX and TensorFlow,
keras.distribution's DataParallel over two host devices, MirroredStrategy over two logical CPUs, and plain torch in
one process and in two with DistributedDataParallel over gloo. Models and ways are those of `fastdp bench`. All train by
SGD with momentum on the same global batches, measured as `fastdp bench` does; results are medians over the rounds. This
puts several models into one table and one picture.

Peers on two devices normalize each device's rows, except JAX, which normalizes the whole batch. A peer that fails or
times out is recorded with the reason, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.frameworks.cases import CASES
from bench.frameworks.table import draw, markdown
from bench.report import RESULTS, result_line, result_name
from fastdp.benchmark.display import open_display
from fastdp.benchmark.request import Request
from fastdp.benchmark.rounds import ratio
from fastdp.benchmark.run import run
from fastdp.benchmark.settings import Settings

# The fields of each peer's request. "auto" reaches fastdp's compiled steps after training a shape for long enough; here
# they are compiled at once.
FASTDP: dict[str, Any] = {"library": "fastdp", "framework": "keras", "kind": "virtual", "mode": "compiled"}
PEERS: dict[str, dict[str, Any]] = {
    "fastdp-1": FASTDP,
    "fastdp-2": {**FASTDP, "devices": 2},
    "keras-torch": {"library": "keras", "framework": "keras"},
    "keras-jax": {"library": "keras-jax", "framework": "keras"},
    "keras-jax-2": {"library": "keras-jax", "framework": "keras", "devices": 2},
    "keras-tf": {"library": "keras-tensorflow", "framework": "keras"},
    "keras-tf-2": {"library": "keras-tensorflow", "framework": "keras", "devices": 2},
    "torch": {"library": "torch", "framework": "torch"},
    "torch-ddp-2": {"library": "ddp", "framework": "torch", "devices": 2},
}
LIBRARIES = ("keras", "torch", "jax", "jaxlib", "tensorflow-cpu", "tensorflow")


def request(model: str, peer: str) -> Request:
    """What a peer trains."""
    case = CASES[model]
    return Request(target=case.target, batch=case.rows, optimizer="sgd", **PEERS[peer])


def measure(model: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Measure all peers on one model: samples per second, the ratio to fastdp, and the reasons of failures."""
    case, names = CASES[model], {request(model, peer).name: peer for peer in asked.peers}
    settings = Settings(
        target=case.target,
        name=case.title,
        framework="keras",
        ways=[request(model, peer) for peer in asked.peers],
        batch=case.rows,
        steps=asked.steps or case.steps,
        rounds=asked.rounds,
        timeout=asked.timeout,
    )
    with open_display() as display:
        result = run(settings, display)
    entries = {names[entry["name"]]: entry for entry in result["entries"]}
    seconds = {peer: entry["step_seconds"]["rounds"] for peer, entry in entries.items()}
    return {
        "title": case.title,
        "rows": case.rows,
        "steps_per_round": settings.steps,
        "rounds": asked.rounds,
        "noise": result["noise"],
        "samples_per_second": {peer: entry["samples_per_second"] for peer, entry in entries.items()},
        "speed_of_fastdp_2_to": {
            peer: ratio(values, seconds["fastdp-2"]) for peer, values in seconds.items() if "fastdp-2" in seconds
        },
        "facts": {peer: {key: entry[key] for key in ("parameters", "how", "why")} for peer, entry in entries.items()},
        "failed": {names[one["name"]]: one["reason"] for one in result["failed"]},
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(CASES), default=tuple(CASES), metavar="MODEL")
    parser.add_argument("--peers", nargs="+", choices=tuple(PEERS), default=tuple(PEERS), metavar="PEER")
    parser.add_argument("--rounds", type=_count, default=5, help="default: 5")
    parser.add_argument("--steps", type=_count, help="steps of a round (default: the model's own)")
    parser.add_argument("--timeout", type=float, default=420.0, help="seconds until a peer is ready (default: 420)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where JSON, table and picture go")
    return parser.parse_args(arguments)


def _count(text: str) -> int:
    """Parse a whole number from 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every model and write the results after each; returns 1 if every peer failed."""
    asked = parse(arguments)
    asked.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for model in asked.models:
        results[model] = measure(model, asked)
        titles = {peer: request(model, peer).name for peer in asked.peers}
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
