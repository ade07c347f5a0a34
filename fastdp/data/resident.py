"""A data set that lies on the devices: steps gather their rows there, by number, and nothing comes from the host."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdp.kernel_twins import slice_rows
from fastdp.shard import Rows
from fastdp.transfer import count_rows

FLOATS = ("float32", "float16")


@dataclass(frozen=True, slots=True)
class Scaled:
    """What a uint8 array becomes on its way into a step: `x * scale + offset` in fp32, rounded to `dtype`.

    Raises:
        ValueError: a dtype other than "float32" and "float16".
    """

    dtype: str = "float32"
    scale: float = 1 / 255
    offset: float = 0.0

    def __post_init__(self) -> None:
        if self.dtype not in FLOATS:
            raise ValueError(f"`dtype` must be one of {FLOATS}. Received: dtype={self.dtype!r}")


class DeviceDataset:
    """Arrays that are kept whole in the memory of each device, and batches of their rows.

    Args:
        arrays: with the same number of rows, on the host; not changed as long as the data set is used. Each card gets
            one copy, which its virtual devices share; virtual devices in host memory use the arrays themselves.
        devices: those of the engine: `engine.devices`.
        casts: by place in `arrays`, what becomes of uint8 ones.

    A step gets its row numbers alone from the host; on a GPU one launch gathers the rows of all arrays. For engines
    of any program; `parallel.fit` of a Keras model does not take it, since Keras makes its own batches. Not for losses
    that are computed on the merged outputs.

    Raises:
        ValueError: arrays of unequal length or without rows, or a cast of an array that is not uint8.
        MemoryError: a GPU has not enough room.

    Example:
        >>> engine = fastdp.DataParallel(program, 8)  # doctest: +SKIP
        >>> data = fastdp.data.DeviceDataset([images, labels], engine.devices, casts={0: Scaled()})  # doctest: +SKIP
        >>> for epoch in range(10):  # doctest: +SKIP
        ...     for batch in data.batches(1024, seed=epoch):
        ...         engine.train(batch)
    """

    def __init__(
        self, arrays: Sequence[np.ndarray], devices: Sequence[Any], casts: Mapping[int, Scaled] | None = None
    ) -> None:
        self.arrays = [np.ascontiguousarray(array) for array in arrays]
        self._rows = count_rows(self.arrays)
        self._casts = dict(casts or {})
        for place in self._casts:
            if place not in range(len(self.arrays)) or self.arrays[place].dtype != np.uint8:
                what = [str(array.dtype) for array in self.arrays]
                raise ValueError(f"`casts` may name places of uint8 arrays. Received: place {place} of {what}")
        # By where the memory is: virtual GPUs of one card have it once.
        self._copies: dict[str, list[Any]] = {}
        for device in devices:
            if device.on_gpu and device.space not in self._copies:
                self._copies[device.space] = [self._put(device, array) for array in self.arrays]

    def __len__(self) -> int:
        """The number of rows."""
        return self._rows

    def rows(self, index: Any) -> ResidentBatch:
        """The batch of these rows, in this order; a number may come more than once.

        Raises:
            ValueError: no rows, or not a vector of whole numbers.
            IndexError: a number out of range; negative ones do not count from the end.
        """
        numbers = np.asarray(index)
        if numbers.ndim != 1 or not numbers.size or numbers.dtype.kind not in "iu":
            raise ValueError(
                "`index` must be a vector of one or more row numbers. "
                f"Received: {numbers.dtype} of shape {numbers.shape}"
            )
        if numbers.min() < 0 or numbers.max() >= self._rows:
            raise IndexError(
                f"`index` must hold numbers from 0 to {self._rows - 1}. Received: {numbers.min()} to {numbers.max()}"
            )
        return ResidentBatch(self, np.ascontiguousarray(numbers, np.int64))

    def batches(
        self, batch_size: int, *, shuffle: bool = True, seed: int | None = None, drop_last: bool = False
    ) -> Iterator[ResidentBatch]:
        """The batches of one epoch.

        Args:
            batch_size: rows of a global batch; the last one may have fewer.
            shuffle: deal the rows out in a random order.
            seed: of that order; None for another one each time.
            drop_last: leave out a last batch with fewer rows.

        Raises:
            ValueError: `batch_size` below 1.
        """
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1. Received: batch_size={batch_size}")
        order = np.random.default_rng(seed).permutation(self._rows) if shuffle else np.arange(self._rows)
        for start in range(0, self._rows, batch_size):
            index = order[start : start + batch_size]
            if len(index) == batch_size or not drop_last:
                yield self.rows(index)

    def gather(self, device: Any, index: NDArray[np.int64]) -> list[Any]:
        """The rows of every array on a device, ordered before what its compute stream gets later.

        Raises:
            ValueError: a GPU that the data set was not made for.
        """
        if not device.on_gpu:
            return [self.on_host(place, index) for place in range(len(self.arrays))]
        if device.space not in self._copies:
            raise ValueError(
                f"The data set is not on {device.name}: it was made for {sorted(self._copies)}. Make it with the "
                "devices of the engine: DeviceDataset(arrays, engine.devices)."
            )
        copies = self._copies[device.space]
        casts = [self._casts.get(place) for place in range(len(copies))]
        numbers = [None if cast is None else (cast.dtype, cast.scale, cast.offset) for cast in casts]
        gathered: list[Any] = device.gather_rows(copies, numbers, index)
        return gathered

    def on_host(self, place: int, index: NDArray[np.int64]) -> np.ndarray:
        """Rows of one array, as the devices get them."""
        array, cast = self.arrays[place], self._casts.get(place)
        if cast is None:
            return array[index]
        taken = np.empty((len(index), *array.shape[1:]), cast.dtype)
        slice_rows(array, taken, index=index, scale=cast.scale, offset=cast.offset)
        return taken

    def spec(self, place: int) -> tuple[tuple[int, ...], np.dtype]:
        """Shape of a row, and dtype, as a step gets them."""
        array, cast = self.arrays[place], self._casts.get(place)
        return array.shape[1:], np.dtype(cast.dtype) if cast else array.dtype

    @staticmethod
    def _put(device: Any, array: np.ndarray) -> Any:
        """A copy on a GPU, there on return."""
        copy = device.empty(array.shape, array.dtype)
        device.copy(copy, array)
        return copy


class ResidentBatch(Sequence[Any]):
    """A global batch as row numbers of a `DeviceDataset`; an engine takes it where it takes arrays.

    Attributes:
        numbers: of the rows, int64.
    """

    def __init__(self, data: DeviceDataset, index: NDArray[np.int64]) -> None:
        self.numbers = index
        self._data = data

    def __len__(self) -> int:
        """The number of arrays."""
        return len(self._data.arrays)

    def __getitem__(self, place: Any) -> Any:
        """One of the arrays; its values are gathered on the host when somebody asks for them."""
        return _Column(self._data, range(len(self))[place], self.numbers)

    def rows_on(self, device: Any, rows: Rows) -> list[Any]:
        """The device's rows of every array."""
        return self._data.gather(device, self.numbers[rows.start : rows.stop])


class _Column:
    """One array of a batch: its shape and dtype, and its values for whoever asks."""

    def __init__(self, data: DeviceDataset, place: int, index: NDArray[np.int64]) -> None:
        self._data, self._place, self._index = data, place, index
        row, self.dtype = data.spec(place)
        self.shape = (len(index), *row)
        self.ndim = len(self.shape)
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """NumPy's protocol."""
        values = self._data.on_host(self._place, self._index)
        return values if dtype is None else values.astype(dtype)
