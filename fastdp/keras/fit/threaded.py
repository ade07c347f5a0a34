"""Makes the workers of a data set threads: a process with device threads or CUDA must not be forked."""

from __future__ import annotations

from typing import Any

import keras

from fastdp.warn import warn_user


class Threaded(keras.utils.PyDataset):
    """A `PyDataset` that asked for worker processes, read by as many threads.

    Args:
        data: the user's data set; it is not changed.
    """

    def __init__(self, data: keras.utils.PyDataset) -> None:
        super().__init__(workers=data.workers, use_multiprocessing=False, max_queue_size=data.max_queue_size)
        self._data = data

    @property
    def num_batches(self) -> int | None:
        """As the data set says; None for one without an end."""
        return self._data.num_batches

    def __getitem__(self, index: int) -> Any:
        """A batch."""
        return self._data[index]

    def on_epoch_begin(self) -> None:
        """Hand it on."""
        self._data.on_epoch_begin()

    def on_epoch_end(self) -> None:
        """Hand it on."""
        self._data.on_epoch_end()


def without_forks(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `fit` and its like, with threads in the place of worker processes; said by a UserWarning.

    Keras forks its worker processes and waits for them without a time limit: a forked child has none of the device
    threads, holds locks that nobody will release, and may not touch CUDA (keras-team/keras #11634, #10948).
    """
    changed = {}
    for name in ("x", "validation_data"):
        data = arguments.get(name)
        if isinstance(data, keras.utils.PyDataset) and data.use_multiprocessing and data.workers > 0:
            warn_user(
                f"`use_multiprocessing=True` of {name} would fork this process, whose device threads do not live on in "
                f"a child: its {data.workers} workers are threads instead. Say use_multiprocessing=False."
            )
            changed[name] = Threaded(data)
    return {**arguments, **changed}
