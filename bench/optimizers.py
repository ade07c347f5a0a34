"""What does applying a Keras optimizer to flat buffers save, beside Keras's update of each variable?

Measures the update alone (with given gradients) and whole training steps by `train_on_batch` of an MLP and of
ResNet50 on one virtual device, in alternating rounds:

    each     Keras's per-variable formula: `update_step` for one variable after the other
    Keras    Keras's own update on torch, by torch._foreach functions over all variables
    flat     fastdp's update

"each" is measured for the update alone. Ratios are medians over rounds.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
from report import finish, options, print_table
from virtual_devices import mlp, resnet50

import fastdp
from fastdp.benchmark.rounds import alternate, ratio, spread
from fastdp.program.base import Totals
from fastdp.program.keras.optimizer.flat import FlatUpdate
from fastdp.program.keras.program import Notes

# Name, model, rows of the batch, rounds, seconds of each step in a round.
CASES: tuple[tuple[str, Callable[[], keras.Model], int, int, float], ...] = (
    ("MLP 784-512-512-10, batch 128", mlp, 128, 15, 0.2),
    ("ResNet50 64x64, batch 32", resnet50, 32, 7, 0.1),
)
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "Adam": lambda: keras.optimizers.Adam(1e-4),
    "SGD momentum": lambda: keras.optimizers.SGD(1e-4, momentum=0.9),
    "RMSprop": lambda: keras.optimizers.RMSprop(1e-4),
    "AdamW": lambda: keras.optimizers.AdamW(1e-4),
}


class OneByOne(keras.optimizers.Adam):
    """Adam by Keras's formula: Keras has no torch implementation for a subclass of Adam."""


def parallel(build: Callable[[], keras.Model], optimizer: Any, *, flat: bool) -> Any:
    """A compiled parallel model on one device."""
    keras.utils.set_random_seed(0)
    model = fastdp.wrap(build(), gpus=1)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    state = model.engine.replicas[0]._state
    if not flat:
        state.flat_update = None
    assert isinstance(state.flat_update, FlatUpdate) == flat
    return model


def update(model: Any) -> Callable[[], None]:
    """A call that runs only the update, with the same gradients each time."""
    engine = model.engine
    state, notes = engine.replicas[0]._state, Notes()
    generator = np.random.default_rng(0)
    for tensor in state.gradients:
        tensor.copy_(keras.ops.convert_to_tensor(generator.standard_normal(tensor.shape, np.float32) * 1e-3))
    totals = Totals(np.zeros(1), notes, [notes])
    return lambda: engine.program.update(state, totals)


def step(model: Any, rows: int) -> Callable[[], object]:
    """A training step on a batch of random numbers."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((rows, *model.template.input_shape[1:]), np.float32)
    y = generator.integers(0, 10, rows)
    return lambda: model.train_on_batch(x, y)


def main() -> None:
    """Measure, print, save."""
    asked = options(__doc__)
    fastdp.set_virtual_devices(1)
    table, results = [], {}
    for name, build, rows, rounds, seconds in CASES:
        for kind, make in OPTIMIZERS.items():
            models = {"Keras": parallel(build, make(), flat=False), "flat": parallel(build, make(), flat=True)}
            updates = {how: update(model) for how, model in models.items()}
            if kind == "Adam":
                updates["each"] = update(parallel(build, OneByOne(1e-4), flat=False))
            steps = {how: step(model, rows) for how, model in models.items()} if kind == "Adam" else {}
            for what, calls in (("update", updates), ("step", steps)):
                if not calls:
                    continue
                times = alternate(calls, rounds=1 if asked.quick else rounds, seconds=0.0 if asked.quick else seconds)
                milli = {how: [1e3 * value for value in values] for how, values in times.items()}
                found = ratio(times["flat"], times["Keras"])
                results[f"{name}, {kind}, {what}"] = {
                    "milliseconds": {how: spread(values, 4) for how, values in milli.items()},
                    "flat_to_Keras": found,
                }
                medians = [
                    f"{statistics.median(milli[h]):.2f}" if h in milli else "" for h in ("each", "Keras", "flat")
                ]
                table.append([f"{name}, {kind}, {what}", *medians, found])
    print_table("Milliseconds (median)", ["", "each", "Keras", "flat", "flat : Keras"], table)
    finish("optimizers", results, libraries=("keras", "torch"), save=asked.save)
    fastdp.set_virtual_devices(0)


if __name__ == "__main__":
    main()
