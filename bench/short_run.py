"""Does a short training pay: two epochs of 150 batches from a fresh process, with all that comes first?

Measures the whole process, from its start to the end of `fit`: imports, the model, wrapping, tracing and compiling.
Compares plain Keras on torch with fastdp on one virtual device with everything at its default (`compile="auto"`), once
with an empty cache folder and once as a later run of the same script, in alternating rounds. The models are those of
bench/frameworks; `--models` chooses some.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["KERAS_BACKEND"] = "torch"

import keras
from frameworks.cases import CASES
from report import finish, print_table

import fastdp
from fastdp.benchmark.arrays import draw
from fastdp.benchmark.models import find
from fastdp.benchmark.rounds import ratio, spread

WAYS = ("keras", "fastdp", "fastdp again")
EPOCHS, BATCHES = 2, 150
LIMIT = 1800.0


def train(model_name: str, way: str, batches: int) -> dict[str, object]:
    """Train in this process; how the last steps ran, and the seconds of `fit`."""
    case = CASES[model_name]
    builtin = find(case.target)
    x, y = draw((*builtin.inputs_of("keras"), *builtin.targets), case.rows * batches, 0)
    model = builtin.build("keras")
    trained = model if way == "keras" else fastdp.wrap(model, gpus=1)
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    trained.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    began = time.perf_counter()
    trained.fit(x, y, batch_size=case.rows, epochs=EPOCHS, verbose=0)
    fit = time.perf_counter() - began
    return {"fit": fit, "how": "eager" if way == "keras" else trained.report()[0]["how"]}


def in_a_process(model_name: str, way: str, batches: int, cache: Path) -> tuple[float, str]:
    """Seconds of a new process, which exits without cleanup since a compiler may still run in it, and how it ran."""
    command = [sys.executable, __file__, "--only", model_name, way, str(batches)]
    environment = {**os.environ, "FASTDP_CACHE_DIR": str(cache), "FASTDP_VIRTUAL_DEVICES": "1"}
    began = time.perf_counter()
    told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=LIMIT, env=environment).stdout
    return time.perf_counter() - began, str(json.loads(told.splitlines()[-1])["how"])


def measure(model: str, rounds: int, batches: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """The seconds of each way in each round, and how its last steps ran."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    how: dict[str, str] = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="fastdp-short-run-") as folder:
            for way in WAYS:
                found, how[way] = in_a_process(model, way, batches, Path(folder))
                seconds[way].append(found)
    return seconds, how


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write the result to bench/results/")
    parser.add_argument("--quick", action="store_true", help="few batches: to see that it works, not to measure")
    parser.add_argument("--models", nargs="+", choices=tuple(CASES), default=("mlp", "cnn", "lstm", "transformer"))
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    rounds, batches = (1, 10) if asked.quick else (asked.rounds, BATCHES)
    results = {}
    for model in asked.models:
        in_a_process(model, "keras", 2, Path("unused"))  # brings the files into the system's cache
        seconds, how = measure(model, rounds, batches)
        of_ways = {way: {**spread(found, 4), "how": how[way]} for way, found in seconds.items()}
        ratios = {way: round(ratio(seconds[way], seconds["keras"]), 3) for way in WAYS[1:]}
        results[model] = {"seconds": of_ways, "ratio to keras": ratios}
    print_table(
        f"Seconds of a process that trains {EPOCHS} epochs of {batches} batches (median), and the ratio to Keras",
        ["model", *WAYS, *(f"ratio {way}" for way in WAYS[1:])],
        [
            [model, *(f"{found['seconds'][way]['median']:.2f}" for way in WAYS), *found["ratio to keras"].values()]
            for model, found in results.items()
        ],
    )
    finish("short_run", results, libraries=("torch", "keras"), unit="seconds", save=asked.save)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--only"]:
        print(f"\n{json.dumps(train(sys.argv[2], sys.argv[3], int(sys.argv[4])))}", flush=True)
        os._exit(0)
    main()
