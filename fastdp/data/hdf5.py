"""`HDF5Matrix`: rows of an HDF5 data set, read when they are asked for."""

from __future__ import annotations

import errno
import operator
import os
import posixpath
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from fastdp.data.h5_checks import check_texts, damage_named
from fastdp.data.h5_rows import StoredRows
from fastdp.data.selection import parse_rows, split_key

Normalizer = Callable[[Any], Any]

# One read-only handle per file, by (device, inode). HDF5 closes it when the last matrix drops it.
_open_files: weakref.WeakValueDictionary[tuple[int, int], h5py.File] = weakref.WeakValueDictionary()
_open_files_lock = threading.Lock()

MOST_NAMES_SHOWN = 20
MOST_SOFT_LINKS = 64


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

    `shape` and `dtype` are those after the normalizer. Reading is thread-safe (HDF5 reads one at a time).
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
        self.datapath = os.path.abspath(os.fspath(datapath))
        self.dataset = dataset
        self.normalizer = normalizer
        self.follow_external = follow_external
        with damage_named(self.datapath, "datapath"):
            self._file: h5py.File | None = _open_file(self.datapath)
            data = _open_dataset(self._file, dataset, follow_external)
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
    def closed(self) -> bool:
        """Whether `close()` was called."""
        return self._rows is None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        first, rest = split_key(key, self.ndim)
        rows = parse_rows(first, len(self))
        index: tuple[Any, ...]
        if isinstance(rows, int):
            block, index = self._row(rows), (0, *rest)
            return np.asarray(block)[np.newaxis][index] if rest else block
        if isinstance(rows, range):
            block, index = self._block(rows), (slice(None), *rest)
            return block[index] if rest else block
        block, index = self._block(rows.reshape(-1)), (np.arange(rows.size).reshape(rows.shape), *rest)
        return block[index] if rest or rows.ndim > 1 else block

    def __iter__(self) -> Iterator[Any]:
        for row in range(len(self)):
            yield self[row]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("copy must be None or True, got False: an HDF5Matrix is read from a file, drop copy=False")
        block = self._block(range(len(self)))
        return block if dtype is None else block.astype(dtype, copy=False)

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


def _open_file(path: str) -> h5py.File:
    """The shared read-only handle of the file that is now at `path`."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        problem = "datapath must be an existing HDF5 file, check the path; found no file"
        raise FileNotFoundError(errno.ENOENT, problem, path) from None
    key = (status.st_dev, status.st_ino)
    with _open_files_lock:
        file = _open_files.get(key)
        if not file:  # none yet, or a handle that was closed elsewhere
            with open(path, "rb"):
                pass  # a folder or a file without permission raises its own OSError here
            if not h5py.is_hdf5(path):
                raise OSError(f"datapath must be an HDF5 file, got {path!r} of another format: convert it first")
            file = _open_files[key] = h5py.File(path, "r")
    return file


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


def _open_dataset(file: h5py.File, name: str, follow_external: bool) -> h5py.Dataset:
    """Open the data set `name`. It must have rows and, unless `follow_external`, lie in the file itself."""
    place = name if follow_external else _resolve(file, name)
    data = None if place is None else file.get(place)
    if not isinstance(data, h5py.Dataset):
        found: list[str] = []
        file.visititems(lambda path, item: found.append(path) if isinstance(item, h5py.Dataset) else None)
        shown = ", ".join(repr(path) for path in sorted(found)[:MOST_NAMES_SHOWN]) or "none"
        more = f" and {len(found) - MOST_NAMES_SHOWN} more" if len(found) > MOST_NAMES_SHOWN else ""
        what = "a group" if isinstance(data, h5py.Group) else "no data set"
        raise KeyError(f"dataset must name a data set of {file.filename!r}: {name!r} is {what}, it has {shown}{more}")
    if not follow_external and (data.external or data.is_virtual):
        raise _leaves_file(file, name, "external storage" if data.external else "a virtual data set")
    if not data.shape:
        raise ValueError(
            f"dataset must have at least one axis, its rows; {name!r} has shape {data.shape}: store an array"
        )
    return data


def _resolve(file: h5py.File, name: str) -> str | None:
    """Resolve `name` to a path of hard links, or None. Follows soft links, rejects external ones."""
    parts, here, soft_links = name.split("/"), "/", 0
    while parts:
        part = parts.pop(0)
        if part in ("", "."):
            continue
        group = file[here]
        link = group.get(part, getlink=True) if isinstance(group, h5py.Group) else None
        if link is None or soft_links > MOST_SOFT_LINKS:
            return None
        if isinstance(link, h5py.ExternalLink):
            raise _leaves_file(file, name, f"an external link to {link.filename!r}")
        if isinstance(link, h5py.SoftLink):
            soft_links += 1
            here = "/" if link.path.startswith("/") else here
            parts = link.path.split("/") + parts
        else:
            here = posixpath.join(here, part)
    return here


def _leaves_file(file: h5py.File, name: str, why: str) -> ValueError:
    return ValueError(
        f"dataset must lie in {file.filename!r} itself; {name!r} is {why}: "
        "pass follow_external=True if you trust where this file comes from"
    )
