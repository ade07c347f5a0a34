"""The command `demo`: trains a convolutional network on handwritten digits on several devices and on one."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from fastdp.cli.demo.digits import TRAIN_ROWS, Digits, open_digits, write_digits
from fastdp.cli.demo.report import draw_curves, json_line, loss_difference, print_tables
from fastdp.cli.demo.training import Run, train
from fastdp.cli.optional import load
from fastdp.runtime.select import devices, resolve, set_virtual_devices

LEAST_ACCURACY = 0.97
LARGEST_LOSS_DIFFERENCE = 1e-4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the number of devices, epochs, batch size and output folder."""
    parser.add_argument("--devices", type=_between(2, 64), default=4, metavar="N", help="how many (default: 4)")
    parser.add_argument("--epochs", type=_between(1, 1000), default=10, metavar="N", help="default: 10")
    parser.add_argument(
        "--batch-size", type=_between(1, TRAIN_ROWS), default=64, metavar="ROWS", help="global (default: 64)"
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"), metavar="DIR", help="default: out/demo")
    parser.add_argument(
        "--verbose", type=int, choices=(0, 1, 2), help="Keras's: nothing, a bar, a line per epoch (default: 1 or 2)"
    )


def run(options: argparse.Namespace) -> int:
    """Train on all devices and on one, compare, and write files; returns 1 if a check fails."""
    began = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    names = _choose_devices(options.devices)
    path = options.out / "digits_data.h5"
    write_digits(path)
    digits = open_digits(path)
    print(f"{TRAIN_ROWS:,} digits to train on and {len(digits.x_test)} to test on, read from {path}")
    several = _train(digits, names, options)
    runs = [_train(digits, names[:1], options), several]
    print_tables(runs)
    print(f"\n{several.report}\n")
    draw_curves(runs, options.out / "curves.png")
    problems = _check(runs) + _save(runs[-1], digits, options.out)
    print(f"Files in {options.out}: {', '.join(sorted(file.name for file in options.out.iterdir()))}")
    for problem in problems:
        print(f"fastdp demo: {problem}", file=sys.stderr)
    print(json_line(runs, names, time.perf_counter() - began))
    return 1 if problems else 0


def _choose_devices(count: int) -> list[str]:
    """Choose the existing devices if there are enough, else virtual ones; returns their names."""
    found = devices()
    if len(found) > 1 and found[0].kind != "virtual":
        count = min(count, len(found))
    if len(found) < count:
        set_virtual_devices(count)
    try:
        return [device.name for device in resolve(count)]
    except ValueError as error:
        print(f"{error}\nThe demo goes on with {count} virtual devices.")
        set_virtual_devices(count)
        return [device.name for device in resolve(count)]


def _train(digits: Digits, names: list[str], options: argparse.Namespace) -> Run:
    """Train once on the devices with these names."""
    print(f"Training on {', '.join(names)}")
    verbose = _verbosity(options)
    return train(digits, len(names), epochs=options.epochs, batch_size=options.batch_size, verbose=verbose)


def _verbosity(options: argparse.Namespace) -> int:
    """Keras's `verbose`: the user's value, else a bar on a terminal and a line per epoch elsewhere."""
    if options.verbose is not None:
        return int(options.verbose)
    return 1 if sys.stdout.isatty() else 2


def _check(runs: list[Run]) -> list[str]:
    """Problems with the results, one sentence each."""
    problems = []
    if runs[-1].accuracy < LEAST_ACCURACY:
        problems.append(
            f"test accuracy is {runs[-1].accuracy:.4f} after {len(runs[-1].history['loss'])} epochs, "
            f"expected at least {LEAST_ACCURACY}."
        )
    if not loss_difference(runs) <= LARGEST_LOSS_DIFFERENCE:
        problems.append(
            f"the training losses of the runs differ by {loss_difference(runs):.1e}, "
            f"expected at most {LARGEST_LOSS_DIFFERENCE:.0e}."
        )
    return problems


def _save(trained: Run, digits: Digits, out: Path) -> list[str]:
    """Save the template in both formats and load it with plain Keras; returns the files that predict differently."""
    load_model = load("keras", "keras").models.load_model
    images = np.asarray(digits.x_test)
    expected = trained.model.predict(images, verbose=0)
    problems = []
    for name in ("digits.keras", "digits.h5"):
        trained.model.save(out / name)
        loaded: Any = load_model(out / name)
        if not np.array_equal(loaded.predict(images, verbose=0), expected):
            problems.append(f"{out / name}, loaded with keras.models.load_model, predicts something else.")
    return problems


def _between(least: int, most: int) -> Any:
    """An argparse type: a whole number from `least` to `most`."""

    def whole_number(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} to {most}, got {text}")
        return value

    return whole_number
