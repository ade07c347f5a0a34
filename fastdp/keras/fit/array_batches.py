"""`ArrayBatches`: global batches of arrays that need not fit in memory, for `fit`, `evaluate` and `predict`."""

from __future__ import annotations

import math
import operator
import random
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray


class ArrayBatches(keras.utils.PyDataset):
    """Global batches of arrays. Each batch is read when it is needed.

    Args:
        x: inputs: one array, or a list, tuple or dict of arrays, as the model takes them. An array is
            anything with a `shape` that can be sliced by rows: `HDF5Matrix`, `h5py.Dataset`, NumPy,
            memory-mapped, torch. All arrays have the same number of rows. No array is copied or converted
            as a whole, except pandas columns.
        y: targets in the same form, or None.
        sample_weight: weights in the same form, or None; needs `y`.
        batch_size: rows of a global batch; the last batch may be smaller.
        shuffle: `True` draws a new permutation of all rows for each epoch, reads the rows of a batch in
            rising order and puts them in the drawn order. `"batch"` shuffles the order of whole batches:
            the rows of a batch stay together and in order, and an incomplete last batch stays last, so that
            each batch is one read. `False` keeps the order.
        seed: an int for the same order in each run; None draws one from Python's `random`, which
            `keras.utils.set_random_seed` seeds.
        **kwargs: `workers`, `use_multiprocessing`, `max_queue_size`, as for `keras.utils.PyDataset`.

    `batches[i]` is a tuple `(x,)`, `(x, y)` or `(x, y, sample_weight)` of new NumPy arrays that belong to
    the caller. Floating point arrays have the dtype `keras.config.floatx()`, as from Keras's own array
    input. The order depends only on seed and epoch. `on_epoch_end` starts the next epoch; Keras calls it
    after each epoch and once before the first.

    Pass `shuffle=False` to `fit` together with this object. Otherwise Keras shuffles the order of the
    batches once more, regardless of the `shuffle` given here.

    Raises:
        ValueError: the numbers of rows differ or are 0, `batch_size` is below 1, `shuffle` has another
            value, or `sample_weight` comes without `y`.
        TypeError: an entry of `x`, `y` or `sample_weight` is not an array, or `batch_size` is not an int.
        IndexError: the index is past the last batch.

    Example:
        >>> x, y = HDF5Matrix("train.h5", "x"), HDF5Matrix("train.h5", "y")
        >>> model.fit(ArrayBatches(x, y, batch_size=256, shuffle="batch"), shuffle=False, epochs=2)
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        batch_size: int = 32,
        shuffle: bool | str = True,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if sample_weight is not None and y is None:
            raise ValueError("y must be given along with sample_weight, got None: pass the targets")
        if shuffle not in (True, False, "batch"):
            raise ValueError(f'shuffle must be True, False or "batch", got {shuffle!r}: choose one of them')
        self.batch_size = operator.index(batch_size)
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}: pass the rows of a global batch")
        parts = {"x": x, "y": y, "sample_weight": sample_weight}
        self._arrays = tuple(_as_arrays(name, part) for name, part in parts.items() if part is not None)
        self.num_rows = _count_rows(parts.keys(), self._arrays)
        self.shuffle = "batch" if shuffle == "batch" else bool(shuffle)
        self.seed = random.getrandbits(63) if seed is None else operator.index(seed)
        self.epoch = 0
        self._order = self._draw_order()

    def __len__(self) -> int:
        return math.ceil(self.num_rows / self.batch_size)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be a batch from 0 to {len(self) - 1}, got {index}: see len()")
        index %= len(self)
        rows: slice | NDArray[np.int64]
        if self.shuffle is True:
            rows = self._order[index * self.batch_size : (index + 1) * self.batch_size]
        else:
            first = int(self._order[index]) * self.batch_size
            rows = slice(first, min(first + self.batch_size, self.num_rows))
        return tuple(keras.tree.map_structure(lambda array: _read(array, rows), part) for part in self._arrays)

    def on_epoch_end(self) -> None:
        """Start the next epoch, and draw its order."""
        self.epoch += 1
        self._order = self._draw_order()

    def state_dict(self) -> dict[str, int]:
        """What its order depends on, for `fastdp.callbacks.Checkpoint`."""
        return {"seed": self.seed, "epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on in the epoch in which `state_dict` was called, in its order."""
        self.seed, self.epoch = state["seed"], state["epoch"]
        self._order = self._draw_order()

    def _draw_order(self) -> NDArray[np.int64]:
        """Rows (`shuffle=True`) or batches (otherwise) in this epoch's order."""
        generator = np.random.default_rng((self.seed, self.epoch))
        if self.shuffle is True:
            return generator.permutation(self.num_rows)
        order = np.arange(len(self))
        if self.shuffle == "batch":
            generator.shuffle(order[: self.num_rows // self.batch_size])
        return order


def _as_arrays(name: str, part: Any) -> Any:
    """Check that each leaf of `part` is an array; pandas columns become NumPy arrays."""

    def check(leaf: Any) -> Any:
        leaf = leaf.to_numpy() if hasattr(leaf, "iloc") else leaf
        if not hasattr(leaf, "__getitem__") or not getattr(leaf, "shape", ()):
            raise TypeError(
                f"{name} must hold arrays with rows, got {type(leaf).__name__}: "
                "convert lists of numbers by np.asarray, and pass one array for each input or output"
            )
        return leaf

    return keras.tree.map_structure(check, part)


def _count_rows(names: Any, arrays: tuple[Any, ...]) -> int:
    """The number of rows that all arrays have."""
    counts = [[int(leaf.shape[0]) for leaf in keras.tree.flatten(part)] for part in arrays]
    distinct = {count for part in counts for count in part}
    if len(distinct) != 1 or 0 in distinct:
        found = ", ".join(f"{name}: {part}" for name, part in zip(names, counts, strict=False))
        raise ValueError(f"x, y and sample_weight must have the same number of rows, at least 1, got {found}")
    return distinct.pop()


def _read(array: Any, rows: slice | NDArray[np.int64]) -> NDArray[Any]:
    """Rows of one array as a new NumPy array; index lists are read in rising order."""
    order = None
    if not isinstance(rows, slice):
        order = np.argsort(rows)
        rows = rows[order]
    block = array[rows]
    block = keras.ops.convert_to_numpy(block) if keras.ops.is_tensor(block) else np.asarray(block)
    floatx = keras.config.floatx()
    dtype = floatx if np.issubdtype(block.dtype, np.floating) else block.dtype
    if order is None:
        return block.astype(dtype, copy=not block.flags.owndata)
    placed = np.empty(block.shape, dtype)
    placed[order] = block
    return placed
