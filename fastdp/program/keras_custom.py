"""Single calls of layers on several devices, forward and backward: what a model's own `train_step` is made of.

A train step that a user wrote runs once, on the host, with the whole batch, so whatever it computes from losses,
gradients and metrics is as on one device. Only the calls of layers inside it are dealt out: each replica runs the
layer on its rows and keeps its part of autograd's graph; backward, the gradient of the merged outputs is dealt out by
rows, and the gradients of the weights are added up over the replicas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import keras
import numpy as np
import torch

from fastdp.program.base import Context, Result
from fastdp.program.keras import KerasProgram
from fastdp.program.keras_batch import Structure, flatten_outputs, unpack
from fastdp.program.keras_effects import Effect, NotByRowsError, classify, mixes_rows
from fastdp.program.keras_indices import IndicesNamed
from fastdp.program.keras_memory import Mapping, ReplicaScope
from fastdp.program.keras_outcome import Notes, Outcome
from fastdp.program.keras_placed import gradients_of
from fastdp.program.keras_plain import check_same
from fastdp.program.keras_replica import Running, replica_scope
from fastdp.program.keras_scope import replica_aware
from fastdp.program.keras_trial import Effects, _unlike_first
from fastdp.program.torch_tensors import as_array


@dataclass(slots=True)
class _Ran:
    """What a replica keeps of a forward call for the backward one."""

    context: Context
    run: Running
    inputs: list[torch.Tensor]
    leaves: list[torch.Tensor]
    outputs: list[torch.Tensor]
    losses: list[torch.Tensor]


@dataclass(slots=True)
class Forward:
    """One call of a layer.

    Args:
        call: runs the layer on the row arrays (all of them, or a replica's rows).
        structure: of the row arrays.
        wants_gradient: for each row array, whether its gradient may be asked for.
        weights: the trainable variables that the layer may use; none where nothing is differentiated.
        differentiable: build autograd's graph.
    """

    call: Callable[[list[torch.Tensor]], Any]
    structure: Structure
    wants_gradient: list[bool]
    weights: list[keras.Variable]
    differentiable: bool
    ran: dict[int, _Ran] = field(default_factory=dict)
    seeds: Mapping = field(default_factory=list)


@dataclass(slots=True)
class Backward:
    """The gradients of one call: those of its merged outputs and losses go in, those of its weights come out."""

    forward: Forward
    outputs: Sequence[torch.Tensor | None]
    losses: Sequence[torch.Tensor | None]
    weights: list[torch.Tensor | None] = field(default_factory=list)


class LayerEffects(Effects):
    """Whether and how one layer can be run by rows: found out by running it on two rows and on each alone.

    `refused` says why it cannot; `tried` whether the question has been answered.
    """

    tried = False
    refused: str | None = None

    def inspect(self, batch: Sequence[np.ndarray], structure: Structure) -> None:
        """Answer the question, once, where the batch has two different rows."""
        other = _unlike_first(batch, structure)
        if self.tried or other is None:
            return
        pair = [array[[0, other]] for array in batch]
        try:
            with replica_aware():
                both = self._try_rows(pair, structure, 0, 2)
                a, b = (self._try_rows(pair, structure, row, row + 1) for row in (0, 1))
            check_same([a.plain, b.plain, both.plain], both.nest)
        except NotByRowsError as error:
            self.tried, self.refused = True, str(error)
            return
        self.tried = True
        scalar = any(not out.ndim for out in both.outputs)
        uneven = any(
            x.ndim and (x.shape[0] == 0 or xy.shape != (2 * x.shape[0], *x.shape[1:]))
            for x, xy in zip(a.outputs, both.outputs, strict=True)
        )
        if scalar or uneven:
            self.refused = "its outputs have no rows"
        elif mixes_rows(a.outputs, b.outputs, both.outputs):
            self.refused = "its outputs for a row depend on the other rows"
        self._losses = [classify(*values) for values in zip(a.losses, b.losses, both.losses, strict=True)]
        if {Effect.UNKNOWN, Effect.UNDECIDED} & set(self._losses):
            self.refused = "its add_loss() is neither known as a mean nor as a sum over rows"
        self._assigned |= self._moves(a, b, both)
        for i, effect in self._assigned.items():
            if effect is Effect.UNKNOWN:
                self.refused = f"it assigns {self._variables[i].path}, which is neither a mean nor a sum over rows"


class CallProgram(KerasProgram):
    """A Keras program that also runs single calls of the model's layers: `Forward` and `Backward`.

    Args:
        own_train_step: the model trains by a step of its own, which updates the weights on the host: replicas need
            neither gradients nor slots.
    """

    def __init__(self, model: Any, trainer: Any, *, own_train_step: bool, **options: Any) -> None:
        super().__init__(model, trainer, **options)
        self._own_train_step = own_train_step
        if own_train_step:
            self.trainable = list(model.trainable_variables)
            self.gradients = []
            self.slots = []

    def home_slots(self, device: Any) -> Any:
        """No slots where the model's own step updates the weights."""
        if not self._own_train_step:
            return super().home_slots(device)
        optimizer, self.optimizer = self.optimizer, None
        try:
            return super().home_slots(device)
        finally:
            self.optimizer = optimizer

    def effects_of(self, layer: Any, call: Callable[[list[torch.Tensor]], Any]) -> LayerEffects:
        """What is to be found out about a layer."""
        return LayerEffects(layer, self.variables, lambda x, _: call(x), self._seed)

    def knows(self, layer: Any) -> bool:
        """Whether the replicas have all the layer's variables, and their leaves if they are trained."""
        leaves = set(map(id, self.trainable))
        trains = torch.is_grad_enabled()
        return all(
            id(v) in self._index and not (trains and v.value.requires_grad and id(v) not in leaves)
            for v in layer.variables
        )

    def seeds_now(self) -> Mapping:
        """The states of all seed generators, copied."""
        generators = [g for layer in self.model._flatten_layers() for g in layer._seed_generators]
        return [(g.state, g.state.value.detach().clone()) for g in generators]

    def predict(self, state: Any, batch: list[np.ndarray], context: Context) -> Result:
        """One call, forward or backward; or the whole model forward."""
        work = context.structure
        if isinstance(work, Forward):
            return self._forward(state, batch, context, work)
        if isinstance(work, Backward):
            return self._backward(context, work)
        return super().predict(state, batch, context)

    def _forward(self, state: Any, batch: list[np.ndarray], context: Context, work: Forward) -> Result:
        """The layer on a replica's rows."""
        rows, _, _ = unpack(work.structure.pack(batch))
        pairs = zip(rows, work.wants_gradient, strict=True)
        inputs = [row.detach().requires_grad_() if wanted else row for row, wanted in pairs]
        run = self.running_replica(context)
        weights = set(map(id, work.weights))
        tracing = torch.set_grad_enabled(work.differentiable)
        named = IndicesNamed(partial(self._on_rows, state, work, rows, context), context.rows.start, context.rows.stop)
        with tracing, replica_scope(run), ReplicaScope(state.mapping, weights) as scope, named:
            y = work.call(inputs)
            losses = self._extra_losses(scope.losses, context)
        outputs, structure = flatten_outputs(y)
        if work.differentiable:
            leaves = [scope.get_current_value(v) for v in work.weights]
            work.ran[context.rank] = _Ran(context, run, inputs, leaves, outputs, losses)
        detached = [loss.detach() for loss in losses]
        outcome = Outcome([], detached, outputs, structure, scope.assigned(state.mapping), run.moments)
        return self._result(outcome, state, context, Notes(structure, len(losses)))

    def _on_rows(self, state: Any, work: Forward, rows: Any, context: Context, start: int, stop: int) -> None:
        """The layer on some of a replica's rows, which counts nowhere."""
        first = context.rows.start
        part = [row[start - first : stop - first].detach() for row in rows]
        run = Running(Context.alone(part, work, start, stop, context.rows.total), sites=self.effects.sites)
        with torch.no_grad(), replica_scope(run), ReplicaScope(state.mapping, set()):
            work.call(part)

    @staticmethod
    def _backward(context: Context, work: Backward) -> Result:
        """A replica's part of the gradients. Its outputs are those of the row arrays."""
        ran = work.forward.ran[context.rank]
        ran.context.rendezvous = context.rendezvous  # where synchronized moments meet, backward
        roots, seeds = [], []
        for output, gradient in zip(ran.outputs, work.outputs, strict=False):
            if gradient is not None and output.requires_grad:
                per_row = output.shape[0] // context.rows.count
                roots.append(output)
                seeds.append(gradient[per_row * context.rows.start : per_row * context.rows.stop])
        for loss, gradient in zip(ran.losses, work.losses, strict=True):
            if gradient is not None and loss.requires_grad:
                roots.append(loss)
                seeds.append(gradient)
        wanted = [row for row, wants in zip(ran.inputs, work.forward.wants_gradient, strict=True) if wants]
        targets = [*wanted, *ran.leaves]
        found = gradients_of(ran.run, roots, seeds, targets, retain=True)
        everyone = context.exchange(found[len(wanted) :])
        for i in range(context.rank, len(ran.leaves), context.size):  # each replica adds up its part of the weights
            parts = [part[i] for part in everyone if part[i] is not None]
            work.weights[i] = sum(parts[1:], parts[0]) if parts else None
        rows = [torch.zeros_like(row) if g is None else g for row, g in zip(wanted, found, strict=False)]
        return Result([as_array(row) for row in rows], np.zeros(0), Notes())

    def replay(self, work: Forward, inputs: list[torch.Tensor], batch: list[np.ndarray]) -> list[torch.Tensor]:
        """The call again, on the whole batch and on this thread, with a graph that can be differentiated twice.

        Draws come from the seeds of the first time, so the values are the same. Its outputs, then its losses.

        Raises:
            NotImplementedError: the layer's BatchNormalization used each replica's own moments.
        """
        context = Context.alone(batch, work, 0, len(batch[0]), len(batch[0]))
        context.step = work.ran[0].context.step
        run = self.running_replica(context)
        run.placed = None
        mapping = [(v, v.value) for v in self.variables] + work.seeds
        with replica_aware(), torch.enable_grad(), replica_scope(run), ReplicaScope(mapping, set()) as scope:
            outputs, _ = flatten_outputs(work.call(inputs))
            losses = self._extra_losses(scope.losses, context)
        if run.moments and not self.sync_batch_norm:
            raise NotImplementedError(
                "A gradient of a gradient through BatchNormalization needs the moments of the global batch: wrap the "
                "model with sync_batch_norm=True."
            )
        return [*outputs, *losses]
