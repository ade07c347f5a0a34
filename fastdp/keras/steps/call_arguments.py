"""Finds out which arguments of a layer's call have the rows of the batch, and which all rows share.

An axis as long as the batch need not be rows: a mask of T x T, weights of classes, a buffer. So roles are not read off
lengths. `CallArguments.choices` lists what they may be, the likeliest first, and the layer is tried (see
`fastdp.program.keras.rows.call_probe`). What is found is kept by `key` and `lengths`, which have no number of rows in
them: a last batch or half a batch is known by the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import keras
import numpy as np
import torch

from fastdp.comm.batch import Batch
from fastdp.program.keras.batch import make_batch, pack_like

# For each tensor of a call, whether it is dealt out by rows.
Roles = tuple[bool, ...]

_TENSORS = (torch.Tensor, np.ndarray, keras.Variable)
_PLAIN = (type(None), bool, int, float, complex, str, bytes, np.generic, torch.dtype, np.dtype)
# What needs no walk through a tree.
_LEAVES = (*_TENSORS, *_PLAIN)
# Among more arguments of one length than that, not all ways to deal them out are tried.
_EVERY_WAY = 4


class CallArguments:
    """One call of a layer.

    Args:
        layer: called by `original(layer, *args, **kwargs)`.

    Attributes:
        tensors: the tensors, arrays and variables anywhere in the arguments, as tensors.
        key: what the call looks like, whatever its number of rows; equal for calls whose tensors have equal roles.
        kept: objects in the arguments that `key` knows by their identity, so that no other one gets it.
        symbolic: the call computes shapes, not numbers.
    """

    def __init__(self, layer: Any, original: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.layer, self._original = layer, original
        names = sorted(kwargs)
        leaves = [*args, *(kwargs[name] for name in names)]
        self._is_flat = all(isinstance(leaf, _LEAVES) for leaf in leaves)
        self._nest = (args, {name: kwargs[name] for name in names})
        self._leaves = leaves if self._is_flat else keras.tree.flatten(self._nest)
        self._places = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, _TENSORS)]
        self.symbolic = any(isinstance(leaf, keras.KerasTensor) for leaf in self._leaves)
        self.tensors = [keras.ops.convert_to_tensor(self._leaves[i]) for i in self._places]
        self.masks = [getattr(self._leaves[i], "_keras_mask", None) for i in self._places]
        self._sizes = [_size(tensor) for tensor in self.tensors]
        others = [leaf for i, leaf in enumerate(self._leaves) if i not in self._places]
        self.kept = [leaf for leaf in others if not isinstance(leaf, _PLAIN)]
        self.key = (
            id(layer),
            (len(args), *names) if self._is_flat else str(keras.tree.map_structure(type, self._nest)),
            *(repr(leaf) if isinstance(leaf, _PLAIN) else id(leaf) for leaf in others),
            *(
                (place, t.ndim, t.dtype, mask is None)
                for place, t, mask in zip(self._places, self.tensors, self.masks, strict=True)
            ),
        )

    @property
    def is_plain(self) -> bool:
        """Whether it gives the layer its inputs, and nothing more but the mode."""
        args, kwargs = self._nest
        return len(args) == 1 and not set(kwargs) - {"training"}

    @property
    def most_rows(self) -> int:
        """The longest first axis of a tensor: with less than two there is nothing to deal out."""
        return max((size for size in self._sizes if size is not None), default=0)

    @property
    def lengths(self) -> tuple[int | None, ...]:
        """Which tensors are equally long, by numbers that do not depend on how long; None for those without rows."""
        first = {size: number for number, size in reversed(list(enumerate(self._sizes))) if size is not None}
        return tuple(None if size is None or size == 1 else first[size] for size in self._sizes)

    def choices(self) -> Iterator[list[Roles]]:
        """The roles that the tensors may have, the likeliest first: one list for each number of rows."""
        for size in dict.fromkeys(size for size in self._sizes if size is not None and size > 1):
            group = [i for i, other in enumerate(self._sizes) if other == size]
            counts = range(len(group), 0, -1) if len(group) <= _EVERY_WAY else (len(group), len(group) - 1, 1)
            chosen = [rows for count in counts for rows in combinations(group, count)]
            yield [tuple(i in rows for i in range(len(self._sizes))) for rows in chosen]

    def unlike(self, roles: Roles) -> set[int]:
        """The tensors that are the same for all rows for sure: they are long, and not as long as the rows."""
        rows = next(size for size, by_rows in zip(self._sizes, roles, strict=True) if by_rows)
        return {i for i, size in enumerate(self._sizes) if size is not None and size not in (1, rows)}

    def plain(self) -> Any:
        """The call as plain Keras makes it."""
        args, kwargs = self._nest
        return self._original(self.layer, *args, **kwargs)

    def dealt(self, roles: Roles) -> DealtCall | None:
        """The call with these roles; None where a Keras mask does not fit the rows of its tensor."""
        rows = [i for i, by_rows in enumerate(roles) if by_rows]
        masked = [i for i in rows if self.masks[i] is not None]
        if any(_size(self.masks[i]) != self._sizes[i] for i in masked):
            return None
        tensors = [*(self.tensors[i] for i in rows), *(self.masks[i] for i in masked)]
        batch = make_batch(([tensor.detach() for tensor in tensors], None, None))
        shared = [i for i in range(len(roles)) if i not in rows]
        return DealtCall(self, rows, masked, shared, tensors, batch)

    def run(self, values: dict[int, torch.Tensor], masks: dict[int, torch.Tensor]) -> Any:
        """The call with other tensors and masks in the place of some."""
        leaves = list(self._leaves)
        for i, tensor in values.items():
            if i in masks:
                tensor._keras_mask = masks[i]
            leaves[self._places[i]] = tensor
        args, kwargs = self._packed(leaves)
        return self._original(self.layer, *args, **kwargs)

    def _packed(self, leaves: list[Any]) -> Any:
        """Leaves as the arguments of the call."""
        args, kwargs = self._nest
        if not self._is_flat:
            return pack_like(self._nest, leaves)
        return tuple(leaves[: len(args)]), dict(zip(kwargs, leaves[len(args) :], strict=True))


@dataclass(frozen=True)
class DealtCall:
    """A call whose tensors have roles.

    Attributes:
        tensors: those with rows, then the masks of these.
        batch: the same for the engine.
    """

    arguments: CallArguments
    _rows: list[int]
    _masked: list[int]
    _shared: list[int]
    tensors: list[torch.Tensor]
    batch: Batch

    @property
    def shared(self) -> list[torch.Tensor]:
        """The tensors that all rows share, as far as a replica has to have its own: NumPy arrays stay what they are."""
        return [self.arguments.tensors[i] for i in self._shared_tensors]

    @property
    def _shared_tensors(self) -> list[int]:
        leaves, places = self.arguments._leaves, self.arguments._places
        return [i for i in self._shared if not isinstance(leaves[places[i]], np.ndarray)]

    def on_rows(self, rows: Sequence[torch.Tensor], shared: Sequence[torch.Tensor]) -> Any:
        """The layer on these rows and their masks, and these shared tensors, on this thread."""
        count = len(self._rows)
        values = dict(zip(self._rows, rows[:count], strict=True)) | dict(zip(self._shared_tensors, shared, strict=True))
        masks = dict(zip(self._masked, rows[count:], strict=True))
        for i in self._shared_tensors:
            mask = self.arguments.masks[i]
            if mask is not None:
                masks[i] = mask.to(values[i].device)
        return self.arguments.run(values, masks)


def _size(tensor: torch.Tensor) -> int | None:
    """Entries along the first axis; None where there is none to deal out."""
    return tensor.shape[0] if tensor.ndim and tensor.layout == torch.strided and tensor.shape[0] else None
