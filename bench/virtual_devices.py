"""Are two virtual devices on this machine no slower than 1.15 x one device at the same global batch?

Measures a training step on one batch with plain Keras (`train_on_batch`) and with fastdp on 1, 2 and 4 virtual
devices, in alternating rounds. All do the same work: loss and accuracy on the whole batch, SGD with momentum. Plain
Keras uses torch's default number of threads; fastdp divides the cores among its devices. The ratio is the median
over rounds of the time on 2 devices divided by the time on 1 device, below 1 if two are faster.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
import torch
from report import finish, options, print_table

import fastdp
from fastdp.benchmark.rounds import alternate, ratio, spread

DEVICES = (1, 2, 4)
LIMIT = 1.15
layers = keras.layers


def cnn() -> keras.Model:
    """Two convolutions and two dense layers on 28x28 images."""
    return keras.Sequential(
        [
            layers.Input((28, 28, 1)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dense(10, activation="softmax"),
        ]
    )


def mlp() -> keras.Model:
    """784-512-512-10."""
    dense = [layers.Dense(512, activation="relu") for _ in range(2)]
    return keras.Sequential([layers.Input((784,)), *dense, layers.Dense(10, activation="softmax")])


def resnet50() -> keras.Model:
    """keras.applications' ResNet50 on 64x64 images, 10 classes."""
    return keras.applications.ResNet50(weights=None, input_shape=(64, 64, 3), classes=10)


# Name, model, rows of the global batch, rounds, seconds of each step in a round.
CASES: tuple[tuple[str, Callable[[], keras.Model], int, int, float], ...] = (
    ("CNN 28x28, batch 128", cnn, 128, 15, 0.5),
    ("MLP 784-512-512-10, batch 128", mlp, 128, 15, 0.3),
    ("ResNet50 64x64, batch 32", resnet50, 32, 3, 0.1),
)


def step(build: Callable[[], keras.Model], rows: int, devices: int) -> Callable[[], object]:
    """A training step of a new model on `devices` virtual devices; 0 is plain Keras."""
    keras.utils.set_random_seed(0)
    model = build()
    runner = fastdp.wrap(model, gpus=devices) if devices else model
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    runner.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    generator = np.random.default_rng(0)
    x = generator.standard_normal((rows, *model.input_shape[1:]), np.float32)
    y = generator.integers(0, 10, rows)
    return lambda: runner.train_on_batch(x, y)


def main() -> None:
    """Measure all models, print, save."""
    asked = options(__doc__)
    fastdp.set_virtual_devices(max(DEVICES))
    table, results = [], {}
    for name, build, rows, rounds, seconds in CASES:
        steps = {"Keras": step(build, rows, 0), **{f"fastdp {n}": step(build, rows, n) for n in DEVICES}}
        times = alternate(steps, rounds=1 if asked.quick else rounds, seconds=0.0 if asked.quick else seconds)
        rates = {runner: [rows / value for value in values] for runner, values in times.items()}
        two = ratio(times["fastdp 2"], times["fastdp 1"])
        results[name] = {
            "samples_per_second": {runner: spread(values, 4) for runner, values in rates.items()},
            "time_1_device_to_keras": ratio(times["fastdp 1"], times["Keras"]),
            "time_2_devices_to_1": two,
            "time_4_devices_to_1": ratio(times["fastdp 4"], times["fastdp 1"]),
            "within_limit": two <= LIMIT,
        }
        medians = [f"{statistics.median(values):,.0f}" for values in rates.values()]
        others = [value for key, value in results[name].items() if key.startswith("time_")]
        table.append([name, *medians, *others, "yes" if two <= LIMIT else "NO"])
    header = ["samples/s (median)", *rates, "1 : Keras", "2 : 1", "4 : 1", f"2 : 1 <= {LIMIT}"]
    print_table("Training steps; ratios of time per step, median over rounds", header, table)
    finish(
        "virtual_devices",
        results,
        libraries=("keras", "torch"),
        limit=LIMIT,
        torch_threads=torch.get_num_threads(),
        save=asked.save,
    )


if __name__ == "__main__":
    main()
