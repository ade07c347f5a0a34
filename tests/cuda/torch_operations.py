"""Torch's operations noted instead of run, so that they can be run again on the same memory: torch's part of a
recorded step, where torch computes in host memory.

While they are noted nothing is computed: what an operation would give is garbage. A run computes the operations in
order on the memory that they took and gave. So a value that is looked at while it is recorded, or a replay that would
have to look elsewhere than the recording did, gives wrong numbers here as on a GPU. A value for the host fails here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FORBIDDEN = "CUDA error: operation not permitted when stream is capturing (simulated)"
_FOR_THE_HOST = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Operations:
    """Operations with the memory that they take and give: (function, args, kwargs, results, whether those are new)."""

    def __init__(self) -> None:
        self.found: list[tuple[Any, tuple, dict, list[torch.Tensor], bool]] = []
        self.runs = 0

    def note(self, work: Callable[[], Iterable[Any]], refused: Collection[object] = ()) -> list[Any]:
        """Note the operations of `work()`; gives its results, which hold nothing yet.

        Raises:
            RuntimeError: one of them cannot be recorded, or is in `refused`.
        """
        with _Noting(self, refused):
            return list(work())

    def run(self) -> None:
        """Compute them all."""
        self.runs += 1
        with torch.no_grad():
            for function, args, kwargs, results, fresh in self.found:
                found = tensors(function(*args, **kwargs))
                if fresh:
                    for result, value in zip(results, found, strict=True):
                        result.copy_(value)

    def nbytes(self) -> int:
        """The memory of the operations' own results."""
        return sum(one.untyped_storage().nbytes() for *_, results, fresh in self.found if fresh for one in results)


class _Noting(TorchDispatchMode):
    """Notes operations instead of running them."""

    def __init__(self, operations: Operations, refused: Collection[object]) -> None:
        super().__init__()
        self._found, self._refused = operations.found, refused

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in self._refused or _FOR_THE_HOST & set(function.tags):
            raise RuntimeError(FORBIDDEN)
        if function._schema.is_mutable:
            written = _written(function, args, kwargs)
            self._found.append((function, args, kwargs, written, False))
            assert len(function._schema.returns) < 2, f"it is not known what {function} gives"
            return written[0] if function._schema.returns else None
        # It is run on garbage, for the shapes of what it gives.
        results = function(*args, **kwargs)
        taken = {tensor.untyped_storage().data_ptr() for tensor in tensors((args, kwargs)) if tensor.numel()}
        made = tensors(results)
        if any(tensor.numel() and tensor.untyped_storage().data_ptr() in taken for tensor in made):
            return results  # a view: no kernel
        for tensor in made:
            tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.zero_()
        self._found.append((function, args, kwargs, made, True))
        return results


def tensors(values: Any) -> list[torch.Tensor]:
    """The tensors among nested values."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _written(function: Any, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """The tensors that an operation writes into."""
    return [
        args[i] if i < len(args) else kwargs[argument.name]
        for i, argument in enumerate(function._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
