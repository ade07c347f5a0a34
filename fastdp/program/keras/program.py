"""`KerasProgram`: the steps of a real Keras model as pure functions over explicit state.

All replicas are the same Python object, the user's model, run under a `StatelessScope` on each device's
state: no model is ever cloned. The model itself, the *template*, aliases the first replica's memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import keras
import numpy as np
import torch

from fastdp.buffers import Allocator, ArraySpec, FlatBuffers, Home, Memory
from fastdp.capture.cuda_graphs.step_graphs import RecordedStepGraph
from fastdp.capture.shapes import are_recorded
from fastdp.capture.steps import Captures
from fastdp.capture.trace import Captured
from fastdp.comm.batch import Batch
from fastdp.comm.context import Context
from fastdp.program.base import Launched, Program, Result, Totals
from fastdp.program.keras.foreign import ForeignVariables, assign
from fastdp.program.keras.gradients import LeftGradients
from fastdp.program.keras.indices import RowsNamed
from fastdp.program.keras.optimizer.accumulation import Accumulation, Engine
from fastdp.program.keras.optimizer.slots import optimizer_of
from fastdp.program.keras.optimizer.update import OptimizerUpdate
from fastdp.program.keras.passes import ModelCall, Passes
from fastdp.program.keras.placement.graph import PlacedGraph, graph_of
from fastdp.program.keras.prepared_rows import PreparedRows
from fastdp.program.keras.random.step_draws import StepDraws
from fastdp.program.keras.replica import ReplicaContext, keras_device
from fastdp.program.keras.rows.known_layers import has_known_regularizers, keeps_rows_apart
from fastdp.program.keras.rows.later import LaterWrites
from fastdp.program.keras.rows.policy import ModelEffects, Policy
from fastdp.program.keras.rows.probe import Effects
from fastdp.program.keras.running import Running
from fastdp.program.keras.step_sums import Notes, StepSums, Summed
from fastdp.program.keras.training_loss import TrainingLoss
from fastdp.program.keras.variables import AdoptedVariables, ReplicaState, adopted, variables_of
from fastdp.program.keras.weight_hooks import WeightHooks
from fastdp.runtime.queue import QueueDevice
from fastdp.shard import Deal
from fastdp.tensors.arrays import accumulate, settle, spec_of
from fastdp.tensors.autocast import Autocast
from fastdp.tensors.threads import given_cores, in_place_of_workers, prepare_worker


class KerasProgram(Program):
    """Runs a built Keras model as replicas.

    Args:
        model: the template.
        trainer: the owner of the compiled loss and optimizer: the parallel model or the template itself. If it is
            not compiled, the program can only predict.
        sync_batch_norm: normalize by the global batch.
        template_state: makes a context manager to hold while replicas run, for templates whose own
            `compute_loss` needs the trainer's compile state.
        replicas: the number of replicas. A single one needs no trial of how values depend on rows.
        policy: what to do if a layer mixes rows.
        groups: all devices of each replica, if replicas span several.
        in_parts: each of several replicas updates its part of the weights, and has the slots of this part alone.

    Raises:
        ValueError: the optimizer cannot update parts.
    """

    def __init__(
        self,
        model: keras.Model,
        trainer: Any,
        *,
        sync_batch_norm: bool = False,
        template_state: Any = None,
        replicas: int = 2,
        policy: Policy | None = None,
        groups: Sequence[Sequence[QueueDevice]] | None = None,
        in_parts: bool = False,
    ) -> None:
        self.model, self.trainer = model, trainer
        self.sync_batch_norm = sync_batch_norm
        self._template_state = template_state
        self.variables = variables_of(model)
        self._index = {id(v): i for i, v in enumerate(self.variables)}
        self.optimizer = optimizer = optimizer_of(trainer)
        self.scales_loss = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        self.trainable = list(model.trainable_variables) if optimizer is not None else []
        self.accumulation = Accumulation(optimizer, self.trainable)
        self.slot_variables = list(optimizer.variables) if optimizer is not None else []
        self.gradients: Sequence[ArraySpec] = [spec_of(v.path, v.value) for v in self.trainable]
        # Follows keras.utils.set_random_seed without drawing from any generator.
        self.seed = torch.initial_seed() & 0x7FFFFFFF
        self._replicas, self._groups = replicas, groups
        call = ModelCall(model)
        about = (model, self.variables, call, self.seed)
        policy = policy or Policy()
        self.effects = ModelEffects(*about, training=True, policy=policy)
        self.forward_effects = ModelEffects(*about, self.effects.sites, training=False, policy=policy)
        self.loss = TrainingLoss(model, trainer, optimizer, self.effects)
        self.passes = Passes(call, self.loss, self.trainable, self.effects, self.forward_effects)
        self._is_known = has_known_regularizers(self.trainable) and keeps_rows_apart(model)
        self.draws = StepDraws(moves=bool(self.effects.seeds) or not self._is_known)
        self._update = OptimizerUpdate(optimizer, self.trainable, self.draws, in_parts=in_parts)
        self.slots: Sequence[ArraySpec] = [spec_of(v.path, v.value) for v in self._update.slots]
        self._left, self._hooks = LeftGradients(self.trainable), WeightHooks(self.trainable)
        self.foreign, self.later = ForeignVariables(), LaterWrites(model)
        self._adopted: list[AdoptedVariables] = []
        self._captures: Captures[Captured[StepSums]] | None = None
        self.states: weakref.WeakValueDictionary[int, ReplicaState] = weakref.WeakValueDictionary()
        self._autocast = Autocast.current()  # the state of the thread that calls steps

    uses_cupy = False
    shards_optimizer = True

    @property
    def trained(self) -> list[int]:
        """The numbers of the trainable variables."""
        return [self._index[id(v)] for v in self.trainable]

    @property
    def spans_devices(self) -> bool:
        """Whether a replica spans several devices."""
        return self._groups is not None

    # Memory.

    def home(self, device: Allocator) -> Home:
        """The template's own variables, in flat buffers."""
        self._adopted = [adopted(self.model, self.variables, device)]
        return self._adopted[0].home

    def home_slots(self, device: Allocator) -> FlatBuffers:
        """The optimizer's own variables, in flat buffers."""
        if self.optimizer is None:
            return FlatBuffers([], device)
        self._adopted.append(adopted(self.optimizer, self._update.slots, device))
        return self._adopted[-1].home.variables

    def known_parts(self) -> Sequence[object]:
        """The model, its layers and its variables."""
        return [self.model, *self.model._flatten_layers(), *self.variables]

    def changed_outside(self) -> bool:
        """Whether a callback or the user assigned a weight, the learning rate, or anything else."""
        self._update.claim()
        changed = [one.changed() for one in self._adopted]  # not any(...): `changed` also adopts new values
        if any(changed):
            settle(v.value for v in self.variables)
        return any(changed)

    def committed(self) -> None:
        """Note that all replicas have the present values."""
        for one in self._adopted:
            one.note()

    def unbind(self, deal: Deal) -> None:
        """Forget all replicas. Captured steps are kept where the rows of a replica stay what they are."""
        self._replicas = deal.parts
        self.states.clear()
        if self._captures is not None:
            self._captures.deal_by(deal)

    def bind(self, memory: Memory, device: QueueDevice, rank: int) -> ReplicaState:
        """A replica's tensors over its memory."""
        state = ReplicaState.over(memory, device, self.variables, self.trained, self._update.flat(memory, device, rank))
        self.states[rank] = state
        return state

    # Around a step.

    @property
    def cores(self) -> int:  # type: ignore[override]
        """The cores that the user lets torch use."""
        return given_cores()

    def prepare_thread(self, threads: int, device: QueueDevice) -> None:
        """Set the worker's number of threads."""
        prepare_worker(threads, device)

    def running(self, threads: int) -> AbstractContextManager[None]:
        """Hold what Keras and torch need while replicas run."""
        return Running(self, threads)

    def begun(self) -> None:
        """Prepare what a step reads of the calling thread. Within `running`."""
        self.loss.prepare()
        self.draws.begin()
        self.later.begin()
        self._autocast = Autocast.current()

    @property
    def template_state(self) -> Callable[[], AbstractContextManager[None]] | None:
        """Makes the context in which a template's own loss is computed; None where none is needed."""
        return self._template_state if self.loss.is_own else None

    @property
    def captures(self) -> Captures[Captured[StepSums]] | None:
        """The captured steps; None where all steps run eagerly."""
        return self._captures

    def capture_by(self, captures: Captures[Captured[StepSums]]) -> None:
        """Use the captured steps of `captures`, which must be of this program, where they exist."""
        self._captures = captures

    def train(self, state: ReplicaState, batch: list[np.ndarray], context: Context) -> Result:
        """Compute forward, this replica's contribution to the loss, and its gradient."""
        captured = self._captures.find(context) if self._captures is not None else None
        with RowsNamed(self, batch, context, state.mapping, trains=True):
            if captured is not None:
                rows, moved = self._rows_of(state, batch, context)
                outcome = captured.replay(state, rows, context)  # writes the gradients
                outcome.effects.assigned.extend(moved)
                unused = frozenset(i for i, gradient in enumerate(outcome.gradients) if gradient is None)
            else:
                # If a replica spans devices, backward goes call by call: gradients come in parts, from several threads.
                ready = context.ready if context.listens and self._groups is None else None
                with state.arrivals.during(ready), self._autocast.enter():
                    nest, versions = context.structure.pack(batch), self.later.versions(state.mapping)
                    outcome = self.passes.train(state.mapping, nest, self.running_replica(context))
                unused = state.arrivals.store(outcome.gradients)
                self.later.check(context, state.mapping, versions)
        return outcome.result(state.mapping, context, self._notes(outcome, unused), self.effects)

    def _rows_of(self, state: ReplicaState, batch: Any, context: Context) -> tuple[Any, list[tuple[int, torch.Tensor]]]:
        """What a captured step takes of a replica's rows, and the seeds that layers in front of the model advance."""
        if self.passes.call.augmented is None:
            return batch, []
        run = self.running_replica(context)
        rows = PreparedRows.of(self.passes.call, state.mapping, batch, context, run)
        self.draws.begun(context.index, run.generators)
        return rows, rows.moved

    def _notes(self, outcome: StepSums, unused: frozenset[int]) -> Notes:
        """The notes of a training step in which these trainable variables have no gradient."""
        unused |= {i for i, v in enumerate(self.trainable) if not v._value.requires_grad}  # frozen through torch
        terms, ways = len(outcome.terms) - 1, self.later.asked(outcome)
        return Notes(outcome.structure, terms, unused=unused, added=outcome.added, branches=ways)

    def launches(self, contexts: Sequence[Context]) -> bool:
        """Whether the replicas' steps are recorded as CUDA graphs."""
        eager = self.passes.call.augmented is not None  # layers in front of the model run on the workers
        return self._captures is not None and not eager and are_recorded(self._captures.find, contexts)

    launching = staticmethod(in_place_of_workers)  # the thread gets its streams and modes of torch back

    def launch(self, state: ReplicaState, batch: list[np.ndarray], context: Context) -> Launched:
        """Enqueue a recorded step."""
        captured: Captured[StepSums] = context.found
        with RowsNamed(self, batch, context, state.mapping, trains=True):
            outcome = captured.replay(state, batch, context)
        unused = frozenset(i for i, gradient in enumerate(outcome.gradients) if gradient is None)
        notes = self._notes(outcome, unused)
        return Launched(
            lambda: outcome.arrays(context), lambda: outcome.summed(state.mapping, context, notes, self.effects)
        )

    def step_graph(self, contexts: Sequence[Context], why_not: str) -> RecordedStepGraph | None:
        """The step graph for these rows; None if there is none."""
        return self._captures.step_graph(contexts, why_not) if self._captures is not None else None

    def predict(self, state: ReplicaState, batch: list[np.ndarray], context: Context) -> Result:
        """Run forward only. The sums are the contributions of `add_loss` terms, then those of assigned variables."""
        run, versions = self.running_replica(context, training=False), self.later.versions(state.mapping)
        with self._autocast.enter(), RowsNamed(self, batch, context, state.mapping):
            outcome = self.passes.predict(state.mapping, context.structure.pack(batch), run)
        self.later.check(context, state.mapping, versions)
        notes = Notes(outcome.structure, len(outcome.terms), branches=self.later.asked(outcome))
        return outcome.result(state.mapping, context, notes, self.forward_effects)

    def running_replica(
        self, context: Context, *, training: bool = True, effects: Effects | None = None, spans_devices: bool = True
    ) -> ReplicaContext:
        """Make the context of a replica's thread in a step.

        Args:
            effects: the effects of what is run, if that is not the whole model.
            spans_devices: run the layers on the devices where they are placed.
        """
        effects = effects or (self.effects if training else self.forward_effects)
        generators = self.draws.of_replica(context.index)
        run = ReplicaContext(context, self.sync_batch_norm, generators=generators, sites=effects.sites)
        run.units = effects.units()
        run.watches_torch = self.loss.is_merged or not self._is_known or self.later.is_active
        if self._groups is not None and spans_devices:
            run.placed = graph_of(self.model), PlacedGraph(self._groups[context.index])
        return run

    # The update.

    def update(self, state: ReplicaState, totals: Totals) -> None:
        """Write assigned variables, then apply Keras's optimizer to the summed gradients."""
        with torch.no_grad():
            every = [note.effects for note in totals.every_note]
            if state is self.states.get(0):
                self.foreign.note(every[0].foreign)
            Summed.apply(every, state.variables, totals.sums[1 + totals.notes.terms :], self._index, self.effects)
            if self.trainable and (totals.reduced or state.slots):  # without slots nothing else is to do
                unused = frozenset.intersection(*[note.unused for note in totals.every_note])
                if totals.reduced and self._hooks:
                    self._hooks.run(state.gradients, unused)
                if state is self.states.get(0):
                    self._left.note(unused)
                found = self._update.apply(state, unused, totals)
                if state is self.states.get(0):
                    self.foreign.note(found)

    def rehearse_update(self, state: ReplicaState) -> bool:
        """Try the optimizer on copies, if it acts on flat buffers."""
        return self._update.rehearse(state)

    @property
    def update_how(self) -> str:  # type: ignore[override]
        """How the optimizer is applied: "flat", to all variables as one, or "per variable: " and the reason."""
        return self._update.how

    @property
    def update_is_shared(self) -> bool:  # type: ignore[override]
        """Whether the optimizer is applied to parts of the buffers by several threads."""
        return self._update.is_flat

    @property
    def updates_parts(self) -> bool:  # type: ignore[override]
        """Whether each replica updates its part of the weights."""
        return self._update.in_parts

    def part_needs_whole(self) -> bool:
        """Whether the update of a part needs the gradients of all weights. Raises ValueError as at first."""
        self._update.check()
        return self._update.needs_whole

    @property
    def update_is_reliable(self) -> bool:  # type: ignore[override]
        """Whether optimizer, learning rate and constraints are Keras's own."""
        return self._update.is_reliable and not self._hooks

    update_is_ours = update_is_reliable

    def leave_gradients(self, engine: Engine) -> None:
        """After a training step, leave its gradients on the template's variables, as Keras's trainer does.

        Not if gradients are accumulated on the replicas, where the gradient of the whole batch does not exist, or if
        each replica has its part of it.
        """
        if self.accumulation.defers(engine) or self.updates_parts:
            self._left.forget()
        else:
            self._left.leave(self.states[0].gradients)

    accumulate = staticmethod(accumulate)

    def fold(self, state: ReplicaState) -> None:
        """Add reduced gradients of an unfinished cycle to the optimizer's accumulators."""
        if self.updates_parts and state.flat_update is not None:
            with torch.no_grad():
                state.flat_update.fold("_accumulated_gradients", self.optimizer.loss_scale_factor)
            return
        slots = dict(zip(map(id, self._update.slots), state.slots, strict=True))
        self.accumulation.fold(slots, state.gradients)

    # How values depend on the rows.

    def inspect(self, batch: Batch, *, training: bool = True, every_row: bool = False) -> None:
        """Try how outputs and side effects depend on the rows. Called before the first steps, on the host thread."""
        effects = self.effects if training else self.forward_effects
        for one in (self.effects, self.forward_effects) if not every_row and self.later.has_changed() else ():
            one.forget()
        effects.asked_of_every_row = every_row
        asks = effects.asks_of(batch.rows, every_row=every_row)
        if self._replicas == 1 or not (asks or effects.asks_of_size(batch.rows)):
            return
        context = Context.alone(batch, batch.structure, 0, batch.rows, batch.rows)
        context.device = self._adopted[0].home.device if self._adopted else None
        with keras_device(context.device), RowsNamed(self, batch, context):
            effects.inspect(batch.arrays, batch.structure, every_row=every_row)
            self.later.tried(every_row=every_row)
            effects.check_at_size(batch.arrays, batch.structure, batch.deal(self._replicas))

    @property
    def most_replicas(self) -> int:  # type: ignore[override]
        """How many replicas may share a step."""
        return 1 if self.effects.alone or self.forward_effects.alone else self._replicas

    def assign(
        self, sums: np.ndarray, notes: Notes, every_note: Sequence[Notes], effects: Effects | None = None
    ) -> None:
        """Assign the variables that a forward pass changed to the template: layer metrics, seeds, moving statistics.

        Raises:
            UndecidedError: a variable moved differently than in the trial. Nothing has been assigned.
        """
        every = [note.effects for note in every_note]
        if any(every):
            values = [v.value for v in self.variables]
            with torch.no_grad():
                assign(every[0].foreign)
                Summed.apply(every, values, sums[notes.terms :], self._index, effects or self.forward_effects)
