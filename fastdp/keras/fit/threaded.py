"""Makes the workers of a data set threads: a process with device threads or CUDA must not be forked."""

from __future__ import annotations

from typing import Any

import keras

from fastdp.warn import warn_user


class Threaded(keras.utils.PyDataset):
    """Reads a `PyDataset` that requested worker processes with the same number of threads.

    Args:
        data: the user's data set; it is not changed.
    """

    def __init__(self, data: keras.utils.PyDataset) -> None:
        super().__init__(workers=data.workers, use_multiprocessing=False, max_queue_size=data.max_queue_size)
        self._data = data

    @property
    def num_batches(self) -> int | None:
        """The data set's number of batches; None if it is infinite."""
        return self._data.num_batches

    def __getitem__(self, index: int) -> Any:
        """A batch."""
        return self._data[index]

    def on_epoch_begin(self) -> None:
        """Call the data set's own."""
        self._data.on_epoch_begin()

    def on_epoch_end(self) -> None:
        """Call the data set's own."""
        self._data.on_epoch_end()


def without_forks(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `fit` and the like, with worker processes replaced by threads. Gives a UserWarning.

    Keras forks its worker processes and waits for them without a timeout. A forked child has no device threads,
    inherits locks that are never released, and must not use CUDA (keras-team/keras #11634, #10948).
    """
    changed = {}
    for name in ("x", "validation_data"):
        data = arguments.get(name)
        if isinstance(data, keras.utils.PyDataset) and data.use_multiprocessing and data.workers > 0:
            warn_user(
                f"`use_multiprocessing=True` of {name} would fork this process, and a forked child has no device "
                f"threads, so its {data.workers} workers run as threads instead. Pass use_multiprocessing=False."
            )
            changed[name] = Threaded(data)
    return {**arguments, **changed}
