"""Marks that say how tensors depend on the rows of a batch: `fastdp.rows`, `fastdp.same` and `fastdp.mean_over`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastdp.tensors.row_effects import Effect, Layout

_NAME = "_fastdp_layout"


def rows(tensor: torch.Tensor, axis: int = 0) -> torch.Tensor:
    """Mark a tensor: its rows lie along this axis.

    Args:
        tensor: an input or a target of a module that `fastdp.wrap` made parallel, or an output, marked in `forward`.
            The mark belongs to this tensor object; a result of computing with it has none.
        axis: the axis. Its length is the number of rows of the batch, or a multiple of it.

    Returns:
        The tensor itself. Outside of fastdp the mark means nothing.

    Raises:
        TypeError: `tensor` is not a torch tensor.
        ValueError: it has no such axis.

    Example:
        >>> output, state = model(x, fastdp.rows(state, axis=1))  # (layers, rows, features)  # doctest: +SKIP
    """
    _check(tensor)
    if not -tensor.ndim <= axis < tensor.ndim:
        raise ValueError(f"`axis` must be an axis of the tensor. Received: axis={axis!r} for {tuple(tensor.shape)}")
    return _marked(tensor, Layout(Effect.ROWS, axis % tensor.ndim, 1, True))


def same(tensor: torch.Tensor) -> torch.Tensor:
    """Mark a tensor: it is the same for all rows, such as a causal mask. Every device gets all of it.

    Args and errors as in `rows`.

    Example:
        >>> output = model(x, fastdp.same(mask))  # doctest: +SKIP
    """
    _check(tensor)
    return _marked(tensor, Layout(Effect.SAME))


@dataclass(frozen=True, slots=True, eq=False)
class MeanOver:
    """What the rows count in a mean: a function of some arguments of forward, by their names."""

    function: Callable[..., torch.Tensor]
    names: tuple[str, ...]


def mean_over(weights: Callable[..., torch.Tensor]) -> MeanOver:
    """Say in `fastdp.wrap(module, rows=...)` that an output is a mean over what counts, such as tokens without padding.

    Args:
        weights: `weights(labels)` returns what each entry of the batch counts, as numbers or booleans of any shape with
            rows first. The names of its parameters are those of forward's. Called before each step on the arguments of
            the whole batch, in host memory.

    Returns:
        A value for `rows`. Merged values and gradients are those of one device, also where all rows of a device count
        nothing.

    Raises:
        TypeError: `weights` is not a function with named parameters.

    Example:
        >>> counted = fastdp.mean_over(lambda labels: labels[:, 1:] != -100)  # doctest: +SKIP
        >>> model = fastdp.wrap(module, gpus=8, rows={"output['loss']": counted})  # doctest: +SKIP
    """
    if not callable(weights):
        raise TypeError(
            "`weights` must be a function of some arguments of forward, such as lambda labels: labels != -100. "
            f"Received: {weights!r} (of type {type(weights).__name__})"
        )
    return MeanOver(weights, tuple(inspect.signature(weights).parameters))


def mark_of(tensor: torch.Tensor) -> Layout | None:
    """The layout that a tensor is marked with; None without a mark."""
    found = getattr(tensor, _NAME, None)
    return found if isinstance(found, Layout) else None


def _marked(tensor: torch.Tensor, layout: Layout) -> torch.Tensor:
    setattr(tensor, _NAME, layout)
    return tensor


def _check(tensor: object) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"`tensor` must be a torch tensor. Received: {tensor!r} (of type {type(tensor).__name__})")
