"""Values on their way to another process: pickled, with tensors as plain numbers and known objects by their place."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fastdp.tensors import pytree

_NOTHING = "nothing"


class _Pickler(pickle.Pickler):
    """Pickles tensors without their graphs and storages, and known objects by their place."""

    def __init__(self, file: io.BytesIO, known: Sequence[object]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._places = {id(one): place for place, one in enumerate(known)}

    def persistent_id(self, obj: Any) -> Any:
        if hasattr(type(obj), "stays_in_process") and obj.stays_in_process:
            return _NOTHING
        return self._places.get(id(obj))

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor) and obj.layout is torch.strided:
            plain = obj.detach().cpu().contiguous()
            if type(obj) not in (torch.Tensor, torch.nn.Parameter):
                plain = plain.as_subclass(torch.Tensor)
            return _tensor, (plain.reshape(-1).view(torch.uint8).numpy().tobytes(), plain.dtype, tuple(plain.shape))
        if isinstance(obj, pytree.TreeSpec):  # pickled as an object it is read with a warning
            return pytree.tree_structure, (obj.unflatten(range(obj.num_leaves)),)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    """Reads what `_Pickler` has written in another process of this training."""

    def __init__(self, data: bytes, known: Sequence[object]) -> None:
        super().__init__(io.BytesIO(data))
        self._known = known

    def persistent_load(self, pid: Any) -> Any:
        return None if pid == _NOTHING else self._known[pid]


def dumps(value: Any, known: Sequence[object]) -> bytes:
    """A value as bytes for another process.

    Args:
        value: a nest of tensors, arrays and objects. Values of a class with `stays_in_process = True` become None.
        known: objects that both processes have in the same order.

    Raises:
        TypeError: a part of it cannot be sent.
    """
    file = io.BytesIO()
    try:
        _Pickler(file, known).dump(value)
    except (pickle.PicklingError, AttributeError, TypeError, ValueError) as error:
        raise TypeError(
            f"A value that the replicas of several processes exchange cannot be sent between them: {error}. Train this "
            "model in one process (without torchrun), or let the layers exchange tensors and plain values only."
        ) from error
    return file.getvalue()


def loads(data: bytes, known: Sequence[object]) -> Any:
    """The value of `dumps`. Only for bytes from a process of the same training: pickle trusts them."""
    return _Unpickler(data, known).load()


def _tensor(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor in host memory."""
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy()).view(dtype).reshape(shape)
