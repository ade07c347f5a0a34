"""Runs single calls of a model's layers on several devices, forward and backward.

A train step that a user wrote runs once, on the host, with the whole batch. So everything that it computes from losses,
gradients and metrics is as on one device. Only the layer calls inside it are split: each replica runs the layer on its
rows and keeps its part of autograd's graph. Backward splits the gradient of the merged outputs by rows and sums the
gradients of the weights over the replicas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import keras
import numpy as np
import torch

from fastdp.buffers import Allocator, FlatBuffers
from fastdp.comm.batch import Batch
from fastdp.comm.context import Context
from fastdp.program.base import Result
from fastdp.program.keras.batch import flatten_outputs, pack_like, unpack
from fastdp.program.keras.indices import IndicesNamed
from fastdp.program.keras.patches import replica_aware
from fastdp.program.keras.placement.graph import gradients_of
from fastdp.program.keras.program import KerasProgram
from fastdp.program.keras.random.generators import Generators
from fastdp.program.keras.recompute import keep_values
from fastdp.program.keras.replica import ReplicaContext, keras_device, replica_scope
from fastdp.program.keras.rows.call_probe import LayerEffects, RowsCall, is_number
from fastdp.program.keras.step_sums import Notes, SideEffects, StepSums
from fastdp.program.keras.variables import Mapping, ReplicaScope, ReplicaState
from fastdp.tensors.arrays import as_array
from fastdp.tensors.row_effects import Effect, NotByRowsError


@dataclass(slots=True)
class _Ran:
    """What a replica keeps of a forward call for its backward."""

    context: Context
    run: ReplicaContext
    inputs: list[torch.Tensor]
    leaves: list[torch.Tensor]
    outputs: list[torch.Tensor]
    numbers: list[torch.Tensor]
    scope: ReplicaScope


_ROWS, _NUMBER = object(), object()


@dataclass(slots=True)
class OutputForm:
    """The structure of a call's outputs: which leaves are tensors with rows, and which are tensors of one number.

    All other leaves are kept unchanged.
    """

    nest: Any = None
    leaves: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, outputs: Any) -> tuple[OutputForm, list[torch.Tensor], list[torch.Tensor]]:
        """Split a call's outputs into their form, the tensors with rows, and the tensors of one number."""
        leaves = keras.tree.flatten(outputs)
        tensors = [isinstance(leaf, torch.Tensor) for leaf in leaves]
        kinds = [
            (_NUMBER if is_number(leaf) else _ROWS) if is_tensor else leaf
            for leaf, is_tensor in zip(leaves, tensors, strict=True)
        ]
        rows = [leaf for leaf, kind in zip(leaves, kinds, strict=True) if kind is _ROWS]
        numbers = [leaf for leaf, kind in zip(leaves, kinds, strict=True) if kind is _NUMBER]
        return cls(keras.tree.map_structure(lambda _: 0, outputs), kinds), rows, numbers

    @property
    def numbers(self) -> int:
        """The number of outputs that are one number."""
        return sum(leaf is _NUMBER for leaf in self.leaves)

    def pack(self, rows: Sequence[torch.Tensor], numbers: Sequence[torch.Tensor], masked: Sequence[bool]) -> Any:
        """Rebuild the outputs. `rows` holds the outputs with rows, then the Keras masks of those that are `masked`."""
        masks = iter(rows[len(masked) :])
        for tensor, has_mask in zip(rows, masked, strict=False):
            if has_mask:
                tensor._keras_mask = next(masks)
        given = {_ROWS: iter(rows), _NUMBER: iter(numbers)}
        leaves = [next(given[leaf]) if leaf is _ROWS or leaf is _NUMBER else leaf for leaf in self.leaves]
        return pack_like(self.nest, leaves)


@dataclass(slots=True)
class Forward:
    """One call of a layer.

    Args:
        effects: what is known of such calls.
        call: runs the layer on the row tensors (whole or a replica's rows) and the shared ones.
        rows_want, shared_want: for each row tensor and each shared tensor, whether its gradient may be needed.
        weights: the trainable variables that the layer may use; empty if nothing is differentiated.
        differentiable: build autograd's graph.
        shared: tensors that are the same for all rows.

    `form` and `number_dtypes` describe the first replica's outputs; `added_by` lists the layers of its `add_loss` terms
    (None if unknown). `chained` says that one output is computed from another; with `refuses_chains` that is an error.
    """

    effects: LayerEffects
    call: RowsCall
    rows_want: list[bool]
    weights: list[keras.Variable]
    differentiable: bool
    shared: Sequence[torch.Tensor] = ()
    shared_want: Sequence[bool] = ()
    refuses_chains: bool = False
    chained: bool = False
    ran: dict[int, _Ran] = field(default_factory=dict)
    seeds: Mapping = field(default_factory=list)
    form: OutputForm = field(default_factory=OutputForm)
    number_dtypes: list[torch.dtype] = field(default_factory=list)
    added_by: list[Any] = field(default_factory=list)

    @property
    def leaf_count(self) -> int:
        """The number of tensors whose gradients are sums over the replicas: shared ones, then weights."""
        return sum(self.shared_want) + len(self.weights)


