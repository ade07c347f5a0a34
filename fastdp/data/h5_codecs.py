"""Decodes stored HDF5 chunks without HDF5's lock: gzip, lzf, zstd, blosc, blosc2, shuffle and fletcher32.

Each library writes into memory of the size that the data set declares and no further, so a hostile chunk cannot ask
for more. gzip is decoded by isal where it is installed, else by Python's zlib; lzf by the function inside h5py; zstd,
blosc and blosc2 by the libraries inside hdf5plugin. All of them work without Python's lock.

Source of the formats: the HDF5 file format specification, and the registered filter plugins.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdp.data import h5_blosc2
from fastdp.data.h5_libraries import function, plugin, plugin_folder

Bytes = NDArray[np.uint8]

DEFLATE, SHUFFLE, FLETCHER32, LZF, BLOSC, ZSTD, BLOSC2 = 1, 2, 3, 32000, 32001, 32015, 32026
NAMES = {
    DEFLATE: "gzip",
    SHUFFLE: "shuffle",
    FLETCHER32: "fletcher32",
    LZF: "lzf",
    BLOSC: "blosc",
    ZSTD: "zstd",
    BLOSC2: "blosc2",
}
_PLUGINS = {BLOSC: "blosc", ZSTD: "zstd", BLOSC2: "blosc2"}


class DecodeError(ValueError):
    """A stored chunk does not hold what its data set declares."""


class DamagedError(DecodeError):
    """A chunk is surely damaged, though HDF5 may read it: it leaves memory that lzf does not fill as it is."""


@dataclass(frozen=True)
class Pipeline:
    """The filters of a data set, by which its chunks are decoded.

    Attributes:
        filters: number and parameters of each, in the order in which they were applied to a chunk.
        chunk: the shape of a chunk.
        itemsize: bytes of an element.
    """

    filters: tuple[tuple[int, tuple[int, ...]], ...]
    chunk: tuple[int, ...]
    itemsize: int

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of a decoded chunk."""
        return self.itemsize * int(np.prod(self.chunk, dtype=object))

    @property
    def compressed(self) -> bool:
        """Whether a filter makes chunks smaller."""
        return any(code not in (SHUFFLE, FLETCHER32) for code, _ in self.filters)

    @property
    def why_not(self) -> str:
        """Which filter cannot be decoded here, and why; empty if all can."""
        packers = [code for code, _ in self.filters if code not in (SHUFFLE, FLETCHER32)]
        if len(packers) > 1:
            return f"{len(packers)} compressing filters"
        for code in packers:
            if code in _PLUGINS and not plugin_folder():
                return f"the filter {NAMES[code]} without hdf5plugin: pip install 'fastdp[hdf5]'"
            if code not in NAMES or not _decoder(code):
                return f"the filter {NAMES.get(code, code)}"
        return ""

    def __str__(self) -> str:
        return "+".join(NAMES.get(code, str(code)) for code, _ in self.filters) or "no filter"

    def decode(self, stored: Bytes, skipped: int, out: Bytes | None = None) -> Bytes:
        """The bytes of a chunk.

        Args:
            stored: the chunk as the file stores it.
            skipped: bits of the filters that were not applied to this chunk.
            out: memory of the chunk's size, used if a filter can write its result there.

        Returns:
            `out`, `stored` or new memory, of `nbytes` bytes.

        Raises:
            DecodeError: the chunk is damaged, or decodes to another size.
        """
        applied = [step for place, step in enumerate(self.filters) if not skipped >> place & 1]
        data = stored
        while applied:
            code, values = applied.pop()
            size = self.nbytes + 4 * sum(other == FLETCHER32 for other, _ in applied)
            target = out if out is not None and not applied else None
            if code == FLETCHER32:
                data = _checked(data)
            elif code == SHUFFLE:
                data = _unshuffled(data, values[0] if values else self.itemsize, target)
            else:
                data = self._unpacked(code, data, np.empty(size, np.uint8) if target is None else target)
        if len(data) != self.nbytes:
            raise DecodeError(f"a chunk of {self.nbytes:,} bytes was expected, got {len(data):,}")
        return data

    def _unpacked(self, code: int, data: Bytes, target: Bytes) -> Bytes:
        """What a compressing filter has packed, which must fill `target`."""
        decoder = _decoder(code)
        written = decoder(data, target, self.chunk, self.itemsize) if decoder and len(data) else -1
        if written != len(target):
            kind = DamagedError if code == LZF else DecodeError
            raise kind(f"{NAMES[code]} must give {len(target):,} bytes, got {written:,}")
        return target


Decoder = Callable[[Bytes, Bytes, tuple[int, ...], int], int]


def _checked(data: Bytes) -> Bytes:
    """The data before its checksum, which must fit: Fletcher's, of 16-bit words of the higher byte first."""
    body = data[:-4]
    found = int.from_bytes(data[-4:].tobytes(), "little")
    if len(data) < 4 or found not in (_fletcher32(body), _swapped(_fletcher32(body))):
        raise DecodeError(f"the checksum of a chunk of {len(data):,} bytes does not fit")
    return body


