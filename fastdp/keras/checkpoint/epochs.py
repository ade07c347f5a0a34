"""The batches of Keras's `fit`: where the loop is in them, and the same ones again after a restart."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import CodeType
from typing import Any

import keras
import torch
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter
from keras.src.trainers.data_adapters.py_dataset_adapter import PyDatasetAdapter
from keras.src.trainers.data_adapters.torch_data_loader_adapter import TorchDataLoaderAdapter

from fastdp.checkpoint.generators import read_generators, write_generators
from fastdp.checkpoint.order import own_generators
from fastdp.keras.fit.threaded import Threaded
from fastdp.warn import warn_user


class FitLoop:
    """The loop of one `fit`, watched. Keras gives callbacks no way to its data, so they are found in its frame.

    Args:
        model: the model that trains.
        before_batch: called in each epoch before the first batch, with 0, and before each further one with the number
            of batches that are done. With several steps per execution: before each execution. All callbacks that look
            at batches have seen those before by then.

    `latest` is the number of batches of the latest execution.

    Raises:
        RuntimeError: `model.fit` is not running.
    """

    def __init__(self, model: keras.Model, before_batch: Callable[[int], None]) -> None:
        epochs, self.callbacks, self.code = _running_fit(model)
        self._epochs = weakref.ref(epochs)
        self._before_batch = before_batch
        self._taken = self.latest = 0
        self._begin: dict[str, Any] = self._read()
        self._resumed: tuple[int, Mapping[str, Any], Callable[[int], None]] | None = None
        epochs._get_iterator = self._noting(vars(epochs).get("_get_iterator"))
        epochs._enumerate_iterator = self._enumerate

    def state_dict(self) -> dict[str, Any]:
        """What the same batches need to come again."""
        return {"taken": self._taken, **self._begin}

    def resume(self, batch: int, state: Mapping[str, Any], then: Callable[[int], None]) -> None:
        """Have the next epoch go on after `batch` batches, and call `then` with their number.

        Args:
            batch: how many of the epoch are done.
            state: what `state_dict` has returned before the next one.
            then: sets everything else, right before the next one. Gets 0 where the epoch must begin anew.
        """
        if batch and (why := _why_not_again(self._epochs())):
            warn_user(
                f"The checkpoint was made after {batch} batches of an epoch, and {why}. The epoch begins anew, with "
                "the weights of then."
            )
            batch, state = 0, {**state, "taken": 0}
        self._resumed = batch, state, then

    def _noting(self, replaced: Callable[[], Any] | None) -> Callable[[], Any]:
        """Keras's `_get_iterator`, which notes the generators' states before the order of the data is drawn."""

        def get_iterator() -> Any:
            epochs: Any = self._epochs()
            self._begin, self._taken = self._read(), 0
            return replaced() if replaced is not None else type(epochs)._get_iterator(epochs)

        return get_iterator

    def _enumerate(self) -> Iterator[Any]:
        """Keras's own enumeration of an epoch's batches, with a look before each of them."""
        epochs = self._epochs()
        assert epochs is not None
        resumed, self._resumed = self._resumed, None
        done = 0
        if resumed is not None:
            done, state, then = resumed
            self._repeat(epochs, state, done)
        batches = type(epochs)._enumerate_iterator(epochs)
        for _ in range(0, done, epochs.steps_per_execution):
            _, _, iterator = next(batches)
            for _ in range(epochs.steps_per_execution):
                self._take(iterator)
        if resumed is not None:
            then(done)
        else:
            self._before_batch(0)
        for begin, end, iterator in batches:
            if begin > done:
                self._before_batch(begin)
            self.latest = 0
            yield begin, end, self._counted(iterator)

    def _counted(self, iterator: Iterator[Any]) -> Iterator[Any]:
        """The batches of an execution, counted as Keras takes them."""
        for data in iterator:
            self._taken += 1
            self.latest += 1
            yield data

    def _repeat(self, epochs: Any, state: Mapping[str, Any], done: int) -> None:
        """Set the generators to where the order was drawn. An iterator over several epochs begins with those before."""
        write_generators(state["generators"])
        for generator, values in zip(_own(epochs), state["own"], strict=False):
            generator.set_state(values)
        data = _stateful_data(epochs)
        if data is not None and state["data"] is not None:
            data.load_state_dict(state["data"])
        if epochs.steps_per_epoch is not None and state["taken"]:
            epochs._current_iterator = iter(epochs._get_iterator())
            epochs._steps_seen = state["taken"] - done
            for _ in range(state["taken"] - done):
                self._take(epochs._current_iterator)

    def _take(self, iterator: Iterator[Any]) -> None:
        """Fetch a batch that is done, and drop it.

        Raises:
            ValueError: there is none.
        """
        try:
            next(iterator)
        except StopIteration:
            raise ValueError(
                f"`x` has {self._taken} batches, and the checkpoint was made after more of them: it is other data than "
                "before, or is cut into other batches."
            ) from None
        self._taken += 1

    def _read(self) -> dict[str, Any]:
        epochs = self._epochs()
        data = _stateful_data(epochs)
        return {
            "generators": read_generators(),
            "own": [generator.get_state() for generator in _own(epochs)],
            "data": data.state_dict() if data is not None else None,
        }


def _running_fit(model: keras.Model) -> tuple[Any, list[keras.callbacks.Callback], CodeType]:
    """The iterator over epochs and the callbacks of the `fit` that calls, and its code."""
    frame = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals
        if frame.f_code.co_name == "fit" and found.get("self") is model and "epoch_iterator" in found:
            return found["epoch_iterator"], found["callbacks"].callbacks, frame.f_code
        frame = frame.f_back  # type: ignore[assignment]
    raise RuntimeError(
        "fastdp.callbacks.Checkpoint works in Keras's own `fit`, with whose data it goes on. In a loop of your own, "
        "use fastdp.Checkpoint(folder, model=model, ...)."
    )


def _dataset(epochs: Any) -> Any:
    """The user's `PyDataset`; None where the data are something else."""
    if not isinstance(epochs.data_adapter, PyDatasetAdapter):
        return None
    data = epochs.data_adapter.py_dataset
    return data._data if isinstance(data, Threaded) else data


def _stateful_data(epochs: Any) -> Any:
    """The user's data set, if it can tell and set its state."""
    data = _dataset(epochs)
    return data if hasattr(data, "state_dict") and hasattr(data, "load_state_dict") else None


def _own(epochs: Any) -> list[Any]:
    """The generators that a DataLoader has for itself."""
    adapter = epochs.data_adapter
    return own_generators(adapter._dataloader) if isinstance(adapter, TorchDataLoaderAdapter) else []


def _why_not_again(epochs: Any) -> str | None:
    """Why the batches of an epoch cannot come again; None where they can."""
    adapter = epochs.data_adapter
    if isinstance(adapter, ArrayDataAdapter):
        return None
    if isinstance(adapter, TorchDataLoaderAdapter):
        iterable = isinstance(adapter._dataloader.dataset, torch.utils.data.IterableDataset)
        return "a DataLoader of an IterableDataset does not tell where it is" if iterable else None
    data = _dataset(epochs)
    if data is None:
        return "data of this kind (a generator, or tf.data) do not tell where they are"
    base = keras.utils.PyDataset
    changes = type(data).on_epoch_end is not base.on_epoch_end or type(data).on_epoch_begin is not base.on_epoch_begin
    if changes and _stateful_data(epochs) is None:
        return (
            f"the data set {type(data).__name__} changes from epoch to epoch, and has no `state_dict` and "
            "`load_state_dict` that say how"
        )
    return None
