"""`fit`, `evaluate` and `predict` on a `DeviceDataset`: Keras deals out row numbers, the rows stay on the devices.

Keras's loops take a data adapter in the place of arrays. The one here is Keras's own for arrays, so that batch sizes,
shuffling with its seeds, and class weights are Keras's. But its batches hold arrays that are nothing but a shape, a
dtype and row numbers (`fastdp.data.row_batch`), which `flatten_batch` hands on to the engine.
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
from fastdp.tensors.arrays import dtype_name


def as_fed(data: Any) -> Any:
    """Arrays in any nest as Keras's `fit` would feed them to the model, whole and in host memory.

    By Keras's own conversion: floats become `keras.config.floatx()`, types that torch lacks wider ones. Arrays that are
    so already are not copied.

    Raises:
        ValueError: something that Keras takes for no array, or `floatx` is a type that NumPy lacks.
    """
    return keras.tree.map_structure(lambda leaf: None if leaf is None else _array_as_fed(leaf), data)


def _array_as_fed(array: Any) -> np.ndarray:
    """One array."""
    sliceable = array_slicing.convert_to_sliceable(array, target_backend="torch")
    with keras.device("cpu"):
        row = keras.ops.convert_to_tensor(sliceable.convert_to_torch_compatible(sliceable[:1]))
    name = dtype_name(row)
    if name == "bfloat16":
        raise ValueError(
            "A DeviceDataset holds types that NumPy has. Received: bfloat16. Leave keras.config.floatx() at "
            '"float32", and let the model compute in bfloat16: keras.config.set_dtype_policy("mixed_bfloat16").'
        )
    whole = sliceable.convert_to_torch_compatible(sliceable[:])
    whole = whole.detach().cpu().numpy() if isinstance(whole, torch.Tensor) else whole
    return np.asarray(whole, name)


def resident_fit(arguments: dict[str, Any], devices: Sequence[Any]) -> dict[str, Any]:
    """The arguments of `fit`, with adapters in the place of data sets on the devices.

    Raises:
        ValueError: targets or weights beside a data set, a data set for other devices or one that Keras's arguments do
            not fit.
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


def resident_forward(arguments: dict[str, Any], devices: Sequence[Any]) -> dict[str, Any]:
    """The arguments of `evaluate` or `predict`, likewise."""
    data = arguments.get("x")
    if not isinstance(data, DeviceDataset):
        return arguments
    _check_alone(arguments)
    rows, size, steps = np.arange(len(data)), arguments.get("batch_size"), arguments.get("steps")
    return {**arguments, "x": ResidentRows(data, devices, rows, [size], steps)}


def resident_batch(arguments: dict[str, Any], devices: Sequence[Any]) -> dict[str, Any]:
    """The arguments of `train_on_batch` and its like, with the arrays of a batch in the place of the batch.

    Raises:
        ValueError: targets or weights beside the batch, or a data set for other devices.
    """
    batch = arguments.get("x")
    if not isinstance(batch, ResidentBatch):
        return arguments
    _check_alone(arguments, "class_weight")
    batch.data.check_devices(devices)
    parts = dict(zip(("x", "y", "sample_weight"), keras.utils.unpack_x_y_sample_weight(batch.nested()), strict=True))
    return {**arguments, **parts}


def _check_alone(arguments: dict[str, Any], *others: str) -> None:
    """Targets and weights are in the data set."""
    beside = [name for name in ("y", "sample_weight", *others) if arguments.get(name) is not None]
    if beside:
        raise ValueError(
            f"A {type(arguments['x']).__name__} has its targets and weights itself. Received: {' and '.join(beside)} "
            "beside it. Make it of all of them: DeviceDataset((x, y, sample_weight), parallel)."
        )


def _check_as_fed(data: DeviceDataset) -> None:
    """The arrays have types that Keras feeds to models.

    Raises:
        ValueError: they have not, as those of a data set for an engine may.
    """
    for place, array in enumerate(data.arrays):
        fed = as_fed(array[:1]).dtype
        if fed != array.dtype:
            raise ValueError(
                f"A Keras model takes the array at place {place} of the data set as {fed}. Received: {array.dtype}. "
                "Make the data set with the model, which converts its arrays: DeviceDataset(arrays, parallel)."
            )


class ResidentRows(ArrayDataAdapter):
    """Keras's adapter for arrays, over a data set on the devices.

    Args:
        data: the data set.
        devices: those that train on it.
        rows: numbers of the rows that take part.
        sizes: of a global batch: the first that is not None or 0 counts; without one Keras's default.
        steps: of an epoch, if it is known, for that default.
        shuffle: True, False or "batch", as in `fit` of a parallel model.
        class_weight: as in `fit`. The weights of all rows become one more array of the data set.

    Raises:
        ValueError: a data set for other devices, one that does not nest as `x`, `(x, y)` or `(x, y, sample_weight)`, or
            whatever Keras finds wrong with its arrays and `class_weight`.
    """

    def __init__(
        self,
        data: DeviceDataset,
        devices: Sequence[Any],
        rows: np.ndarray,
        sizes: Sequence[int | None],
        steps: int | None = None,
        shuffle: bool | str = False,
        class_weight: Any = None,
    ) -> None:
        data.check_devices(devices)
        _check_as_fed(data)
        size = next(filter(None, sizes), None)
        # Views: of the rows in use Keras wants to know how many there are, and the classes.
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
        self._inputs: Any = rows  # what the adapter itself deals out
        self._order = _WholeBatches(len(rows), self.batch_size) if shuffle == "batch" else None
        self._dealt = dealt

    def get_torch_dataloader(self) -> torch.utils.data.DataLoader[Any]:
        """The batches of an epoch."""
        order = self._order if self._order is not None else super().get_torch_dataloader().batch_sampler
        return torch.utils.data.DataLoader(self._dealt, batch_sampler=order, collate_fn=lambda batch: batch)

    def on_epoch_end(self) -> None:
        """Keras calls it after each epoch and once before the first."""
        if self._order is not None:
            self._order.batches.on_epoch_end()


class _Rows(torch.utils.data.Dataset[Any]):
    """Batches of a data set on the devices by the numbers of their rows, nested as Keras feeds them."""

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
    """The rows of whole batches in a shuffled order, as `fit(shuffle="batch")` has them for arrays."""

    def __init__(self, rows: int, batch_size: int) -> None:
        self.batches = ArrayBatches(np.arange(rows), batch_size=batch_size, shuffle="batch")

    def __len__(self) -> int:
        """The number of batches."""
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        """The row numbers of each batch."""
        for i in range(len(self.batches)):
            yield self.batches[i][0]
