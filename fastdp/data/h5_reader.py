"""Reads rows of an HDF5 data set from the file itself, in several threads and without h5py's lock.

h5py reads where the chunks lie, once. From then on threads `pread` stored chunks and decode them; data in one piece is
read straight into the result. Whatever h5py would refuse is left to h5py: a chunk that cannot be decoded here is read
again by it, and its verdict counts.
"""

from __future__ import annotations

import functools
import itertools
import os
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from fastdp.data.h5_cache import ChunkCache
from fastdp.data.h5_codecs import DamagedError, DecodeError
from fastdp.data.h5_layout import read_layout
from fastdp.runtime.host.job_threads import SHARED, Job, JobThreads

Rows = range | NDArray[np.int64]
Part = slice | NDArray[np.int64]

PIECE_NBYTES = 1 << 20  # what one job reads of data in one piece, at least
GROUP_NBYTES = 1 << 18  # decoded bytes of the small chunks that one job reads, at least
# A span of rows is read whole if it is small, or not much larger than the rows that are wanted of it.
SPAN_NBYTES, SPAN_SHARE = 1 << 18, 3
# Rows below this are copied by one call of NumPy, which makes a copy of them all; larger ones one by one.
LEAST_ROW_NBYTES = 4096
WORKING_NBYTES = 1 << 30  # of chunks that are decoded at the same time: fewer threads work on larger ones


