"""The form of a replica's outputs: structure, values that are no tensors, dtypes, and shapes but for the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastdp.program.torch.nest import Nest
from fastdp.shard import Rows
from fastdp.tensors import pytree
from fastdp.tensors.row_effects import Effect, Layout


@dataclass(frozen=True, slots=True)
class OutputForm:
    """What is equal for the outputs of all replicas of a step.

    Args:
        nest: the structure of the outputs, with their dtypes.
        shapes: those of the tensors, with the number of entries per row in place of the rows.
    """

    nest: Nest
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, nest: Nest, tensors: Sequence[torch.Tensor], layouts: Sequence[Layout], rows: Rows) -> OutputForm:
        """The form of the outputs of a replica with these rows."""
        pairs = zip(tensors, layouts, strict=True)
        return cls(nest, tuple([_shape(tensor.shape, layout, rows) for tensor, layout in pairs]))

    def check(self, other: OutputForm) -> None:
        """Check that another replica's outputs have this form.

        Raises:
            ValueError: they have not.
        """
        if self == other:
            return
        mine, theirs = self._told(), other._told()
        name = next((name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)), "output")
        if name not in mine and name not in theirs:
            return  # values that are not equal to themselves
        raise ValueError(
            f"The outputs of the module must have one form on all devices. `{name}` is {mine.get(name, 'missing')} on "
            f"one and {theirs.get(name, 'missing')} on another, where one device has a single one for all rows. Return "
            "the same structure for any rows, with tensors for what depends on their values; pad to a length that is "
            "the same for all rows (pad_packed_sequence(..., total_length=x.shape[1])); or use gpus=[0]."
        )

    def _told(self) -> dict[str, str]:
        """What each output is, by its name."""
        texts = [
            f"{dtype} of shape {shape} (per row)" for dtype, shape in zip(self.nest.dtypes, self.shapes, strict=True)
        ]
        leaves = iter(self.nest.leaves)
        named = pytree.tree_flatten_with_path(self.nest.pack(texts))[0]
        tensors = [self.nest.is_hole(place) for place in range(len(self.nest.leaves))]
        return {
            "output" + pytree.keystr(path): value if is_tensor else repr(next_leaf)
            for (path, value), is_tensor, next_leaf in zip(named, tensors, leaves, strict=True)
        }


def _shape(shape: torch.Size, layout: Layout, rows: Rows) -> tuple[int, ...]:
    axis = layout.axis
    if layout.effect is not Effect.ROWS or axis is None or axis >= len(shape):
        return tuple(shape)
    return (*shape[:axis], shape[axis] // rows.count, *shape[axis + 1 :])
