"""The loss of the global batch for torch modules, and where each replica's backward begins.

The loss function gets outputs that are leaves of autograd. A replica's backward starts from the gradient by
them. The reduction of the loss selects one of three ways:

    None    any function: computed once, on the outputs and targets of the whole batch; of torch's own losses each
            replica computes its part
    "mean"  a mean over samples: each replica computes its own, weighted by its share of the rows
    "sum"   a sum over samples: each replica computes its own
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastdp.program.torch.batch import Structure
from fastdp.program.torch.known_losses import known_loss
from fastdp.program.torch.losses import Reported, split
from fastdp.program.torch.nest import Nest
from fastdp.program.torch.replica import ReplicaContext, gradients_of
from fastdp.program.torch.rows.declared import parts_fit
from fastdp.program.torch.rows.forms import OutputForm
from fastdp.program.torch.rows.hints import refuse_lists
from fastdp.program.torch.rows.merging import merge, own_gradient
from fastdp.shard import Rows
from fastdp.tensors.function_mode import plain
from fastdp.tensors.row_effects import Effect, Layout

REDUCTIONS = (None, "mean", "sum")
NOTHING_TO_TRAIN = (
    "No output of the module has a gradient, so there is nothing to train. Are all of its parameters frozen "
    "(requires_grad), or does forward run under torch.no_grad() or .detach() its result?"
)
WITHOUT_GRADIENT = (
    "`loss_fn` must return a number that depends on the module's outputs. Received: one without a gradient. Is there a "
    ".detach(), .item() or torch.no_grad() in it?"
)
LossFunction = Callable[..., Any]


@dataclass(slots=True)
class Contribution:
    """A replica's part of the loss, with its outputs and the gradients by them that backward starts from.

    `direct` are the gradients by parameters that the loss function itself uses, by position, and `reported` its part of
    the other numbers that the loss function returns.
    """

    value: float
    dtype: torch.dtype
    roots: list[torch.Tensor] = field(default_factory=list)
    seeds: list[torch.Tensor] = field(default_factory=list)
    direct: dict[int, torch.Tensor] = field(default_factory=dict)
    reported: Reported | None = None


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
        loss_function: `loss_function(outputs, *targets)` returns one number, or several (`losses.split`).
        outputs: the replica's outputs, attached to its graph.
        targets: the replica's targets.
        parameters: the user's own parameters, for loss functions that use them (a penalty, say).
        running: the replica.
    """
    structure: Structure = running.context.structure
    running.tried = False
    with plain():
        nest, tensors = Nest.flatten(outputs, "The module's outputs")
        layouts = structure.layouts_of(outputs, tensors)
        parts_fit(layouts, tensors, running.rows)
        structure.agree(OutputForm.of(nest, tensors, layouts, running.rows))
    known = _part_of_known(loss_function, outputs, targets, layouts, running)
    if known is not None:
        leaves = [_leaf(tensors[0])]
        part = known(nest.pack(leaves))
        gradients, _ = _gradients(running, part, leaves, ())
        return _contribution(float(part.detach()), part, tensors, gradients, {}, None)
    if reduction is None:
        return _merged(loss_function, nest, tensors, layouts, parameters, running)
    refuse_lists(targets, running.rows.total, reduction)
    with plain():
        check_reduction(reduction, tensors, layouts)
        leaves = [_leaf(tensor) for tensor in tensors]
    loss, reported = split(loss_function(nest.pack(leaves), *targets), reduction)
    weight = running.context.rows.share if reduction == "mean" else 1.0
    gradients, direct = _gradients(running, loss * weight, leaves, parameters)
    if direct and reduction == "sum":
        raise ValueError(
            "A loss function that uses the module's parameters itself would count that part once per device with "
            'reduction="sum". Use reduction=None.'
        )
    reported = reported and reported.read(weight)
    return _contribution(float(loss.detach()) * weight, loss, tensors, gradients, direct, reported)


