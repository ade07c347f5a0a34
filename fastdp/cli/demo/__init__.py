"""The command `demo`: trains a convolutional network on handwritten digits on several devices and on one.

    fastdp demo
    fastdp demo --devices 8 --epochs 3
    fastdp demo --json --out results

It compares losses, accuracy and speed, and writes the data, two files of the model and a picture of the curves. The
devices are the GPUs of this machine, or virtual ones, which share its cores: on those, more devices are no faster.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from fastdp.cli.arguments import add_json, check_folder, whole_number
from fastdp.cli.demo.digits import TRAIN_ROWS, Digits, open_digits, write_digits
from fastdp.cli.demo.report import draw_curves, loss_difference, print_tables, result
from fastdp.cli.demo.training import Run, train
from fastdp.cli.optional import choose_torch, load
from fastdp.cli.output import only_json, print_json
from fastdp.cli.status import FAILED, OK, say
from fastdp.runtime.select import devices, resolve, set_virtual_devices

# What is expected after so many epochs of batches of so many rows or fewer. Shorter runs are not judged.
LEAST_ACCURACY = 0.97
ENOUGH_EPOCHS, ENOUGH_ROWS = 10, 64
LARGEST_LOSS_DIFFERENCE = 1e-4
FILES = ("digits_data.h5", "digits.keras", "digits.h5", "curves.png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the number of devices, epochs, batch size and output folder."""
    parser.add_argument("--devices", type=whole_number(2, 64), default=4, metavar="N", help="how many (default: 4)")
    parser.add_argument("--epochs", type=whole_number(1, 1000), default=10, metavar="N", help="default: 10")
    parser.add_argument(
        "--batch-size", type=whole_number(1, TRAIN_ROWS), default=64, metavar="ROWS", help="global (default: 64)"
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"), metavar="DIR", help="default: out/demo")
    parser.add_argument(
        "--verbose", type=whole_number(0, 2), help="Keras's: 0 nothing, 1 a bar, 2 a line per epoch (default: 1 or 2)"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Train on all devices and on one, compare, and write files; returns 1 if a check fails."""
    began = time.perf_counter()
    check_folder("--out", options.out)
    choose_torch("demo")
    for library in ("keras", "rich", "sklearn", "matplotlib"):  # before the training, not after it
        load(library, "keras,demo")
    with only_json(options.json):
        found, problems = _demonstrate(options)
    for problem in problems:
        say("demo", problem)
    if options.json:
        print_json({**found, "problems": problems, "seconds": round(time.perf_counter() - began, 1)})
    return FAILED if problems else OK


def _demonstrate(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Train, compare and write files; returns the result for `--json`, and what is wrong with it."""
    names = _choose_devices(options.devices)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / FILES[0]
    write_digits(path)
    digits = open_digits(path)
    print(f"{TRAIN_ROWS:,} digits to train on and {len(digits.x_test)} to test on, read from {path}")
    several = _train(digits, names, options)
    runs = [_train(digits, names[:1], options), several]
    print_tables(runs)
    print(f"\n{several.report}\n")
    draw_curves(runs, options.out / FILES[3])
    judged = options.epochs >= ENOUGH_EPOCHS and options.batch_size <= ENOUGH_ROWS
    if not judged:
        print(
            f"The accuracy is not judged: {ENOUGH_EPOCHS} epochs of batches of {ENOUGH_ROWS} rows reach 0.97 and more."
        )
    problems = _check(runs, judged=judged) + _save(runs[-1], digits, options.out)
    files = [path.name for path in map(options.out.joinpath, FILES) if path.is_file()]
    print(f"Files in {options.out}: {', '.join(files)}")
    return {**result(runs, names), "folder": str(options.out), "files": files}, problems


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
    if options.json:
        return 0
    if options.verbose is not None:
        return int(options.verbose)
    return 1 if sys.stdout.isatty() else 2


def _check(runs: list[Run], *, judged: bool) -> list[str]:
    """Problems with the results, one sentence each. The accuracy counts only if it is `judged`."""
    problems = []
    if judged and not runs[-1].accuracy >= LEAST_ACCURACY:
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
    # Keras warns that .h5 is an old format, and that metrics are built later: nothing for a user to act on here.
    absl = logging.getLogger("absl")
    before = absl.level
    absl.setLevel(logging.ERROR)
    try:
        return _saved(trained, digits, out, load_model)
    finally:
        absl.setLevel(before)


def _saved(trained: Run, digits: Digits, out: Path, load_model: Any) -> list[str]:
    """Save and load; returns the problems."""
    images = np.asarray(digits.x_test)
    expected = trained.model.predict(images, verbose=0)
    problems = []
    for name in FILES[1:3]:
        trained.model.save(out / name)
        loaded: Any = load_model(out / name)
        if not np.array_equal(loaded.predict(images, verbose=0), expected):
            problems.append(f"{out / name}, loaded with keras.models.load_model, predicts something else.")
    return problems
