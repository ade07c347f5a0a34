"""How fast is HDF5 as training input, beside NumPy, h5py and torch's DataLoader?

On 512 images of 224 x 224 pixels, uint8, warm in the page cache, in batches of 128, in alternating rounds:

    one piece   `HDF5Matrix` slices of a contiguous data set, against a NumPy copy of the same bytes
    gzip, ...   `HDF5Matrix` slices of chunks of 8 images, against slices of h5py
    loaders     `matrix.batches`, against a DataLoader of two workers that reads the same batches by h5py (slices), or
                row by row as most scripts do (rows)
    fit         `fit` from a gzip file, against the longer of reading it alone and of `fit` on the same arrays in
                memory: a convolutional network, whose computing takes longer, and a mean of pixels
    memory      growth of the process that reads a file of 20 times what may wait (batches ahead and chunks kept)

Ratios above 1 are faster than what they are compared with, but for fit and memory, where they are costs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "torch")

import h5py
import hdf5plugin
import keras
import numpy as np
import torch
from report import finish, options, print_table

import fastdp
from fastdp.benchmark.rounds import ratio, turns
from fastdp.data.hdf5 import HDF5Matrix
from fastdp.keras.fit.array_batches import ArrayBatches

ROWS, SIDE, BATCH, CHUNK = 512, 224, 128, 8
SMALL_ROWS, SMALL_SIDE, SMALL_BATCH = 2048, 64, 128
CODECS: dict[str, dict[str, Any]] = {
    "gzip": {"compression": "gzip"},
    "lzf": {"compression": "lzf"},
    "blosc2": {**hdf5plugin.Blosc2(cname="lz4", clevel=5)},
    "zstd": {**hdf5plugin.Zstd(clevel=3)},
}


def images(rows: int, side: int) -> np.ndarray:
    """Pictures of smooth patches with a little noise, which compress about as photographs do."""
    generator = np.random.default_rng(0)
    patches = generator.integers(0, 256, (rows, side // 16, side // 16, 3), np.int16)
    smooth = patches.repeat(16, axis=1).repeat(16, axis=2)
    return (smooth + generator.integers(-1, 2, smooth.shape, np.int16)).clip(0, 255).astype(np.uint8)


def write(path: str, array: np.ndarray) -> None:
    """The same images in each layout."""
    with h5py.File(path, "w") as file:
        file["one piece"] = array
        for name, filters in CODECS.items():
            file.create_dataset(name, data=array, chunks=(CHUNK, *array.shape[1:]), **filters)


def slices(source: Any) -> None:
    """Read all rows in batches."""
    for start in range(0, ROWS, BATCH):
        source[start : start + BATCH]


def copies(array: np.ndarray) -> None:
    """Copy all rows in batches."""
    for start in range(0, ROWS, BATCH):
        array[start : start + BATCH].copy()


def layouts(path: str, array: np.ndarray, rounds: int) -> dict[str, float]:
    """Each layout by fastdp, and what it is compared with."""
    ratios = {}
    with h5py.File(path) as file:
        for name in ("one piece", *CODECS):
            with HDF5Matrix(path, name) as matrix:
                other = copies if name == "one piece" else slices
                source = array if name == "one piece" else file[name]
                ways = {"fastdp": partial(slices, matrix), "other": partial(other, source)}
                ratios[name] = compared(ways, rounds)["other"]
    return ratios


def compared(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median over rounds of each way's time by the first one's; the order changes from round to round."""
    for way in ways.values():
        way()
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _, name in turns(tuple(ways), rounds):
        began = time.perf_counter()
        ways[name]()
        taken[name].append(time.perf_counter() - began)
    first = taken[next(iter(ways))]
    return {name: ratio(values, first) for name, values in taken.items()}


class Rows(torch.utils.data.Dataset):
    """The images as most scripts read them: each worker opens the file, an item is a row or a batch."""

    def __init__(self, path: str, name: str, height: int) -> None:
        self.path, self.name, self.height = path, name, height
        self.data: Any = None

    def __len__(self) -> int:
        return ROWS // self.height

    def __getitem__(self, item: int) -> np.ndarray:
        if self.data is None:
            self.data = h5py.File(self.path)[self.name]
        return self.data[item] if self.height == 1 else self.data[item * self.height : (item + 1) * self.height]


