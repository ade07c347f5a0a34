"""Fetches the next batch of `fit` and sends its rows to the GPUs while a step runs."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import torch
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter

from fastdp.engine.data_parallel import DataParallel
from fastdp.program.keras.batch import Structure, flatten_batch, unpack

Flat = tuple[list[np.ndarray], Structure]


class Prefetch:
    """The batches of one `fit`, of which one is fetched ahead within an epoch.

    Args:
        epochs: Keras's iterator over the epochs of this `fit`; its batches go through here from now on.

    A data set is asked for its next batch in the middle of a step, never for one beyond the epoch. What it raises then
    is raised where Keras asks for that batch. A data set may overwrite the tensors of its last batch when it is asked
    for the next: batches of a user's data set are copied as they come, those of arrays are copies already.
    """

    def __init__(self, epochs: Any) -> None:
        self._epochs = weakref.ref(epochs)
        self._current: _Batches | None = None
        self._copies = not isinstance(epochs.data_adapter, ArrayDataAdapter)
        self._flat: tuple[Any, Flat] | None = None
        begin = _beginning(epochs)
        epochs._get_iterator = lambda: self._follow(begin())

    def flat(self, data: Any) -> Flat:
        """The batch as arrays: those that were staged, if it is the one that was fetched ahead."""
        known, self._flat = self._flat, None
        if known is not None and known[0] is data:
            return known[1]
        return flatten_batch(unpack(data))

    def advance(self, engine: DataParallel) -> None:
        """Fetch the next batch, if this epoch has one, and begin to copy its rows. In the middle of a step."""
        batches, epochs = self._current, self._epochs()
        if batches is None or epochs is None or not batches.fetch(epochs.steps_per_epoch, epochs._num_batches):
            return
        data = batches.fetched
        # What is wrong with a batch its own step finds and tells.
        with contextlib.suppress(TypeError, ValueError):
            flat = flatten_batch(unpack(data))
            engine.stage(flat[0])
            self._flat = data, flat

    def end(self, engine: DataParallel | None) -> None:
        """What was fetched and not taken is dropped: `fit` is over."""
        fetched = self._flat is not None
        self._current = self._flat = None
        if fetched and engine is not None:
            engine.forget_staged()

    def _follow(self, batches: Any) -> _Batches:
        self._current = _Batches(iter(batches), self._copies)
        return self._current


def in_host_memory(epochs: Any) -> None:
    """Let Keras's iterator over epochs make its tensors in host memory, from where each GPU gets its own rows.

    Keras would copy each batch to its own default device, the first GPU, and the engine back from there. Once for an
    iterator: Keras keeps that of the validation data.
    """
    if getattr(epochs, "_fastdp_in_host_memory", False):
        return
    epochs._fastdp_in_host_memory = True
    begin = _beginning(epochs)
    epochs._get_iterator = lambda: _fetched_on_host(iter(begin()))


def _beginning(epochs: Any) -> Callable[[], Any]:
    """`epochs._get_iterator`, for one who replaces it. It keeps `epochs` alive no longer than its owner does.

    In a cycle the iterator over the data would be left to the garbage collector, which may come in the middle of a step
    on a device's thread: there the iterator of a torch DataLoader waits five seconds for each of its worker processes.
    """
    replaced: Callable[[], Any] | None = vars(epochs).get("_get_iterator")
    if replaced is not None:
        return replaced
    begin, owner = type(epochs)._get_iterator, weakref.ref(epochs)
    return lambda: begin(owner())


def _fetched_on_host(batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches, each fetched while the host is Keras's device."""
    end = object()
    while True:
        with keras.device("cpu"):
            data = next(batches, end)
        if data is end:
            return
        yield data


class _Batches:
    """Keras's iterator over batches, which may hold the next one already, or what fetching it raised."""

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
        """Fetch the next batch if the epoch has one: of its steps, and of `count` in all, where those are known."""
        over = (steps_per_epoch and self._taken % steps_per_epoch == 0) or (count and self._taken >= count)
        if self._holds or over:
            return False
        self._holds = True
        try:
            self.fetched = self._next()
        # Whatever it is, Keras's loop gets it where it asks for this batch.
        except BaseException as error:  # noqa: BLE001
            self._error = error
        return self._error is None

    def _next(self) -> Any:
        data = next(self._batches)
        return keras.tree.map_structure(_copy, data) if self._copies else data


def _copy(leaf: Any) -> Any:
    """An array in host memory of its own; anything else as it is."""
    if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided and not leaf.is_cuda:
        return leaf.clone()
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf
