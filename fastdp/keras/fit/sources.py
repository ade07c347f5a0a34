"""Which sources of Keras's `fit`, `evaluate` and `predict` are read ahead, by whom, and why not, by kind of data."""

from __future__ import annotations

import itertools
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
from keras.src.backend.common import global_state
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter
from keras.src.trainers.data_adapters.data_adapter_utils import NUM_BATCHES_FOR_TENSOR_SPEC
from keras.src.trainers.data_adapters.generator_data_adapter import GeneratorDataAdapter
from keras.src.trainers.data_adapters.py_dataset_adapter import PyDatasetAdapter
from keras.src.trainers.data_adapters.tf_dataset_adapter import TFDatasetAdapter
from keras.src.trainers.data_adapters.torch_data_loader_adapter import TorchDataLoaderAdapter

from fastdp.data.ahead_guard import Guard, why_not_ahead
from fastdp.data.loaders import PrefetchedLoader, described, makes_new_batches, runs_no_code_of_users
from fastdp.keras.fit.array_batches import ArrayBatches
from fastdp.keras.fit.threaded import Threaded

# A thread costs more than to cut smaller batches out of arrays in memory.
LARGE_NBYTES = 1 << 20


@dataclass(slots=True)
class Source:
    """Where batches come from.

    Attributes:
        name: in words.
        by: how batches come where fastdp's thread does not read them; else None.
        guard: looks whether reading ahead leaves results as they are; None where no code of the user's runs.
        copies: whether a batch may be written again by the next one.
        generator: the user's generator, if that is what it is.
        new: whether batches are made of new arrays, which nobody else has.
        moves: whether Keras moves its batches to the default device; a DataLoader's stay where they are.
    """

    name: str
    by: str | None = None
    guard: Guard | None = None
    copies: bool = False
    generator: types.GeneratorType[Any, Any, Any] | None = None
    new: bool = False
    moves: bool = True


def source_of(adapter: Any, others: Sequence[Any]) -> Source:
    """What batches of one of Keras's data adapters come from.

    Args:
        adapter: it.
        others: callbacks, which run between the batches.
    """
    if isinstance(adapter, ArrayDataAdapter):
        return _of_arrays(adapter, others)
    if isinstance(adapter, PyDatasetAdapter):
        return _of_dataset(adapter, others)
    if isinstance(adapter, TorchDataLoaderAdapter):
        return _of_loader(adapter._dataloader, others)
    if isinstance(adapter, TFDatasetAdapter):
        return Source("a tf.data.Dataset")
    if isinstance(adapter, GeneratorDataAdapter):
        generator = _generator_of(adapter)
        name = described(generator) if generator is not None else "a generator"
        # Keras has taken the first batches before the first epoch.
        guard = _guard([adapter.generator, generator], others, NUM_BATCHES_FOR_TENSOR_SPEC)
        return Source(name, guard=guard, copies=True, generator=generator)
    data = getattr(adapter, "_dataset", adapter)
    return Source(described(data), guard=_guard([data], others), copies=True)


def _of_arrays(adapter: Any, others: Sequence[Any]) -> Source:
    if type(adapter) is not ArrayDataAdapter:
        return Source("a DeviceDataset", by=adapter.held)
    arrays = [one for one in keras.tree.flatten(adapter._inputs) if one is not None]
    rows = min(adapter._batch_size, adapter._num_samples)
    nbytes = sum(getattr(one, "nbytes", 0) for one in arrays) * rows // max(1, adapter._num_samples)
    if nbytes < LARGE_NBYTES:
        return Source("arrays in memory", by="cut when they are asked for, since a batch is below 1 MiB")
    why = why_not_ahead(arrays, others, arrays=True)
    return Source("arrays in memory", guard=Guard(why) if why else None)


def _of_loader(loader: Any, others: Sequence[Any]) -> Source:
    name = described(loader)
    if loader.num_workers:
        return Source(name, by=f"read ahead by its {loader.num_workers} worker processes", moves=False)
    if runs_no_code_of_users(loader):
        return Source(name, moves=False)
    return Source(name, guard=_guard([loader], others), copies=not makes_new_batches(loader), moves=False)


def _of_dataset(adapter: Any, others: Sequence[Any]) -> Source:
    data = adapter.py_dataset
    if isinstance(data, ArrayBatches):
        by = "read ahead by its own thread" if data.reading.count else "not read ahead"
        return Source("arrays of ArrayBatches", by=by, new=type(data) is ArrayBatches)
    inner = data._data if isinstance(data, Threaded) else data
    if adapter.enqueuer is not None:
        return Source(described(inner), by=f"read ahead by Keras's {data.workers} worker threads", copies=True)
    return Source(described(inner), guard=_guard([inner], others), copies=True)


def _guard(data: Sequence[Any], others: Sequence[Any], passed: int = 0) -> Guard:
    return Guard(why_not_ahead(data, others), passed, _keras_draws)


def _keras_draws() -> bytes:
    """The state of Keras's generator for layers and functions without a seed."""
    generator = global_state.get_global_attribute("global_seed_generator")
    return bytes(keras.ops.convert_to_numpy(generator.state.value)) if generator is not None else b""


# Generators that go on.

_inner: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = weakref.WeakKeyDictionary()
_held: weakref.WeakKeyDictionary[Any, Iterator[Any]] = weakref.WeakKeyDictionary()


def continued(data: Any) -> Any:
    """A user's generator as one that begins with the batches that were read ahead of an earlier loop and not used.

    Anything else comes back as it is; a `PrefetchedLoader` as its loader, which is read ahead here.
    """
    if isinstance(data, PrefetchedLoader):
        data = data.loader
    if not isinstance(data, types.GeneratorType):
        return data
    outer = _from(data)
    _inner[outer] = weakref.ref(data)
    return outer


def hold(generator: Any, batches: Iterable[Any], *, first: bool = True) -> None:
    """Keep batches for the next loop over this generator, before (`first`) or behind those that are kept already."""
    kept = _held.get(generator, ())
    _held[generator] = itertools.chain(batches, kept) if first else itertools.chain(kept, batches)


def _from(generator: Iterator[Any]) -> Iterator[Any]:
    """Held batches, then those of the generator, which stays open when this one is closed."""
    while True:
        for batch in _held.pop(generator, ()):
            yield tuple(batch) if isinstance(batch, list) else batch
        try:
            batch = next(generator)
        except StopIteration:
            return
        yield batch


def _generator_of(adapter: Any) -> Any:
    """The user's generator behind Keras's adapter."""
    make: Callable[..., Any] = adapter.generator
    cells = [cell.cell_contents for cell in make.__closure__ or ()]
    found = next((one for one in cells if isinstance(one, types.GeneratorType)), None)
    inner = _inner.get(found) if found is not None else None
    return inner() if inner is not None else found
