"""Torch functions that make or fill tensors of random numbers, on replicas."""

from __future__ import annotations

from typing import Any

import torch

from fastdp.program.torch.random.counted import counted, counted_normal
from fastdp.program.torch.random.drawn import (
    PARAMETERS,
    Fill,
    drawn,
    place_of,
    pop_generator,
    refuse_one_row,
    row_axis,
)
from fastdp.program.torch.replica import ReplicaContext


def created(running: ReplicaContext, function: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """torch.rand, torch.randn, torch.randint and their `_like`s."""
    kwargs = dict(kwargs)
    generator = pop_generator(kwargs)
    out = kwargs.pop("out", None)
    integers = function in (torch.randint, torch.randint_like)
    bounds = _bounds(function, args, kwargs) if integers else ()
    result = _unfilled(function, args, kwargs, out)
    normal = function in (torch.randn, torch.randn_like)
    if integers:
        fill: Fill = lambda whole: whole.random_(*bounds, generator=generator)  # noqa: E731
    else:
        fill = lambda whole: (whole.normal_ if normal else whole.uniform_)(generator=generator)  # noqa: E731
    if result.is_cuda and not integers and generator is torch.default_generator:
        found = counted_normal(running, result.shape) if normal else counted(running, result.shape)
    else:
        refuse_one_row(running, function.__name__, result.shape)
        axis = row_axis(result.shape, running.rows)
        found = drawn(running, function.__name__, bounds, result, fill, axis, generator)
    with torch.no_grad():
        result.copy_(found)
    if out is not None:
        return out.copy_(result)
    return result.requires_grad_() if kwargs.get("requires_grad") else result


def _unfilled(function: Any, args: Any, kwargs: Any, out: torch.Tensor | None) -> torch.Tensor:
    """A tensor of the shape, dtype and layout that the function makes."""
    given = {**kwargs, "requires_grad": False}
    if out is None and function in (torch.randn_like, torch.rand_like):
        return torch.empty_like(*args, **given)
    if out is None and function in (torch.randn, torch.rand) and "names" not in kwargs:
        return torch.empty(*args, **given)
    like = function(*args, **{**given, "device": "meta"})
    device = out.device if out is not None else torch.device(_device_of(function, args, kwargs))
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)


def _bounds(function: Any, args: Any, kwargs: Any) -> tuple[int, int]:
    """The range of torch.randint."""
    numbers = list(args[1:] if function is torch.randint_like else args)
    numbers = [one for one in numbers if isinstance(one, int)]
    low = kwargs["low"] if "low" in kwargs else (numbers.pop(0) if len(numbers) + ("high" in kwargs) > 1 else 0)
    return int(low), int(kwargs["high"] if "high" in kwargs else numbers[0])


def _device_of(function: Any, args: Any, kwargs: Any) -> Any:
    """Where a random tensor is created."""
    if kwargs.get("device") is not None:
        return kwargs["device"]
    return args[0].device if args and isinstance(args[0], torch.Tensor) else torch.get_default_device()


def filled(running: ReplicaContext, function: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """Methods that fill a tensor, such as Tensor.uniform_, and with them the functions of torch.nn.init."""
    kwargs = dict(kwargs)
    generator = pop_generator(kwargs)
    x, numbers = args[0], (*args[1:], *kwargs.values())
    if any(isinstance(number, torch.Tensor) for number in numbers):
        raise NotImplementedError(PARAMETERS.format(f"Tensor.{function.__name__}"))
    counts = generator is torch.default_generator and function in (torch.Tensor.uniform_, torch.Tensor.normal_)
    if x.is_cuda and counts:
        names = ("from", "to") if function is torch.Tensor.uniform_ else ("mean", "std")
        low, high = ({names[0]: 0.0, names[1]: 1.0} | dict(zip(names, args[1:], strict=False)) | kwargs).values()
        if function is torch.Tensor.uniform_:
            return x.copy_(counted(running, x.shape) * (high - low) + low)
        return x.copy_(counted_normal(running, x.shape) * high + low)
    refuse_one_row(running, function.__name__, x.shape)
    fill: Fill = lambda whole: function(whole, *args[1:], **kwargs, generator=generator)  # noqa: E731
    axis = row_axis(x.shape, running.rows)
    return x.copy_(drawn(running, function.__name__, numbers, x.detach(), fill, axis, generator))


def randperm(running: ReplicaContext, function: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """torch.randperm, the same for all rows."""
    kwargs = dict(kwargs)
    generator = pop_generator(kwargs)
    n = int(args[0] if args else kwargs["n"])
    rows = running.rows
    if n == rows.count != rows.total:
        place = place_of(running, running.draws + 1, (n,))
        if place is None or place.axis is not None:
            raise ValueError(
                f"torch.randperm({n}) in a module that fastdp splits permutes as many things as this device has rows. "
                "If it permutes the rows of the batch, it mixes rows of different devices: draw the permutation "
                "outside and pass it in, or use gpus=[0]."
            )
    like = torch.empty(n, dtype=kwargs.get("dtype") or torch.int64)
    fill: Fill = lambda whole: whole.copy_(function(n, generator=generator))  # noqa: E731
    found = drawn(running, "randperm", (n,), like, fill, None, generator)
    return found.clone().to(kwargs.get("device") or "cpu")
