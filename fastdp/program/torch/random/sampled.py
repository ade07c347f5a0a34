"""Torch functions whose draws depend on values of the rows, such as multinomial and rrelu, on replicas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastdp.errors import NotCapturable
from fastdp.program.torch.random.drawn import PARAMETERS, How, place_of, pop_generator, refuse_ambiguous, row_axis
from fastdp.program.torch.replica import ReplicaContext
from fastdp.program.torch.shared_draws import SharedDraws

# Draws from parameters for some rows, or for all rows, with a generator.
Make = Callable[[Sequence[torch.Tensor], torch.Generator], torch.Tensor]


def sampled(running: ReplicaContext, function: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """Functions with parameters per row, such as torch.multinomial: they draw from the parameters of all replicas."""
    kwargs = dict(kwargs)
    generator = pop_generator(kwargs)
    device = next((one.device for one in args if isinstance(one, torch.Tensor)), None)
    given = [one.detach().cpu() for one in args if isinstance(one, torch.Tensor)]
    if not given or kwargs.get("out") is not None or any(isinstance(one, torch.Tensor) for one in kwargs.values()):
        raise NotImplementedError(PARAMETERS.format(f"torch.{function.__name__}"))

    def make(given: Sequence[torch.Tensor], generator: torch.Generator) -> torch.Tensor:
        rest = iter(given)
        whole = [next(rest) if isinstance(one, torch.Tensor) else one for one in args]
        found: torch.Tensor = function(*whole, **kwargs, generator=generator)
        return found

    return _own_part(running, f"torch.{function.__name__}", given, make, generator).to(device, copy=True)


def rrelu(running: ReplicaContext, function: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """F.rrelu and torch.rrelu, with and without `_`: one number for each value that is not positive, in their order."""
    named = dict(zip(("input", "lower", "upper", "training"), args, strict=False)) | kwargs
    if not named.get("training", False):
        found: torch.Tensor = function(*args, **kwargs)
        return found
    generator = pop_generator(named)
    x, lower, upper = named["input"], named.get("lower", 1.0 / 8), named.get("upper", 1.0 / 3)

    def make(given: Sequence[torch.Tensor], generator: torch.Generator) -> torch.Tensor:
        values = given[0].contiguous()
        noise = torch.empty_like(values)
        torch.ops.aten.rrelu_with_noise(values, noise, lower, upper, True, generator)
        return noise

    slopes = _own_part(running, "rrelu", [x.detach().cpu()], make, generator, mask=True).to(x.device)
    in_place = named.get("inplace", False) or function is torch.rrelu_
    return x.mul_(slopes) if in_place else x * slopes


def _own_part(
    running: ReplicaContext,
    name: str,
    given: list[torch.Tensor],
    make: Make,
    generator: torch.Generator,
    *,
    mask: bool = False,
) -> torch.Tensor:
    """A replica's rows of a draw from the parameters of all replicas. Read-only.

    Args:
        running: the replica.
        name: of the function.
        given: the replica's parameters, on the host.
        make: makes the draw.
        generator: for the draw.
        mask: as of `row_axis`.

    Raises:
        RuntimeError: parameters that should be the same on all replicas are not.
    """
    if running.traced:
        raise NotCapturable(f"{name}, whose parameters the step computes")
    draws: SharedDraws = running.context.structure.draws
    rows, number, how = running.rows, running.next_draw(), How.of(running, generator)
    draws.note_parameters(number, [tuple(one.shape) for one in given])
    if rows.count == rows.total:
        return how.outcome(running, number, None, lambda: make(given, generator))
    shape = make(given, torch.Generator()).shape
    place = place_of(running, number, shape)
    if place is not None:
        axis, axes = place.axis, place.given
    else:
        axes = tuple(row_axis(one.shape, rows, mask=mask) for one in given)
        axis = row_axis(shape, rows, mask=mask) if any(one is not None for one in axes) else None
        if not running.tried:
            refuse_ambiguous(name, shape, axis, rows)
    if how.repeats:
        whole = draws.kept(number)
    else:
        every = draws.exchanged(running.context, given, f"the parameters of {name}")
        merged = [_merged(name, [parts[i] for parts in every], one) for i, one in enumerate(axes)]
        request = (name, *(tuple(one.shape) for one in merged))
        whole = how.outcome(running, number, request, lambda: make(merged, generator))
        if how.repeatable:
            draws.keep(number, whole)
    if axis is None:
        return whole
    per_row = whole.shape[axis] // rows.total
    return whole.narrow(axis, per_row * rows.start, per_row * rows.count)


def _merged(name: str, parts: Sequence[torch.Tensor], axis: int | None) -> torch.Tensor:
    """A parameter for all rows, of those of the replicas.

    Raises:
        RuntimeError: it has no rows, and is not the same on all replicas.
    """
    if axis is not None:
        return torch.cat(list(parts), axis)
    first = parts[0]
    if not all(torch.allclose(first, other, equal_nan=True) for other in parts[1:]):
        raise RuntimeError(
            f"The parameters of {name} have no rows, and depend on the rows of the batch: on one device they would "
            "depend on all of them. Combine them by fastdp.replica.all_reduce, or use gpus=[0]."
        )
    return first