def loaders(path: str, rounds: int) -> dict[str, float]:
    """`matrix.batches` and DataLoaders, on images stored by gzip. Workers stay between rounds."""
    keep: dict[str, Any] = {"num_workers": 2, "persistent_workers": True, "multiprocessing_context": "spawn"}
    by_slices = torch.utils.data.DataLoader(Rows(path, "gzip", BATCH // 2), batch_size=None, **keep)
    by_rows = torch.utils.data.DataLoader(Rows(path, "gzip", 1), batch_size=BATCH // 2, **keep)

    def drained(loader: Any) -> None:
        assert sum(len(batch) for batch in loader) == ROWS

    with HDF5Matrix(path, "gzip") as matrix:
        ways = {
            "fastdp": lambda: drained(matrix.batches(BATCH // 2)),
            "DataLoader, slices": lambda: drained(by_slices),
            "DataLoader, rows": lambda: drained(by_rows),
        }
        found = compared(ways, rounds)
    return {name: ratio for name, ratio in found.items() if name != "fastdp"}


def models() -> Iterator[tuple[str, keras.Model]]:
    """One whose computing takes longer than reading, and one of which it does not."""
    shape = (SMALL_SIDE, SMALL_SIDE, 3)
    layers = keras.layers
    heavy = [layers.Rescaling(1 / 255), layers.Conv2D(32, 3, strides=2), layers.ReLU(), layers.Conv2D(64, 3, strides=2)]
    yield (
        "convolutions",
        keras.Sequential([keras.Input(shape), *heavy, layers.GlobalAveragePooling2D(), layers.Dense(8)]),
    )
    yield "mean of pixels", keras.Sequential([keras.Input(shape), layers.GlobalAveragePooling2D(), layers.Dense(8)])


def read_all(batches: ArrayBatches) -> None:
    """Read an epoch."""
    for number in range(len(batches)):
        batches[number]


def fits(folder: str, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of an epoch of `fit` by those of reading alone and of computing alone."""
    x, path = images(SMALL_ROWS, SMALL_SIDE), str(Path(folder, "small.h5"))
    y = np.arange(SMALL_ROWS) % 8
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=x, chunks=(32, *x.shape[1:]), compression="gzip")
        file["y"] = y
    found = {}
    for name, model in models():
        parallel = fastdp.wrap(model, gpus=2)
        parallel.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        files = HDF5Matrix(path, "x"), HDF5Matrix(path, "y")
        batches = ArrayBatches(*files, batch_size=SMALL_BATCH, shuffle=False)
        options = {"batch_size": SMALL_BATCH, "shuffle": False, "verbose": 0}
        ways = {
            "fit": partial(parallel.fit, *files, **options),
            "load": partial(read_all, batches),
            "compute": partial(parallel.fit, x, y, **options),
        }
        for _ in range(2):
            ways["fit"](), ways["compute"]()
        shares = compared(ways, rounds)
        longer = max(shares["load"], shares["compute"])
        found[name] = {"load": shares["load"], "compute": shares["compute"], "fit by the longer": 1 / longer}
    return found


_MEMORY = """
import sys
from fastdp.data.hdf5 import HDF5Matrix

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) << 10

matrix = HDF5Matrix(sys.argv[1], "x")
reader = matrix.stored().reader()
reader.cache._limit = int(sys.argv[3])
matrix[:2]
before, rows = peak(), 0
for batch in matrix.batches(int(sys.argv[2]), shuffle=False):
    rows += len(batch)
print(peak() - before, rows)
"""


def memory(folder: str) -> dict[str, float]:
    """Growth of a process, by what may wait, for a file of 20 times that."""
    path, side, batch = str(Path(folder, "memory.h5")), 64, 256
    row = side * side * 3
    cache = 4 * CHUNK * row
    # Two batches ahead, the one being taken, and the one that the loop holds.
    waiting = 4 * batch * row + cache
    rows = 20 * waiting // row
    with h5py.File(path, "w") as file:
        data = file.create_dataset(
            "x", (rows, side, side, 3), np.uint8, chunks=(CHUNK, side, side, 3), compression="lzf"
        )
        block = images(1024, side)
        for start in range(0, rows, 1024):
            data[start : start + 1024] = block[: min(1024, rows - start)]
    command = [sys.executable, "-c", _MEMORY, path, str(batch), str(cache)]
    grown, read = map(
        int, subprocess.run(command, capture_output=True, text=True, check=True, timeout=90).stdout.split()
    )
    assert read == rows
    return {"file by what may wait": rows * row / waiting, "growth by what may wait": grown / waiting}


def main() -> None:
    """Measure and print."""
    chosen = options(__doc__)
    rounds = 2 if chosen.quick else 5
    fastdp.set_virtual_devices(2)
    array = images(ROWS, SIDE)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/var/tmp")) as folder:
        path = str(Path(folder, "images.h5"))
        write(path, array)
        results = {
            "times faster, by layout": layouts(path, array, rounds),
            "times faster than loaders": loaders(path, 3 if rounds > 3 else 1),
            "fit": fits(folder, rounds),
            "memory": memory(folder),
        }
    faster = [[name, f"{ratio:.2f}"] for name, ratio in results["times faster, by layout"].items()]
    print_table("HDF5Matrix slices, times as fast as h5py (one piece: as a NumPy copy)", ["layout", "ratio"], faster)
    others = [[name, f"{ratio:.2f}"] for name, ratio in results["times faster than loaders"].items()]
    print_table("matrix.batches, times as fast", ["as", "ratio"], others)
    costs = [[name, *(f"{part:.2f}" for part in parts.values())] for name, parts in results["fit"].items()]
    print_table("fit from a gzip file (its time is 1)", ["model", "load", "compute", "fit by the longer"], costs)
    print_table("Memory", ["", "ratio"], [[name, f"{value:.2f}"] for name, value in results["memory"].items()])
    finish("hdf5", results, libraries=("h5py", "hdf5plugin", "isal", "torch", "keras"), save=chosen.save)


if __name__ == "__main__":
    main()