def _part_of_known(
    loss_function: LossFunction,
    outputs: Any,
    targets: Sequence[Any],
    layouts: Sequence[Layout],
    running: ReplicaContext,
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Computes the replica's part of a loss of torch's own from its output; None if that cannot be known."""
    known = known_loss(loss_function)
    if known is None:
        return None
    with plain():
        context = running.context
        whole = context.structure.target_of(context.batch)
        exact = isinstance(outputs, torch.Tensor) and outputs.dtype in (torch.float32, torch.float64)
        if whole is None or not exact or known.why_not(outputs, targets, layouts):
            return None
        divisor = known.divisor(whole).to(outputs.device) if known.divides(whole) else None
    return lambda leaf: known.part(leaf, targets[0], context.rows.share, divisor)


def _merged(
    loss_function: LossFunction,
    nest: Nest,
    tensors: Sequence[torch.Tensor],
    layouts: Sequence[Layout],
    parameters: Sequence[torch.Tensor],
    running: ReplicaContext,
) -> Contribution:
    """The loss on the merged outputs, computed by the first replica. Each replica continues with its own rows."""
    context = running.context
    with plain():
        everyone = context.exchange([tensor.detach() for tensor in tensors], "the loss of the merged outputs")
    answer = None
    if context.rank == 0:
        shards = context.shards
        merged = zip(zip(*everyone, strict=True), layouts, strict=True)
        with plain():
            leaves = [_leaf(merge(parts, layout, shards)) for parts, layout in merged]
            _, _, targets = context.structure.pack(context.batch, context.torch_device)
        own, running.rows = running.rows, Rows(0, running.rows.total, running.rows.total)
        try:
            loss, reported = split(loss_function(nest.pack(leaves), *targets), None)
        finally:
            running.rows = own
        gradients, direct = _gradients(running, loss, leaves, parameters)
        answer = (loss.detach(), gradients, direct, reported and reported.read(1.0))
    loss, gradients, direct, reported = context.exchange(answer, "the gradients of the loss of the merged outputs")[0]
    pairs = zip(gradients, tensors, layouts, strict=True)
    with plain():
        mine = [own_gradient(gradient, part, one, context.rows) for gradient, part, one in pairs]
    if context.rank > 0:
        return _contribution(0.0, loss, tensors, mine, {}, reported and reported.elsewhere())
    return _contribution(float(loss), loss, tensors, mine, direct, reported)


def _contribution(
    value: float,
    loss: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor | None],
    direct: dict[int, torch.Tensor],
    reported: Reported | None,
) -> Contribution:
    """Keep the outputs that have both a graph and a gradient."""
    pairs = [(t, g) for t, g in zip(tensors, gradients, strict=True) if g is not None and t.requires_grad]
    return Contribution(value, loss.dtype, [t for t, _ in pairs], [g for _, g in pairs], direct, reported)


def check_reduction(reduction: str, tensors: Sequence[torch.Tensor], layouts: Sequence[Layout]) -> None:
    """Refuse outputs that a loss of each replica's own rows would count wrongly.

    Raises:
        ValueError: a sum among the outputs of a mean loss, or a value that is no sum among those of a sum; a mean in
            which rows do not count alike.
    """
    if any(t.requires_grad and one.weights is not None for t, one in zip(tensors, layouts, strict=True)):
        raise ValueError(
            "An output of the module is a mean in which some rows count more than others, which a loss with "
            f"reduction={reduction!r} would count wrongly on several devices. Use reduction=None."
        )
    wrong = (Effect.SUM,) if reduction == "mean" else (Effect.SAME, Effect.LARGEST, Effect.SMALLEST)
    found = [one.effect for t, one in zip(tensors, layouts, strict=True) if t.requires_grad and one.effect in wrong]
    if found:
        raise ValueError(
            f"An output of the module is {found[0].value}, which a loss with reduction={reduction!r} would "
            "count wrongly on several devices. Use reduction=None."
        )


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    """A leaf of autograd with the tensor's values."""
    leaf = tensor.detach()
    return leaf.requires_grad_() if leaf.is_floating_point() or leaf.is_complex() else leaf


def _gradients(
    running: ReplicaContext, loss: torch.Tensor, leaves: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor | None], dict[int, torch.Tensor]]:
    """The gradients of the loss by outputs, and by the parameters that it uses directly."""
    with plain():
        if not loss.requires_grad:
            raise ValueError(WITHOUT_GRADIENT)
        used = _leaves_below(loss)
    positions = [i for i, leaf in enumerate(leaves) if id(leaf) in used]
    trained = [i for i, parameter in enumerate(parameters) if id(parameter) in used]
    inputs = [leaves[i] for i in positions] + [parameters[i] for i in trained]
    found = gradients_of(running, loss, inputs) if inputs else ()
    by_leaf = dict(zip(positions, found[: len(positions)], strict=True))
    direct = dict(zip(trained, found[len(positions) :], strict=True))
    return [by_leaf.get(i) for i in range(len(leaves))], {i: g for i, g in direct.items() if g is not None}


def _leaves_below(loss: torch.Tensor) -> set[int]:
    """The leaves of autograd that a tensor depends on, by identity."""
    if loss.grad_fn is None:
        return {id(loss)}
    nodes, seen, leaves = [loss.grad_fn], {loss.grad_fn}, set()
    while nodes:
        node = nodes.pop()
        variable = getattr(node, "variable", None)  # of the node that adds to a leaf's gradient
        if variable is not None:
            leaves.add(id(variable))
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                nodes.append(below)
    return leaves


def check_options(reduction: str | None, accumulate: int) -> None:
    """Check the values of a train step's options."""
    if reduction not in REDUCTIONS:
        raise ValueError(
            f'`reduction` must be one of {REDUCTIONS}: None for any loss, computed on the merged outputs; "mean" or '
            f'"sum" for a loss that is the mean or the sum over samples. Received: reduction={reduction!r}'
        )
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(f"`accumulate` must be a whole number >= 1. Received: accumulate={accumulate!r}")
