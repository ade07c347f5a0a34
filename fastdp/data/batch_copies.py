"""Batches as copies of their own, cast on the way: a data set may fill the same arrays again for its next batch."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

_PLAIN = (str, bytes, int, float, complex, bool, type(None), np.generic)


def copied(batch: Any, dtype: str | None = None, *, copies: bool = True, unknown: Callable[[Any], object] = id) -> Any:
    """A batch with copies of its arrays and tensors, in tuples, lists and dicts.

    Args:
        batch: the batch.
        dtype: the name of a floating dtype, to which floating arrays and tensors are cast. Integers, such as images
            in uint8, stay as they are.
        copies: whether arrays that need no cast are copied too.
        unknown: called with each object that is none of these, which stays as it is.
    """
    kind = type(batch)
    if kind is tuple or kind is list:
        return kind([copied(part, dtype, copies=copies, unknown=unknown) for part in batch])
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return kind(*[copied(part, dtype, copies=copies, unknown=unknown) for part in batch])
    if kind is dict:
        return {name: copied(part, dtype, copies=copies, unknown=unknown) for name, part in batch.items()}
    if isinstance(batch, np.ndarray):
        return _array(batch, dtype, copies)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(batch, torch.Tensor):
        return _tensor(torch, batch, dtype, copies)
    if not isinstance(batch, _PLAIN):
        unknown(batch)
    return batch


def _array(array: Any, dtype: str | None, copies: bool) -> Any:
    if dtype is not None and np.issubdtype(array.dtype, np.floating):
        return array.astype(dtype, copy=copies)
    return array.copy() if copies else array


def _tensor(torch: Any, tensor: Any, dtype: str | None, copies: bool) -> Any:
    if tensor.requires_grad or tensor.layout is not torch.strided:
        return tensor
    if dtype is not None and tensor.is_floating_point():
        return tensor.to(getattr(torch, dtype), copy=copies)
    return tensor.clone() if copies else tensor


class Repeats:
    """Notices a data set that hands out the same object again, of a class that cannot be copied here."""

    def __init__(self) -> None:
        self.found: str | None = None
        self._latest: weakref.ref[Any] | None = None

    def note(self, one: Any) -> None:
        """An object of a batch."""
        if self._latest is not None and self._latest() is one:
            self.found = f"it hands out the same {type(one).__name__} again"
        try:
            self._latest = weakref.ref(one)
        except TypeError:  # not to be told apart from one that is used again
            self.found = f"its {type(one).__name__} may be used again"


def each_copied(batches: Iterator[Any], dtype: str | None, repeats: Repeats, *, copies: bool) -> Iterator[Any]:
    """The batches, each `copied`, in the thread that asks for them."""
    return map(partial(copied, dtype=dtype, copies=copies, unknown=repeats.note), batches)
