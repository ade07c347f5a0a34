"""The loss of the merged outputs: exact for any loss, at the cost of synchronizing all replicas once.

All replicas gather their outputs. The first replica computes Keras's own loss on them and its gradient with respect to
each. Every replica runs backward from the gradient of its own rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import keras
import torch

from fastdp.comm.batch import Batch
from fastdp.comm.context import Context
from fastdp.program.keras.batch import layouts_of, pack_like, split_leaves, with_plain
from fastdp.program.keras.indices import IndicesNamed, rows_of
from fastdp.program.keras.loss.per_sample import own_copy
from fastdp.program.keras.plain_outputs import Plain, check_same
from fastdp.program.keras.random.ops import whole_batch
from fastdp.program.keras.replica import ReplicaContext, running
from fastdp.program.keras.rows.units import own_part
from fastdp.program.keras.variables import ReplicaScope
from fastdp.tensors.row_effects import Effect, Layout
from fastdp.tensors.sums import weighted_sum

if TYPE_CHECKING:
    from fastdp.program.keras.training_loss import TrainingLoss


def merged_loss(
    training_loss: TrainingLoss,
    y_pred: Any,
    extra: list[torch.Tensor],
    scope: ReplicaScope,
    context: Context,
    y: Any = None,
) -> tuple[list[torch.Tensor], list[torch.Tensor | None], list[torch.Tensor]]:
    """The tensors where a replica's backward starts, their gradients, and the loss and its terms.

    Only the first replica returns the values of the loss and its terms; the others return zeros.

    Args:
        training_loss: the loss that the model was compiled with.
        y_pred: the replica's outputs.
        extra: the replica's contributions to the `add_loss` terms.
        scope: the replica's stateless scope, which must be active.
        context: the replica's place in the step.
        y: the replica's targets where they are not those of the batch; None where they are.
    """
    leaves, plain = split_leaves(y_pred)
    layouts = layouts_of(leaves, training_loss.effects.layouts, context.rows)
    everyone = context.exchange(_Given(leaves, plain, extra, context, y), "the loss of the merged outputs")
    answer = None
    if context.rank == 0:
        run = running()
        assert run is not None, "a replica computes the loss"
        before = dict(scope.state_mapping)
        with whole_batch(run), _waited_for(run):  # the loss draws for all rows
            answer = _compute(training_loss, y_pred, layouts, everyone, scope, context)
        run.by_loss = frozenset(n for n, value in scope.state_mapping.items() if before.get(n) is not value)
    answer = context.exchange(answer, "the gradients of the loss of the merged outputs")[0]
    roots: list[torch.Tensor] = []
    seeds: list[torch.Tensor | None] = []
    for place, (leaf, gradient) in enumerate(zip(leaves, answer.outputs, strict=True)):
        if gradient is not None and leaf.requires_grad:
            roots.append(leaf)
            seeds.append(_own_rows(gradient, layouts[place], context))
    for term, gradient in zip(extra, answer.extra, strict=True):
        if gradient is not None and term.requires_grad:
            roots.append(term)
            seeds.append(gradient)
    if context.rank == 0 and answer.direct is not None:
        roots.append(answer.direct)
        seeds.append(None)
    zeros = [torch.zeros(()) for _ in answer.terms]
    return roots, seeds, answer.terms if context.rank == 0 else zeros


@contextmanager
def _waited_for(run: ReplicaContext) -> Iterator[None]:
    """Note that all other replicas wait for this one."""
    run.waited_for = True
    try:
        yield
    finally:
        run.waited_for = False


class _Given:
    """What a replica contributes: its detached outputs, outputs that are not tensors, masks and terms."""

    def __init__(
        self, leaves: list[torch.Tensor], plain: Plain, extra: list[torch.Tensor], context: Context, y: Any = None
    ) -> None:
        self.leaves = [leaf.detach() for leaf in leaves]
        self.masks = [getattr(leaf, "_keras_mask", None) for leaf in leaves]
        self.extra = [term.detach() for term in extra]
        self.plain = plain
        self.rows = context.rows
        self.targets = None if y is None else [leaf.detach() for leaf in keras.tree.flatten(y)]
        self.nest = y

    def moved(self, how: Callable[[Any], Any]) -> _Given:
        """The same with its tensors moved."""
        twin = copy.copy(self)
        twin.leaves, twin.masks, twin.extra = how(self.leaves), how(self.masks), how(self.extra)
        twin.targets = how(self.targets)
        return twin


class _Answer:
    """What the first replica computes.

    Attributes:
        outputs, extra: gradients with respect to the merged outputs and the `add_loss` terms; None without one.
        terms: the loss and its terms.
        direct: the loss in autograd's graph, if it can be differentiated: it may use weights directly (regularizers).
    """

    def __init__(self) -> None:
        self.outputs: list[torch.Tensor | None] = []
        self.extra: list[torch.Tensor | None] = []
        self.terms: list[torch.Tensor] = []
        self.direct: torch.Tensor | None = None

    def moved(self, how: Callable[[Any], Any]) -> _Answer:
        """The same with its tensors moved."""
        twin = copy.copy(self)
        twin.outputs, twin.extra, twin.terms = how(self.outputs), how(self.extra), how(self.terms)
        return twin


def _compute(
    training_loss: TrainingLoss,
    y_pred: Any,
    layouts: list[Layout],
    everyone: list[_Given],
    scope: ReplicaScope,
    context: Context,
) -> _Answer:
    """Keras's loss on all outputs, and its gradients."""
    check_same([given.plain for given in everyone], y_pred)
    columns = zip(layouts, *(given.leaves for given in everyone), strict=True)
    merged = [_merge(layout, parts, everyone) for layout, *parts in columns]
    for i, tensor in enumerate(merged):
        masks = [given.masks[i] for given in everyone]
        if masks[0] is not None:
            axis = layouts[i].axis
            tensor._keras_mask = masks[0] if axis is None else torch.cat(masks, min(axis, masks[0].ndim - 1))
    extra = [torch.stack(parts).sum() for parts in zip(*(given.extra for given in everyone), strict=True)]
    inputs = [tensor for tensor in (*merged, *extra) if tensor.is_floating_point()]
    for tensor in inputs:
        tensor.requires_grad_()
    answer = _Answer()
    nest = pack_like(y_pred, with_plain(merged, everyone[0].plain))
    y = _targets(everyone)
    with IndicesNamed(partial(_of_rows, training_loss, nest, y, scope, context), 0, context.rows.total):
        loss, answer.terms = _loss_of_all(training_loss, nest, extra, scope, context, y)
    scaled = training_loss.optimizer.scale_loss(loss)
    gradients: list[torch.Tensor | None] = [None] * len(inputs)
    if scaled.requires_grad:
        # The graph is kept: the weights that the loss uses directly take their gradient from it below.
        gradients = list(torch.autograd.grad(scaled, inputs, retain_graph=True, allow_unused=True))
        answer.direct = scaled
    found = dict(zip(map(id, inputs), gradients, strict=True))
    answer.outputs = [found.get(id(tensor)) for tensor in merged]
    answer.extra = [found.get(id(term)) for term in extra]
    return answer


