"""`BatchLayout`: where the rows of a batch lie in pinned memory and on a GPU, found out once for each shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdp.runtime.cuda import cupy_api
from fastdp.runtime.cuda.streams import CudaEvent

# Alignment of arrays in a buffer, enough for the widest loads of the kernels.
ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class CopyPlace:
    """Where the rows of a batch go on their way: first to views of pinned memory, then by one copy to a device buffer.

    Attributes:
        buffer, pinned_at: the device buffer, and the address of the pinned one.
        views: the arrays in pinned memory, by their number.
        source, target, nbytes: of the copy.
        arrays: the arrays in the device buffer.
        read: the event behind the copy.
    """

    buffer: Any
    pinned_at: int
    views: list[tuple[int, NDArray[Any]]]
    source: int
    target: int
    nbytes: int
    arrays: list[Any]
    read: CudaEvent


class BatchLayout:
    """Where the rows of one shape of batch lie in a buffer, one array behind the other.

    Args:
        parts: the rows of every array.

    Attributes:
        starts, nbytes: where each array begins, and the bytes of all of them, aligned.
        host: the indices of arrays in host memory that are not empty.
        cards: the ordinals of the GPUs that hold the others.
        whole: whether all rows come from the host, so that one copy takes them, with the gaps between arrays.
        arrays: the arrays on the device, by buffer; made once.
        pinned: views of pinned memory for the arrays of `host`, by the address of the buffer; made once.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        sizes = [-(-part.nbytes // ALIGNMENT) * ALIGNMENT for part in parts]
        self.starts, self.nbytes = [sum(sizes[:i]) for i in range(len(sizes))], sum(sizes)
        self.host = [i for i, part in enumerate(parts) if part.nbytes and not cupy_api.is_array(part)]
        self.cards = sorted({cupy_api.array_device(part) for part in parts if part.nbytes and cupy_api.is_array(part)})
        self.whole = bool(self.host) and not self.cards
        self.arrays: dict[int, tuple[Any, list[Any]]] = {}
        self.pinned: dict[int, list[NDArray[Any]]] = {}
        if self.whole:
            first, last = self.host[0], self.host[-1]
            self.first = self.starts[first]
            self.length = self.starts[last] + parts[last].nbytes - self.first

    def on(self, buffer: Any, parts: Sequence[Any], ordinal: int) -> list[Any]:
        """The arrays in a device buffer."""
        at = cupy_api.array_pointer(buffer)
        found = self.arrays.get(at)
        if found is None or found[0] is not buffer:
            made = [
                cupy_api.array(at + start, part.shape, part.dtype, ordinal, buffer)
                for start, part in zip(self.starts, parts, strict=True)
            ]
            found = self.arrays[at] = buffer, made
        return found[1]

    def fill(self, buffer: NDArray[np.uint8], at: int, parts: Sequence[Any]) -> None:
        """Copy the rows in host memory to a pinned buffer at an address."""
        for i, view in zip(self.host, self._pinned_views(buffer, at, parts), strict=True):
            np.copyto(view, parts[i])

    def place(self, buffer: Any, pinned: NDArray[np.uint8], parts: Sequence[Any], read: CudaEvent) -> CopyPlace:
        """Where one copy of all rows, which are in host memory, begins and ends.

        Args:
            buffer, pinned: the device buffer, and the pinned one.
            parts: the rows of every array.
            read: recorded after each such copy.
        """
        at = int(pinned.ctypes.data)
        arrays = self.on(buffer, parts, cupy_api.array_device(buffer))
        target = cupy_api.array_pointer(arrays[self.host[0]])
        views = list(zip(self.host, self._pinned_views(pinned, at, parts), strict=True))
        return CopyPlace(buffer, at, views, at + self.first, target, self.length, arrays, read)

    def _pinned_views(self, buffer: NDArray[np.uint8], at: int, parts: Sequence[Any]) -> list[NDArray[Any]]:
        views = self.pinned.get(at)
        if views is None:
            views = self.pinned[at] = [
                buffer[self.starts[i] : self.starts[i] + parts[i].nbytes].view(parts[i].dtype).reshape(parts[i].shape)
                for i in self.host
            ]
        return views
