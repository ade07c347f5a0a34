"""How long does `fit` take between two steps, and is a step of the MLP as fast as plain torch's?

784-512-512-10, batch 128, Adam, one virtual device, compiled steps. Whole epochs of `fit` take turns with each other
and with a loop of plain torch over the same ready batches:

    arrays        shuffled rows are cut from arrays of 77 MB; no callback looks at batches
    generator     ready batches; no callback looks at batches
    looks         arrays, and a callback with a hook for batches
    looks, k=10   the same with steps_per_execution=10
    torch         zero_grad, forward, loss, backward, step; nothing else

`between` is the time from the end of a step in the engine to the beginning of the next: the data, metrics, callbacks,
and the checks of what has changed. `driver` is what the engine takes beside compute and update. Medians over rounds.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import fastdp

import keras  # isort: skip - after fastdp, which chooses its backend
import numpy as np
import torch
from report import finish, options, print_table

ROWS, FEATURES, WIDTH, CLASSES = 128, 784, 512, 10
COMPILE_SECONDS = 300


def model(**settings: Any) -> Any:
    """A parallel model with compiled steps."""
    layers = [keras.layers.Dense(WIDTH, activation="relu") for _ in range(2)]
    template = keras.Sequential([keras.Input((FEATURES,)), *layers, keras.layers.Dense(CLASSES)])
    parallel = fastdp.wrap(template, gpus=1, compile="inductor")
    parallel.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), **settings)
    return parallel


class Looks(keras.callbacks.Callback):
    """Reads the loss of each batch."""

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Read it."""
        self.loss = logs["loss"]


def torch_epoch(batches: list[tuple[np.ndarray, np.ndarray]], steps: int) -> Callable[[], float]:
    """An epoch of plain torch; returns seconds per step."""
    layers = [torch.nn.Linear(FEATURES, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU()]
    module = torch.nn.Sequential(*layers, torch.nn.Linear(WIDTH, CLASSES))
    optimizer, loss_of = torch.optim.Adam(module.parameters()), torch.nn.CrossEntropyLoss()
    ready = [(torch.from_numpy(x), torch.from_numpy(y).long()) for x, y in batches]

    def epoch() -> float:
        began = time.perf_counter()
        for step in range(steps):
            x, y = ready[step % len(ready)]
            optimizer.zero_grad()
            loss_of(module(x), y).backward()
            optimizer.step()
        return (time.perf_counter() - began) / steps

    return epoch


def fits(steps: int, x: np.ndarray, y: np.ndarray) -> dict[str, tuple[Any, Callable[[], Any]]]:
    """By name, a model and a function that trains it for one epoch."""
    quiet, several = model(), model(steps_per_execution=10)

    def batches() -> Iterator[Any]:
        for step in range(steps):
            rows = slice(step % 4 * ROWS, step % 4 * ROWS + ROWS)
            yield x[rows], y[rows]

    def fit(one: Any, *data: Any, **more: Any) -> Any:
        return one.fit(*data, batch_size=ROWS, verbose=0, **more)

    return {
        "arrays": (quiet, lambda: fit(quiet, x, y)),
        "generator": (quiet, lambda: quiet.fit(batches(), steps_per_epoch=steps, shuffle=False, verbose=0)),
        "looks": (quiet, lambda: fit(quiet, x, y, callbacks=[Looks()])),
        "looks, k=10": (several, lambda: fit(several, x, y, callbacks=[Looks()])),
    }


def main() -> None:
    """Measure, print, save."""
    asked = options(__doc__)
    steps, rounds = (20, 1) if asked.quick else (200, 7)  # the engine's times cover 200 steps
    generator = np.random.default_rng(0)
    x = generator.standard_normal((ROWS * steps, FEATURES), np.float32)
    y = generator.integers(0, CLASSES, ROWS * steps).astype("int32")
    fastdp.set_virtual_devices(1, kind="host")
    ways = fits(steps, x, y)
    plain = torch_epoch([(x[i * ROWS : (i + 1) * ROWS], y[i * ROWS : (i + 1) * ROWS]) for i in range(4)], steps)
    for one, epoch in ways.values():
        epoch()
        one.wait_compiled(COMPILE_SECONDS)
        epoch()
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for _ in range(rounds):
        for name, (one, epoch) in ways.items():
            epoch()
            times = one.engine.times
            for what, seconds in (("step", times.step + times.between), ("between", times.between)):
                found[name][what].append(1e3 * seconds)
            found[name]["driver"].append(1e3 * times.overhead)
        found["torch"]["step"].append(1e3 * plain())
    how = {name: one.report()[0]["how"] for name, (one, _) in ways.items()}
    results = {
        name: {what: round(statistics.median(values), 4) for what, values in every.items()}
        for name, every in found.items()
    }
    print_table(
        f"Milliseconds; steps are {', '.join(sorted(set(how.values())))}",
        ["fit", "a step", "between two", "driver"],
        [[name, *(f"{values[what]:.3f}" if what in values else "" for what in ("step", "between", "driver"))]
         for name, values in results.items()],
    )  # fmt: skip
    fastdp.set_virtual_devices(0)
    finish("between_steps", {**results, "how": how}, unit="milliseconds", save=asked.save)


if __name__ == "__main__":
    main()