@dataclass(slots=True)
class Backward:
    """The gradients of one call: by its merged outputs and numbers as input, by its leaves as result."""

    forward: Forward
    outputs: Sequence[torch.Tensor | None]
    numbers: Sequence[torch.Tensor | None]
    leaves: list[torch.Tensor | None] = field(default_factory=list)


class CallProgram(KerasProgram):
    """A Keras program that also runs single calls of the model's layers: `Forward` and `Backward`.

    Args:
        own_train_step: the model has its own train step, which updates the weights on the host, so that replicas need
            neither gradients nor slots.
    """

    def __init__(self, model: Any, trainer: Any, *, own_train_step: bool, **options: Any) -> None:
        super().__init__(model, trainer, **options)
        self.own_train_step = own_train_step
        self._doubted = False
        self.follows_trainable = own_train_step or self.optimizer is None
        if self.follows_trainable:
            # Weights are still leaves of autograd, including those frozen now: a step may unfreeze them in its middle.
            layers = model._flatten_layers()
            trained = {id(v) for layer in layers for v in (*layer._trainable_variables, *layer.trainable_variables)}
            self.trainable = [v for v in self.variables if id(v) in trained and v.value.is_floating_point()]
            self.gradients = []
            self.slots = []

    def home_slots(self, device: Allocator) -> FlatBuffers:
        """No slots if the model's own step updates the weights."""
        if not self.own_train_step:
            return super().home_slots(device)
        return FlatBuffers([], device)

    def changed_outside(self) -> bool:
        """As in `KerasProgram`, but also True if changes may have gone unnoticed (`doubt`).

        Torch does not count writes by its fused optimizers or through `.data`, and custom training loops use both. So
        replicas are refreshed before each call from such a loop, and after each backward pass.
        """
        doubted, self._doubted = self._doubted, False
        return super().changed_outside() or doubted

    def doubt(self) -> None:
        """Make the next step refresh the replicas, because weights may have been written unnoticed."""
        self._doubted = True

    def effects_of(self, layer: Any) -> LayerEffects:
        """Make the record of how calls of a layer depend on rows."""
        self.later.is_active = True
        return LayerEffects(layer, self.variables, lambda x, training: layer(x, training=training), self.seed)

    def knows(self, variables: Sequence[keras.Variable]) -> bool:
        """Whether the replicas have these variables, and their leaves if they are trained."""
        leaves = set(map(id, self.trainable))
        trains = torch.is_grad_enabled()
        return all(
            id(v) in self._index and not (trains and v.value.requires_grad and id(v) not in leaves) for v in variables
        )

    def seeds_now(self) -> Mapping:
        """The states of all seed generators, copied."""
        generators = [g for layer in self.model._flatten_layers() for g in layer._seed_generators]
        return [(g.state, g.state.value.detach().clone()) for g in generators]

    # Work for `DataParallel.call`.

    def forward(self, work: Forward, state: ReplicaState, batch: list[np.ndarray], context: Context) -> Result:
        """Run the layer on a replica's rows."""
        rows, _, _ = unpack(context.structure.pack(batch))
        inputs = _leaves(rows, work.rows_want, context.torch_device)
        shared = _leaves(work.shared, work.shared_want, context.torch_device)
        run = self.running_replica(context, effects=work.effects)
        weights, versions = set(map(id, work.weights)), self.later.versions(state.mapping)
        tracing = torch.set_grad_enabled(work.differentiable)
        named = IndicesNamed(
            partial(self._on_rows, state, work, rows, shared, context), context.rows.start, context.rows.stop
        )
        with (
            tracing,
            keras_device(context.device),
            self._autocast.enter(),
            replica_scope(run),
            ReplicaScope(state.mapping, weights) as scope,
            named,
        ):
            y = work.call(inputs, shared)
            branches = tuple(run.branches)
            losses = work.effects.contributions(scope.losses, context)
        keep_values(run, scope, state.mapping)
        self.later.check(context, state.mapping, versions)
        form, found, numbers = OutputForm.of(y)
        outputs, structure = flatten_outputs(found)
        if context.index == 0:
            work.form = form
            work.number_dtypes = [tensor.dtype for tensor in (*losses, *numbers)]
            work.added_by = [run.added_by.get(id(loss)) for loss in scope.losses]
            work.chained = work.differentiable and feed_each_other([*outputs, *numbers])
            if work.chained and work.refuses_chains:
                raise NotByRowsError(
                    "one of its outputs is computed from another one, and no gradient flows between merged outputs"
                )
        numbers = [*losses, *_contributions(numbers, work.effects, context)]
        if work.differentiable:
            wanted = [tensor for tensor, wants in zip(shared, work.shared_want, strict=True) if wants]
            leaves = [*wanted, *(scope.get_current_value(v) for v in work.weights)]
            work.ran[context.index] = _Ran(context, run, inputs, leaves, outputs, numbers, scope)
        detached = [number.detach() for number in numbers]
        side_effects = SideEffects.of(scope, state.mapping, run)
        outcome = StepSums([], detached, outputs, structure, side_effects, branches=branches)
        notes = Notes(structure, len(numbers), branches=self.later.asked(outcome))
        return outcome.result(state.mapping, context, notes, work.effects)

    def _on_rows(
        self, state: ReplicaState, work: Forward, rows: Any, shared: Any, context: Context, start: int, stop: int
    ) -> None:
        """Run the layer on some of a replica's rows, without any effect."""
        first = context.rows.start
        part = [row[start - first : stop - first].detach() for row in rows]
        alone = Context.alone(part, context.structure, start, stop, context.rows.total)
        run = ReplicaContext(alone, sites=work.effects.sites)
        with torch.no_grad(), replica_scope(run), ReplicaScope(state.mapping, set()):
            work.call(part, shared)

    def backward(self, work: Backward, state: ReplicaState, batch: list[np.ndarray], context: Context) -> Result:
        """Compute a replica's part of the gradients. The result's outputs are the gradients by the row arrays."""
        self.doubt()
        ran = work.forward.ran[context.index]
        ran.context.rendezvous = context.rendezvous  # for the backward of synchronized moments
        roots, seeds = [], []
        for output, gradient in zip(ran.outputs, work.outputs, strict=False):
            if gradient is not None and output.requires_grad:
                per_row = output.shape[0] // context.rows.count
                roots.append(output)
                rows = gradient[per_row * context.rows.start : per_row * context.rows.stop]
                seeds.append(rows.to(output.device))
        for number, gradient in zip(ran.numbers, work.numbers, strict=True):
            if gradient is not None and number.requires_grad:
                roots.append(number)
                seeds.append(gradient.to(number.device, number.dtype))
        wanted = [row for row, wants in zip(ran.inputs, work.forward.rows_want, strict=True) if wants]
        targets = [*wanted, *ran.leaves]
        with replica_scope(ran.run), ran.scope:
            found = gradients_of(ran.run, roots, seeds, targets, retain=True)
        everyone = context.exchange(found[len(wanted) :], "the sum of the gradients")
        for i in range(context.index, len(ran.leaves), context.here):  # each replica sums its part of the leaves
            parts = [part[i] for part in everyone if part[i] is not None]
            work.leaves[i] = sum(parts[1:], parts[0]) if parts else None
        rows_found = [torch.zeros_like(row) if g is None else g for row, g in zip(wanted, found, strict=False)]
        return Result([as_array(row) for row in rows_found], np.zeros(0), Notes())

    def replay(
        self, work: Forward, inputs: list[torch.Tensor], shared: list[torch.Tensor], batch: Batch
    ) -> list[torch.Tensor]:
        """Repeat a call on the whole batch and on this thread, with a graph that can be differentiated twice.

        Draws use the seeds of the first call, so the values are the same.

        Returns:
            The call's outputs, then its losses, then its outputs of one number.

        Raises:
            NotImplementedError: the layer's BatchNormalization used each replica's own moments.
        """
        context = Context.alone(batch, batch.structure, 0, batch.rows, batch.rows)
        context.step = work.ran[0].context.step
        run = self.running_replica(context, effects=work.effects, spans_devices=False)
        run.generators = Generators(work.ran[0].run.generators.step)
        mapping = [(v, v.value) for v in self.variables] + work.seeds
        with replica_aware(), torch.enable_grad(), replica_scope(run), ReplicaScope(mapping, set()) as scope:
            _, found, numbers = OutputForm.of(work.call(inputs, shared))
            losses = work.effects.contributions(scope.losses, context)
        if run.moments and not self.sync_batch_norm:
            raise NotImplementedError(
                "A gradient of a gradient through BatchNormalization needs the moments of the global batch: wrap the "
                "model with sync_batch_norm=True."
            )
        return [*flatten_outputs(found)[0], *losses, *numbers]


