"""Measures how fast an HDF5 data set is read as it is, where the time goes, and what other chunks would give."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from fastdp.data.h5_checks import damage_named
from fastdp.data.h5_open import open_dataset, open_file
from fastdp.data.h5_reader import Meter, Reader
from fastdp.data.h5_rows import StoredRows
from fastdp.data.hdf5 import HDF5Matrix
from fastdp.data.row_order import chunk_order
from fastdp.runtime.host.job_threads import JobThreads, thread_count

SAMPLE_NBYTES = 64 << 20  # of rows that are written anew to try other chunks
CHUNK_NBYTES = 1 << 20  # of the chunks that are tried

Rows = range | NDArray[np.int64]


@dataclass(frozen=True)
class Speed:
    """How fast rows were read in one way: `rows_per_second`, and the `gb_per_second` of them in memory."""

    how: str
    rows_per_second: float
    gb_per_second: float


@dataclass(frozen=True)
class Trial:
    """The same rows in another layout: its name, bytes stored per byte in memory, and how fast they are read."""

    layout: str
    size: float
    in_order: Speed
    by_chunks: Speed


@dataclass(frozen=True)
class FileSpeed:
    """What was measured of a data set.

    Attributes:
        dataset, rows, row_nbytes, dtype, stored_nbytes: what it is.
        how: how fastdp reads it.
        threads: how many read.
        index_seconds: time to read the index of its chunks, once.
        shares: seconds of one thread that reads a part of the file, by `read`, `decode` and `copy`; empty where h5py
            reads.
        speeds: how fast it is read in several ways.
        trials: how fast a sample of its rows would be read in other layouts.
    """

    dataset: str
    rows: int
    row_nbytes: int
    dtype: str
    stored_nbytes: int
    how: str
    threads: int
    index_seconds: float
    shares: dict[str, float]
    speeds: list[Speed]
    trials: list[Trial]


def names_of_arrays(path: str) -> list[str]:
    """The data sets of numbers in a file that have rows, the largest first.

    Raises:
        FileNotFoundError, OSError, ValueError: the file is not there, is not HDF5, or is damaged.
    """
    found: list[tuple[int, str]] = []

    def note(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.shape and item.dtype.kind in "biufc":
            found.append((-item.size * item.dtype.itemsize, name))

    with damage_named(path, "FILE"):
        file = open_file(path)
        file.visititems(note)
        return [name for _, name in sorted(found)]


def measure(path: str, name: str, *, batch_size: int, seconds: float, trials: bool = True) -> FileSpeed:
    """Measure one data set.

    Args:
        path: the file.
        name: the data set.
        batch_size: rows that are read at once.
        seconds: time for each way of reading, about.
        trials: also write a sample of up to 64 MiB into temporary files of other layouts, and read those; not of less
            than 1 MiB.

    Raises:
        FileNotFoundError, OSError, KeyError, ValueError: as `HDF5Matrix`; also a data set without rows.
    """
    with HDF5Matrix(path, name) as matrix:
        if not len(matrix):
            raise ValueError(f"{name!r} of {path!r} has no rows: nothing can be measured")
        stored = matrix.stored()
        data = open_dataset(open_file(path), name, False)
        first = _timed("in order, at first", matrix, _in_order(len(matrix), batch_size), seconds, again=False)
        generator = np.random.default_rng(0)
        rows = stored.chunk_rows if stored.chunk_rows > 1 else batch_size
        mixed = chunk_order(len(matrix), rows, generator, stored.keep_window(batch_size))
        uniform = generator.permutation(len(matrix))
        speeds = [
            first,
            _timed("in order, again", matrix, _in_order(len(matrix), batch_size), seconds),
            _timed("in order, by h5py", data, _in_order(len(matrix), batch_size), seconds),
            _timed('shuffle="chunks"', matrix, _parts(mixed, batch_size), seconds),
            _timed("shuffle=True", matrix, _parts(uniform, batch_size), seconds),
        ]
        reader = stored.reader()
        return FileSpeed(
            name,
            len(matrix),
            stored.row_nbytes,
            str(matrix.dtype),
            data.id.get_storage_size(),
            stored.describe(),
            thread_count(),
            reader.index_seconds if reader is not None else 0.0,
            _shares(data, batch_size, seconds) if reader is not None else {},
            speeds,
            _trials(matrix, batch_size, seconds) if trials and len(matrix) * stored.row_nbytes >= CHUNK_NBYTES else [],
        )


def _in_order(rows: int, batch_size: int) -> list[range]:
    return [range(start, min(start + batch_size, rows)) for start in range(0, rows, batch_size)]


def _parts(order: NDArray[np.int64], batch_size: int) -> list[NDArray[np.int64]]:
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _timed(how: str, source: Any, batches: list[Any], seconds: float, *, again: bool = True) -> Speed:
    """Read batches for about so many seconds; those of an epoch again if there is time."""
    read: Callable[[Any], Any] = source.__getitem__
    if isinstance(source, h5py.Dataset):
        read = lambda rows: source[rows.start : rows.stop]  # noqa: E731
    else:
        read = lambda rows: source[slice(rows.start, rows.stop) if isinstance(rows, range) else rows]  # noqa: E731
    count = nbytes = 0
    began = time.perf_counter()
    for batch in _repeated(batches) if again else batches:
        block = read(batch)
        count, nbytes = count + len(block), nbytes + block.nbytes
        if time.perf_counter() - began >= seconds:
            break
    taken = time.perf_counter() - began
    return Speed(how, count / taken, nbytes / taken / 1e9)


def _repeated(batches: list[Any]) -> Iterator[Any]:
    while True:
        yield from batches


def _shares(data: h5py.Dataset, batch_size: int, seconds: float) -> dict[str, float]:
    """Where the time of one thread goes."""
    reader = Reader(data, JobThreads(1))
    reader.meter = Meter()
    began = time.perf_counter()
    for rows in _in_order(reader.layout.shape[0], batch_size):
        reader.read(rows)
        if time.perf_counter() - began >= seconds:
            break
    return reader.meter.seconds


def _layouts(rows: int, row: tuple[int, ...], itemsize: int) -> Iterable[tuple[str, dict[str, Any]]]:
    """Names and options of the layouts that are tried."""
    height = chunk_rows(row, itemsize, CHUNK_NBYTES, rows)
    chunks = {"chunks": (height, *row)}
    shuffle = {"shuffle": itemsize > 1}
    yield "one piece", {}
    yield f"lzf, {height} rows", {**chunks, **shuffle, "compression": "lzf"}
    yield f"gzip, {height} rows", {**chunks, **shuffle, "compression": "gzip", "compression_opts": 1}
    if importlib.util.find_spec("hdf5plugin") is not None:
        plugin = importlib.import_module("hdf5plugin")
        yield f"blosc2, {height} rows", {**chunks, **plugin.Blosc2(cname="lz4", clevel=5)}
        yield f"zstd, {height} rows", {**chunks, **shuffle, **plugin.Zstd(clevel=1)}


def chunk_rows(row: tuple[int, ...], itemsize: int, nbytes: int, most: int) -> int:
    """The rows of a chunk of about so many bytes; at least 1."""
    return max(1, min(most, nbytes // max(1, itemsize * int(np.prod(row, dtype=object)))))


def _trials(matrix: HDF5Matrix, batch_size: int, seconds: float) -> list[Trial]:
    """Write a sample of the rows in other layouts, and read it."""
    rows = max(1, min(len(matrix), SAMPLE_NBYTES // (matrix.stored().row_nbytes or 1)))
    sample, found = matrix[:rows], []
    with tempfile.TemporaryDirectory(prefix="fastdp-") as folder:
        for number, (layout, options) in enumerate(_layouts(rows, matrix.shape[1:], matrix.dtype.itemsize)):
            path = str(Path(folder, f"{number}.h5"))
            with h5py.File(path, "w") as file:
                file.create_dataset("x", data=sample, **options)
                size = file["x"].id.get_storage_size() / sample.nbytes
            with HDF5Matrix(path, "x") as written:
                stored: StoredRows = written.stored()
                window = stored.keep_window(batch_size)
                height = stored.chunk_rows if stored.chunk_rows > 1 else batch_size
                order = chunk_order(rows, height, np.random.default_rng(0), window)
                written[:batch_size]
                in_order = _timed("in order", written, _in_order(rows, batch_size), seconds)
                stored.forget_chunks()
                by_chunks = _timed('shuffle="chunks"', written, _parts(order, batch_size), seconds, again=False)
            found.append(Trial(layout, size, in_order, by_chunks))
    return found
