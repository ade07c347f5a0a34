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
from fastdp.data.row_parts import RowParts
from fastdp.launch.reference import slice_rows
from fastdp.options import check_flag
from fastdp.runtime.queue import QueueDevice

FLOATS = ("float32", "float16")
LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class Scaled:
    """Converts a uint8 array on its way into a step: `x * scale + offset` in fp32, rounded to `dtype`.

    Raises:
        ValueError: a dtype other than "float32" and "float16"; a `scale` or `offset` that is not finite.
        TypeError: a `scale` or `offset` that is no number.
    """

    dtype: str = "float32"
    scale: float = 1 / 255
    offset: float = 0.0

    def __post_init__(self) -> None:
        if self.dtype not in FLOATS:
            raise ValueError(f"`dtype` must be one of {FLOATS}. Received: dtype={self.dtype!r}")
        for name in ("scale", "offset"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
                raise TypeError(f"`{name}` must be a number. Received: {name}={value!r}")
            if not abs(value) <= LARGEST:
                raise ValueError(f"`{name}` must be a number that float32 has. Received: {name}={value!r}")


class DeviceDataset:
    """Arrays kept in the memory of the devices, whole in each or each a part, and batches of their rows.

    Args:
        arrays: host arrays with the same number of rows; do not change them while the data set is in use. A sequence,
            as an engine's program takes them; for a Keras model `x`, `(x,)`, `(x, y)` or `(x, y, sample_weight)`, each
            of which may be a list, tuple or dict of arrays. Each card gets one copy or part, which its virtual devices
            share; virtual devices in host memory use the arrays themselves.
        devices: the model or engine that trains on the data: the result of `fastdp.wrap`, an engine, or its
            `engine.devices`. For a Keras model, arrays are converted as in `fit`: floats become
            `keras.config.floatx()`, which copies those of another dtype.
        casts: conversions of uint8 arrays, by position in `arrays` or by key in a dict of arrays.
        sharded: whether each device keeps an equal part of the rows instead of all of them: 1/N of the memory on each
            of N devices, with the same batches, in the same order and with the same bits. Default: False.

    The host sends only row numbers to a step. On a GPU one launch gathers the rows of all arrays; in host memory each
    device's worker gathers its own rows. If the data set is sharded, that launch reads other GPUs' rows over the link
    between them. Rows of GPUs that its kernels do not reach, or that are lost, come from the arrays in host memory.
    `fit`, `evaluate` and `predict` of a Keras model from `fastdp.wrap` take the
    data set as their only data argument `x`, and so do those of any Keras model after `fastdp.install`, which returns
    what `devices` takes. Torch modules and their train steps take the arrays of its batches in place of tensors, and
    `torch.utils.data.DataLoader(data, collate_fn=data.collate, ...)` makes such batches in torch's own order. Engines
    of any program take its `batches`.

    Raises:
        ValueError: the arrays differ in length or have no rows, or a cast names an array that is not uint8.
        TypeError: an item is not an array, `devices` has no devices, `casts` is no dict of `Scaled`, or `sharded` is
            not a bool.
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

    def __init__(
        self, arrays: Any, devices: Any, casts: Mapping[int | str, Scaled] | None = None, *, sharded: bool = False
    ) -> None:
        if not isinstance(sharded, bool):
            raise TypeError(
                f"`sharded` must be True (each device keeps a part of the rows) or False (all). Received: {sharded!r}"
            )
        owner, devices = devices, _devices_of(devices)
        self._devices = devices
        if hasattr(owner, "as_fed"):
            arrays = owner.as_fed(arrays)
        keys: list[str | None] = []
        self.arrays: list[np.ndarray] = []
        # The structure of `arrays`, with indices into `self.arrays` as leaves.
        self.nest = places_of(arrays, self.arrays, keys)
        self._rows = count_rows(self.arrays)
        self._casts = self._checked_casts({} if casts is None else casts, keys)
        # Keyed by memory space, so that the virtual GPUs of a card share one copy.
        self._gpus = {device.space: device for device in reversed(devices) if device.on_gpu}
        self._parts = RowParts(self._rows, _owners(devices, self._gpus)) if sharded else None
        self._copies = {space: [self._put(space, array) for array in self.arrays] for space in self._gpus}

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
    def sharded(self) -> bool:
        """Whether each device keeps a part of the rows."""
        return self._parts is not None

    @property
    def nbytes(self) -> dict[str, int]:
        """The bytes of its copies by memory: those of each card, such as "cuda:0"; the arrays' own as "host".

        If it is sharded over virtual devices in host memory, the part of each, such as "virtual:0". These parts are
        views of the arrays.
        """
        held = {space: sum(copy.nbytes for copy in copies) for space, copies in sorted(self._copies.items())}
        if self._parts is not None and not held:
            for name, rows in self._parts.rows.items():
                held[name] = sum(array[rows.start : rows.stop].nbytes for array in self.arrays)
        return {"host": sum(array.nbytes for array in self.arrays), **held}

    @property
    def held(self) -> str:
        """Who has how many bytes, in words."""
        sizes = {name: nbytes for name, nbytes in self.nbytes.items() if name != "host"}
        if not sizes:
            return "whose rows the devices have"
        words = ", ".join(f"{nbytes / 1e6:,.1f} MB on {name}" for name, nbytes in sizes.items())
        return f"whose rows {'the devices have in parts' if self.sharded else 'each device has'}: {words}"

    def __repr__(self) -> str:
        """Appears in Keras's messages when a model that fastdp did not wrap gets the data set."""
        where = ", ".join(sorted(self._copies)) or "host memory"
        how = "in parts in" if self.sharded else "in"
        return f"<DeviceDataset of {self._rows} rows {how} {where}; only models run by fastdp can read its rows>"

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
            ValueError: `batch_size` is below 1, or `seed` below 0.
            TypeError: an argument of another kind.
        """
        for name, number, least in (("batch_size", batch_size, 1), ("seed", 0 if seed is None else seed, 0)):
            if isinstance(number, bool) or not isinstance(number, (int, np.integer)):
                raise TypeError(f"`{name}` must be a whole number. Received: {name}={number!r}")
            if number < least:
                raise ValueError(f"`{name}` must be at least {least}. Received: {name}={number}")
        check_flag("shuffle", shuffle)
        check_flag("drop_last", drop_last)
        return self._batches(batch_size, seed if shuffle else False, drop_last=drop_last)

    def _batches(self, batch_size: int, seed: int | bool | None, *, drop_last: bool) -> Iterator[ResidentBatch]:
        """`seed`: False for the rows in their order."""
        order = np.arange(self._rows) if seed is False else np.random.default_rng(seed).permutation(self._rows)
        for start in range(0, self._rows, batch_size):
            index = order[start : start + batch_size]
            if len(index) == batch_size or not drop_last:
                yield self.rows(index)

    def with_array(self, array: np.ndarray) -> DeviceDataset:
        """A data set with one more array at the end, which shares the others with this one."""
        count_rows([*self.arrays, array])
        twin = copy.copy(self)
        twin.arrays = [*self.arrays, np.ascontiguousarray(array)]
        twin._copies = {space: [*copies, self._put(space, twin.arrays[-1])] for space, copies in self._copies.items()}
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
        casts = [self._casts.get(place) for place in places]
        numbers = [None if cast is None else (cast.dtype, cast.scale, cast.offset) for cast in casts]
        gathered: list[Any] = device.gather_rows(**self._sources(device, index, places), casts=numbers)
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

    def _sources(self, device: Any, index: NDArray[np.int64], places: Sequence[int]) -> dict[str, Any]:
        """From where a GPU gathers rows: arguments of its `gather_rows`, by name."""
        if self._parts is None:
            copies = self._copies[device.space]
            return {"parts": [[copies[place] for place in places]], "counts": [len(index)], "index": index}
        lost = {one.space for one in self._devices if one.lost}
        numbers, order = self._parts.by_owner(index)
        parts = []
        near = [
            space
            for space, gpu in self._gpus.items()
            if space == device.space or (space not in lost and device.reads(gpu))
        ]
        for space in numbers:
            rows = self._parts.rows[space]
            copies = self._copies[space] if space in near else [array[rows.start : rows.stop] for array in self.arrays]
            parts.append([copies[place] for place in places])
        return {
            "parts": parts,
            "counts": [len(local) for local in numbers.values()],
            "index": np.concatenate(list(numbers.values())),
            "places": order,
            "host_rows": 0 if len(near) == len(self._gpus) else len(index),
        }

    def _put(self, space: str, array: np.ndarray) -> Any:
        """Copy an array, or a card's part of it, to the card; the copy is complete on return."""
        rows = None if self._parts is None else self._parts.rows[space]
        part = array if rows is None else array[rows.start : rows.stop]
        made = self._gpus[space].empty(part.shape, part.dtype)
        self._gpus[space].copy(made, part)
        return made

    def _take(self, places: Sequence[int], index: NDArray[np.int64], targets: Sequence[np.ndarray]) -> None:
        """Gather rows in host memory; row numbers must be in range."""
        for place, target in zip(places, targets, strict=True):
            array, cast = self.arrays[place], self._casts.get(place)
            if self._parts is not None and not self._gpus:
                scaling = () if cast is None else (cast.scale, cast.offset)
                self._parts.take(array, index, target, *scaling)
            elif cast is None:
                np.take(array, index, axis=0, out=target, mode="clip")  # other modes buffer the output
            else:
                slice_rows(array, target, index=index, scale=cast.scale, offset=cast.offset)

    def _checked_casts(self, casts: Mapping[int | str, Scaled], keys: Sequence[str | None]) -> dict[int, Scaled]:
        """Casts by place."""
        if not isinstance(casts, Mapping) or not all(isinstance(cast, Scaled) for cast in casts.values()):
            raise TypeError(f"`casts` must be a dict of Scaled(...) by place or key, or None. Received: {casts!r}")
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


def _owners(devices: Sequence[QueueDevice], gpus: Mapping[str, QueueDevice]) -> list[str]:
    """Who keeps a part: the cards in the order of their devices, or each virtual device in host memory."""
    if gpus:
        return list(dict.fromkeys(device.space for device in devices if device.on_gpu))
    return list(dict.fromkeys((device.part_of or device).name for device in devices))
