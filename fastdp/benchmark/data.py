"""The batches that a way trains on: drawn, made by the user's own function, or read from an HDF5 file."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from fastdp.benchmark.arrays import Array, draw
from fastdp.benchmark.request import SYNTHETIC, Request
from fastdp.benchmark.target import Target
from fastdp.benchmark.user_file import batch_of
from fastdp.data.hdf5 import HDF5Matrix

POOL = 4  # different batches, which are trained on in turn
POOL_NBYTES = 256 << 20  # fewer of them where they are larger than this together
# Names under which files keep inputs and labels, where the model's own names are not in it.
INPUT_NAMES = ("x", "x_train", "inputs", "images", "data", "features")
TARGET_NAMES = ("y", "y_train", "targets", "labels", "label")

Batch = tuple[Any, Any]  # inputs and targets, as the model takes them: an array, a tuple or a dict of arrays


class Batches:
    """Global batches by number, without end: `batches(0)`, `batches(1)`, ...

    Args:
        make: the batch of a number.
        rows: rows of a batch.
        close: releases what `make` reads from.
    """

    def __init__(self, make: Callable[[int], Batch], rows: int, close: Callable[[], None] = lambda: None) -> None:
        self._make, self.rows, self.close = make, rows, close

    def __call__(self, number: int) -> Batch:
        return self._make(number)


def batches_of(target: Target, request: Request, rows: int | None = None, part: slice | None = None) -> Batches:
    """The batches of a request; with `rows`, of so many rows. Of a batch only the rows of `part` are kept, and read.

    Raises:
        ValueError: the file has not what the model takes; the message says what it has.
        FileNotFoundError, OSError: there is no such file, or it is not HDF5.
    """
    rows = rows or request.batch
    if request.data != SYNTHETIC:
        return _from_file(target, request.data, rows, part or slice(0, rows))
    if target.make_batch is not None:
        return _pooled([batch_of(target.make_batch, rows) for _ in range(2)], rows, part)
    nbytes = sum(array.nbytes(rows) for array in (*target.inputs, *target.targets))
    count = max(1, min(POOL, POOL_NBYTES // max(1, nbytes)))
    return _pooled([_drawn(target, rows, request.seed + number) for number in range(count)], rows, part)


def _pooled(pool: Sequence[Batch], rows: int, part: slice | None) -> Batches:
    """Batches that come again and again."""
    if part is not None:
        pool = [_cut(batch, part) for batch in pool]
    return Batches(lambda number: pool[number % len(pool)], rows)


def _cut(value: Any, part: slice) -> Any:
    """Some rows of each array in a nest of tuples, lists and dicts; zero-dim ones and plain values as they are."""
    if isinstance(value, dict):
        return {name: _cut(one, part) for name, one in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_cut(one, part) for one in value)
    return value[part] if getattr(value, "ndim", 0) else value


def _drawn(target: Target, rows: int, seed: int) -> Batch:
    """A batch of random rows."""
    arrays = draw((*target.inputs, *target.targets), rows, seed)
    cut = len(target.inputs)
    return target.pack_inputs(arrays[:cut]), target.pack_targets(arrays[cut:])


def _from_file(target: Target, data: str, rows: int, part: slice) -> Batches:
    """Rows of an HDF5 file in order, from the start again at its end; of each batch those of `part`.

    Numbers get the model's dtypes.
    """
    path, names = split(data)
    wanted = (*target.inputs, *target.targets)
    if not wanted:
        raise ValueError("`data`: the inputs of this model come from its make_batch, which can read the file itself.")
    usual: list[tuple[str, ...]] = [INPUT_NAMES if len(target.inputs) == 1 else ()] * len(target.inputs)
    usual += [TARGET_NAMES if len(target.targets) == 1 else ()] * len(target.targets)
    if names and len(names) != len(wanted):
        raise ValueError(f"`data` must name {len(wanted)} data sets, for {_named(wanted)}. Received: {data!r}")
    found = [
        _matrix(path, [names[place]] if names else [array.name, *usual[place]], array, data)
        for place, array in enumerate(wanted)
    ]
    total = min(len(matrix) for matrix in found)
    if total < rows:
        raise ValueError(f"`data`: {path} has {total} rows, and a batch has {rows}. Use a smaller --batch.")
    count, cut = total // rows, len(target.inputs)

    def make(number: int) -> Batch:
        start = number % count * rows
        read = [matrix[start + part.start : start + part.stop] for matrix in found]
        values = [rows.astype(array.dtype, copy=False) for rows, array in zip(read, wanted, strict=True)]
        return target.pack_inputs(values[:cut]), target.pack_targets(values[cut:])

    def close() -> None:
        for matrix in found:
            matrix.close()

    return Batches(make, rows, close)


def split(data: str) -> tuple[str, list[str]]:
    """The path and the names of data sets that "FILE.h5:x,y" has."""
    found = re.fullmatch(r"(.+\.(?:h5|hdf5|hdf))(?::(.+))?", data, re.IGNORECASE)
    if found is None:
        return data, []
    return found[1], found[2].split(",") if found[2] else []


def _matrix(path: str, names: Sequence[str], array: Array, data: str) -> HDF5Matrix:
    """The first of these data sets that the file has, if its rows have the array's shape."""
    problem: KeyError | None = None
    for name in dict.fromkeys(names):
        try:
            matrix = HDF5Matrix(path, name)
        except KeyError as error:
            problem = problem or error
            continue
        if matrix.shape[1:] != array.shape:
            raise ValueError(
                f"`data`: rows of {name!r} in {path} have the shape {matrix.shape[1:]}, and the model takes "
                f"{array.shape} for {array.name!r}."
            )
        return matrix
    assert problem is not None
    raise ValueError(
        f"`data`: {path} has no data set for {array.name!r} (tried {', '.join(names)}). {problem.args[0]}. Name them: "
        f"--data {path}:inputs,labels"
    )


def _named(arrays: Sequence[Array]) -> str:
    return ", ".join(array.name for array in arrays)
