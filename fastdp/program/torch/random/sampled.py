"""Torch functions that draw with parameters for each row, such as multinomial, on replicas."""

from __future__ import annotations

from typing import Any

import torch

from fastdp.errors import NotCapturable
from fastdp.program.torch.random.drawn import PARAMETERS, refuse_generator, row_axis
from fastdp.program.torch.replica import ReplicaContext


def sampled(running: ReplicaContext, function: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """Functions with parameters per row, such as torch.multinomial: they draw from the parameters of all replicas."""
    kwargs = dict(kwargs)
    refuse_generator(kwargs.pop("generator", None))
    rows, context = running.rows, running.context
    device = next((one.device for one in args if isinstance(one, torch.Tensor)), None)
    given = [one.detach().cpu() for one in args if isinstance(one, torch.Tensor)]
    if not given or kwargs.get("out") is not None or any(isinstance(one, torch.Tensor) for one in kwargs.values()):
        raise NotImplementedError(PARAMETERS.format(f"torch.{function.__name__}"))
    if running.traced:
        raise NotCapturable(f"torch.{function.__name__}, whose parameters the step computes")
    if rows.count == rows.total:
        running.next_draw()
        return context.structure.draws.alone(lambda: function(*args, **kwargs))
    axes = [row_axis(one.shape, rows) for one in given]
    if any(axis is not None for axis in axes):
        every = context.exchange(given, f"the parameters of torch.{function.__name__}")
        given = [
            one if axis is None else torch.cat([parts[i] for parts in every])
            for i, (one, axis) in enumerate(zip(given, axes, strict=True))
        ]
    rest = iter(given)
    whole_args = [next(rest) if isinstance(one, torch.Tensor) else one for one in args]
    request = (function.__name__, tuple(tuple(one.shape) for one in given))
    number = running.next_draw()
    whole = context.structure.draws.take(number, context.size, request, lambda: function(*whole_args, **kwargs))
    if all(axis is None for axis in axes):
        return whole.to(device, copy=True)
    per_row = whole.shape[0] // rows.total
    return whole.narrow(0, per_row * rows.start, per_row * rows.count).to(device, copy=True)
