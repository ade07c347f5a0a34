"""Arguments of `fit`, `evaluate` and `predict` that Keras would read whole or understand differently.

Keras converts an `HDF5Matrix` to one NumPy array before the first batch; here it is read batch by batch, and so are an
`h5py.Dataset` and other arrays of chunks. `shuffle="batch"` works as in Keras 2, for any arrays: it shuffles the order
of whole batches, and the rows inside a batch stay in order. `shuffle="chunks"` mixes rows and reads each chunk once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import h5py
import keras
import numpy as np

from fastdp.data.h5_rows import StoredRows
from fastdp.data.read_ahead import AHEAD
from fastdp.keras.fit.array_batches import ArrayBatches
from fastdp.keras.fit.sources import continued
from fastdp.keras.fit.threaded import without_forks

BATCH_SIZE = 32


class RowRange:
    """Rows `[start, stop)` of an array, read on access."""

    def __init__(self, array: Any, start: int, stop: int) -> None:
        self._array, self._start = array, start
        self.shape = (stop - start, *array.shape[1:])
        self.dtype = array.dtype
        self.new_rows: bool = getattr(array, "new_rows", type(array) is np.ndarray)
        if hasattr(array, "stored_part"):
            self.stored_part = self._stored_part

    def __getitem__(self, rows: Any) -> Any:
        """A slice of rows, or rows by number."""
        if isinstance(rows, slice):
            start, stop, step = rows.indices(self.shape[0])
            return self._array[slice(self._start + start, self._start + stop, step)]
        return self._array[np.asarray(rows) + self._start]

    def _stored_part(self) -> tuple[StoredRows, int]:
        """The data set in a file, and its row that is row 0 here."""
        rows, first = self._array.stored_part()
        return rows, first + self._start


def stream_fit(arguments: dict[str, Any], ahead: int | None = None) -> dict[str, Any]:
    """The arguments of `fit`, with matrices on disk as data sets that read so many batches ahead; two by default."""
    arguments = without_forks({**arguments, **_continued(arguments)})
    validation = arguments.get("validation_data")
    if isinstance(validation, (list, tuple)) and _on_disk(list(validation)):
        size = arguments.get("validation_batch_size") or arguments.get("batch_size")
        arguments["validation_data"] = _batches(*validation, batch_size=size, shuffle=False, ahead=ahead)
        arguments.pop("validation_batch_size", None)
    data = [_opened(arguments.get(name), name) for name in ("x", "y", "sample_weight")]
    shuffle = arguments.get("shuffle", True)
    if not _on_disk(data) and not (isinstance(shuffle, str) and shuffle in ("batch", "chunks") and _arrays(data[0])):
        return arguments
    size = arguments.pop("batch_size", None)
    # Keras uses `batch_size` as the default of `validation_batch_size`, but no longer gets `batch_size`.
    arguments["validation_batch_size"] = arguments.get("validation_batch_size") or size
    split = arguments.pop("validation_split", 0.0)
    if split and validation is None:
        data, held_out = _split(data, split)
        arguments["validation_data"] = _batches(
            *held_out, batch_size=arguments.pop("validation_batch_size", None) or size, shuffle=False, ahead=ahead
        )
    for name in ("x", "y", "sample_weight"):
        arguments.pop(name, None)
    return {**arguments, "x": _batches(*data, batch_size=size, shuffle=shuffle, ahead=ahead), "shuffle": False}


def stream_forward(arguments: dict[str, Any], ahead: int | None = None) -> dict[str, Any]:
    """The arguments of `evaluate` or `predict`, with matrices on disk replaced by data sets."""
    arguments = without_forks({**arguments, **_continued(arguments)})
    data = [_opened(arguments.get(name), name) for name in ("x", "y", "sample_weight")]
    if not _on_disk(data):
        return arguments
    rest = {k: v for k, v in arguments.items() if k not in ("x", "y", "sample_weight", "batch_size")}
    return {**rest, "x": _batches(*data, batch_size=arguments.get("batch_size"), shuffle=False, ahead=ahead)}


def _batches(
    x: Any, y: Any = None, sample_weight: Any = None, *, batch_size: int | None, shuffle: Any, ahead: int | None
) -> ArrayBatches:
    """A data set of batches."""
    ahead = AHEAD if ahead is None else ahead
    return ArrayBatches(x, y, sample_weight, batch_size=batch_size or BATCH_SIZE, shuffle=shuffle, ahead=ahead)


def _continued(arguments: dict[str, Any]) -> dict[str, Any]:
    """The generators among the data, as ones that begin with batches which an earlier loop has left."""
    return {name: continued(arguments[name]) for name in ("x", "validation_data") if name in arguments}


def _split(data: list[Any], fraction: float) -> tuple[list[Any], list[Any]]:
    """Split off the last `fraction` of the rows, before any shuffling, as Keras does.

    Raises:
        ValueError: one of the parts would be empty.
    """
    rows = int(keras.tree.flatten(data[0])[0].shape[0])
    border = int(rows * (1.0 - fraction))
    if not 0 < border < rows:
        raise ValueError(
            f"`validation_split` must leave rows for training and for validation. Received: "
            f"validation_split={fraction} of {rows} rows"
        )

    def cut(part: Any, start: int, stop: int) -> Any:
        return None if part is None else keras.tree.map_structure(lambda a: RowRange(a, start, stop), part)

    return [cut(part, 0, border) for part in data], [cut(part, border, rows) for part in data]


def _opened(part: Any, name: str) -> Any:
    """`part` with rows that can be split in place of each `h5py.Dataset`."""
    if part is None:
        return None
    return keras.tree.map_structure(
        lambda leaf: StoredRows(leaf, name) if isinstance(leaf, h5py.Dataset) else leaf, part
    )


def _on_disk(data: list[Any]) -> bool:
    """Whether any of the arrays lies in a file: an HDF5Matrix, an h5py.Dataset, or one of chunks, such as zarr's."""
    leaves = [leaf for part in data if part is not None for leaf in keras.tree.flatten(part)]
    return any(hasattr(leaf, "stored_part") or (hasattr(leaf, "chunks") and hasattr(leaf, "shape")) for leaf in leaves)


def _arrays(x: Any) -> bool:
    """Whether `x` consists of arrays, and is not a data set or a generator."""
    leaves = keras.tree.flatten(x)
    return bool(leaves) and all(hasattr(leaf, "shape") and hasattr(leaf, "__getitem__") for leaf in leaves)


def arguments_by_name(method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name, bound to the signature of `method`.

    Raises:
        TypeError: `method` does not accept these arguments.
    """
    try:
        bound = inspect.signature(method).bind(None, *args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{method.__name__}() {error}") from None
    named = dict(bound.arguments)
    named.pop("self")
    return {**{k: v for k, v in named.items() if k != "kwargs"}, **named.get("kwargs", {})}
