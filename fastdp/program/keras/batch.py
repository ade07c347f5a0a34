"""Flattens Keras's nested batches and outputs into lists of arrays, and packs them again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
import torch

from fastdp.comm.batch import Batch, ResidentArray
from fastdp.program.keras.rows.effects import MEAN_SCALAR, ROWS_FIRST, Effect, Layout
from fastdp.shard import Rows
from fastdp.tensors.arrays import as_array, as_tensor, dtype_name

# The nest of most batches: x, y and sample_weight, each one array or None. It needs no walk through the tree.
_PLAIN = (0, 0, 0)
_PARTS = ("x", "y", "sample_weight")
_ARRAY_OR_NONE = (torch.Tensor, np.ndarray, type(None))


@dataclass(frozen=True, slots=True)
class Structure:
    """How a flat list of arrays was nested: `dtypes[i]` is None where the nest held None."""

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
        """The nest again, with tensors that share the arrays' memory.

        Without `inputs` there is None for those of `x`: rows that are on the devices are fetched for whoever looks.
        """
        skipped = 0 if inputs else 1 if self.nest == _PLAIN else len(keras.tree.flatten(self.nest[0]))
        leaves = iter(arrays)
        tensors: list[Any] = []
        for place, dtype in enumerate(self.dtypes):
            array = None if dtype is None else next(leaves)
            tensors.append(None if array is None or place < skipped else as_tensor(array, dtype))
        return tuple(tensors) if self.nest == _PLAIN else pack_like(self.nest, tensors)

    def tensors(self, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """The arrays as tensors that share their memory, as flat as they are."""
        dtypes = [dtype for dtype in self.dtypes if dtype is not None]
        return [as_tensor(array, dtype) for array, dtype in zip(arrays, dtypes, strict=True)]

    def nested(self, tensors: Sequence[torch.Tensor]) -> Any:
        """Such tensors in the nest."""
        leaves = iter(tensors)
        return pack_like(self.nest, [None if dtype is None else next(leaves) for dtype in self.dtypes])


def pack_like(nest: Any, leaves: Sequence[Any]) -> Any:
    """Leaves, as `keras.tree.flatten` gives them, in the nest again.

    Keras flattens dicts by sorted keys, and packs them so too. A model may go by the order that its user wrote
    (`list(inputs.values())`), so dicts keep that of `nest`.
    """
    packed = keras.tree.pack_sequence_as(nest, leaves)
    return keras.tree.map_structure(lambda _, leaf: leaf, nest, packed) if keras.tree.is_nested(nest) else packed


def make_batch(data: Any) -> Batch:
    """A batch `(x, y, sample_weight)` as the engine takes it, with its `Structure`.

    Raises:
        ValueError: no arrays, arrays without rows, or with unequal numbers of rows; the message names them.
    """
    arrays, structure = flatten_batch(data)
    return Batch.of(arrays, structure, lambda: structure.names)


def flatten_batch(data: Any) -> tuple[Any, Structure]:
    """A batch `(x, y, sample_weight)` as host arrays and their structure.

    Torch tensors and NumPy arrays on the host are not copied. Arrays of one batch of a data set that is on the devices
    stay there: they come as such a batch (`fastdp.comm.batch.Resident`).
    """
    arrays: list[np.ndarray] = []
    dtypes: list[str | None] = []
    plain = type(data) is tuple and len(data) == 3 and all(isinstance(part, _ARRAY_OR_NONE) for part in data)
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
        tensor = leaf if isinstance(leaf, torch.Tensor) else _host_tensor(leaf)
        arrays.append(as_array(tensor))
        dtypes.append(dtype_name(tensor))
    return arrays, Structure(_PLAIN if plain else keras.tree.map_structure(lambda _: 0, data), tuple(dtypes))


def _host_tensor(leaf: Any) -> torch.Tensor:
    """A NumPy array, or whatever Keras takes for one, as a tensor in host memory."""
    with keras.device("cpu"):
        return keras.ops.convert_to_tensor(leaf)


@dataclass(frozen=True, slots=True)
class OutputStructure:
    """How a model's outputs were nested, which of them carried a Keras mask, and those that are no tensors.

    `dtypes` and `masked` are of the tensors. `axes` tells along which axis each of them, and then each mask, has its
    rows: the outputs of replicas are merged along their first. None stands for one that each replica has whole; `whole`
    are the first replica's own of these. `plain` has the place among all leaves, and the value, of the leaves that are
    no tensors: None, numbers, strings, NumPy arrays, objects. They are those of one replica.
    """

    nest: Any
    dtypes: tuple[str, ...]
    masked: tuple[bool, ...]
    axes: tuple[int | None, ...] = ()
    whole: tuple[torch.Tensor, ...] = ()
    plain: tuple[tuple[int, Any], ...] = ()

    def pack(self, arrays: Sequence[np.ndarray]) -> Any:
        """Tensors over the merged arrays, with their masks; first all outputs, then all masks."""
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
        """These for the tensors, and the other leaves, in the nest."""
        return pack_like(self.nest, with_plain(tensors, self.plain))


def with_plain(tensors: Sequence[Any], plain: Sequence[tuple[int, Any]]) -> list[Any]:
    """All leaves in their order: `tensors`, and among them, at their places, those that are none."""
    leaves = list(tensors)
    for place, value in plain:
        leaves.insert(place, value)
    return leaves


def split_leaves(outputs: Any) -> tuple[list[torch.Tensor], tuple[tuple[int, Any], ...]]:
    """The tensors among the leaves of outputs, and the place and value of each leaf that is none."""
    leaves = keras.tree.flatten(outputs)
    plain = tuple((i, leaf) for i, leaf in enumerate(leaves) if not isinstance(leaf, torch.Tensor))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)], plain


def _along(axis: int, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whose first axis becomes another."""
    return tensor.movedim(0, axis) if axis else tensor


def layouts_of(leaves: Sequence[torch.Tensor], known: Sequence[Layout] | None, rows: Rows | None) -> list[Layout]:
    """How a replica's outputs lie over its rows: as the trial has shown, or by their first axis.

    Where one replica has all rows, what is no multiple of them is whole.
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
    """A model's outputs that are merged by rows, followed by their masks, as tensors with rows first; and the rest.

    An output without axes is averaged over replicas by rows, as numbers: one of a dtype that NumPy lacks becomes fp32.

    Args:
        outputs: a replica's.
        known: how they depend on the rows, where that is known.
        rows: the replica's; None where each output is known to have rows first.
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
