"""Fetches the next batch of `fit` and sends its rows to the GPUs while a step runs."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import torch
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter
from keras.src.trainers.data_adapters.py_dataset_adapter import PyDatasetAdapter

from fastdp.comm.batch import Batch
from fastdp.engine.data_parallel import DataParallel
from fastdp.keras.fit.array_batches import ArrayBatches
from fastdp.keras.fit.feeding import Feed, beginning
from fastdp.program.keras.batch import make_batch, unpack
from fastdp.program.keras.layer_calls import CallProgram


class Prefetch:
    """The batches of one `fit`. Within an epoch, one batch is fetched ahead.

    Args:
        epochs: Keras's iterator over the epochs of this `fit`. From now on its batches pass through this object.

    The next batch is fetched in the middle of a step, but never one beyond the epoch. An error of the data set is
    raised when Keras requests that batch. A data set may reuse the tensors of its last batch for the next one, so
    batches of a user's data set are copied; batches of arrays are copies already.
    """

    def __init__(self, epochs: Any) -> None:
        self._epochs = weakref.ref(epochs)
        self._current: _Batches | None = None
        self._feed: Feed | None = getattr(epochs, "_fastdp_feed", None)
        self._copies = not (self._feed is not None and self._feed.owns) and not _gives_new_arrays(epochs.data_adapter)
        self._fetched: tuple[Any, Batch] | None = None
        begin = beginning(epochs)
        epochs._get_iterator = lambda: self._follow(begin())

    def batch_of(self, data: Any) -> Batch:
        """The batch for the engine; the staged batch if it was fetched ahead.

        Raises:
            ValueError: from `make_batch`.
        """
        known, self._fetched = self._fetched, None
        if known is not None and known[0] is data:
            return known[1]
        return make_batch(unpack(data))

    def advance(self, engine: DataParallel[CallProgram], following: Any = None) -> None:
        """Fetch the epoch's next batch, if there is one, and start to copy its rows. Called in the middle of a step.

        Args:
            following: the next batch, if Keras has fetched it already.
        """
        data = following if following is not None else self._fetch()
        if data is None:
            return
        # An invalid batch raises in its own step.
        with contextlib.suppress(TypeError, ValueError):
            batch = make_batch(unpack(data))
            engine.stage(batch)
            self._fetched = data, batch

    def _fetch(self) -> Any:
        """The epoch's next batch; None without one."""
        batches, epochs = self._current, self._epochs()
        if batches is None or epochs is None or not batches.fetch(epochs.steps_per_epoch, epochs._num_batches):
            return None
        return batches.fetched

    def end(self, engine: DataParallel[CallProgram] | None) -> None:
        """Drop a batch that was fetched and not used, at the end of `fit`."""
        fetched = self._fetched is not None
        if self._feed is not None and self._current is not None and self._current.fetched is not None:
            self._feed.give_back(self._current.fetched)
        self._current = self._fetched = None
        if fetched and engine is not None:
            engine.forget_staged()

    def _follow(self, batches: Any) -> _Batches:
        self._current = _Batches(iter(batches), self._copies)
        return self._current


def _gives_new_arrays(adapter: Any) -> bool:
    """Whether each batch of Keras's adapter is made of new arrays, which nobody writes again."""
    if isinstance(adapter, PyDatasetAdapter):
        return isinstance(adapter.py_dataset, ArrayBatches)
    return isinstance(adapter, ArrayDataAdapter)


class _Batches:
    """Keras's iterator over batches. It may already hold the next batch, or the error that fetching it raised."""

    def __init__(self, batches: Iterator[Any], copies: bool) -> None:
        self._batches = batches
        self._copies = copies
        self._taken = 0
        self._error: BaseException | None = None
        self._holds = False
        self.fetched: Any = None

    def __iter__(self) -> _Batches:
        return self

    def __next__(self) -> Any:
        """The next batch."""
        if not self._holds:
            data = self._next()
        else:
            data, self.fetched, self._holds = self.fetched, None, False
            error, self._error = self._error, None
            if error is not None:
                raise error
        self._taken += 1
        return data

    def fetch(self, steps_per_epoch: int | None, count: int | None) -> bool:
        """Fetch the next batch, unless the epoch's steps or the `count` batches in total (if known) are used up."""
        over = (steps_per_epoch and self._taken % steps_per_epoch == 0) or (count and self._taken >= count)
        if self._holds or over:
            return False
        self._holds = True
        try:
            self.fetched = self._next()
        # Any error is raised in Keras's loop when it requests this batch.
        except BaseException as error:  # noqa: BLE001
            self._error = error
        return self._error is None

    def _next(self) -> Any:
        data = next(self._batches)
        return keras.tree.map_structure(_copy, data) if self._copies else data


def _copy(leaf: Any) -> Any:
    """A copy of an array in host memory; anything else unchanged."""
    if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided and not leaf.is_cuda:
        return leaf.clone()
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf
