"""Torch's tensors in host memory, as a replica's outputs on a card."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

# Of one shape and dtype, in one step of a replica.
OUTPUTS = 8


class Outputs:
    """Places on cards, to which the values of tensors go: where a GPU's tensor would be.

    As torch's allocator, this one asks CUDA for no memory once a step of a shape has run.
    """

    def __init__(self) -> None:
        self._places: dict[Any, dict[Any, list[Any]]] = {}

    def wrap(self, device: Any, pointer: int, shape: tuple[int, ...], dtype: Any, owner: Any) -> Any:
        """What CudaDevice.wrap gives."""
        places = self._places.setdefault(device, {}).setdefault((shape, np.dtype(dtype)), [])
        if not places:
            places += [device.empty(shape, np.dtype(dtype)) for _ in range(OUTPUTS)]
        places.append(places.pop(0))
        array = places[-1]
        if array.nbytes:
            ctypes.memmove(int(array.data.ptr), pointer, array.nbytes)
        return array

    def forget(self, device: Any) -> None:
        """Let go of a device's places."""
        self._places.pop(device, None)
