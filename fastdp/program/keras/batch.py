"""Flattens Keras's nested batches and outputs into lists of arrays, and packs them again."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
import torch

from fastdp.comm.batch import Batch, ResidentArray
from fastdp.shard import Rows
from fastdp.tensors.arrays import as_array, as_tensor, dtype_name
from fastdp.tensors.row_effects import MEAN_SCALAR, ROWS_FIRST, Effect, Layout

# The nest of most batches: x, y and sample_weight, each one array or None. No tree walk is needed.
_PLAIN = (0, 0, 0)
_PARTS = ("x", "y", "sample_weight")
# The names of dtypes that need no conversion between torch and NumPy.
_NAMES = {
    dtype: dtype_name(torch.empty(0, dtype=dtype))
    for dtype in (torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool)
}
_ARRAY_OR_NONE = (torch.Tensor, np.ndarray, type(None))
_MOST_STRUCTURES = 64


@dataclass(frozen=True, slots=True)
class Structure:
    """How a flat list of arrays was nested. `dtypes[i]` is None if leaf i of the nest is None."""

    nest: Any
    dtypes: tuple[str | None, ...]

    @property
    def names(self) -> list[str]:
        """A readable name for each array of `(x, y, sample_weight)`, for messages."""
        names = []
        for label, part in zip(_PARTS, self.nest if isinstance(self.nest, tuple) else (self.nest,), strict=False):
            for path, _ in keras.tree.flatten_with_path(part) if keras.tree.is_nested(part) else [((), part)]:
                names.append(label + "".join(f"[{key!r}]" for key in path))
        return [name for name, dtype in zip(names, self.dtypes, strict=False) if dtype is not None]

    def pack(self, arrays: Sequence[np.ndarray], *, inputs: bool = True) -> Any:
        """Rebuild the nest with tensors that share the arrays' memory.

        Without `inputs` the leaves of `x` are None, which avoids fetching rows that are on the devices.
        """
        skipped = 0 if inputs else 1 if self.nest == _PLAIN else len(keras.tree.flatten(self.nest[0]))
        leaves = iter(arrays)
        tensors: list[Any] = []
        for place, dtype in enumerate(self.dtypes):
            array = None if dtype is None else next(leaves)
            tensors.append(None if array is None or place < skipped else as_tensor(array, dtype))
        return tuple(tensors) if self.nest == _PLAIN else pack_like(self.nest, tensors)

    def tensors(self, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """The arrays as a flat list of tensors that share their memory."""
        dtypes = [dtype for dtype in self.dtypes if dtype is not None]
        return [as_tensor(array, dtype) for array, dtype in zip(arrays, dtypes, strict=True)]

    def nested(self, tensors: Sequence[torch.Tensor]) -> Any:
        """Rebuild the nest with tensors as returned by `tensors`."""
        leaves = iter(tensors)
        return pack_like(self.nest, [None if dtype is None else next(leaves) for dtype in self.dtypes])


def pack_like(nest: Any, leaves: Sequence[Any]) -> Any:
    """Pack leaves, in the order of `keras.tree.flatten`, like `nest`.

    Keras flattens and packs dicts by sorted keys. A model may rely on the order in its user's code
    (`list(inputs.values())`), so dicts keep the order of `nest`.
    """
    packed = keras.tree.pack_sequence_as(nest, leaves)
    return keras.tree.map_structure(lambda _, leaf: leaf, nest, packed) if keras.tree.is_nested(nest) else packed


def make_batch(data: Any) -> Batch:
    """Make the engine's batch, with its `Structure`, of `(x, y, sample_weight)`.

    Raises:
        ValueError: no arrays, arrays without rows, or unequal numbers of rows; the message names them.
    """
    arrays, structure = flatten_batch(data)
    return Batch.of(arrays, structure, lambda: structure.names)


@functools.lru_cache(maxsize=_MOST_STRUCTURES)
def _plain_structure(dtypes: tuple[str | None, ...]) -> Structure:
    """The structure of three leaves, each an array or None: the same object for each batch."""
    return Structure(_PLAIN, dtypes)


def flatten_batch(data: Any) -> tuple[Any, Structure]:
    """Flatten a batch `(x, y, sample_weight)` into host arrays and their structure.

    Torch tensors and NumPy arrays on the host are not copied. Arrays of one batch of a data set on the devices stay
    there and are returned as that batch (`fastdp.comm.batch.Resident`).
    """
    arrays: list[np.ndarray] = []
    dtypes: list[str | None] = []
    plain = type(data) is tuple and len(data) == 3 and all([isinstance(part, _ARRAY_OR_NONE) for part in data])  # noqa: C419
    leaves = data if plain else keras.tree.flatten(data)
    present = [] if plain else [leaf for leaf in leaves if leaf is not None]
    resident = present[0].batch_of(present) if present and isinstance(present[0], ResidentArray) else None
    if resident is not None:
        flat = type(data) is tuple and len(data) == 3 and not any(map(keras.tree.is_nested, data))
        dtypes = [str(leaf.dtype) if leaf is not None else None for leaf in leaves]
        nest = _PLAIN if flat else keras.tree.map_structure(lambda _: 0, data)
        return resident, Structure(nest, tuple(dtypes))
    for leaf in leaves:
        if leaf is None:
            dtypes.append(None)
            continue
        name = _NAMES.get(leaf.dtype) if type(leaf) is torch.Tensor and leaf.is_cpu else None
        if name is not None and leaf.layout == torch.strided and not leaf.requires_grad:
            arrays.append(leaf.numpy())
            dtypes.append(name)
            continue
        tensor = leaf if isinstance(leaf, torch.Tensor) else _host_tensor(leaf)
        arrays.append(as_array(tensor))
        dtypes.append(dtype_name(tensor))
    if plain:
        return arrays, _plain_structure(tuple(dtypes))
    return arrays, Structure(keras.tree.map_structure(lambda _: 0, data), tuple(dtypes))


def _host_tensor(leaf: Any) -> torch.Tensor:
    """A NumPy array, or anything that Keras can convert, as a tensor in host memory."""
    with keras.device("cpu"):
        return keras.ops.convert_to_tensor(leaf)


@dataclass(frozen=True, slots=True)
class OutputStructure:
    """How a model's outputs were nested, which tensors had a Keras mask, and the leaves that are not tensors.

    `dtypes` and `masked` describe the tensors. `axes` holds the row axis of each tensor, then of each mask; replicas
    pass rows first, for the merge. None means that each replica has the whole value; `whole` holds the first replica's
    values of these. `plain` holds the place among all leaves and the value of the leaves that are not tensors: None,
    numbers, strings, NumPy arrays, objects. They are one replica's values.
    """

    nest: Any
    dtypes: tuple[str, ...]
    masked: tuple[bool, ...]
    axes: tuple[int | None, ...] = ()
    whole: tuple[torch.Tensor, ...] = ()
    plain: tuple[tuple[int, Any], ...] = ()

    def pack(self, arrays: Sequence[np.ndarray]) -> Any:
        """Rebuild the outputs over the merged arrays: all outputs, then all masks."""
        dtypes = [*self.dtypes, *("bool" for masked in self.masked if masked)]
        merged, whole = iter(arrays), iter(self.whole)
        every = [
            next(whole) if axis is None else _along(axis, as_tensor(next(merged), dtype))
            for axis, dtype in zip(self.axes, dtypes, strict=True)
        ]
        tensors, masks = every[: len(self.dtypes)], iter(every[len(self.dtypes) :])
        for tensor, masked in zip(tensors, self.masked, strict=True):
            if masked:
                tensor._keras_mask = next(masks)
        return self.nested(tensors)

    def nested(self, tensors: Sequence[Any]) -> Any:
        """Rebuild the nest with these values in place of the tensors."""
        return pack_like(self.nest, with_plain(tensors, self.plain))


def with_plain(tensors: Sequence[Any], plain: Sequence[tuple[int, Any]]) -> list[Any]:
    """All leaves in order: `tensors`, with the `plain` ones inserted at their places."""
    leaves = list(tensors)
    for place, value in plain:
        leaves.insert(place, value)
    return leaves


def split_leaves(outputs: Any) -> tuple[list[torch.Tensor], tuple[tuple[int, Any], ...]]:
    """The tensors among the leaves of outputs, and the place and value of every other leaf."""
    leaves = keras.tree.flatten(outputs)
    plain = tuple((i, leaf) for i, leaf in enumerate(leaves) if not isinstance(leaf, torch.Tensor))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)], plain


def _along(axis: int, tensor: torch.Tensor) -> torch.Tensor:
    """Move a tensor's first axis to another place."""
    return tensor.movedim(0, axis) if axis else tensor


