"""Tells modules apart that run in different ways, as far as what they hold tells: modes, functions, hooks, dtypes."""

from __future__ import annotations

import functools
import types
from typing import Any

import numpy as np
import torch

from fastdp.program.torch.following.guard import Guard

_NUMBERS = (int, float, complex)


def kind_of(guard: Guard) -> Any:
    """A value that equals that of another guard if nothing differs but numbers, and the shapes and values of tensors.

    Args:
        guard: of the user's module, just after it has recorded.
    """
    values = [
        (holder.name, key if isinstance(key, str) else str(key), _kind(value))
        for holder, key, value in guard.recorded()
    ]
    elements = [(holder.name, *map(_kind, held)) for holder, held in guard.recorded_elements()]
    hooks = [tuple(map(_kind, table.values())) for table in guard.contents.hooks if table]
    return tuple(map(type, guard.contents.parts)), tuple(values), tuple(elements), tuple(hooks)


def _kind(value: Any) -> Any:
    """What a value tells."""
    if type(value) in _NUMBERS:
        return type(value)
    if value is None or isinstance(value, (bool, str, bytes)):
        return value
    if isinstance(value, torch.Tensor):
        return value.dtype, value.ndim
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.ndim
    if isinstance(value, (list, tuple)):
        return type(value), *map(_kind, value)
    if isinstance(value, dict):
        return type(value), *(_kind(one) for pair in value.items() for one in pair)
    if isinstance(value, functools.partial):
        return functools.partial, _kind(value.func)
    code = getattr(getattr(value, "__func__", value), "__code__", None)
    if code is not None:
        return code
    return value if isinstance(value, (types.BuiltinFunctionType, type)) else type(value)
