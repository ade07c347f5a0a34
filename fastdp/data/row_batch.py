"""Batches of a `DeviceDataset`: row numbers that an engine and Keras's loops take for arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastdp.runtime.queue import QueueDevice
from fastdp.shard import Rows


class Source(Protocol):
    """The part of a data set that a batch uses."""

    arrays: list[np.ndarray]
    nest: Any

    @property
    def held(self) -> str:
        """Who has how many bytes, in words."""

    def spec(self, place: int) -> tuple[tuple[int, ...], np.dtype]:
        """Row shape and dtype of an array as a step gets them."""

    def on_host(self, place: int, index: NDArray[np.int64]) -> np.ndarray:
        """Rows of one array, converted as on the devices."""

    def gather(self, device: QueueDevice, index: NDArray[np.int64], places: Sequence[int]) -> list[Any]:
        """Gather rows of some arrays on a device."""

    def check_devices(self, devices: Sequence[QueueDevice]) -> None:
        """Check that the arrays are in the memory of these devices."""


class ResidentBatch(Sequence[Any]):
    """A global batch as row numbers of a `DeviceDataset`; engines take it in place of arrays.

    Attributes:
        numbers: the row numbers, int64.
        data: the data set.
    """

    def __init__(self, data: Source, index: NDArray[np.int64], places: Sequence[int] | None = None) -> None:
        self.numbers = index
        self.data = data
        self._places = range(len(data.arrays)) if places is None else places
        self._columns = [ResidentColumn(data, place, index) for place in self._places]

    def __len__(self) -> int:
        """The number of arrays."""
        return len(self._columns)

    def __getitem__(self, place: Any) -> Any:
        """One of the arrays; its values are gathered on the host only when they are read."""
        return self._columns[place]

    def nested(self) -> Any:
        """The arrays in the structure of the data set: `x`, `(x, y)` and so on."""
        every = [ResidentColumn(self.data, place, self.numbers) for place in range(len(self.data.arrays))]
        return filled(self.data.nest, every)

    def rows_on(self, device: QueueDevice, rows: Rows) -> list[Any]:
        """The device's rows of every array."""
        return self.data.gather(device, self.numbers[rows.start : rows.stop], self._places)


class ResidentColumn:
    """One array of a batch: shape, dtype and, on demand, its values as a NumPy array or by DLPack.

    A slice or a list of rows gives a ResidentColumn again; a single row gives its values.
    """

    def __init__(self, data: Source, place: int, index: NDArray[np.int64]) -> None:
        self._data, self._place, self._index = data, place, index
        row, self.dtype = data.spec(place)
        self.shape = (len(index), *row)
        self.ndim = len(self.shape)
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._index)

    def __getitem__(self, rows: Any) -> Any:
        """Some of the rows, or the values of one."""
        index = self._index[rows]
        if np.ndim(index) == 0:
            return self._data.on_host(self._place, index[None])[0]
        return ResidentColumn(self._data, self._place, index)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """NumPy's protocol."""
        values = self._data.on_host(self._place, self._index)
        return values if dtype is None else values.astype(dtype)

    def __dlpack__(self, **options: Any) -> Any:
        """Export the values, in host memory, to another library."""
        return np.asarray(self).__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        """DLPack's device of host memory."""
        return np.empty(0).__dlpack_device__()

    @property
    def source(self) -> Source:
        """The data set."""
        return self._data

    def check_devices(self, devices: Sequence[QueueDevice]) -> None:
        """Check that the values are in the memory of these devices. Raises as `DeviceDataset.check_devices` does."""
        self._data.check_devices(devices)

    def batch_of(self, arrays: Sequence[Any]) -> ResidentBatch | None:
        """The batch of these arrays if all belong to the same batch as this one, else None."""
        for array in arrays:
            ours = isinstance(array, ResidentColumn)
            if not ours or array._data is not self._data or array._index is not self._index:
                return None
        return ResidentBatch(self._data, self._index, [array._place for array in arrays])


def places_of(nest: Any, arrays: list[np.ndarray], keys: list[str | None], key: str | None = None) -> Any:
    """Append the arrays of a nested structure to `arrays`, and the dict key of each to `keys`.

    Returns:
        The structure with each array replaced by its index in `arrays`.
    """
    if nest is None:
        return None
    if isinstance(nest, Mapping):
        return {name: places_of(part, arrays, keys, str(name)) for name, part in nest.items()}
    if isinstance(nest, (list, tuple)):
        return _sequence(nest, [places_of(part, arrays, keys, key) for part in nest])
    array = np.asarray(nest)
    if not array.ndim or array.dtype.kind not in "biufc":
        raise TypeError(
            f"A data set must hold arrays of numbers with rows. Received: {type(nest).__name__} "
            f"({array.dtype} of shape {array.shape}). Convert lists of numbers by np.asarray."
        )
    arrays.append(np.ascontiguousarray(array))
    keys.append(key)
    return len(arrays) - 1


def filled(nest: Any, values: Sequence[Any]) -> Any:
    """Replace each index in a nested structure by the value at that index."""
    if isinstance(nest, dict):
        return {name: filled(part, values) for name, part in nest.items()}
    if isinstance(nest, (list, tuple)):
        return _sequence(nest, [filled(part, values) for part in nest])
    return None if nest is None else values[nest]


def _sequence(like: Any, parts: list[Any]) -> Any:
    """`parts` as a list or a tuple, like `like`."""
    return parts if isinstance(like, list) else tuple(parts)
