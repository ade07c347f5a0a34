"""Traces each step once per process, and gives copies of the graph to other models whose steps compute the same."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import pytest
import torch
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from fastdp.capture import trace

_kept: dict[Hashable, GraphModule] = {}


def share_traces(patch: pytest.MonkeyPatch) -> None:
    """Let `fastdp.capture.trace.graph_of` trace only what no step of this process has computed before.

    A trace takes half a second, and tests of what happens to graphs make the same one dozens of times. The step runs
    once on copies of its tensors, and what it computes there is the key: a trace notes those very operations.
    """
    original = trace.graph_of

    def graph_of(function: Callable[..., Any], arguments: list[torch.Tensor]) -> GraphModule:
        key = operations_of(function, arguments)
        if key not in _kept:
            _kept[key] = original(function, arguments)
        return GraphModule(_kept[key], copy.deepcopy(_kept[key].graph))

    patch.setattr(trace, "graph_of", graph_of)


def operations_of(function: Callable[..., Sequence[torch.Tensor]], arguments: Sequence[torch.Tensor]) -> Hashable:
    """What a function computes: its operations in their order, what each is given, and what it returns."""
    given = [argument.detach().clone() for argument in arguments]
    with Operations(given) as operations:
        returned = function(*given)
    return *operations.noted, operations.names(returned)


class Operations(TorchDispatchMode):
    """Notes the operations of a thread, from its functions' arguments on.

    A tensor's name is the number of its storage, in the order of their first use, and its place there. A storage that
    is neither an argument nor the result of an operation is a constant, and is noted with its bytes.
    """

    def __init__(self, arguments: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._storages: dict[int, tuple[int, Any]] = {}
        self.noted: list[Hashable] = [self.names(arguments)]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note it."""
        leaves, structure = tree_flatten((args, kwargs or {}))
        given = tuple(self._given(leaf) for leaf in leaves)
        result = function(*args, **(kwargs or {}))
        self.noted.append((str(function), str(structure), given, self.names(tree_flatten(result)[0])))
        return result

    def names(self, values: Sequence[Any]) -> Hashable:
        """The names of tensors, and other values as text."""
        return tuple(self._name(value) if isinstance(value, torch.Tensor) else repr(value) for value in values)

    def _given(self, value: Any) -> Hashable:
        if not isinstance(value, torch.Tensor):
            return repr(value)
        if value.untyped_storage()._cdata in self._storages:
            return self._name(value)
        data = bytes(value.detach().cpu().untyped_storage().tolist())
        return self._name(value), hashlib.sha256(data).hexdigest()

    def _name(self, tensor: torch.Tensor) -> Hashable:
        storage = tensor.untyped_storage()  # kept, so that its address is not used again
        number, _ = self._storages.setdefault(storage._cdata, (len(self._storages), storage))
        return number, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype, str(tensor.device)
