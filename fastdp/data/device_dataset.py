"""`DeviceDataset`: a data set that lies on the devices, whose steps gather their rows there by number."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdp.comm.batch import count_rows
from fastdp.data.row_batch import ResidentBatch, filled, places_of
from fastdp.launch.reference import slice_rows
from fastdp.runtime.queue import QueueDevice

FLOATS = ("float32", "float16")


@dataclass(frozen=True, slots=True)
class Scaled:
    """Converts a uint8 array on its way into a step: `x * scale + offset` in fp32, rounded to `dtype`.

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
    """Arrays kept whole in the memory of each device, and batches of their rows.

    Args:
        arrays: host arrays with the same number of rows; do not change them while the data set is in use. A sequence,
            as an engine's program takes them; for a Keras model `x`, `(x,)`, `(x, y)` or `(x, y, sample_weight)`, each
            of which may be a list, tuple or dict of arrays. Each card gets one copy, which its virtual devices share;
            virtual devices in host memory use the arrays themselves.
        devices: the model or engine that trains on the data: the result of `fastdp.wrap`, an engine, or its
            `engine.devices`. For a Keras model, arrays are converted as in `fit`: floats become
            `keras.config.floatx()`, which copies those of another dtype.
        casts: conversions of uint8 arrays, by position in `arrays` or by key in a dict of arrays.

    The host sends only row numbers to a step. On a GPU one launch gathers the rows of all arrays; in host memory each
    device's worker gathers its own rows. `fit`, `evaluate` and `predict` of a Keras model from `fastdp.wrap` take the
    data set as their only data argument `x`, and so do those of any Keras model after `fastdp.install`, which returns
    what `devices` takes. Torch modules and their train steps take the arrays of its batches in place of tensors, and
    `torch.utils.data.DataLoader(data, collate_fn=data.collate, ...)` makes such batches in torch's own order. Engines
    of any program take its `batches`.

    Raises:
        ValueError: the arrays differ in length or have no rows, or a cast names an array that is not uint8.
        TypeError: an item is not an array, or `devices` has no devices.
        MemoryError: a GPU has too little free memory.

    Example:
        >>> data = fastdp.data.DeviceDataset((images, labels), parallel, casts={0: Scaled()})  # doctest: +SKIP
        >>> parallel.fit(data, batch_size=1024, epochs=10)  # doctest: +SKIP

        >>> data = DeviceDataset((images, labels), parallel_module, casts={0: Scaled()})  # doctest: +SKIP
        >>> for x, y in torch.utils.data.DataLoader(data, 256, True, collate_fn=data.collate):  # doctest: +SKIP
        ...     loss = step(x, y)

        >>> engine = fastdp.DataParallel(program, 8)  # doctest: +SKIP
        >>> data = fastdp.data.DeviceDataset([images, labels], engine.devices, casts={0: Scaled()})  # doctest: +SKIP
        >>> for epoch in range(10):  # doctest: +SKIP
        ...     for batch in data.batches(1024, seed=epoch):
        ...         engine.train(batch)
    """

    def __init__(self, arrays: Any, devices: Any, casts: Mapping[int | str, Scaled] | None = None) -> None:
        owner, devices = devices, _devices_of(devices)
        if hasattr(owner, "as_fed"):
            arrays = owner.as_fed(arrays)
        keys: list[str | None] = []
        self.arrays: list[np.ndarray] = []
        # The structure of `arrays`, with indices into `self.arrays` as leaves.
        self.nest = places_of(arrays, self.arrays, keys)
        self._rows = count_rows(self.arrays)
        self._casts = self._checked_casts(casts or {}, keys)
        # Keyed by memory space, so that the virtual GPUs of a card share one copy.
        self._gpus = {device.space: device for device in reversed(devices) if device.on_gpu}
        self._copies = {space: [_put(device, array) for array in self.arrays] for space, device in self._gpus.items()}

    def __len__(self) -> int:
        """The number of rows."""
        return self._rows

    def __getitem__(self, number: int) -> Any:
        """One row, in the structure of the data set, with values in host memory."""
        return filled(self.nest, [np.asarray(column)[0] for column in self.rows([number])])

    def __getitems__(self, numbers: Sequence[int]) -> ResidentBatch:
        """The batch that torch's `DataLoader` asks for. With `collate_fn=data.collate` it gives nested arrays."""
        return self.rows(np.asarray(numbers))

    @staticmethod
    def collate(batch: ResidentBatch) -> Any:
        """The arrays of a batch in the structure of the data set, for `torch.utils.data.DataLoader`."""
        return batch.nested()

    @property
    def nbytes(self) -> dict[str, int]:
        """The bytes of its copies by memory: those of each card, such as "cuda:0"; the arrays' own as "host"."""
        held = {space: sum(copy.nbytes for copy in copies) for space, copies in sorted(self._copies.items())}
        return {"host": sum(array.nbytes for array in self.arrays), **held}

    def __repr__(self) -> str:
        """Appears in Keras's messages when a model that fastdp did not wrap gets the data set."""
        where = ", ".join(sorted(self._copies)) or "host memory"
        return f"<DeviceDataset of {self._rows} rows in {where}; only models run by fastdp can read its rows>"

    def rows(self, index: Any) -> ResidentBatch:
        """The batch of these rows, in this order; numbers may repeat.

        Raises:
            ValueError: `index` is empty, or not a vector of whole numbers.
            IndexError: a number is out of range; negative numbers do not count from the end.
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
            batch_size: rows of a global batch; the last batch may have fewer.
            shuffle: take the rows in a random order.
            seed: seed of that order; None gives another order each time.
            drop_last: omit a last batch that has fewer rows.

        Raises:
            ValueError: `batch_size` is below 1.
        """
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1. Received: batch_size={batch_size}")
        order = np.random.default_rng(seed).permutation(self._rows) if shuffle else np.arange(self._rows)
        for start in range(0, self._rows, batch_size):
            index = order[start : start + batch_size]
            if len(index) == batch_size or not drop_last:
                yield self.rows(index)

    def with_array(self, array: np.ndarray) -> DeviceDataset:
        """A data set with one more array at the end, which shares the others with this one."""
        count_rows([*self.arrays, array])
        twin = copy.copy(self)
        twin.arrays = [*self.arrays, np.ascontiguousarray(array)]
        twin._copies = {
            space: [*copies, _put(self._gpus[space], twin.arrays[-1])] for space, copies in self._copies.items()
        }
        return twin

    def check_devices(self, devices: Sequence[QueueDevice]) -> None:
        """Check that the arrays are in the memory of these devices.

        Raises:
            ValueError: the data set was not made for one of the GPUs.
        """
        for device in devices:
            if device.on_gpu and device.space not in self._copies:
                made_for = f"for {sorted(self._copies)}" if self._copies else "in host memory"
                raise ValueError(
                    f"The data set is not on {device.name}: it was made {made_for}. Make it for the model or the "
                    "engine that trains on it: DeviceDataset(arrays, parallel)."
                )

    def gather(self, device: Any, index: NDArray[np.int64], places: Sequence[int]) -> list[Any]:
        """Gather rows of the arrays at these places on a device, ordered before later work on its compute stream.

        Raises:
            ValueError: the data set was not made for this GPU.
        """
        if not device.on_gpu:
            taken = [np.empty((len(index), *row), dtype) for row, dtype in map(self.spec, places)]
            device.compute.enqueue(lambda: self._take(places, index, taken))
            return taken
        self.check_devices([device])
        copies = self._copies[device.space]
        casts = [self._casts.get(place) for place in places]
        numbers = [None if cast is None else (cast.dtype, cast.scale, cast.offset) for cast in casts]
        gathered: list[Any] = device.gather_rows([copies[place] for place in places], numbers, index)
        return gathered

    def on_host(self, place: int, index: NDArray[np.int64]) -> np.ndarray:
        """Rows of one array, converted as on the devices."""
        row, dtype = self.spec(place)
        taken = np.empty((len(index), *row), dtype)
        self._take([place], index, [taken])
        return taken

    def spec(self, place: int) -> tuple[tuple[int, ...], np.dtype]:
        """Row shape and dtype as a step gets them."""
        array, cast = self.arrays[place], self._casts.get(place)
        return array.shape[1:], np.dtype(cast.dtype) if cast else array.dtype

    def _take(self, places: Sequence[int], index: NDArray[np.int64], targets: Sequence[np.ndarray]) -> None:
        """Gather rows in host memory; row numbers must be in range."""
        for place, target in zip(places, targets, strict=True):
            array, cast = self.arrays[place], self._casts.get(place)
            if cast is None:
                np.take(array, index, axis=0, out=target, mode="clip")  # other modes buffer the output
            else:
                slice_rows(array, target, index=index, scale=cast.scale, offset=cast.offset)

    def _checked_casts(self, casts: Mapping[int | str, Scaled], keys: Sequence[str | None]) -> dict[int, Scaled]:
        """Casts by place."""
        found = {}
        for name, cast in casts.items():
            places = [place for place, key in enumerate(keys) if name in (place, key)]
            if len(places) != 1 or self.arrays[places[0]].dtype != np.uint8:
                what = [
                    f"{key!r}: {a.dtype}" if key else str(a.dtype) for a, key in zip(self.arrays, keys, strict=True)
                ]
                raise ValueError(
                    "Each key of `casts` must be the index or the dict key of exactly one uint8 array. Received: "
                    f"{name!r}; the arrays are {what}"
                )
            found[places[0]] = cast
        return found


def _devices_of(owner: Any) -> list[QueueDevice]:
    """The devices of a parallel model or an engine; a sequence of devices as a list.

    Raises:
        TypeError: `owner` has no devices.
    """
    devices = getattr(owner, "devices", owner)
    found = list(devices) if isinstance(devices, Sequence) else []
    if not found or not all(hasattr(device, "on_gpu") for device in found):
        raise TypeError(
            "`devices` must be a model from fastdp.wrap, an engine, or the devices of one (engine.devices). "
            f"Received: {owner!r} (of type {type(owner).__name__}). Wrap a Keras model first: fastdp.wrap(model, gpus)."
        )
    return found


def _put(device: QueueDevice, array: np.ndarray) -> Any:
    """Copy an array to a GPU; the copy is complete on return."""
    made = device.empty(array.shape, array.dtype)
    device.copy(made, array)
    return made