def _contributions(numbers: Sequence[torch.Tensor], effects: LayerEffects, context: Context) -> list[torch.Tensor]:
    """A replica's contributions to outputs that are one number for the whole batch."""
    factors = [1.0 if effect is Effect.SUM else context.rows.share for effect in effects.numbers]
    return [number * factor for number, factor in zip(numbers, factors, strict=True)]


def _leaves(tensors: Sequence[torch.Tensor], wants: Sequence[bool], device: str) -> list[torch.Tensor]:
    """A replica's own tensors, as leaves of autograd if their gradients are wanted."""
    own = (tensor.detach().to(device) for tensor in tensors)
    return [one.requires_grad_() if wanted else one for one, wanted in zip(own, wants, strict=True)]


def feed_each_other(outputs: Sequence[torch.Tensor]) -> bool:
    """Whether autograd's graph computes one of these tensors from another.

    A script may want the gradient of one by the other (of a class's score by a feature map). Two outputs of one
    autograd node have no such gradient.
    """
    ends = {output.grad_fn for output in outputs if output.grad_fn is not None}
    if len(ends) < 2:
        return False
    seen, left = set(ends), list(ends)
    while left:
        for node, _ in left.pop().next_functions:
            if node in ends:
                return True
            if node is not None and node not in seen:
                seen.add(node)
                left.append(node)
    return False
