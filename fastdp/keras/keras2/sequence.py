"""`Sequence`: the base of Keras 2's data sets that return one batch an index."""

from __future__ import annotations

from typing import Any

import keras


class Sequence(keras.utils.PyDataset):
    """Base class of data sets that return one batch per index: `keras.utils.PyDataset`, also for Keras 2 code.

    A subclass has `__len__`, the number of batches, and `__getitem__(i)`, which returns a tuple `(x,)`,
    `(x, y)` or `(x, y, sample_weight)` of arrays with the rows of global batch `i`. It may have
    `on_epoch_end`. Its `__init__` need not call `super().__init__()`, which Keras 3 requires, but may call it
    to set `workers`, `use_multiprocessing` and `max_queue_size`.

    Example:
        >>> class Squares(Sequence):
        ...     def __init__(self, x):
        ...         self.x = x
        ...     def __len__(self):
        ...         return len(self.x) // 32
        ...     def __getitem__(self, i):
        ...         x = self.x[32 * i : 32 * (i + 1)]
        ...         return x, x**2
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        instance = super().__new__(cls)
        keras.utils.PyDataset.__init__(instance)
        return instance
