"""Takes batches of arrays, generators and data sets as Keras does, without the cost of torch's DataLoader.

Keras reads all of these through a DataLoader that converts each array twice and walks each batch as a tree. The batches
here are the same, bit for bit and in the same order: torch's own samplers deal out the row numbers, after the same
draws. What is not recognized goes through the DataLoader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import torch
from keras.src.backend.torch.core import convert_to_tensor
from keras.src.trainers.data_adapters.array_slicing import NumpySliceable
from torch.utils.data import DataLoader, SequentialSampler, default_convert

# What Keras calls the two data sets that it makes for a DataLoader.
_OF_ARRAYS = "ArrayDataAdapter.get_torch_dataloader.<locals>.ArrayDataset"
_OF_BATCHES = "get_torch_dataloader.<locals>.ConverterIterableDataset"
# The dtypes that Keras and torch take over as they are.
_SAME_IN_TORCH = frozenset(["?", "b", "B", "h", "i", "l", "q", "e", "f", "d"])


def batches_of(loader: Any, *, new: bool = False) -> Iterator[Any]:
    """The batches of one epoch, in host memory. They belong to the caller.

    Args:
        loader: what Keras's iterator over epochs would iterate over: as a rule a DataLoader.
        new: whether a data set makes batches of new arrays, which nobody else has, so that they need no copy.
    """
    batches = iter(loader)  # a DataLoader draws a number here
    if type(loader) is not DataLoader or loader.num_workers or not _is_keras_own(loader.dataset):
        return batches
    if type(loader.dataset).__qualname__ == _OF_BATCHES:
        return _each_converted(loader.dataset.iterable, new)
    cut = _cutter(loader.dataset.array)
    if cut is None:
        return batches
    in_order = isinstance(getattr(loader.batch_sampler, "sampler", None), SequentialSampler)
    return CutBatches(cut, map(_as_slice if in_order else _as_index, batches._sampler_iter))


class CutBatches(map):  # type: ignore[type-arg]
    """Batches that are cut from arrays in host memory: no code of the user's runs meanwhile, and nothing can hang."""


def _is_keras_own(dataset: Any) -> bool:
    kind = type(dataset)
    return kind.__module__.startswith("keras.src.") and kind.__qualname__ in (_OF_ARRAYS, _OF_BATCHES)


def _as_slice(numbers: list[int]) -> slice:
    return slice(numbers[0], numbers[-1] + 1)


def _as_index(numbers: list[int]) -> np.ndarray:
    return np.array(numbers, np.int64)


def _cutter(arrays: Any) -> Callable[[Any], Any] | None:
    """A function that cuts the rows of an index out of all arrays; None where Keras must convert them.

    Args:
        arrays: (x,), (x, y) or (x, y, sample_weight), each one of Keras's `Sliceable` objects or None.
    """
    if type(arrays) is not tuple or not all(part is None or _is_plain(part) for part in arrays):
        return None
    sources = [None if part is None else part.array for part in arrays]

    def cut(rows: Any) -> Any:
        if type(rows) is slice:
            return tuple([None if one is None else torch.from_numpy(one[rows].copy()) for one in sources])
        return tuple([None if one is None else torch.from_numpy(one.take(rows, 0)) for one in sources])

    return cut


def _is_plain(part: Any) -> bool:
    """Whether Keras feeds these rows to torch as they are."""
    return type(part) is NumpySliceable and _is_array(part.array)


def _each_converted(iterable: Any, new: bool) -> Iterator[Any]:
    """The batches of an iterable, which is asked for an iterator when the first one is wanted, as Keras does.

    At the end of an epoch Keras makes an iterator that it never uses, and a tf.data.Dataset shuffles anew for each one.
    """
    for batch in iterable:
        yield _converted(batch, new)


def _converted(batch: Any, new: bool) -> Any:
    """A batch of a generator or a data set, as it comes out of Keras's conversion and torch's."""
    if type(batch) is tuple and all(_is_array(part) for part in batch):
        return [_own_tensor(part, new) for part in batch]
    return default_convert(keras.tree.map_structure(convert_to_tensor, batch, none_is_leaf=False))


def _is_array(part: Any) -> bool:
    return type(part) is np.ndarray and part.dtype.char in _SAME_IN_TORCH and part.dtype.isnative and part.ndim > 0


def _own_tensor(array: np.ndarray, new: bool) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array) if new else array.copy())
