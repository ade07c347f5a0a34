"""`HDF5Matrix`: rows of an HDF5 data set, read when they are asked for."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterator
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from fastdp.data.h5_checks import check_texts, damage_named
from fastdp.data.h5_open import open_dataset, open_file
from fastdp.data.h5_rows import StoredRows
from fastdp.data.read_ahead import AHEAD, ReadAhead
from fastdp.data.row_order import chunk_order
from fastdp.data.selection import block_of, parse_rows, split_key

Normalizer = Callable[[Any], Any]


class HDF5Matrix:
    """Rows `[start, end)` of an HDF5 data set, used like a NumPy array and read from disk block by block.

    Args:
        datapath: path of the HDF5 file, which is only ever opened for reading.
        dataset: name of a data set in the file, with at least one axis: `"x"`, `"train/images"`.
        start: first row, an int from 0.
        end: row after the last one; None means all rows.
        normalizer: called on each fetched block, rows first (for `matrix[3]` on that one row); returns the
            block to use instead. The constructor calls it once on one row to learn shape and dtype.
        follow_external: also read data outside `datapath`: external links, external storage and virtual data
            sets. Off by default, because a file from elsewhere could name any file of this machine.

    What is read at once may be 1 MiB large, or 1,100 times as large as what the file stores of the data set: more is
    only declared, or packed to fill the memory.

    Indexing follows NumPy: an int, a slice with any step, a list or array of ints (in any order, repeated or
    not), a boolean mask, an Ellipsis, or a tuple whose first element addresses rows. Rows count from
    `start`; a single row or an index list past the end is an error, a slice stops there. Each result is a
    new array that the caller owns.

    `shape` and `dtype` are those after the normalizer. Any thread may read. Threads read and decode the chunks of a
    file without h5py's lock where they know its filters; `stored().describe()` says so, or why h5py reads. Do not
    change the file while it is read: that is an error. `batches` reads ahead.
    Matrices on one file share one handle; `close()`, or leaving a `with` block, releases this matrix's
    reference. A copy or an unpickled matrix reopens the file by its absolute path.

    `np.asarray(matrix)` reads everything, and so do `fit`, `evaluate` and `predict` of plain Keras. Pass
    `fastdp.keras.fit.array_batches.ArrayBatches` to read batch by batch; parallel models do this by themselves.

    Raises:
        FileNotFoundError: there is no file `datapath`.
        OSError: the file is not HDF5, or cannot be read.
        KeyError: `dataset` is not a data set of the file; the message lists those that are.
        TypeError: `start` or `end` is not an int, or `normalizer` is not callable.
        ValueError: `start` or `end` lies outside the data set, the data set has no rows axis, its data lies outside the
            file, or the file is damaged or declares more than it stores. Reads raise it too, also after `close()`.

    Example:
        >>> x = HDF5Matrix("train.h5", "x", start=0, end=50_000, normalizer=lambda block: block / 255)
        >>> x[:32].shape
        (32, 28, 28)
    """

    def __init__(
        self,
        datapath: str | os.PathLike[str],
        dataset: str,
        start: int = 0,
        end: int | None = None,
        normalizer: Normalizer | None = None,
        *,
        follow_external: bool = False,
    ) -> None:
        if normalizer is not None and not callable(normalizer):
            raise TypeError(f"normalizer must be callable or None, got {normalizer!r}: pass a function of one block")
        if not isinstance(datapath, (str, os.PathLike)):
            raise TypeError(f"datapath must be a path, got {datapath!r}: pass the path of an HDF5 file")
        if not isinstance(dataset, str):
            raise TypeError(f"dataset must be a name in the file, got {dataset!r}: pass a text")
        self.datapath = os.path.abspath(os.fspath(datapath))
        self.dataset = dataset
        self.normalizer = normalizer
        self.follow_external = follow_external
        with damage_named(self.datapath, "datapath"):
            self._file: h5py.File | None = open_file(self.datapath)
            data = open_dataset(self._file, dataset, follow_external)
            if data.dtype.hasobject and not follow_external:
                check_texts(self.datapath, "datapath")
            self._rows: StoredRows | None = StoredRows(data, "datapath")
        self.start, self.end = _check_bounds(start, end, data.shape[0])
        first = self._read(range(self.start, min(self.start + 1, data.shape[0])))
        if normalizer is not None and len(first):
            first = np.asarray(normalizer(first))
        self.dtype: np.dtype[Any] = first.dtype
        self.shape: tuple[int, ...] = (self.end - self.start, *first.shape[1:])

    @property
    def ndim(self) -> int:
        """Number of axes, including the rows."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def new_rows(self) -> bool:
        """Whether slices of it are new arrays, which nobody else has: no code of the user's makes them."""
        return self.normalizer is None and type(self) is HDF5Matrix

    @property
    def closed(self) -> bool:
        """Whether `close()` was called."""
        return self._rows is None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        first, rest = split_key(key, self.ndim)
        rows = parse_rows(first, len(self))
        if isinstance(rows, int):
            row, within = self._row(rows), (0, *rest)
            return np.asarray(row)[np.newaxis][within] if rest else row
        wanted, index = block_of(rows, rest)
        block = self._block(wanted)
        return block[index] if index else block

    def __iter__(self) -> Iterator[Any]:
        for row in range(len(self)):
            yield self[row]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("copy must be None or True, got False: an HDF5Matrix is read from a file, drop copy=False")
        block = self._block(range(len(self)))
        return block if dtype is None else block.astype(dtype, copy=False)

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool | str = False,
        seed: int | None = None,
        drop_last: bool = False,
        ahead: int = AHEAD,
    ) -> Iterator[NDArray[Any]]:
        """The rows of one epoch in batches, which a thread reads ahead of the loop.

        Args:
            batch_size: rows of a batch; the last one may have fewer.
            shuffle: `"chunks"` mixes rows so that each chunk is read once: chunks are permuted, and rows mixed in a
                window (`fastdp.data.row_order`). True takes the rows in a uniform order, which reads a chunk again for
                almost each row of it. False keeps the order.
            seed: seed of that order; None gives another one each time.
            drop_last: omit a last batch that has fewer rows.
            ahead: how many batches are read ahead.

        Raises:
            ValueError: `batch_size` is below 1, `ahead` is negative, or `shuffle` has another value.
        """
        if batch_size < 1 or ahead < 0:
            raise ValueError(f"batch_size must be at least 1 and ahead at least 0, got {batch_size} and {ahead}")
        if shuffle not in (True, False, "chunks"):
            raise ValueError(f'shuffle must be True, False or "chunks", got {shuffle!r}: choose one of them')
        order = self._order(shuffle, np.random.default_rng(seed), batch_size) if shuffle else None
        count = len(self) // batch_size if drop_last else -(-len(self) // batch_size)

        def read(number: int) -> NDArray[Any]:
            rows = slice(number * batch_size, min((number + 1) * batch_size, len(self)))
            return self[rows] if order is None else self[order[rows]]

        reading = ReadAhead(read, ahead, f"{self.dataset!r} of {self.datapath!r}")
        try:
            for number in range(count):
                yield reading.take(number, count)
        finally:
            reading.close()

    def _order(self, shuffle: bool | str, generator: np.random.Generator, batch_size: int) -> NDArray[np.int64]:
        """A random order of the rows."""
        if shuffle is True:
            return generator.permutation(len(self))
        stored = self.stored()
        rows = stored.chunk_rows if stored.chunk_rows > 1 else batch_size
        window = stored.keep_window(batch_size)
        return chunk_order(len(self), rows, generator, window, self.start)

    def close(self) -> None:
        """Release the file, which closes once no other matrix uses it. Idempotent."""
        self._rows = self._file = None

    def __enter__(self) -> HDF5Matrix:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        names = ("datapath", "dataset", "start", "end", "normalizer", "follow_external")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        HDF5Matrix.__init__(self, **state)

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {self.dataset!r} of {self.datapath!r}, rows {self.start} to {self.end}, "
            f"shape {self.shape}, dtype {self.dtype}{', closed' if self.closed else ''}>"
        )

    def stored(self) -> StoredRows:
        """The rows of the whole data set as they are stored.

        Raises:
            ValueError: the matrix was closed.
        """
        rows = self._rows
        if rows is None:
            raise ValueError(
                f"expected an open HDF5Matrix, got one of {self.datapath!r} that was closed: "
                "read before close(), or make a new one"
            )
        return rows

    def stored_part(self) -> tuple[StoredRows, int]:
        """The data set, and the row of it that is row 0 here."""
        return self.stored(), self.start

    def _read(self, rows: range | NDArray[np.int64], first_row: int = 0) -> NDArray[Any]:
        """Rows as they are stored, counted from `first_row` of the data set."""
        return self.stored().read(rows, first_row)

    def _row(self, row: int) -> Any:
        """One normalized row, without the rows axis."""
        value = self._read(range(self.start + row, self.start + row + 1))[0]
        return value if self.normalizer is None else np.asarray(self.normalizer(value))[()]

    def _block(self, rows: range | NDArray[np.int64]) -> NDArray[Any]:
        """Several normalized rows."""
        block = self._read(rows, self.start)
        if self.normalizer is None:
            return block
        if len(block) == 0:  # a normalizer may fail on an empty block, as np.max does
            return np.empty((0, *self.shape[1:]), self.dtype)
        return np.asarray(self.normalizer(block))


def _check_bounds(start: Any, end: Any, count: int) -> tuple[int, int]:
    """`start` and `end` as ints with 0 <= start <= end <= count."""
    for name, value in (("start", start), ("end", end)):
        if isinstance(value, (bool, np.bool_)) or not (hasattr(value, "__index__") or (name, value) == ("end", None)):
            raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}: pass a row number")
    start, end = operator.index(start), count if end is None else operator.index(end)
    if not 0 <= start <= count:
        raise ValueError(f"start must be from 0 to {count}, the rows of the data set, got {start}: pass a row in it")
    if not start <= end <= count:
        raise ValueError(
            f"end must be from start={start} to {count}, the rows of the data set, got {end}: "
            "pass a row in that range, or None for all rows"
        )
    return start, end