def layouts_of(leaves: Sequence[torch.Tensor], known: Sequence[Layout] | None, rows: Rows | None) -> list[Layout]:
    """How a replica's outputs depend on its rows: as the trial has shown, or else along their first axis.

    If the replica has all rows, an output whose first axis is not a multiple of them is taken as the same for all rows.
    """
    if known is not None and len(known) == len(leaves):
        return list(known)
    found = []
    for leaf in leaves:
        if not leaf.ndim:
            found.append(MEAN_SCALAR)
        elif rows is not None and rows.count == rows.total and (not leaf.shape[0] or leaf.shape[0] % rows.count):
            found.append(Layout(Effect.SAME))
        else:
            found.append(ROWS_FIRST if rows is None else replace(ROWS_FIRST, per_row=leaf.shape[0] // rows.count))
    return found


def flatten_outputs(
    outputs: Any, known: Sequence[Layout] | None = None, rows: Rows | None = None
) -> tuple[list[torch.Tensor], OutputStructure]:
    """Split a model's outputs into tensors with rows first (outputs to be merged, then their masks) and structure.

    A zero-dim output becomes fp32, since NumPy lacks some dtypes; it is averaged over replicas by rows.

    Args:
        outputs: the outputs of a replica.
        known: how they depend on the rows, if known.
        rows: the replica's rows; None if every output is known to have rows first.
    """
    tensors, plain = split_leaves(outputs)
    leaves = [leaf.detach().float() if leaf.ndim == 0 else leaf for leaf in tensors]
    masks = [getattr(leaf, "_keras_mask", None) for leaf in leaves]
    layouts = layouts_of(leaves, known, rows)
    merged: list[torch.Tensor] = []
    whole: list[torch.Tensor] = []
    axes: list[int | None] = []
    of_masks = [(mask, layout) for mask, layout in zip(masks, layouts, strict=True) if mask is not None]
    for leaf, layout in [*zip(leaves, layouts, strict=True), *of_masks]:
        if layout.effect is Effect.SAME:
            axes.append(None)
            whole.append(leaf.detach().cpu().clone())
            continue
        axis = 0 if layout.axis is None else min(layout.axis, leaf.ndim - 1)
        axes.append(axis)
        if layout.effect is Effect.SUM and rows is not None:  # the mean of these is the sum
            leaf = leaf * (rows.total / rows.count)
        merged.append(leaf.movedim(axis, 0) if axis else leaf)
    structure = OutputStructure(
        keras.tree.map_structure(lambda _: 0, outputs),
        tuple(dtype_name(leaf) for leaf in leaves),
        tuple(mask is not None for mask in masks),
        tuple(axes),
        tuple(whole),
        plain,
    )
    return merged, structure


def unpack(data: Any) -> tuple[Any, Any, Any]:
    """x, y and sample_weight of a batch."""
    return keras.utils.unpack_x_y_sample_weight(data)
