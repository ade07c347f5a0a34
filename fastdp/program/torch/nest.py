"""Nests of tensors, as batches and outputs are: their structure apart from their tensors."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from fastdp.tensors import pytree
from fastdp.tensors.arrays import dtype_name

PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.memory_format, enum.Enum)


@dataclass(frozen=True, slots=True)
class Nest:
    """The structure of a nest of tensors: the places of the tensors, their dtypes, and the other leaves."""

    spec: Any
    leaves: tuple[Any, ...]
    dtypes: tuple[str, ...]
    axes: tuple[int, ...] = ()  # of merged outputs: where their rows are

    stays_in_process: ClassVar[bool] = True  # that of each process is the same

    @classmethod
    def flatten(cls, values: Any, what: str, *, dense: bool = True) -> tuple[Nest, list[torch.Tensor]]:
        """Split nested values into their structure and their tensors, which have to be `dense`, or not.

        Raises:
            TypeError: a leaf is neither a tensor nor a plain value.
            ValueError: a tensor is sparse, nested or quantized, or of a subclass that a copy of its rows would not be.
        """
        found, spec = pytree.tree_flatten(values)
        return cls.of(found, spec, what, dense=dense)

    @classmethod
    def of(cls, found: Sequence[Any], spec: Any, what: str, *, dense: bool = True) -> tuple[Nest, list[torch.Tensor]]:
        """As `flatten`, of values that are flat already."""
        leaves: list[Any] = []
        tensors: list[torch.Tensor] = []
        for leaf in found:
            if isinstance(leaf, torch.Tensor):
                if dense and not is_dense(leaf):
                    raise ValueError(_not_dense(leaf, what))
                leaves.append(HOLE)
                tensors.append(leaf)
                continue
            if not isinstance(leaf, PLAIN):
                raise TypeError(
                    f"{what} must be tensors, or nested tuples, lists, dicts and dataclasses of them and of plain "
                    f"values. Received a {type(leaf).__name__} in it{_place_of(len(leaves), spec)}. {_instead_of(leaf)}"
                )
            leaves.append(leaf)
        return cls(spec, tuple(leaves), tuple(dtype_name(t) for t in tensors)), tensors

    def on(self, where: str) -> Nest:
        """The nest with the tensors with axes among its other leaves on a device."""
        leaves = [one.to(where) if isinstance(one, torch.Tensor) and one.ndim else one for one in self.leaves]
        return Nest(self.spec, tuple(leaves), self.dtypes)

    def pack(self, tensors: Sequence[Any]) -> Any:
        """The nest with the given tensors in it."""
        left = iter(tensors)
        return pytree.tree_unflatten([next(left) if leaf is HOLE else leaf for leaf in self.leaves], self.spec)

    def is_hole(self, place: int) -> bool:
        """Whether `pack` puts a tensor at this place among the leaves."""
        return self.leaves[place] is HOLE

    def replaced(self, others: Mapping[int, Any]) -> Nest:
        """The nest with other values at some places among the leaves."""
        if not others:
            return self
        leaves = tuple(others.get(place, leaf) for place, leaf in enumerate(self.leaves))
        return Nest(self.spec, leaves, self.dtypes, self.axes)


class _Hole:
    """The place of a tensor in a nest."""

    def __reduce__(self) -> str:
        return "HOLE"  # the same one in other processes


HOLE = _Hole()


# Traces compute with tensors that stand for plain ones.
_KINDS = (torch.Tensor, nn.Parameter, FakeTensor, FunctionalTensor)


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether rows of a tensor can be cut out and merged: it is dense, and of no subclass with a meaning of its own."""
    strided = tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_quantized
    return strided and type(tensor) in _KINDS


def _not_dense(tensor: torch.Tensor, what: str) -> str:
    """The message for a tensor whose rows cannot be cut out or merged."""
    if tensor.is_nested:
        kind, remedy = "a nested tensor", "Pad it (torch.nested.to_padded_tensor), and keep the lengths in a tensor"
    elif tensor.is_quantized:
        kind, remedy = "a quantized tensor", "Call .dequantize(), or keep integers and scale apart"
    elif tensor.layout is not torch.strided:
        kind, remedy = f"a tensor of layout {tensor.layout}", "Call .to_dense(), or make it sparse inside forward"
    else:
        kind, remedy = f"a {type(tensor).__name__}", "Call .as_subclass(torch.Tensor), or make it inside forward"
    return f"{what} must be dense torch.Tensors on several devices. Received {kind} in it. {remedy}, or use gpus=[0]."


def _place_of(number: int, spec: Any) -> str:
    """Where a leaf is in a nest, for messages, by its number among the leaves."""
    name = pytree.keystr(list(pytree.paths_of(spec))[number])
    return f", at `{name}`" if name else ""


def _instead_of(leaf: object) -> str:
    """What to write instead of a leaf that is neither a tensor nor a plain value."""
    name = type(leaf).__name__
    if isinstance(leaf, (np.ndarray, np.generic)):
        return "Return tensors, and convert the merged ones."
    if isinstance(leaf, Mapping):
        return "Make it a plain dict."
    if isinstance(leaf, torch.distributions.Distribution):
        return f"Return its parameters, and make the {name} of the merged ones."
    if isinstance(leaf, torch.Generator):
        return "Keep it in the module as an attribute: it draws as on one device."
    if callable(leaf):
        return "Keep it in the module as an attribute, or pass a string or an enum that says which one."
    if name.endswith("Cache") and type(leaf).__module__.startswith("transformers."):
        return "Train without a cache: module.config.use_cache = False, or use_cache=False in the call."
    return "Make it tensors in a tuple, a list, a dict or a dataclass, or keep it in the module as an attribute."
