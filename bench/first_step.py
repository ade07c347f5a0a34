"""How long does a user wait for the first training step?

Measures from a built model to the end of its first `train_on_batch`: wrapping, `compile`, the optimizer's slots, the
forward and backward passes and the first update. Compares plain Keras on torch with fastdp on one and two virtual
devices, each in a fresh process, in alternating rounds. The models are those of bench/frameworks.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

os.environ["KERAS_BACKEND"] = "torch"

import keras
from frameworks.cases import CASES
from report import finish, options, print_table

import fastdp
from fastdp.benchmark.arrays import draw
from fastdp.benchmark.models import find
from fastdp.benchmark.rounds import spread

MODELS = ("mlp", "cnn", "resnet50", "xception")
WAYS = ("keras", "1", "2")
LIMIT = 600.0


def first_step(model_name: str, way: str) -> float:
    """Seconds to the first step in this process; `way` is "keras" or a number of devices."""
    case = CASES[model_name]
    builtin = find(case.target)
    x, y = draw((*builtin.inputs_of("keras"), *builtin.targets), case.rows, 0)
    if way != "keras":
        fastdp.set_virtual_devices(int(way))
    model = builtin.build("keras")
    began = time.perf_counter()
    trained = model if way == "keras" else fastdp.wrap(model, gpus=int(way))
    trained.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    trained.train_on_batch(x, y)
    return time.perf_counter() - began


def in_a_process(model_name: str, way: str) -> float:
    """`first_step` in a new process, which exits without cleanup because a compiler may still be running in it."""
    command = [sys.executable, __file__, "--only", model_name, way]
    told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=LIMIT).stdout
    return float(told.split()[-1])


def main() -> None:
    """Measure, print, save."""
    asked = options(__doc__)
    models, rounds = (("mlp",), 1) if asked.quick else (MODELS, 7)
    seconds: dict[str, dict[str, list[float]]] = {model: {way: [] for way in WAYS} for model in models}
    for model, ways in seconds.items():
        in_a_process(model, "keras")  # brings the files into the system's cache
        for _ in range(rounds):
            for way, found in ways.items():
                found.append(in_a_process(model, way))
    results = {model: {way: spread(found, 4) for way, found in ways.items()} for model, ways in seconds.items()}
    print_table(
        "Seconds to the end of the first step (median), and the ratio to Keras",
        ["model", "Keras on torch", "1 device", "2 devices", "ratio 1", "ratio 2"],
        [
            [model, *(f"{ways[way]['median']:.2f}" for way in WAYS)]
            + [f"{ways[way]['median'] / ways['keras']['median']:.2f}" for way in WAYS[1:]]
            for model, ways in results.items()
        ],
    )
    finish("first_step", results, libraries=("torch", "keras"), unit="seconds", save=asked.save)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--only"]:
        print(f"\n{first_step(*sys.argv[2:4])}", flush=True)
        os._exit(0)
    main()
