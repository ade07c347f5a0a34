"""Decodes chunks that Blosc2 packed: frames of one chunk, or of an array of several axes that lies in blocks."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fastdp.data.h5_libraries import function, plugin

Bytes = NDArray[np.uint8]

_MOST_AXES = 32  # more than any array of the library has
_MOST_BLOCKS = 1024  # above, Python's own loop over blocks is the slower one
_HEAD_NBYTES = 4096  # of a frame, in which its description is looked for


class Blosc2:
    """The library's functions.

    Raises:
        OSError, AttributeError: hdf5plugin has no such library, or it lacks a function.
    """

    def __init__(self) -> None:
        library = plugin("blosc2")
        pointer, int64, status = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        function(library, "blosc2_init", None)()
        self._open = function(library, "blosc2_schunk_from_buffer", pointer, pointer, int64, ctypes.c_bool)
        self._unpack = function(
            library, "blosc2_schunk_decompress_chunk", status, pointer, int64, pointer, ctypes.c_int32
        )
        self._free = function(library, "blosc2_schunk_free", status, pointer)
        self._open_array = function(
            library, "b2nd_from_cframe", status, pointer, int64, ctypes.c_bool, ctypes.POINTER(pointer)
        )
        self._unpack_array = function(
            library, "b2nd_get_slice_cbuffer", status, pointer, pointer, pointer, pointer, pointer, int64
        )
        self._free_array = function(library, "b2nd_free", status, pointer)

    def decode(self, data: Bytes, target: Bytes, chunk: tuple[int, ...], itemsize: int) -> int:
        """Decode a frame into `target`; returns the bytes that were written, or a negative number if it is damaged."""
        head = data[:_HEAD_NBYTES].tobytes()
        if not _fits(head, len(data), len(target)):
            return -1
        if b"b2nd" not in head:
            return self._chunk(data, target)
        blocks = block_shape(head, chunk)
        grid = [-(-side // block) for side, block in zip(chunk, blocks or chunk, strict=True)]
        if blocks is None or math.prod(grid) > _MOST_BLOCKS:
            return self._array(data, target, chunk)
        # Decoding the blocks as they lie and ordering them by NumPy takes less time than the library's own slices.
        raw = np.empty(math.prod(grid) * math.prod(blocks) * itemsize, np.uint8)
        if self._chunk(data, raw) != len(raw):
            return -1
        _in_order(raw, target, chunk, blocks, itemsize)
        return len(target)

    def _chunk(self, data: Bytes, target: Bytes) -> int:
        opened = self._open(data.ctypes.data, len(data), False)
        if not opened:
            return -1
        try:
            return int(self._unpack(opened, 0, target.ctypes.data, len(target)))
        finally:
            self._free(opened)

    def _array(self, data: Bytes, target: Bytes, chunk: tuple[int, ...]) -> int:
        array, axes = ctypes.c_void_p(), np.zeros((2, _MOST_AXES), np.int64)
        axes[1, : len(chunk)] = chunk
        if self._open_array(data.ctypes.data, len(data), False, ctypes.byref(array)) < 0:
            return -1
        target[:] = 0  # an array of another shape than its data set's leaves parts as they are
        start, stop = axes.ctypes.data, axes[1].ctypes.data
        try:
            wrong = self._unpack_array(array, start, stop, target.ctypes.data, stop, len(target))
            return -1 if wrong < 0 else len(target)
        finally:
            self._free_array(array)


def _fits(head: bytes, stored: int, nbytes: int) -> bool:
    """Whether a frame's header agrees with the data set: its own length, and the decoded bytes.

    Source: the format of Blosc2's contiguous frames. An array is filled up to whole blocks, so it may be larger.
    """
    if len(head) < 64 or head[2:9] != b"b2frame":
        return False
    own, decoded = int.from_bytes(head[16:24], "big"), int.from_bytes(head[30:38], "big")
    return own <= stored and 0 < decoded <= 16 * nbytes + (1 << 20)


def block_shape(head: bytes, chunk: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of the blocks of an array of this shape, which is all one chunk; None if the frame does not say so.

    Source: the metalayer "b2nd" of a frame, in MessagePack: its shape as 64-bit numbers, those of chunk and block as
    32-bit ones.
    """
    count = len(chunk)
    if not 1 <= count <= 15:
        return None
    array = bytes([0x90 | count])
    shape = array + b"".join(b"\xd3" + side.to_bytes(8, "big") for side in chunk)
    shape += array + b"".join(b"\xd2" + side.to_bytes(4, "big") for side in chunk)
    place = head.find(shape)
    rest = head[place + len(shape) :][: 1 + 5 * count]
    if place < 0 or len(rest) < 1 + 5 * count or rest[:1] != array or any(mark != 0xD2 for mark in rest[1::5]):
        return None
    blocks = tuple(int.from_bytes(rest[2 + 5 * axis : 6 + 5 * axis], "big") for axis in range(count))
    return blocks if all(0 < block <= side for block, side in zip(blocks, chunk, strict=True)) else None


def _in_order(raw: Bytes, target: Bytes, chunk: tuple[int, ...], blocks: tuple[int, ...], itemsize: int) -> None:
    """Copy elements that lie block after block to their places in an array."""
    dtype = np.dtype(f"u{itemsize}" if itemsize in (1, 2, 4, 8) else f"V{itemsize}")
    grid = tuple(-(-side // block) for side, block in zip(chunk, blocks, strict=True))
    array = target.view(dtype).reshape(chunk)
    for corner, block in zip(np.ndindex(*grid), raw.view(dtype).reshape(-1, *blocks), strict=True):
        # The last blocks of an axis reach beyond the array.
        place = tuple(slice(at * side, (at + 1) * side) for at, side in zip(corner, blocks, strict=True))
        part = array[place]
        part[...] = block[tuple(map(slice, part.shape))]


def decoder() -> Callable[[Bytes, Bytes, tuple[int, ...], int], int]:
    """The function that decodes a chunk."""
    return Blosc2().decode
