"""`StoredRows`: rows of an `h5py.Dataset`, read by threads where that is possible, and else by h5py."""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
import weakref
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from fastdp.data.h5_checks import check_stored, damage_named, declared_nbytes
from fastdp.data.h5_layout import why_not
from fastdp.data.h5_reader import Reader
from fastdp.data.row_order import WINDOW_CHUNKS, mixing_window
from fastdp.data.selection import block_of, parse_rows, read_rows, split_key

# One reader per data set, by device, inode and address: it knows the index of the chunks, and keeps decoded ones.
_readers: weakref.WeakValueDictionary[tuple[int, int, int], Reader] = weakref.WeakValueDictionary()
_readers_lock = threading.Lock()


class StoredRows:
    """Rows of a data set in a file, as new arrays that belong to the caller.

    Args:
        data: the data set; its file stays open as long as rows are read.
        argument: what errors call the file.

    Attributes:
        why_h5py: why h5py reads the rows; empty if threads read them from the file without h5py's lock.

    Any thread may read. The index of the chunks is read at the first read of more than one row.

    Raises:
        OSError, ValueError: reads of a file that is damaged, cut, changed or closed; the message names it.
    """

    def __init__(self, data: h5py.Dataset, argument: str = "x") -> None:
        self._data, self._argument = data, argument
        file = data.file
        # A file that is no file of the system, such as a BytesIO, has no name that could be looked up.
        self.path = os.fsdecode(file.filename) if file.driver == "sec2" else str(file.filename)
        self.shape: tuple[int, ...] = data.shape
        self.dtype: np.dtype[Any] = data.dtype
        self.ndim = len(self.shape)
        self.name = str(data.name)
        self._elsewhere = bool(data.external) or data.is_virtual or not os.path.isfile(self.path)
        load_filters(data)
        with damage_named(self.path, argument):
            self.why_h5py = why_not(data)
        self._reader: Reader | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """The number of rows."""
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        """Rows by NumPy's rules; what follows the rows in the index is taken of the rows that were read."""
        first, rest = split_key(key, self.ndim)
        rows, index = block_of(parse_rows(first, len(self)), rest)
        block = self.read(rows)
        return block[index] if index else block

    @property
    def new_rows(self) -> bool:
        """Whether rows come as new arrays, which nobody else has: yes."""
        return True

    @property
    def chunk_rows(self) -> int:
        """The rows of a chunk; 1 if the data lies in one piece."""
        return self._data.chunks[0] if self._data.chunks else 1

    @property
    def row_nbytes(self) -> int:
        """Bytes of a row in memory."""
        return declared_nbytes(self.shape[1:], self.dtype)

    def read(self, rows: range | NDArray[np.int64], first_row: int = 0) -> NDArray[Any]:
        """Rows in the order asked for, counted from `first_row` of the data set.

        Raises:
            ValueError: more is declared than the file stores, or the file is damaged or closed.
            OSError: the file is cut, or was changed.
        """
        with damage_named(self.path, self._argument):
            data, wanted = self._open(), self.row_nbytes * len(rows)
            reader = self.reader() if len(rows) > 1 or self._reader else None
            if not self._elsewhere and len(rows):
                chunk = declared_nbytes(data.chunks or (), data.dtype)
                stored = None if reader is None else reader.stored_nbytes
                check_stored(data, max(wanted, chunk), self.path, self._argument, stored)
            if reader is None:
                return read_rows(data, rows, first_row)
            return reader.read(_shifted(rows, first_row))

    def reader(self) -> Reader | None:
        """What reads without h5py; None if h5py reads.

        Raises:
            OSError, ValueError: the index of the chunks cannot be read; the message names the file.
        """
        if self.why_h5py:
            return None
        with self._lock, damage_named(self.path, self._argument):
            if self._reader is None:
                self._reader = _shared_reader(self._open())
            return self._reader

    def keep_window(self, batch_size: int) -> int:
        """Keep as many decoded chunks as rows in `chunk_order` need.

        Returns:
            The window of that order, in chunks.
        """
        if self.chunk_rows == 1:
            return WINDOW_CHUNKS
        window = mixing_window(self.chunk_rows * self.row_nbytes)
        reader = self.reader()
        if reader is not None:
            count = window + 2 + -(-batch_size // self.chunk_rows)
            reader.cache.keep_at_least(count * len(reader.columns) * reader.layout.pipeline.nbytes)
        return window

    def forget_chunks(self) -> None:
        """Drop all decoded chunks that are kept."""
        if self._reader is not None:
            self._reader.cache.clear()

    def stored_part(self) -> tuple[StoredRows, int]:
        """The data set, and the row of it that is row 0 here: itself, and 0."""
        return self, 0

    def reads_again(self, batch_size: int) -> float:
        """How often a chunk is decoded in an epoch of rows in a uniform order, about; 1 if that is once."""
        reader = self.reader()
        if reader is None or not reader.layout.pipeline.filters or self.chunk_rows == 1:
            return 1.0
        whole = self.row_nbytes * len(self)
        if whole <= reader.cache.limit:
            return 1.0
        chunks = -(-len(self) // self.chunk_rows)
        # The chunks that a batch of rows meets, for all batches.
        met = chunks * (1 - (1 - 1 / chunks) ** batch_size)
        return max(1.0, met * len(self) / batch_size / chunks)

    def describe(self) -> str:
        """How the rows are read, in a few words."""
        if self.why_h5py:
            return f"by h5py: {self.why_h5py}"
        reader = self._reader
        if reader is None:
            return "by threads; not yet read"
        left = [f"{count} chunks by h5py: {why}" for why, count in reader.left_to_h5py.items()]
        return "; ".join([f"by threads: {reader.layout}", *left])

    def _open(self) -> h5py.Dataset:
        if not self._data:
            raise ValueError(f"{self._argument} {self.path!r} was closed: keep the file open while its rows are read")
        return self._data


def _shifted(rows: range | NDArray[np.int64], first: int) -> range | NDArray[np.int64]:
    return range(rows.start + first, rows.stop + first, rows.step) if isinstance(rows, range) else rows + first


def _shared_reader(data: h5py.Dataset) -> Reader:
    """The reader of a data set, which all that read it share."""
    status = os.fstat(data.file.id.get_vfd_handle())
    key = (status.st_dev, status.st_ino, int(h5py.h5o.get_info(data.id).addr))
    with _readers_lock:
        reader = _readers.get(key)
        if reader is None or not reader.usable:
            reader = _readers[key] = Reader(data)
        return reader


def load_filters(data: h5py.Dataset) -> None:
    """Have hdf5plugin register its filters if the data set needs one that HDF5 lacks.

    Raises:
        ValueError: a filter is missing, and hdf5plugin is not installed.
    """
    plist = data.id.get_create_plist()
    for code in [plist.get_filter(number)[0] for number in range(plist.get_nfilters())]:
        if h5py.h5z.filter_avail(code):
            continue
        if importlib.util.find_spec("hdf5plugin") is None:
            raise ValueError(
                f"{data.file.filename!r} stores {data.name!r} by the HDF5 filter {code}, which is not installed: "
                "pip install 'fastdp[hdf5]', or write the data set with gzip or lzf"
            )
        importlib.import_module("hdf5plugin")
