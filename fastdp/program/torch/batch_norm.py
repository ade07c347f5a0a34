"""Batch normalization of torch modules on replicas: moments of the global batch, running statistics.

Each replica normalizes by its own rows, or with `sync_batch_norm` by all rows of the global batch, forward
and backward. In both cases the running statistics move once per call, by the mean and the (unbiased) variance
of the global batch (`fastdp.tensors.moments`).

Torch refuses a batch with a single value per channel on one device; fastdp refuses it if the *global* batch has a
single value per channel. If only a replica has a single value, the formula applies to it: the value minus itself,
zero up to rounding, scaled and shifted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from fastdp.comm.context import Context
from fastdp.program.torch.replica import Normalized, ReplicaContext
from fastdp.tensors.call_path import running_part
from fastdp.tensors.function_mode import Handler
from fastdp.tensors.moments import Moments, global_moments, unbiased
from fastdp.tensors.replica_sums import by_exchange

_NAMES = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


def _batch_norm(running: ReplicaContext, function: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """F.batch_norm, with its arguments."""
    given: dict[str, Any] = {"training": False, "momentum": 0.1, "eps": 1e-5, "weight": None, "bias": None}
    given |= dict(zip(_NAMES, args, strict=False)) | kwargs
    x, count, rows = given["input"], given["input"].numel() // max(1, given["input"].shape[1]), running.rows
    if not given["training"] or count * rows.total // rows.count <= 1:
        return function(*args, **kwargs)  # raises torch's own error for a single value per channel
    mean, variance, weight, bias = (given[name] for name in _NAMES[1:5])
    if running.context.is_cut:  # to name the layer takes longer than to run it
        unless = running.sync_batch_norm and not running.keeps_graph
        running.context.check_whole(f"Batch normalization in {running_part()}", unless=unless)
    if running.sync_batch_norm:
        y, own_mean, own_variance = _synchronized(x, weight, bias, given["eps"], running.context)
    else:
        # With momentum 1 torch writes the batch's own mean and unbiased variance to the running ones.
        own_mean, own_variance = (None if t is None else torch.zeros_like(t) for t in (mean, variance))
        y = torch.batch_norm(
            x, weight, bias, own_mean, own_variance, True, 1.0, given["eps"], torch.backends.cudnn.enabled
        )
    if mean is not None and not running.backward:
        biased = own_variance.double() * ((count - 1) / count) if count > 1 else torch.zeros_like(own_mean).double()
        sums = Moments(own_mean, biased, count).sums()
        running.normalized.append(Normalized(mean, variance, float(given["momentum"]), sums))
    return y


HANDLERS: dict[Any, Handler] = {F.batch_norm: _batch_norm}


def _synchronized(
    x: torch.Tensor, weight: Any, bias: Any, eps: float, context: Context
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output normalized by the global batch, and the replica's own mean and unbiased variance."""
    axes = [axis for axis in range(x.ndim) if axis != 1]
    place = f"the synchronized moments of {running_part()}, {x.shape[1]} channels"
    with torch.no_grad():
        wide = x if x.dtype == torch.float64 else x.float()
        count = x.numel() // x.shape[1]
        own_variance, own_mean = torch.var_mean(wide, axes, correction=0)
    wide = wide if not x.requires_grad else x.to(wide.dtype)
    mean, variance = global_moments(wide, None, axes, by_exchange(context.exchange), place, torch.float64)
    shape = [1, -1] + [1] * (x.ndim - 2)
    scale = torch.rsqrt(variance + eps)
    y = (x.to(wide.dtype) - mean.reshape(shape)) * scale.reshape(shape)
    if weight is not None:
        y = y * weight.to(y.dtype).reshape(shape)
    if bias is not None:
        y = y + bias.to(y.dtype).reshape(shape)
    return y.to(x.dtype), own_mean, own_variance * unbiased(count)
