"""Batch normalization in a step that is traced: moments and running statistics as tensors."""

from __future__ import annotations

from typing import Any

import torch

from fastdp.errors import NotCapturable
from fastdp.program.torch.replica import Normalized, ReplicaContext
from fastdp.tensors.moments import unbiased

_NAMES = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


def traced_batch_norm(running: ReplicaContext, function: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """F.batch_norm. A replica that is alone moves the running statistics; others leave their moments for all rows."""
    given: dict[str, Any] = {"training": False, "momentum": 0.1, "eps": 1e-5, "weight": None, "bias": None}
    given |= dict(zip(_NAMES, args, strict=False)) | kwargs
    x, rows = given["input"], running.rows
    count = x.numel() // max(1, x.shape[1])
    if not given["training"] or count * rows.total // rows.count <= 1:
        return function(*args, **kwargs)
    if running.sync_batch_norm and rows.count < rows.total:
        raise NotCapturable("sync_batch_norm: replicas exchange moments in the middle of a step")
    mean, variance, momentum = given["running_mean"], given["running_var"], float(given["momentum"])
    # Without the running statistics, which torch would write to in an operation that does not say so.
    enabled = torch.backends.cudnn.enabled
    y = torch.batch_norm(x, given["weight"], given["bias"], None, None, True, momentum, given["eps"], enabled)
    if mean is None or running.backward:
        return y
    with torch.no_grad():
        axes = [axis for axis in range(x.ndim) if axis != 1]
        own_variance, own_mean = torch.var_mean(x if x.dtype == torch.float64 else x.float(), axes, correction=0)
        if rows.count == rows.total:
            for target, value in ((mean, own_mean), (variance, own_variance * unbiased(count))):
                target.copy_(target * (1.0 - momentum) + value.to(target.dtype) * momentum)
        else:
            wide, square = own_mean.double(), own_variance.double()
            sums = torch.cat([wide.new_full((1,), float(count)), count * wide, count * (square + wide * wide)])
            running.normalized.append(Normalized(mean, variance, momentum, sums))
    return y
