"""`ArrayBatches`: global batches of arrays that need not fit in memory, for `fit`, `evaluate` and `predict`."""

from __future__ import annotations

import math
import operator
import random
import weakref
from collections.abc import Mapping
from typing import Any

import h5py
import keras
import numpy as np
from numpy.typing import NDArray

from fastdp.data.h5_rows import StoredRows
from fastdp.data.read_ahead import AHEAD, ReadAhead
from fastdp.data.row_order import WINDOW_CHUNKS, chunk_order
from fastdp.warn import warn_user

MANY_REPEATS = 4  # decoding each chunk so often in an epoch is told of


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
            each batch is one read. `"chunks"` mixes rows so that each chunk of an HDF5 file is read only once: chunks
            are permuted, and rows mixed in a window of 16 chunks (`fastdp.data.row_order`); where no array has chunks,
            the rows of a batch count as one. `False` keeps the order.
        seed: an int for the same order in each run; None draws one from Python's `random`, which
            `keras.utils.set_random_seed` seeds.
        ahead: batches that a thread reads ahead, in their order, if an array is not in memory; 0 reads none ahead. The
            normalizer of an HDF5Matrix runs in that thread. With `workers` above 1, Keras reads ahead.
        **kwargs: `workers`, `use_multiprocessing`, `max_queue_size`, as for `keras.utils.PyDataset`.

    `batches[i]` is a tuple `(x,)`, `(x, y)` or `(x, y, sample_weight)` of new NumPy arrays that belong to
    the caller. Floating point arrays have the dtype `keras.config.floatx()`, as from Keras's own array
    input. The order depends only on seed and epoch. `on_epoch_end` starts the next epoch; Keras calls it
    after each epoch and once before the first.

    Pass `shuffle=False` to `fit` together with this object. Otherwise Keras shuffles the order of the
    batches once more, regardless of the `shuffle` given here.

    Raises:
        ValueError: the numbers of rows differ or are 0, `batch_size` is below 1, `shuffle` has another
            value, `ahead` is negative, or `sample_weight` comes without `y`.
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
        ahead: int = AHEAD,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if sample_weight is not None and y is None:
            raise ValueError("y must be given along with sample_weight, got None: pass the targets")
        if shuffle not in (True, False, "batch", "chunks"):
            raise ValueError(f'shuffle must be True, False, "batch" or "chunks", got {shuffle!r}: choose one of them')
        if ahead < 0:
            raise ValueError(f"ahead must be at least 0, got {ahead}: pass how many batches are read ahead")
        self.batch_size = operator.index(batch_size)
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}: pass the rows of a global batch")
        parts = {"x": x, "y": y, "sample_weight": sample_weight}
        self._arrays = tuple(_as_arrays(name, part) for name, part in parts.items() if part is not None)
        self.num_rows = _count_rows(parts.keys(), self._arrays)
        self.shuffle = shuffle if isinstance(shuffle, str) else bool(shuffle)
        self.seed = random.getrandbits(63) if seed is None else operator.index(seed)
        self.epoch = 0
        self._chunks = self._find_chunks()
        self._order = self._draw_order()
        self._reading = self._read_ahead(ahead)

    def __len__(self) -> int:
        return math.ceil(self.num_rows / self.batch_size)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be a batch from 0 to {len(self) - 1}, got {index}: see len()")
        return self._reading.take(index % len(self), len(self))

    def _read_batch(self, index: int) -> tuple[Any, ...]:
        rows: slice | NDArray[np.int64]
        if self.shuffle in (True, "chunks"):
            rows = self._order[index * self.batch_size : (index + 1) * self.batch_size]
        else:
            first = int(self._order[index]) * self.batch_size
            rows = slice(first, min(first + self.batch_size, self.num_rows))
        return tuple(keras.tree.map_structure(lambda array: _read(array, rows), part) for part in self._arrays)

    def on_epoch_end(self) -> None:
        """Start the next epoch, and draw its order."""
        self.epoch += 1
        self._reading.forget()
        self._order = self._draw_order()

    def state_dict(self) -> dict[str, int]:
        """What its order depends on, for `fastdp.callbacks.Checkpoint`."""
        return {"seed": self.seed, "epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on in the epoch in which `state_dict` was called, in its order."""
        self.seed, self.epoch = state["seed"], state["epoch"]
        self._reading.forget()
        self._order = self._draw_order()

    def describe(self) -> list[dict[str, Any]]:
        """How each array that is read from a file is read: its name, and how."""
        named = zip(("x", "y", "sample_weight"), self._arrays, strict=False)
        return [
            {"array": name, "how": leaf.stored_part()[0].describe()}
            for name, part in named
            for leaf in keras.tree.flatten(part)
            if hasattr(leaf, "stored_part")
        ]

    @property
    def reading(self) -> ReadAhead[tuple[Any, ...]]:
        """What reads batches ahead, and counts how long `fit` waits for them."""
        return self._reading

    def _leaves(self) -> list[Any]:
        return [leaf for part in self._arrays for leaf in keras.tree.flatten(part)]

    def _read_ahead(self, ahead: int) -> ReadAhead[tuple[Any, ...]]:
        """Read ahead what is not in memory; Keras's workers read ahead themselves."""
        outside = any(isinstance(leaf, np.memmap) or hasattr(leaf, "chunks") for leaf in self._leaves())
        stored = [leaf.stored_part()[0] for leaf in self._leaves() if hasattr(leaf, "stored_part")]
        names = ", ".join(dict.fromkeys(repr(rows.path) for rows in stored)) or "the arrays"
        method = weakref.WeakMethod(self._read_batch)  # a cycle would leave the thread to the garbage collector

        def read(number: int) -> tuple[Any, ...]:
            bound = method()
            assert bound is not None
            return bound(number)

        return ReadAhead(read, ahead if (outside or stored) and self.workers <= 1 else 0, names)

    def _find_chunks(self) -> tuple[int, int, int]:
        """For `shuffle="chunks"`: rows of a chunk of the largest array, its row that is row 0 here, and the window."""
        parts = [leaf.stored_part() for leaf in self._leaves() if hasattr(leaf, "stored_part")]
        parts = [part for part in parts if part[0].chunk_rows > 1]
        if self.shuffle is True:
            _tell_of_repeats([rows for rows, _ in parts], self.batch_size)
        if self.shuffle != "chunks" or not parts:
            return self.batch_size, 0, WINDOW_CHUNKS
        rows, first = max(parts, key=lambda part: part[0].row_nbytes)
        return rows.chunk_rows, first, rows.keep_window(self.batch_size)

    def _draw_order(self) -> NDArray[np.int64]:
        """Rows (`shuffle=True`) or batches (otherwise) in this epoch's order."""
        generator = np.random.default_rng((self.seed, self.epoch))
        if self.shuffle is True:
            return generator.permutation(self.num_rows)
        if self.shuffle == "chunks":
            rows, first, window = self._chunks
            return chunk_order(self.num_rows, rows, generator, window, first)
        order = np.arange(len(self))
        if self.shuffle == "batch":
            generator.shuffle(order[: self.num_rows // self.batch_size])
        return order


def _as_arrays(name: str, part: Any) -> Any:
    """Check that each leaf of `part` is an array; pandas columns become NumPy arrays."""

    def check(leaf: Any) -> Any:
        leaf = leaf.to_numpy() if hasattr(leaf, "iloc") else leaf
        leaf = StoredRows(leaf, name) if isinstance(leaf, h5py.Dataset) else leaf
        if not hasattr(leaf, "__getitem__") or not getattr(leaf, "shape", ()):
            raise TypeError(
                f"{name} must hold arrays with rows, got {type(leaf).__name__}: "
                "convert lists of numbers by np.asarray, and pass one array for each input or output"
            )
        return leaf

    return keras.tree.map_structure(check, part)


def _tell_of_repeats(stored: list[StoredRows], batch_size: int) -> None:
    """Warn if a uniform order decodes chunks again and again."""
    for rows in stored:
        times = rows.reads_again(batch_size)
        if times >= MANY_REPEATS:
            warn_user(
                f"fastdp: shuffle=True decodes each chunk of {rows.name!r} in {rows.path!r} about {times:.0f} times an "
                f'epoch, since a chunk has {rows.chunk_rows} rows. Pass shuffle="chunks" to mix rows and decode each '
                "chunk once."
            )


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
    # A reader of chunks takes rows in any order; for other arrays a rising order is the faster one.
    if not isinstance(rows, slice) and not hasattr(array, "stored_part"):
        order = np.argsort(rows)
        rows = rows[order]
    block = array[rows]
    block = keras.ops.convert_to_numpy(block) if keras.ops.is_tensor(block) else np.asarray(block)
    floatx = keras.config.floatx()
    dtype = floatx if np.issubdtype(block.dtype, np.floating) else block.dtype
    if order is None:
        # Any other array may hand out the same memory again.
        new = block.flags.owndata and getattr(array, "new_rows", type(array) is np.ndarray)
        return block.astype(dtype, copy=not new)
    placed = np.empty(block.shape, dtype)
    placed[order] = block
    return placed
