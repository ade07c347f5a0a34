"""`fit`, `evaluate` and `predict` on a `DeviceDataset`: Keras deals out row numbers, the rows stay on the devices.

Keras's loops accept a data adapter instead of arrays. The adapter here derives from Keras's own for arrays, so batch
sizes, shuffling with its seeds, and class weights are Keras's. Its batches hold arrays that consist only of a shape, a
dtype and row numbers (`fastdp.data.row_batch`); `flatten_batch` passes them to the engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import torch
from keras.src.trainers.data_adapters import array_slicing
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter

from fastdp.data.device_dataset import DeviceDataset
from fastdp.data.row_batch import ResidentBatch, ResidentColumn, filled
from fastdp.keras.fit.array_batches import ArrayBatches
from fastdp.runtime.queue import QueueDevice
from fastdp.tensors.arrays import dtype_name


def as_fed(data: Any) -> Any:
    """Convert arrays in any nest as Keras's `fit` would before it feeds them, whole and in host memory.

    Keras's own conversion turns floats into `keras.config.floatx()` and dtypes that torch lacks into wider ones. Arrays
    that need no conversion are not copied.

    Raises:
        ValueError: Keras does not accept a leaf as an array, or NumPy lacks the dtype `floatx`.
    """
    return keras.tree.map_structure(lambda leaf: None if leaf is None else _array_as_fed(leaf), data)


def _array_as_fed(array: Any) -> np.ndarray:
    """Convert one array."""
    sliceable = array_slicing.convert_to_sliceable(array, target_backend="torch")
    with keras.device("cpu"):
        row = keras.ops.convert_to_tensor(sliceable.convert_to_torch_compatible(sliceable[:1]))
    name = dtype_name(row)
    if name == "bfloat16":
        raise ValueError(
            "A DeviceDataset can hold only NumPy's dtypes. Received: bfloat16. Leave keras.config.floatx() at "
            '"float32", and let the model compute in bfloat16: keras.config.set_dtype_policy("mixed_bfloat16").'
        )
    whole = sliceable.convert_to_torch_compatible(sliceable[:])
    whole = whole.detach().cpu().numpy() if isinstance(whole, torch.Tensor) else whole
    return np.asarray(whole, name)


def resident_fit(arguments: dict[str, Any], devices: Sequence[QueueDevice]) -> dict[str, Any]:
    """The arguments of `fit`, with data sets on the devices replaced by adapters.

    Raises:
        ValueError: targets or weights are given in addition to a data set, the data set is for other devices, or it
            does not fit Keras's arguments.
    """
    arguments = dict(arguments)
    sizes = arguments.get("validation_batch_size"), arguments.get("batch_size")
    validation = arguments.get("validation_data")
    if isinstance(validation, (list, tuple)) and len(validation) == 1:
        (validation,) = validation
    if isinstance(validation, (list, tuple)) and any(isinstance(part, DeviceDataset) for part in validation):
        raise ValueError(
            "`validation_data` must be a DeviceDataset alone, or arrays. Received: a tuple of "
            f"{[type(part).__name__ for part in validation]}. Put targets and weights into the data set."
        )
    data = arguments.get("x")
    if isinstance(data, DeviceDataset):
        _check_alone(arguments)
        rows = np.arange(len(data))
        split = arguments.pop("validation_split", 0.0)
        if split and validation is None:
            (rows, _, _), (held_out, _, _) = array_slicing.train_validation_split((rows, None, None), split)
            validation = ResidentRows(data, devices, held_out, sizes, arguments.get("validation_steps"))
        shuffle, classes = arguments.pop("shuffle", True), arguments.pop("class_weight", None)
        steps = arguments.get("steps_per_epoch")
        arguments["x"] = ResidentRows(data, devices, rows, sizes[1:], steps, shuffle, classes)
    if isinstance(validation, DeviceDataset):
        rows = np.arange(len(validation))
        validation = ResidentRows(validation, devices, rows, sizes, arguments.get("validation_steps"))
    if isinstance(validation, ResidentRows):
        arguments["validation_data"] = validation
    return arguments


def resident_forward(arguments: dict[str, Any], devices: Sequence[QueueDevice]) -> dict[str, Any]:
    """The arguments of `evaluate` or `predict`, with a data set on the devices replaced by an adapter."""
    data = arguments.get("x")
    if not isinstance(data, DeviceDataset):
        return arguments
    _check_alone(arguments)
    rows, size, steps = np.arange(len(data)), arguments.get("batch_size"), arguments.get("steps")
    return {**arguments, "x": ResidentRows(data, devices, rows, [size], steps)}


def resident_batch(arguments: dict[str, Any], devices: Sequence[QueueDevice]) -> dict[str, Any]:
    """The arguments of `train_on_batch` and the like, with a batch replaced by its arrays.

    Raises:
        ValueError: targets or weights are given in addition to the batch, or the data set is for other devices.
    """
    batch = arguments.get("x")
    if not isinstance(batch, ResidentBatch):
        return arguments
    _check_alone(arguments, "class_weight")
    batch.data.check_devices(devices)
    parts = dict(zip(("x", "y", "sample_weight"), keras.utils.unpack_x_y_sample_weight(batch.nested()), strict=True))
    return {**arguments, **parts}


def _check_alone(arguments: dict[str, Any], *others: str) -> None:
    """Refuse targets and weights in addition to a data set, which has its own."""
    beside = [name for name in ("y", "sample_weight", *others) if arguments.get(name) is not None]
    if beside:
        raise ValueError(
            f"A {type(arguments['x']).__name__} includes its targets and weights. Received: {' and '.join(beside)} "
            "along with it. Build the data set from all of them: DeviceDataset((x, y, sample_weight), parallel)."
        )


def _check_as_fed(data: DeviceDataset) -> None:
    """Check that the arrays have dtypes that Keras feeds to models.

    Raises:
        ValueError: they do not; a data set made for an engine may have others.
    """
    for place, array in enumerate(data.arrays):
        fed = as_fed(array[:1]).dtype
        if fed != array.dtype:
            raise ValueError(
                f"A Keras model needs the array at place {place} of the data set as {fed}. Received: {array.dtype}. "
                "Build the data set with the model, which converts its arrays: DeviceDataset(arrays, parallel)."
            )


class ResidentRows(ArrayDataAdapter):
    """Keras's adapter for arrays, over a data set on the devices.

    Args:
        data: the data set.
        devices: the devices that train on it.
        rows: numbers of the rows to use.
        sizes: candidates for the size of a global batch. The first that is neither None nor 0 counts; without one, the
            size is Keras's default.
        steps: number of steps of an epoch, if known, for that default.
        shuffle: True, False or "batch", as in `fit` of a parallel model.
        class_weight: as in `fit`. The weights of all rows become one more array of the data set.

    Raises:
        ValueError: the data set is for other devices, its nest is not `x`, `(x, y)` or `(x, y, sample_weight)`, or
            Keras rejects its arrays or `class_weight`.

    Attributes:
        held: who has how many bytes, in words.
    """

    def __init__(
        self,
        data: DeviceDataset,
        devices: Sequence[QueueDevice],
        rows: np.ndarray,
        sizes: Sequence[int | None],
        steps: int | None = None,
        shuffle: bool | str = False,
        class_weight: Any = None,
    ) -> None:
        data.check_devices(devices)
        _check_as_fed(data)
        size = next(filter(None, sizes), None)
        # Views of the rows in use: Keras needs their number and the classes.
        views = [array[rows[0] : rows[-1] + 1] for array in data.arrays]
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(filled(data.nest, views))
        super().__init__(x, y, sample_weight, size, steps, shuffle, class_weight)
        places = {id(view): place for place, view in enumerate(views)}
        weights: list[np.ndarray] = []

        def place_of(leaf: Any) -> int | None:
            if leaf is None or id(leaf) in places:
                return None if leaf is None else places[id(leaf)]
            every = np.zeros((len(data), *leaf.shape[1:]), leaf.dtype)
            every[rows] = leaf
            weights.append(every)
            return len(data.arrays)

        packed: Any = self._inputs
        nest = keras.tree.map_structure(place_of, packed)
        dealt = _Rows(data.with_array(*weights) if weights else data, nest, rows)
        self._inputs: Any = rows  # the base class deals out row numbers
        self._order = _WholeBatches(len(rows), self.batch_size) if shuffle == "batch" else None
        self._dealt = dealt
        self.held = data.held

    def get_torch_dataloader(self) -> torch.utils.data.DataLoader[Any]:
        """The batches of an epoch."""
        order = self._order if self._order is not None else super().get_torch_dataloader().batch_sampler
        return torch.utils.data.DataLoader(self._dealt, batch_sampler=order, collate_fn=lambda batch: batch)

    def on_epoch_end(self) -> None:
        """Keras calls it after each epoch and once before the first."""
        if self._order is not None:
            self._order.batches.on_epoch_end()


class _Rows(torch.utils.data.Dataset[Any]):
    """Makes batches of a data set on the devices from row numbers, nested as Keras feeds them."""

    def __init__(self, data: DeviceDataset, nest: Any, rows: np.ndarray) -> None:
        self._data, self._nest, self._rows = data, nest, rows

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._rows)

    def __getitems__(self, numbers: list[int]) -> Any:
        """A batch."""
        index = np.ascontiguousarray(self._rows[np.asarray(numbers)], np.int64)

        def column(place: int | None) -> ResidentColumn | None:
            return None if place is None else ResidentColumn(self._data, place, index)

        return keras.tree.map_structure(column, self._nest)


class _WholeBatches(torch.utils.data.Sampler[list[int]]):
    """The rows of whole batches in shuffled order, as `fit(shuffle="batch")` orders arrays."""

    def __init__(self, rows: int, batch_size: int) -> None:
        self.batches = ArrayBatches(np.arange(rows), batch_size=batch_size, shuffle="batch")

    def __len__(self) -> int:
        """The number of batches."""
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        """The row numbers of each batch."""
        for i in range(len(self.batches)):
            yield self.batches[i][0]
