"""`BatchLayout`: where the rows of a batch lie in pinned memory and on a GPU, found out once for each shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdp.runtime.cuda import cupy_api

# Alignment of arrays in a buffer, enough for the widest loads of the kernels.
ALIGNMENT = 256


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
        views = self.pinned.get(at)
        if views is None:
            views = self.pinned[at] = [
                buffer[self.starts[i] : self.starts[i] + parts[i].nbytes].view(parts[i].dtype).reshape(parts[i].shape)
                for i in self.host
            ]
        for i, view in zip(self.host, views, strict=True):
            np.copyto(view, parts[i])
