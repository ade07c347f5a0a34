"""Finds out once where an HDF5 data set lies in its file: the place, size and filters of each chunk."""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from fastdp.data.h5_codecs import Pipeline

# Chunks below this are read faster by HDF5's own loop than by Python's.
LEAST_CHUNK_NBYTES = 2048
_FIRST_RIGHT_WITH_USER_BLOCK = (2, 0, 0)  # before, HDF5 told places of chunks without it


@dataclass(frozen=True)
class Layout:
    """Where a data set lies.

    Attributes:
        shape: of the data set.
        dtype: as h5py reads it, in the file's byte order.
        fill: the value of what was never written, an array of no axes.
        chunks: the shape of a chunk; None if the data lies in one piece.
        offset: where that piece begins, in bytes; None if nothing was ever written.
        pipeline: the filters of the chunks.
        cells: numbers of the stored chunks in the grid of chunks, rising; int64.
        places: where each of them begins in the file, in bytes; int64.
        sizes: bytes of each in the file; int64.
        skipped: the filters that were not applied to each, as bits; uint32.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fill: NDArray[Any]
    chunks: tuple[int, ...] | None
    offset: int | None
    pipeline: Pipeline
    cells: NDArray[np.int64]
    places: NDArray[np.int64]
    sizes: NDArray[np.int64]
    skipped: NDArray[np.uint32]

    @property
    def grid(self) -> tuple[int, ...]:
        """The number of chunks along each axis."""
        chunks = self.chunks or self.shape
        return tuple(-(-length // chunk) if chunk else 0 for length, chunk in zip(self.shape, chunks, strict=True))

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row in memory."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def rows_of_chunk(self) -> int:
        """The rows of a chunk; 1 if the data lies in one piece."""
        return self.chunks[0] if self.chunks else 1

    def __str__(self) -> str:
        if self.chunks is None:
            return "one piece"
        return f"{len(self.cells):,} chunks of {self.chunks[0]:,} rows, {self.pipeline}"


def why_not(data: h5py.Dataset) -> str:
    """Why a data set cannot be read without h5py, in a few words; empty if it can."""
    plist, kind = data.id.get_create_plist(), data.id.get_type()
    if data.is_virtual:
        return "a virtual data set"
    if plist.get_external_count():
        return "external storage"
    if data.dtype.kind not in "biufc" or data.dtype.subdtype is not None:
        return f"elements of dtype {data.dtype}"
    if not kind.equal(h5py.h5t.py_create(data.dtype, logical=True)):
        return "elements that HDF5 converts"
    if plist.get_layout() not in (h5py.h5d.CONTIGUOUS, h5py.h5d.CHUNKED):
        return "a compact data set"
    return _why_not_chunks(data) or _why_not_file(data.file)


def _why_not_chunks(data: h5py.Dataset) -> str:
    """What of the chunks is not known here."""
    if data.chunks is None:
        return ""
    pipeline = _pipeline(data)
    if pipeline.nbytes < LEAST_CHUNK_NBYTES:
        return f"chunks of only {pipeline.nbytes:,} bytes"
    if math.prod(-(-length // chunk) for length, chunk in zip(data.shape, data.chunks, strict=True)) >= 1 << 62:
        return "a grid of too many chunks"
    return pipeline.why_not


def _why_not_file(file: h5py.File) -> str:
    """What of the file is not known here: only plain files that nobody writes are."""
    if not hasattr(os, "preadv"):
        return "a system without preadv"
    if file.driver != "sec2":
        return f"a file of the driver {file.driver!r}"
    if file.mode != "r" or file.swmr_mode:
        return "a file that is open for writing"
    if file.userblock_size and h5py.version.hdf5_version_tuple < _FIRST_RIGHT_WITH_USER_BLOCK:
        return "a file with a user block"
    return ""


def read_layout(data: h5py.Dataset) -> Layout:
    """Read where a data set lies, of which `why_not` says nothing: one call of Python for each stored chunk.

    Raises:
        OSError, RuntimeError: HDF5 cannot read the index of the chunks.
    """
    found: list[tuple[int, int, int, int]] = []
    plist = data.id.get_create_plist()
    pipeline = _pipeline(data)
    if data.chunks is not None:
        grid = [-(-length // chunk) for length, chunk in zip(data.shape, data.chunks, strict=True)]
        steps = [math.prod(grid[axis + 1 :]) for axis in range(len(grid))]
        weights = list(zip(steps, data.chunks, grid, strict=True))

        def note(info: Any) -> None:
            cell = 0
            for place, (step, chunk, count) in zip(info.chunk_offset, weights, strict=True):
                if place // chunk >= count:  # left over from a data set that was larger
                    return
                cell += place // chunk * step
            found.append((cell, info.byte_offset, info.size, info.filter_mask))

        if math.prod(data.shape):
            data.id.chunk_iter(note)
        found.sort()
    # HDF5 tells a place of what was never written if the file has a user block.
    written = data.id.get_space_status() != h5py.h5d.SPACE_STATUS_NOT_ALLOCATED
    columns = list(zip(*found, strict=True)) or [()] * 4
    return Layout(
        tuple(map(int, data.shape)),
        data.dtype,
        _fill(data, plist),
        data.chunks,
        data.id.get_offset() if data.chunks is None and written else None,
        pipeline,
        np.array(columns[0], np.int64),
        np.array(columns[1], np.int64),
        np.array(columns[2], np.int64),
        np.array(columns[3], np.uint32),
    )


def _fill(data: h5py.Dataset, plist: Any) -> NDArray[Any]:
    """The value of what was never written; zero where HDF5 leaves memory as it is, as h5py's is."""
    unknown = plist.fill_value_defined() == h5py.h5d.FILL_VALUE_UNDEFINED
    if unknown or plist.get_fill_time() == h5py.h5d.FILL_TIME_NEVER:
        return np.zeros((), data.dtype)
    return np.asarray(data.fillvalue, data.dtype)


def _pipeline(data: h5py.Dataset) -> Pipeline:
    """The filters of a data set."""
    plist = data.id.get_create_plist()
    filters = [plist.get_filter(number) for number in range(plist.get_nfilters())]
    shape = data.chunks or tuple(itertools.repeat(1, len(data.shape)))
    return Pipeline(tuple((code, tuple(values)) for code, _, values, _ in filters), shape, data.dtype.itemsize)
