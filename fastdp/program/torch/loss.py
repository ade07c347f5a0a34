"""The loss of the global batch for torch modules, and where each replica's backward begins.

The loss function gets outputs that are leaves of autograd. A replica's backward starts from the gradient by
them. The reduction of the loss selects one of three ways:

    None    any function: computed once, on the outputs and targets of the whole batch
    "mean"  a mean over samples: each replica computes its own, weighted by its share of the rows
    "sum"   a sum over samples: each replica computes its own
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastdp.program.torch.batch import Nest
from fastdp.program.torch.replica import ReplicaContext, gradients_of
from fastdp.shard import Rows, split_rows
from fastdp.tensors.sums import weighted_sum

REDUCTIONS = (None, "mean", "sum")
WITHOUT_GRADIENT = (
    "`loss_fn` must return a number that depends on the module's outputs. Received: one without a gradient. Is there a "
    ".detach(), .item() or torch.no_grad() in it?"
)
LossFunction = Callable[..., Any]


@dataclass(slots=True)
class Contribution:
    """A replica's part of the loss, with its outputs and the gradients by them that backward starts from.

    `direct` are the gradients by parameters that the loss function itself uses, by position.
    """

    value: float
    dtype: torch.dtype
    roots: list[torch.Tensor] = field(default_factory=list)
    seeds: list[torch.Tensor] = field(default_factory=list)
    direct: dict[int, torch.Tensor] = field(default_factory=dict)


def contribute(
    reduction: str | None,
    loss_function: LossFunction,
    outputs: Any,
    targets: Sequence[Any],
    parameters: Sequence[torch.Tensor],
    running: ReplicaContext,
) -> Contribution:
    """Compute this replica's contribution.

    Args:
        reduction: None, "mean" or "sum", as above.
        loss_function: `loss_function(outputs, *targets)` returns one number.
        outputs: the replica's outputs, attached to its graph.
        targets: the replica's targets.
        parameters: the user's own parameters, for loss functions that use them (a penalty, say).
        running: the replica.
    """
    nest, tensors = Nest.flatten(outputs, "The module's outputs")
    _check_rows(tensors, running.rows)
    if reduction is None:
        return _merged(loss_function, nest, tensors, parameters, running)
    leaves = [_leaf(tensor) for tensor in tensors]
    loss = number(loss_function(nest.pack(leaves), *targets))
    weight = running.context.rows.share if reduction == "mean" else 1.0
    gradients, direct = _gradients(running, loss * weight, leaves, parameters)
    if direct and reduction == "sum":
        raise ValueError(
            "A loss function that uses the module's parameters itself would count that part once per device with "
            'reduction="sum". Use reduction=None.'
        )
    return _contribution(float(loss.detach()) * weight, loss, tensors, gradients, direct)


def number(loss: Any) -> torch.Tensor:
    """The loss as a tensor without axes.

    Raises:
        TypeError: it is not a tensor.
        ValueError: it has more than one element.
    """
    if not isinstance(loss, torch.Tensor):
        raise TypeError(f"`loss_fn` must return a tensor. Received: {loss!r} (of type {type(loss).__name__})")
    if loss.numel() != 1:
        raise ValueError(
            f"`loss_fn` must return one number for the batch. Received: shape {tuple(loss.shape)}. Reduce it, for "
            "example by .mean()."
        )
    return loss.reshape(())


def _merged(
    loss_function: LossFunction,
    nest: Nest,
    tensors: Sequence[torch.Tensor],
    parameters: Sequence[torch.Tensor],
    running: ReplicaContext,
) -> Contribution:
    """The loss on the merged outputs, computed by the first replica. Each replica continues with its own rows."""
    context = running.context
    everyone = context.exchange([tensor.detach() for tensor in tensors], "the loss of the merged outputs")
    answer = None
    if context.rank == 0:
        shares = [rows.share for rows in split_rows(context.rows.total, context.size)]
        leaves = [_leaf(_join(parts, shares)) for parts in zip(*everyone, strict=True)]
        _, _, targets = context.structure.pack(context.batch, context.torch_device)
        own, running.rows = running.rows, Rows(0, running.rows.total, running.rows.total)
        try:
            loss = number(loss_function(nest.pack(leaves), *targets))
        finally:
            running.rows = own
        gradients, direct = _gradients(running, loss, leaves, parameters)
        answer = (loss.detach(), gradients, direct)
    loss, gradients, direct = context.exchange(answer, "the gradients of the loss of the merged outputs")[0]
    mine = [None if g is None else _own(g, t, context.rows) for g, t in zip(gradients, tensors, strict=True)]
    first = context.rank == 0
    return _contribution(float(loss) if first else 0.0, loss, tensors, mine, direct if first else {})


def _contribution(
    value: float,
    loss: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor | None],
    direct: dict[int, torch.Tensor],
) -> Contribution:
    """Keep the outputs that have both a graph and a gradient."""
    pairs = [(t, g) for t, g in zip(tensors, gradients, strict=True) if g is not None and t.requires_grad]
    return Contribution(value, loss.dtype, [t for t, _ in pairs], [g for _, g in pairs], direct)


def _check_rows(tensors: Sequence[torch.Tensor], rows: Rows) -> None:
    """Check that outputs have the replica's rows along their first axis, or no axes.

    Raises:
        ValueError: an output has not.
    """
    for i, tensor in enumerate(tensors):
        if tensor.ndim and (tensor.shape[0] < rows.count or tensor.shape[0] % rows.count):
            raise ValueError(
                f"Output {i} of the module must have its rows along the first axis (a multiple of {rows.count} for "
                f"{rows.count} rows), so that the loss can be computed on all. Received: shape {tuple(tensor.shape)}. "
                "Return what the loss needs, and transpose the rest (the states of a torch.nn.LSTM have layers first)."
            )


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    """A leaf of autograd with the tensor's values."""
    leaf = tensor.detach()
    return leaf.requires_grad_() if leaf.is_floating_point() or leaf.is_complex() else leaf


def _gradients(
    running: ReplicaContext, loss: torch.Tensor, leaves: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor | None], dict[int, torch.Tensor]]:
    """The gradients of the loss by outputs, and by the parameters that it uses directly."""
    positions = [i for i, leaf in enumerate(leaves) if leaf.requires_grad]
    trained = [i for i, parameter in enumerate(parameters) if parameter.requires_grad]
    if not loss.requires_grad:
        raise ValueError(WITHOUT_GRADIENT)
    inputs = [leaves[i] for i in positions] + [parameters[i] for i in trained]
    found = gradients_of(running, loss, inputs) if inputs else []
    by_leaf = dict(zip(positions, found[: len(positions)], strict=True))
    direct = dict(zip(trained, found[len(positions) :], strict=True))
    return [by_leaf.get(i) for i in range(len(leaves))], {i: g for i, g in direct.items() if g is not None}


def _join(parts: Sequence[torch.Tensor], shares: Sequence[float]) -> torch.Tensor:
    """Concatenate rows in order, or average a zero-dim output by rows."""
    if parts[0].ndim:
        return parts[0] if len(parts) == 1 else torch.cat(list(parts))
    return weighted_sum(parts, shares)


def _own(gradient: torch.Tensor, tensor: torch.Tensor, rows: Rows) -> torch.Tensor:
    """The part of a merged output's gradient that belongs to this replica."""
    if tensor.ndim == 0:
        return gradient * rows.share
    per_row = tensor.shape[0] // rows.count
    return gradient[per_row * rows.start : per_row * rows.stop]
