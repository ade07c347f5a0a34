"""Calls fastdp's public functions with odd arguments: each call works, or ends at once in a documented error.

`python tests/shared/argument_fuzzer.py TRIES [SEED]`, by hand. One or two arguments of a call that works are
replaced. The error must be a ValueError, a TypeError, an OSError or a KeyError, with a text, and within seconds.
"""

from __future__ import annotations

import faulthandler
import inspect
import itertools
import json
import math
import random
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

import fastdp
import fastdp.callbacks
import fastdp.data
from fastdp.checkpoint import contents
from fastdp.data import DeviceDataset, Scaled
from fastdp.runtime.select import resolve
from fastdp.torch.parallel_module import TorchParallel
from fastdp.utils import HDF5Matrix

SECONDS = 60


ODD: tuple[Callable[[], Any], ...] = tuple(
    (lambda value=value: value)
    for value in (
        *(None, True, False, -1, 0, 1, 1.5, math.nan, math.inf, 1e20, 10**30, 2 + 1j, "", "x", "auto", "all", "\0"),
        *("a" * 5000,),
        *(
            "../x",
            "/dev/null",
            "/proc/x",
            b"x",
            [],
            {},
            (),
            [0, 0],
            [-1],
            [[0]],
            ["virtual:0"],
            {"a": 1},
            object(),
            int,
        ),
        *(np.float32(2), np.int64(2), np.arange(3), np.zeros((0, 2)), np.array("x"), torch.ones(2), Path("x"), print),
        *(range(3), iter([1]), slice(None), Ellipsis),
    )
)


def calls(folder: Path) -> dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]]:
    """Functions by name, and what makes arguments with which they work."""
    with h5py.File(folder / "a.h5", "w") as file:
        file["x"] = np.arange(60.0).reshape(20, 3)

    def checkpoint(**given: Any) -> None:
        with fastdp.Checkpoint(**given):
            pass

    def step(**given: Any) -> None:
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 1)
        train = fastdp.wrap(module, 2, compile=None).train_step(
            torch.nn.MSELoss(), lambda parameters: torch.optim.SGD(parameters, 0.1), **given
        )
        train(torch.ones(4, 3), torch.ones(4, 1))

    def matrix(**given: Any) -> None:
        with HDF5Matrix(**given) as rows:
            rows[0:2]

    def resident(**given: Any) -> None:
        data = DeviceDataset(devices=resolve(2), **given)
        list(data.batches(3))

    def rows(**given: Any) -> None:
        x = np.arange(12.0).reshape(6, 2)
        data = DeviceDataset([x], [*resolve(2)])
        for batch in itertools.islice(data.batches(**given), 9):
            np.asarray(batch[0])

    def traced(**given: Any) -> None:
        with fastdp.trace(**given):
            pass

    def watched(**given: Any) -> None:
        list(fastdp.data.watch_data([1, 2], **given))

    def read_ahead(**given: Any) -> None:
        list(fastdp.data.prefetch(**given))

    options = inspect.signature(fastdp.wrap).parameters
    names = [name for name in options if name not in ("model", "gpus", "fingerprint")]
    defaults = {name: options[name].default for name in names}
    kept = ("self", "log_dir")
    board = {
        n: p.default
        for n, p in inspect.signature(fastdp.callbacks.TensorBoard.__init__).parameters.items()
        if n not in kept
    }
    steps = inspect.signature(TorchParallel.train_step).parameters
    more = {n: p.default for n, p in steps.items() if p.default is not inspect.Parameter.empty and n != "self"}
    return {
        "wrap": (fastdp.wrap, lambda: {"model": torch.nn.Linear(3, 1), "gpus": 2, **defaults}),
        "train_step": (step, lambda: dict(more)),
        "set_virtual_devices": (_virtual, lambda: {"count": 3}),
        "Checkpoint": (
            checkpoint,
            lambda: {"folder": folder / "run", "model": torch.nn.Linear(2, 1), "every_steps": 5, "keep": 3},
        ),
        "HDF5Matrix": (matrix, lambda: {"datapath": str(folder / "a.h5"), "dataset": "x", "start": 0, "end": None}),
        "prefetch": (read_ahead, lambda: {"loader": [1, 2], "batches": 2, "timeout": 9.0, "dtype": None}),
        "Monitor": (
            fastdp.callbacks.Monitor,
            lambda: {"logs": None, "every": None, "bar": True, "append": False, "interval": 1.0},
        ),
        "TensorBoard": (fastdp.callbacks.TensorBoard, lambda: {"log_dir": folder / "logs", **board}),
        "callbacks.Checkpoint": (
            fastdp.callbacks.Checkpoint,
            lambda: {"folder": folder / "fit", "every_steps": 5, "every_minutes": None, "keep": 3},
        ),
        "DeviceDataset": (
            resident,
            lambda: {"arrays": [np.ones((4, 2), np.uint8)], "casts": {0: Scaled()}, "sharded": False},
        ),
        "Scaled": (Scaled, lambda: {"dtype": "float32", "scale": 0.5, "offset": 0.0}),
        "batches": (rows, lambda: {"batch_size": 2, "shuffle": True, "seed": 1, "drop_last": False}),
        "Augment": (fastdp.data.Augment, lambda: {"layers": [], "images": None, "targets": None}),
        "trace": (traced, lambda: {"path": folder / "trace.json", "max_spans": 100}),
        "watch_data": (watched, lambda: {"timeout": 9.0}),
        "verify": (lambda path: contents.read(Path(path)), lambda: {"path": folder / "a.h5"}),
    }


def _virtual(count: Any) -> None:
    try:
        fastdp.set_virtual_devices(count)
    finally:
        fastdp.set_virtual_devices(3)


def main(tries: int, seed: int = 0) -> Counter[str]:
    """Run, and return how the tries ended."""
    chosen, outcomes = random.Random(seed), Counter[str]()
    fastdp.set_virtual_devices(3)
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        every = calls(Path(place))
        for work, given in every.values():
            work(**given())
        for number in range(tries):
            name = chosen.choice(list(every))
            work, given = every[name]
            arguments = given()
            changed = chosen.sample(list(arguments), min(len(arguments), chosen.randint(1, 2)))
            for one in changed:
                arguments[one] = chosen.choice(ODD)()
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            try:
                work(**arguments)
            except (ValueError, TypeError, OSError, KeyError) as error:
                outcome = type(error).__name__
                if not str(error):
                    raise AssertionError(f"seed {seed}, try {number}, {name}: no text") from error
            except BaseException as error:
                told = {one: type(arguments[one]).__name__ for one in changed}
                raise AssertionError(f"seed {seed}, try {number}, {name}, {told}: {error!r}") from error
            else:
                outcome = "right"
            finally:
                faulthandler.cancel_dump_traceback_later()
            outcomes[f"{name} {outcome}"] += 1
    return outcomes


if __name__ == "__main__":
    print(json.dumps(main(*map(int, sys.argv[1:]))))  # noqa: T201