def _of_rows(
    training_loss: TrainingLoss, y_pred: Any, y: Any, scope: ReplicaScope, context: Context, start: int, stop: int
) -> None:
    """Compute the loss of some rows of the global batch, without recording it."""
    some = Batch([array[start:stop] for array in context.batch], context.structure, stop - start)
    part = replace(context, batch=some)
    outputs = keras.tree.map_structure(
        lambda leaf: rows_of(getattr(leaf, "detach", lambda: leaf)(), start, stop), y_pred
    )
    targets = None if y is None else keras.tree.map_structure(lambda leaf: rows_of(leaf, start, stop), y)
    _loss_of_all(training_loss, outputs, [], scope, part, targets)


def _loss_of_all(
    training_loss: TrainingLoss,
    y_pred: Any,
    extra: list[torch.Tensor],
    scope: ReplicaScope,
    context: Context,
    targets: Any = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss of the global batch, and detached values to record: the loss and Keras's terms."""
    batch = context.structure.pack(context.batch, inputs=training_loss.is_own)  # Keras's own loss does not use x
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
    y = y if targets is None else targets
    compiled = training_loss.trainer._compile_loss
    metrics = compiled.metrics if compiled is not None else []
    for metric in metrics:  # reset, so that they hold only this step's terms
        for variable in (metric.total, metric.count):
            scope.state_mapping[id(variable)] = keras.ops.zeros((), dtype=variable.dtype)
    if training_loss.is_own:
        # `self.losses` inside compute_loss reads the scope, so the scope gets the terms of the global batch.
        scope.losses[:] = extra
        training_loss.model._loss_ids.update(map(id, extra))
        loss = training_loss.model._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True)
    else:
        parts = [compiled(y, y_pred, own_copy(sample_weight)), *extra]
        parts += [keras.ops.sum(value) for value in training_loss.regularization()]
        loss = parts[0] if len(parts) == 1 else keras.ops.sum(parts)
    values = [(scope.get_current_value(m.total), scope.get_current_value(m.count)) for m in metrics]
    return loss, [loss.detach(), *((total / count).detach() for total, count in values)]


def _targets(everyone: list[_Given]) -> Any:
    """The targets of all rows where they are not those of the batch; None where they are."""
    first = everyone[0]
    if first.targets is None:
        return None
    columns = zip(*(given.targets or [] for given in everyone), strict=True)
    return pack_like(first.nest, [torch.cat(list(parts)) for parts in columns])


def _merge(layout: Layout, parts: Sequence[torch.Tensor], everyone: list[_Given]) -> torch.Tensor:
    """Concatenate rows in order. An output without rows is taken from one replica, summed, or averaged by rows."""
    if layout.axis is not None:
        return torch.cat(list(parts), layout.axis)
    if layout.effect is Effect.SAME:
        return parts[0].clone()
    factors = [1.0 if layout.effect is Effect.SUM else given.rows.share for given in everyone]
    return weighted_sum(parts, factors)


def _own_rows(gradient: torch.Tensor, layout: Layout, context: Context) -> torch.Tensor:
    """The part of a merged output's gradient that belongs to this replica.

    If all replicas have the same output, each takes its share of the gradient, so that it is counted once in total.
    """
    rows = context.rows
    if layout.axis is None:
        return gradient if layout.effect is Effect.SUM else gradient * rows.share
    return own_part(gradient, layout.axis, rows)
