"""Dropout of torch modules on replicas: the masks of the whole batch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional as F

from fastdp.program.torch.random.counted import counted
from fastdp.program.torch.random.drawn import drawn, row_axis
from fastdp.program.torch.replica import ReplicaContext
from fastdp.tensors.random_functions import dropout_arguments

_SELU_LIMIT = -1.7580993408473766  # replaces values dropped by alpha dropout: -scale * alpha of SELU


def dropout(running: ReplicaContext, function: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """F.dropout and torch.dropout, and F.dropout1d to F.dropout3d, which drop whole channels."""
    x, p, inplace = _active(function, args, kwargs)
    if p in (0.0, 1.0):
        return _all_or_none(x, p, inplace)
    keep = _kept(running, function, x, p) / (1.0 - p)
    return x.mul_(keep) if inplace else x * keep


def alpha_dropout(running: ReplicaContext, function: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """F.alpha_dropout and F.feature_alpha_dropout: dropped values saturate; mean and variance are kept."""
    x, p, inplace = _active(function, args, kwargs)
    if p in (0.0, 1.0):
        return _all_or_none(x, p, inplace)
    keep = _kept(running, function, x, p)
    scale = 1.0 / math.sqrt((1.0 - p) * (1.0 + p * _SELU_LIMIT**2))
    shift = scale * _SELU_LIMIT * ((1.0 - keep) - p)
    return x.mul_(keep * scale).add_(shift) if inplace else x * (keep * scale) + shift


def _active(function: Any, args: Any, kwargs: Any) -> tuple[torch.Tensor, float, bool]:
    """The input of a dropout, its probability (0 in evaluation), and whether it is in place."""
    x, p, training, inplace = dropout_arguments(function, args, kwargs)
    return x, p if training else 0.0, inplace


def _all_or_none(x: torch.Tensor, p: float, inplace: bool) -> torch.Tensor:
    """The output of a dropout that draws nothing: its probability is 0 or 1."""
    if p == 0.0:
        return x
    return x.zero_() if inplace else x * 0.0


def _kept(running: ReplicaContext, function: Any, x: torch.Tensor, p: float) -> torch.Tensor:
    """Ones for what a dropout keeps, and zeros; read-only."""
    shape = _mask_shape(function, x)
    if x.is_cuda:
        return (counted(running, shape, by_replica=True) >= p).to(x.dtype)
    like = x.detach() if shape == tuple(x.shape) else torch.empty(shape, dtype=x.dtype)
    axis = row_axis(shape, running.rows, mask=True)
    return drawn(running, "dropout", (p,), like, lambda whole: whole.bernoulli_(1.0 - p), axis)


_CHANNEL_AXES = {F.dropout1d: 2, F.dropout2d: 3, F.dropout3d: 4}  # axes of an input without rows
_LIKE_CHANNELS = (F.feature_alpha_dropout, torch.feature_dropout)


def _mask_shape(function: Any, x: torch.Tensor) -> tuple[int, ...]:
    """The shape of a mask: one value per element, or per channel."""
    if function in _LIKE_CHANNELS:
        return (*x.shape[:2], *(1 for _ in x.shape[2:]))
    if function not in _CHANNEL_AXES:
        return tuple(x.shape)
    # As in torch, dropout2d takes 3-d input as (rows, channels, length); the others take it as without rows.
    channels = 1 if x.ndim < _CHANNEL_AXES[function] or (x.ndim == 2 and function is F.dropout1d) else 2
    if function is F.dropout2d and x.ndim == 3:
        channels = 2
    elif function is not F.dropout2d and x.ndim == _CHANNEL_AXES[function]:
        channels = 1
    return (*x.shape[:channels], *(1 for _ in x.shape[channels:]))
