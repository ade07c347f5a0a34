"""How fast do recurrent layers train on one fastdp device, against plain Keras on torch?

    python bench/recurrent.py [--kind lstm] [--rounds 7] [--steps 10]

The model is a binary classifier over 80 steps of 32 features with one recurrent layer of 64 units, batches of 64.
Plain Keras, fastdp eager and fastdp traced alternate; the table has the median samples per second over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
import torch

import fastdp

ROWS, STEPS, FEATURES, UNITS = 64, 80, 32, 64
KINDS = {
    "lstm": lambda: keras.layers.LSTM(UNITS),
    "gru": lambda: keras.layers.GRU(UNITS),
    "bidirectional": lambda: keras.layers.Bidirectional(keras.layers.LSTM(UNITS)),
}
MODES = ("keras", "eager", "trace")


def trainer(kind: str, mode: str, masked: bool) -> keras.Model:
    """A compiled model, in plain Keras or on one fastdp device."""
    keras.utils.set_random_seed(0)
    masking = [keras.layers.Masking()] if masked else []
    dense = keras.layers.Dense(1, "sigmoid")
    model = keras.Sequential([keras.Input((STEPS, FEATURES)), *masking, KINDS[kind](), dense])
    if mode != "keras":
        model = fastdp.wrap(model, gpus=1, compile=None if mode == "eager" else mode)
    model.compile("adam", "binary_crossentropy")
    return model


def samples_per_second(model: keras.Model, x: np.ndarray, y: np.ndarray, steps: int) -> float:
    """Samples per second over `steps` training steps."""
    began = time.perf_counter()
    for _ in range(steps):
        model.train_on_batch(x, y)
    return ROWS * steps / (time.perf_counter() - began)


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=KINDS, default="lstm")
    parser.add_argument("--masked", action="store_true", help="right-padded rows, behind keras.layers.Masking")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    x = generator.normal(size=(ROWS, STEPS, FEATURES)).astype("float32")
    if options.masked:
        for row, length in enumerate(generator.integers(STEPS // 4, STEPS, ROWS)):
            x[row, length:] = 0.0
    y = generator.integers(0, 2, (ROWS, 1)).astype("float32")
    fastdp.set_virtual_devices(1)
    models = {mode: trainer(options.kind, mode, options.masked) for mode in MODES}
    for model in models.values():
        samples_per_second(model, x, y, 5)
    speeds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(options.rounds):
        for mode, model in models.items():
            speeds[mode].append(samples_per_second(model, x, y, options.steps))
    how = models["trace"].report()
    fastdp.set_virtual_devices(0)
    medians = {mode: round(statistics.median(values)) for mode, values in speeds.items()}
    for mode, median in medians.items():
        print(f"{mode:>8} {median:>8} samples/s   {median / medians['keras']:.2f} times plain Keras")
    versions = {"torch": torch.__version__, "keras": keras.__version__}
    print(
        json.dumps(
            {"kind": options.kind, "masked": options.masked, "samples_per_second": medians, "report": how, **versions},
            default=str,
        )
    )


if __name__ == "__main__":
    main()
