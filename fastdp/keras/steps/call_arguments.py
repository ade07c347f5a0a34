"""Finds out which arguments of a layer's call have the rows of the batch, and which all rows share.

An axis as long as the batch need not hold its rows: it may belong to a T x T mask, to class weights or to a buffer. So
lengths alone do not decide the roles. `CallArguments.choices` lists the possible roles, the likeliest first, and the
layer is tried with them (see `fastdp.program.keras.rows.call_probe`). Results are cached by `key` and `lengths`, which
do not contain the number of rows, so a shorter last batch reuses the result of a full one.
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

# For each tensor of a call, whether it is split by rows.
Roles = tuple[bool, ...]

_TENSORS = (torch.Tensor, np.ndarray, keras.Variable)
_PLAIN = (type(None), bool, int, float, complex, str, bytes, np.generic, torch.dtype, np.dtype)
# Leaves: arguments of these types alone need no walk through a tree.
_LEAVES = (*_TENSORS, *_PLAIN)
# With more arguments of one length than this, only some of the ways to split them are tried.
_EVERY_WAY = 4


class CallArguments:
    """One call of a layer.

    Args:
        layer: called as `original(layer, *args, **kwargs)`.

    Attributes:
        tensors: the tensors, arrays and variables anywhere in the arguments, as tensors.
        key: identifies the kind of call, regardless of its number of rows: calls with equal keys have equal roles.
        kept: argument objects that `key` holds by id, kept alive so that no other object gets that id.
        symbolic: whether the call computes shapes, not numbers.
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
        """Whether the call passes only the layer's inputs, and possibly `training`."""
        args, kwargs = self._nest
        return len(args) == 1 and not set(kwargs) - {"training"}

    @property
    def most_rows(self) -> int:
        """The longest first axis of a tensor; below two there is nothing to split."""
        return max((size for size in self._sizes if size is not None), default=0)

    @property
    def lengths(self) -> tuple[int | None, ...]:
        """Which tensors have equal lengths, as group numbers independent of the length; None for those without rows."""
        first = {size: number for number, size in reversed(list(enumerate(self._sizes))) if size is not None}
        return tuple(None if size is None or size == 1 else first[size] for size in self._sizes)

    def choices(self) -> Iterator[list[Roles]]:
        """The possible roles of the tensors, the likeliest first: one list for each number of rows."""
        for size in dict.fromkeys(size for size in self._sizes if size is not None and size > 1):
            group = [i for i, other in enumerate(self._sizes) if other == size]
            counts = range(len(group), 0, -1) if len(group) <= _EVERY_WAY else (len(group), len(group) - 1, 1)
            chosen = [rows for count in counts for rows in combinations(group, count)]
            yield [tuple(i in rows for i in range(len(self._sizes))) for rows in chosen]

    def unlike(self, roles: Roles) -> set[int]:
        """The tensors that all rows certainly share: their length is neither 1 nor the number of rows."""
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
        """Make the call with the given tensors and masks in place of its own."""
        leaves = list(self._leaves)
        for i, tensor in values.items():
            if i in masks:
                tensor._keras_mask = masks[i]
            leaves[self._places[i]] = tensor
        args, kwargs = self._packed(leaves)
        return self._original(self.layer, *args, **kwargs)

    def _packed(self, leaves: list[Any]) -> Any:
        """Pack leaves into the arguments of the call."""
        args, kwargs = self._nest
        if not self._is_flat:
            return pack_like(self._nest, leaves)
        return tuple(leaves[: len(args)]), dict(zip(kwargs, leaves[len(args) :], strict=True))


@dataclass(frozen=True)
class DealtCall:
    """A call whose tensors have roles.

    Attributes:
        tensors: the tensors with rows, then their masks.
        batch: the same tensors as a batch for the engine.
    """

    arguments: CallArguments
    _rows: list[int]
    _masked: list[int]
    _shared: list[int]
    tensors: list[torch.Tensor]
    batch: Batch

    @property
    def shared(self) -> list[torch.Tensor]:
        """The tensors that all rows share and each replica needs a copy of. NumPy arrays are passed as they are."""
        return [self.arguments.tensors[i] for i in self._shared_tensors]

    @property
    def _shared_tensors(self) -> list[int]:
        leaves, places = self.arguments._leaves, self.arguments._places
        return [i for i in self._shared if not isinstance(leaves[places[i]], np.ndarray)]

    def on_rows(self, rows: Sequence[torch.Tensor], shared: Sequence[torch.Tensor]) -> Any:
        """Call the layer on this thread, on these rows, their masks and these shared tensors."""
        count = len(self._rows)
        values = dict(zip(self._rows, rows[:count], strict=True)) | dict(zip(self._shared_tensors, shared, strict=True))
        masks = dict(zip(self._masked, rows[count:], strict=True))
        for i in self._shared_tensors:
            mask = self.arguments.masks[i]
            if mask is not None:
                masks[i] = mask.to(values[i].device)
        return self.arguments.run(values, masks)


def _size(tensor: torch.Tensor) -> int | None:
    """Entries along the first axis; None where the tensor has none to split."""
    return tensor.shape[0] if tensor.ndim and tensor.layout == torch.strided and tensor.shape[0] else None