@dataclass
class Meter:
    """Seconds of each part of the work, for `fastdp data bench`; exact where one thread reads."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("read", "decode", "copy"), 0.0))
    stored_nbytes: int = 0

    def add(self, part: str, began: float) -> float:
        """Count the time since `began`; returns now."""
        now = time.perf_counter()
        self.seconds[part] += now - began
        return now


class Reader:
    """The rows of one data set. Any thread may read.

    Args:
        data: a data set of which `why_not` says nothing.
        threads: threads that decode; None for those that all readers share.

    The reader has a file descriptor of its own, of the file that h5py has open. It closes when the reader is dropped.

    Raises:
        OSError, RuntimeError: HDF5 cannot read the index of the chunks.
    """

    def __init__(self, data: h5py.Dataset, threads: JobThreads | None = None) -> None:
        self.path = os.fsdecode(data.file.filename)
        began = time.perf_counter()
        self.layout = read_layout(data)
        self.index_seconds = time.perf_counter() - began
        self.cache = ChunkCache()
        self.meter: Meter | None = None
        self.left_to_h5py: Counter[str] = Counter()  # why chunks could not be decoded here, and how many
        self._data = data
        self._threads = threads or SHARED
        self._file = _opened(self.path, data.file.id.get_vfd_handle())
        self._stamp = _stamp(self._file)
        weakref.finalize(self, os.close, self._file)
        self._threads.use()
        weakref.finalize(self, self._threads.release)
        self.columns = self._column_slices() if self.layout.chunks else []
        self.stored_nbytes = int(self.layout.sizes.sum()) if self.layout.chunks else data.id.get_storage_size()

    def read(self, rows: Rows) -> NDArray[Any]:
        """A new array of rows, in the order asked for; numbers must lie in the data set, and may repeat.

        Raises:
            OSError: the file is cut, cannot be read, or was changed since it was opened.
            ValueError: its h5py file was closed.
        """
        self._check_file()
        out = np.empty((len(rows), *self.layout.shape[1:]), self.layout.dtype)
        if out.size:
            jobs = self._piece_jobs(rows, out) if self.layout.chunks is None else self._jobs(rows, out)
            self._threads.run(jobs, max(1, WORKING_NBYTES // (2 * self.layout.pipeline.nbytes)))
        return out

    @property
    def usable(self) -> bool:
        """Whether its h5py file is still open."""
        return bool(self._data)

    def _check_file(self) -> None:
        if not self._data:
            raise ValueError(f"{self.path!r} was closed while its rows are read: keep it open until the end")
        if _stamp(self._file) != self._stamp:
            raise OSError(f"{self.path!r} was changed after it was opened: open it again when nobody writes to it")

    def _fill(self, memory: Any, place: int) -> None:
        """Read a part of the file into memory."""
        view = memoryview(memory).cast("B")
        while len(view):
            count = os.preadv(self._file, [view], place)
            if not count:
                raise OSError(
                    f"{self.path!r} is cut: its data set {self._data.name!r} goes on at byte {place:,}, where the file "
                    "ends. Take another copy of it."
                )
            view, place = view[count:], place + count

    # Data in one piece.

    def _piece_jobs(self, rows: Rows, out: NDArray[Any]) -> list[Job]:
        """Jobs that read runs of rows straight to their places."""
        start, nbytes = self.layout.offset, self.layout.row_nbytes
        if start is None:
            out[...] = self.layout.fill
            return []
        if not (isinstance(rows, range) and rows.step == 1):
            low, span = _span(rows)
            if span * nbytes <= max(SPAN_NBYTES, SPAN_SHARE * out.nbytes) and span > 1:
                out[...] = self.read(range(low, low + span))[np.asarray(rows) - low]
                return []
        flat = out.reshape(-1).view(np.uint8)
        pieces = list(_pieces(rows, nbytes, max(PIECE_NBYTES, -(-out.nbytes // self._threads.count))))
        size = len(pieces) if out.nbytes <= PIECE_NBYTES else -(-len(pieces) // (4 * self._threads.count))
        groups = (pieces[first : first + size] for first in range(0, len(pieces), size))
        return [functools.partial(self._read_pieces, group, flat, start) for group in groups]

    def _read_pieces(self, pieces: list[tuple[int, int, int]], flat: NDArray[np.uint8], start: int) -> None:
        """Read pieces: each a place in the data, a place in the result and a number of bytes."""
        began = time.perf_counter()
        for source, dest, nbytes in pieces:
            self._fill(flat[dest : dest + nbytes], start + source)
        if self.meter:
            self.meter.stored_nbytes += sum(nbytes for _, _, nbytes in pieces)
            self.meter.add("read", began)

    # Chunks.

    def _column_slices(self) -> list[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """For each chunk beside another in the same rows: its place in a row, and the part of it that exists."""
        assert self.layout.chunks is not None
        spans = [
            [
                (slice(start, min(start + chunk, length)), slice(0, min(chunk, length - start)))
                for start in range(0, length, chunk)
            ]
            for length, chunk in zip(self.layout.shape[1:], self.layout.chunks[1:], strict=True)
        ]
        return [tuple(zip(*column, strict=True)) if column else ((), ()) for column in itertools.product(*spans)]

    def _jobs(self, rows: Rows, out: NDArray[Any]) -> list[Job]:
        """Jobs that decode each chunk once and put its rows to their places."""
        width, layout = len(self.columns), self.layout
        bands = list(_bands(rows, layout.rows_of_chunk))
        cells = (np.array([band for band, _, _ in bands], np.int64)[:, None] * width + np.arange(width)).reshape(-1)
        found = np.searchsorted(layout.cells, cells)
        known = found < len(layout.cells)
        known[known] = layout.cells[found[known]] == cells[known]
        work = [
            (int(cell), int(place) if is_known else -1, column, dest, local)
            for (cell, place, is_known), (column, (_, dest, local)) in zip(
                zip(cells, found, known, strict=True),
                ((column, band) for band in bands for column in range(width)),
                strict=True,
            )
        ]
        size = max(1, GROUP_NBYTES // layout.pipeline.nbytes)
        groups = [work[start : start + size] for start in range(0, len(work), size)]
        return [functools.partial(self._place, group, out, isinstance(rows, range)) for group in groups]

    def _place(self, group: list[tuple[int, int, int, Part, Part]], out: NDArray[Any], in_order: bool) -> None:
        """Put the rows of some chunks to their places in the result."""
        for cell, place, column, dest, local in group:
            outside, inside = self.columns[column]
            where, what = (dest, *outside), (local, *inside)
            if place < 0:
                out[where] = self.layout.fill
                continue
            if self._plain_rows(place, out, dest, local):
                continue
            chunk = self.cache.get(cell)
            target = None
            if chunk is None:
                target = self._direct(out, dest, local)
                chunk = self._chunk(cell, place, target)
            if target is not None and np.shares_memory(chunk, target):
                continue
            began = time.perf_counter()
            _copy_rows(out, where, chunk, what)
            if self.meter:
                self.meter.add("copy", began)
            if not self._used_up(cell, local, in_order):
                self.cache.put(cell, chunk)

    def _plain_rows(self, place: int, out: NDArray[Any], dest: Part, local: Part) -> bool:
        """Read rows of a chunk without filters straight to their places; False if it is not such a chunk."""
        layout, nbytes = self.layout, self.layout.row_nbytes
        assert layout.chunks is not None
        if layout.pipeline.filters or layout.chunks[1:] != layout.shape[1:]:
            return False
        if layout.sizes[place] != layout.pipeline.nbytes:
            return False
        together = isinstance(dest, slice) and isinstance(local, slice)
        if not together and nbytes < LEAST_ROW_NBYTES:
            return False
        began, start = time.perf_counter(), int(layout.places[place])
        flat = out.reshape(-1).view(np.uint8)
        if isinstance(dest, slice) and isinstance(local, slice):
            self._fill(flat[dest.start * nbytes : dest.stop * nbytes], start + local.start * nbytes)
        else:
            for to, row in zip(_numbers(dest), _numbers(local), strict=True):
                self._fill(flat[to * nbytes : (to + 1) * nbytes], start + row * nbytes)
        if self.meter:
            self.meter.stored_nbytes += nbytes * len(_numbers(local))
            self.meter.add("read", began)
        return True

    def _direct(self, out: NDArray[Any], dest: Part, local: Part) -> NDArray[np.uint8] | None:
        """The memory of the result that a whole chunk fills, if there is such."""
        whole = self.layout.chunks
        if whole is None or not isinstance(dest, slice) or not isinstance(local, slice):
            return None
        if whole[1:] != self.layout.shape[1:] or local.stop - local.start != whole[0]:
            return None
        return out[dest].reshape(-1).view(np.uint8)

    def _used_up(self, cell: int, local: Part, in_order: bool) -> bool:
        """Whether these are all rows of a chunk, or its last ones where rows are read in order."""
        if not isinstance(local, slice) or (local.start and not in_order):
            return False
        first = cell // len(self.columns) * self.layout.rows_of_chunk
        return first + local.stop >= min(first + self.layout.rows_of_chunk, self.layout.shape[0])

    def _chunk(self, cell: int, place: int, target: NDArray[np.uint8] | None) -> NDArray[Any]:
        """One decoded chunk, in `target` if that is possible."""
        layout = self.layout
        size, skipped = int(layout.sizes[place]), int(layout.skipped[place])
        began, meter = time.perf_counter(), self.meter
        try:
            if self._unsure(cell, size):
                raise DecodeError("a chunk at the edge, which may be stored without its filters")
            stored = np.empty(self._checked_size(size, place), np.uint8)
            self._fill(stored, int(layout.places[place]))
            if meter:
                meter.stored_nbytes += size
                began = meter.add("read", began)
            data = layout.pipeline.decode(stored, skipped, target)
        except DamagedError as error:
            raise OSError(f"{self.path!r} is damaged in its data set {self._data.name!r}: {error}") from error
        except DecodeError as error:
            self.left_to_h5py[str(error)] += 1
            return self._by_h5py(cell)
        if meter:
            meter.add("decode", began)
        return data.view(layout.dtype).reshape(layout.pipeline.chunk)

    def _checked_size(self, size: int, place: int) -> int:
        """The stored size of a chunk, which must lie in the file."""
        end, length = int(self.layout.places[place]) + size, self._stamp[0]
        if not 0 <= size <= end <= length:
            raise OSError(
                f"{self.path!r} is cut: a chunk of its data set {self._data.name!r} ends at byte {end:,}, and the file "
                f"has {length:,}. Take another copy of it."
            )
        return size

    def _unsure(self, cell: int, size: int) -> bool:
        """Whether a chunk at the edge may be one that HDF5 stored without filters, which no file says of a chunk."""
        layout = self.layout
        if not layout.pipeline.filters or (layout.pipeline.compressed and size != layout.pipeline.nbytes):
            return False
        corner = np.unravel_index(cell, layout.grid)
        ends = [(int(at) + 1) * chunk for at, chunk in zip(corner, layout.pipeline.chunk, strict=True)]
        return any(end > length for end, length in zip(ends, layout.shape, strict=True))

    def _by_h5py(self, cell: int) -> NDArray[Any]:
        """A chunk as h5py reads it, as far as it lies inside the data set."""
        layout = self.layout
        corner = np.unravel_index(cell, layout.grid)
        starts = [int(at) * chunk for at, chunk in zip(corner, layout.pipeline.chunk, strict=True)]
        chunk = np.zeros(layout.pipeline.chunk, layout.dtype)
        ends = [
            min(start + side, n) for start, side, n in zip(starts, layout.pipeline.chunk, layout.shape, strict=True)
        ]
        inside = tuple(slice(0, end - start) for start, end in zip(starts, ends, strict=True))
        chunk[inside] = self._data[tuple(slice(start, end) for start, end in zip(starts, ends, strict=True))]
        return chunk


def _opened(path: str, known: int) -> int:
    """The file of a descriptor, opened anew: a duplicate would keep HDF5's lock on the file for as long as it lives."""
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        return os.dup(known)  # it was removed since h5py opened it
    if os.path.samestat(os.fstat(file), os.fstat(known)):
        return file
    os.close(file)
    return os.dup(known)  # the path leads to another file now