def _fletcher32(data: Bytes) -> int:
    """Fletcher's checksum as HDF5 computes it: sums modulo 65,535, of which 0 stands for no bits at all."""
    words = data[: len(data) // 2 * 2].view(">u2")
    last = [int(data[-1]) << 8] if len(data) % 2 else []
    count = len(words) + len(last)
    block = 4096
    whole = len(words) // block * block
    first = second = 0
    parts = [words[:whole].reshape(-1, block)] if whole else []
    parts += [words[whole:].reshape(1, -1)] if whole < len(words) else []
    place = 0
    for part in parts:
        rows, width = part.shape
        values = part.astype(np.float64)  # exact: all sums stay below 2**53
        sums = values.sum(axis=1).astype(np.int64)
        inner = (values @ np.arange(width, 0, -1, dtype=np.float64)).astype(np.int64)
        # A word counts once for each word from it to the end of the data.
        after = (count - place - width * np.arange(1, rows + 1, dtype=np.int64)) % 65535
        first += int(sums.sum())
        second += int(((inner + sums % 65535 * after) % 65535).sum())
        place += rows * width
    first, second = first + sum(last), second + sum(last)
    return (_folded(second) << 16) | _folded(first)


def _folded(total: int) -> int:
    return (total - 1) % 65535 + 1 if total else 0


def _swapped(total: int) -> int:
    """The checksum with the bytes of both halves exchanged, as early versions of HDF5 wrote it."""
    return (total & 0x00FF00FF) << 8 | (total >> 8) & 0x00FF00FF


def _unshuffled(data: Bytes, size: int, target: Bytes | None) -> Bytes:
    """Bytes in the order of elements of `size` bytes; they were stored as all first bytes, all second bytes, ..."""
    count = len(data) // size if size > 0 else 0
    if size <= 1 or count <= 1:
        return data
    out = target if target is not None and len(target) == len(data) else np.empty(len(data), np.uint8)
    whole = count * size
    elements, planes = out[:whole].reshape(count, size), data[:whole].reshape(size, count)
    for place in range(size):
        elements[:, place] = planes[place]
    out[whole:] = data[whole:]
    return out


def _gunzip(data: Bytes, target: Bytes, chunk: tuple[int, ...], itemsize: int) -> int:
    """gzip, which HDF5 calls deflate: a stream of zlib's."""
    library = _zlib()
    stream = library.decompressobj()
    try:
        result = stream.decompress(data, len(target) + 1)
    except library.error:
        return -1
    if len(result) != len(target) or not stream.eof:
        return len(result) if len(result) != len(target) else -1
    target[:] = np.frombuffer(result, np.uint8)
    return len(result)


@functools.cache
def _zlib() -> ModuleType | Any:
    """The fastest library for zlib's streams that is installed."""
    return importlib.import_module("isal.isal_zlib") if importlib.util.find_spec("isal") else zlib


def gzip_library() -> str:
    """The name of the library that decodes gzip."""
    return _zlib().__name__.partition(".")[0]


@functools.cache
def _decoder(code: int) -> Decoder | None:
    """The decoder of a compressing filter; None if there is none, or its library lacks a function."""
    try:
        return {DEFLATE: lambda: _gunzip, LZF: _lzf, BLOSC: _blosc, ZSTD: _zstd, BLOSC2: h5_blosc2.decoder}[code]()
    except (KeyError, OSError, AttributeError):  # no such filter, library or function
        return None


def _lzf() -> Decoder:
    """The function of the lzf library that h5py carries."""
    library = ctypes.CDLL(importlib.import_module("h5py.h5z").__file__)
    pointer, number = ctypes.c_void_p, ctypes.c_uint
    run = function(library, "lzf_decompress", number, pointer, number, pointer, number)
    return lambda data, target, *_: run(data.ctypes.data, len(data), target.ctypes.data, len(target))


def _zstd() -> Decoder:
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    run = function(plugin("zstd"), "ZSTD_decompress", size, pointer, size, pointer, size)
    return lambda data, target, *_: run(target.ctypes.data, len(target), data.ctypes.data, len(data))


def _blosc() -> Decoder:
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    run = function(plugin("blosc"), "blosc_decompress_ctx", ctypes.c_int, pointer, pointer, size, ctypes.c_int)

    def decode(data: Bytes, target: Bytes, chunk: tuple[int, ...], itemsize: int) -> int:
        # The header says how many bytes the library reads and writes: bytes 4 to 7 decoded, 12 to 15 stored.
        if len(data) < 16 or not 16 <= int(data[12:16].view("<u4")[0]) <= len(data):
            return -1
        if int(data[4:8].view("<u4")[0]) != len(target):
            return -1
        return run(data.ctypes.data, target.ctypes.data, len(target), 1)

    return decode