def _stamp(file: int) -> tuple[int, int]:
    """What changes when a file is written: its size and time of change."""
    status = os.fstat(file)
    return status.st_size, status.st_mtime_ns


def _span(rows: Rows) -> tuple[int, int]:
    """The first of some rows, and how many there are from it to the last."""
    numbers = (rows[0], rows[-1]) if isinstance(rows, range) else (int(rows.min()), int(rows.max()))
    return min(numbers), max(numbers) - min(numbers) + 1


def _pieces(rows: Rows, row_nbytes: int, most: int) -> Iterator[tuple[int, int, int]]:
    """Runs of rows as pieces of at most `most` bytes: place in the data, place in the result, bytes."""
    if isinstance(rows, range) and rows.step == 1:
        runs = [(rows.start, 0, len(rows))]
    else:
        numbers = np.asarray(rows)
        starts = np.concatenate([[0], np.flatnonzero(np.diff(numbers) != 1) + 1, [len(numbers)]])
        runs = [(int(numbers[a]), int(a), int(b - a)) for a, b in itertools.pairwise(starts)]
    for first, dest, count in runs:
        for done in range(0, count * row_nbytes, most):
            yield first * row_nbytes + done, dest * row_nbytes + done, min(most, count * row_nbytes - done)


def _bands(rows: Rows, height: int) -> Iterator[tuple[int, Part, Part]]:
    """Rows by the chunks that they lie in: number of the chunk, places in the result, rows in the chunk."""
    if isinstance(rows, range) and rows.step == 1:
        for band in range(rows.start // height, (rows.stop - 1) // height + 1):
            low, high = max(rows.start, band * height), min(rows.stop, (band + 1) * height)
            yield band, slice(low - rows.start, high - rows.start), slice(low - band * height, high - band * height)
        return
    numbers = np.asarray(rows, np.int64)
    bands = numbers // height
    order = np.argsort(bands, kind="stable")
    starts = np.concatenate([[0], np.flatnonzero(np.diff(bands[order])) + 1, [len(order)]])
    for a, b in itertools.pairwise(starts):
        dest = order[a:b]
        band = int(bands[dest[0]])
        yield band, _as_slice(dest), _as_slice(numbers[dest] - band * height)


def _as_slice(numbers: NDArray[np.int64]) -> Part:
    """Consecutive numbers as a slice; others as they are."""
    first, count = int(numbers[0]), len(numbers)
    if int(numbers[-1]) - first == count - 1 and (count < 3 or bool(np.all(np.diff(numbers) == 1))):
        return slice(first, first + count)
    return numbers


def _copy_rows(out: NDArray[Any], where: tuple[Any, ...], chunk: NDArray[Any], what: tuple[Any, ...]) -> None:
    """Copy rows of a chunk to their places."""
    dest, local = where[0], what[0]
    small = out.strides[0] < LEAST_ROW_NBYTES
    if small or (isinstance(dest, slice) and isinstance(local, slice)):
        out[where] = chunk[what]
        return
    for to, row in zip(_numbers(dest), _numbers(local), strict=True):
        there, here = (to, *where[1:]), (row, *what[1:])
        out[there] = chunk[here]


def _numbers(part: Part) -> list[int]:
    return list(range(part.start, part.stop)) if isinstance(part, slice) else part.tolist()
