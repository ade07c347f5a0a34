"""The Keras program: a step of a real Keras model as a pure function over explicit state.

A replica is the same Python object as the user's model, run under a `StatelessScope` on another device's
state: no model is ever cloned. The model itself, the *template*, aliases the first replica's memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import torch

from fastdp.backend.host import HostDevice
from fastdp.buckets import Allocate, ArraySpec, FlatBuffers
from fastdp.program.base import Context, Home, Memory, Result, Totals
from fastdp.program.keras_batch import OutputStructure, Structure, flatten_outputs
from fastdp.program.keras_effects import Effect, check_loss, classify, warn_variable
from fastdp.program.keras_losses import NotPerSample, SharedLoss
from fastdp.program.keras_merged import merged_loss
from fastdp.program.keras_moments import combine
from fastdp.program.keras_scope import Running, replica_aware, replica_scope
from fastdp.program.torch_tensors import as_tensor, intra_op_threads, spec_of

_homes: weakref.WeakKeyDictionary[Any, Adopted] = weakref.WeakKeyDictionary()


class Adopted:
    """Keras variables whose values live in flat buffers.

    Args:
        variables: the variables, in the order of the buffers' views.
        allocate: memory for the buffers.

    The variables keep their tensors' identity; their storage becomes views of `home.variables`.
    """

    def __init__(self, variables: Sequence[keras.Variable], allocate: Allocate) -> None:
        self.variables = list(variables)
        specs = [spec_of(v.path, v.value) for v in self.variables]
        self.home = Home(specs, allocate)
        self._tensors = tensors_of(self.home.variables)
        self._versions: list[int] = []
        self.adopt()

    def adopt(self) -> bool:
        """Move values whose storage is not ours (any more) into the buffers; True if there were any."""
        moved = False
        for variable, tensor in zip(self.variables, self._tensors, strict=True):
            value = variable.value
            if value.data_ptr() != tensor.data_ptr() and value.numel():
                with torch.no_grad():
                    tensor.copy_(value)
                    value.data = tensor
                moved = True
        return moved

    def changed(self) -> bool:
        """Whether somebody else assigned a variable since `note()`."""
        return self.adopt() or self._versions != [v.value._version for v in self.variables]

    def note(self) -> None:
        """Remember the variables as they are now."""
        self._versions = [v.value._version for v in self.variables]


def adopted(owner: Any, variables: Sequence[keras.Variable], allocate: Allocate) -> Adopted:
    """The adopted variables of a model or an optimizer: one home for all engines that use it."""
    home = _homes.get(owner)
    if home is None or [id(v) for v in home.variables] != [id(v) for v in variables]:
        home = _homes[owner] = Adopted(variables, allocate)
    return home


def tensors_of(flat: FlatBuffers) -> list[torch.Tensor]:
    """Tensors over the views of a flat buffer."""
    return [as_tensor(view, spec.dtype) for view, spec in zip(flat.views, flat.specs, strict=True)]


@dataclass(slots=True)
class _State:
    """A replica's tensors. `leaves` are the trainable ones, as the leaves of autograd."""

    variables: list[torch.Tensor]
    slots: list[torch.Tensor]
    gradients: list[torch.Tensor]
    leaves: list[torch.Tensor]
    mapping: list[tuple[keras.Variable, torch.Tensor]]


@dataclass(slots=True)
class Notes:
    """What a step's sums mean, beside its outputs' structure.

    `sums` holds: the loss; the loss terms; then per entry of `assigned` its elements; then per entry of
    `normalized` its moments. `constant` are assigned values that are the same on all replicas.
    """

    structure: OutputStructure | None = None
    terms: int = 0
    assigned: list[tuple[int, Effect]] = field(default_factory=list)
    constant: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    normalized: list[keras.layers.BatchNormalization] = field(default_factory=list)
    unused: frozenset[int] = frozenset()


class KerasProgram:
    """Runs a built Keras model as replicas.

    Args:
        model: the template.
        trainer: whose compiled loss and optimizer apply: the parallel model, or the template itself. Not
            compiled, the program can only predict.
        sync_batch_norm: normalize by the global batch.
        template_state: a context manager factory held while replicas run, for templates whose own
            `compute_loss` wants the trainer's compile state.
    """

    def __init__(
        self, model: keras.Model, trainer: Any, *, sync_batch_norm: bool = False, template_state: Any = None
    ) -> None:
        self.model = model
        self.trainer = trainer
        self.sync_batch_norm = sync_batch_norm
        self._template_state = template_state
        own_metrics = [m for layer in model._flatten_layers() for m in layer._metrics]
        self.variables = list(model.variables) + [v for metric in own_metrics for v in metric.variables]
        self._metric_ids = {id(v) for metric in own_metrics for v in metric.variables}
        self._index = {id(v): i for i, v in enumerate(self.variables)}
        self._seed_ids = {id(g.state) for layer in model._flatten_layers() for g in layer._seed_generators}
        optimizer: Any = trainer.optimizer if trainer.compiled else None
        self.trainable = list(model.trainable_variables) if optimizer is not None else []
        self.optimizer = optimizer
        self.slot_variables = list(optimizer.variables) if optimizer is not None else []
        self.gradients: Sequence[ArraySpec] = [spec_of(v.path, v.value) for v in self.trainable]
        self.slots: Sequence[ArraySpec] = [spec_of(v.path, v.value) for v in self.slot_variables]
        self.effects: dict[int, Effect] = {}
        self.loss_effects: list[Effect] | None = None
        self._shared: SharedLoss | None = None
        self._own_compute_loss = type(model).compute_loss is not keras.Model.compute_loss
        # Follows keras.utils.set_random_seed, and takes nothing from any generator.
        self._seed = torch.initial_seed() & 0x7FFFFFFF
        self._loss_is_merged = False
        self._found_not_per_sample = False
        self._tried_equal_rows = False
        self._adopted: list[Adopted] = []

    # Memory: the protocol of fastdp.program.base.

    def home(self, allocate: Allocate) -> Home:
        """The template's own variables, in flat buffers."""
        self._adopted = [adopted(self.model, self.variables, allocate)]
        return self._adopted[0].home

    def home_slots(self, allocate: Allocate) -> FlatBuffers:
        """The optimizer's own variables, in flat buffers."""
        if self.optimizer is None:
            return FlatBuffers([], allocate)
        self._adopted.append(adopted(self.optimizer, self.slot_variables, allocate))
        return self._adopted[-1].home.variables

    def changed_outside(self) -> bool:
        """Whether a callback or the user assigned a weight, the learning rate, or anything else."""
        return any(one.changed() for one in self._adopted)

    def committed(self) -> None:
        """All replicas have the present values."""
        for one in self._adopted:
            one.note()

    def bind(self, memory: Memory, device: HostDevice, rank: int) -> _State:
        """A replica's tensors over its memory."""
        variables = tensors_of(memory.variables)
        positions = [self._index[id(v)] for v in self.trainable]
        leaves = [variables[i].detach().requires_grad_() for i in positions]
        mapping = list(zip(self.variables, variables, strict=True))
        for i, leaf in zip(positions, leaves, strict=True):
            mapping[i] = (self.variables[i], leaf)
        return _State(variables, tensors_of(memory.slots), tensors_of(memory.gradients), leaves, mapping)

    def prepare_thread(self, threads: int) -> None:
        """Set the worker's share of the cores."""
        torch.set_num_threads(threads)

    @contextmanager
    def running(self, threads: int) -> Iterator[None]:
        """Hold what Keras and torch need while replicas run."""
        with ExitStack() as stack:
            stack.enter_context(replica_aware())
            stack.enter_context(intra_op_threads(threads))
            if self._own_compute_loss and self._template_state is not None:
                stack.enter_context(self._template_state())
            self._prepare_loss()
            yield

    # The step.

    def train(self, state: _State, batch: list[np.ndarray], context: Context) -> Result:
        """Forward, this replica's contribution to the loss, and its gradient."""
        x, y, sample_weight = unpack(context.structure.pack(batch))
        run = Running(context, self.sync_batch_norm, seed=self._seed)
        with replica_scope(run), _Scope(state.mapping, set(map(id, self.trainable))) as scope:
            y_pred = self._call(x, training=True)
            extra = self._extra_losses(scope.losses, context)
            outputs, seeds, terms = self._loss(y, y_pred, sample_weight, extra, scope, run)
        leaves = [scope.get_current_value(v) for v in self.trainable]
        found = torch.autograd.grad(outputs, leaves, seeds, allow_unused=True) if outputs else [None] * len(leaves)
        unused = self._store_gradients(state, found)
        arrays, structure = flatten_outputs(y_pred) if context.wants_outputs else ([], None)
        notes = Notes(structure, len(terms) - 1, unused=unused)
        sums = [np.array([float(term) for term in terms]), *self._effects(scope, state, run, notes)]
        return Result(arrays, np.concatenate(sums), notes)

    def predict(self, state: _State, batch: list[np.ndarray], context: Context) -> Result:
        """Forward only. The sums are the contributions of `add_loss` terms, then those of assigned variables."""
        x, _, _ = unpack(context.structure.pack(batch))
        run = Running(context, seed=self._seed)
        with torch.no_grad(), replica_scope(run), _Scope(state.mapping, set()) as scope:
            y_pred = self._call(x, training=False)
            extra = self._extra_losses(scope.losses, context)
        arrays, structure = flatten_outputs(y_pred)
        notes = Notes(structure, len(extra))
        sums = [np.array([float(term) for term in extra]), *self._effects(scope, state, run, notes)]
        return Result(arrays, np.concatenate(sums), notes)

    def assign(self, sums: np.ndarray, notes: Notes) -> None:
        """Give the template the variables that a forward pass assigned: metrics of layers, seeds, counters."""
        if notes.assigned or notes.constant:
            with torch.no_grad():
                self._assign([v.value for v in self.variables], sums[notes.terms :], notes)

    def update(self, state: _State, totals: Totals) -> None:
        """Assigned variables, then Keras's optimizer on the summed gradients."""
        notes: Notes = totals.notes
        with torch.no_grad():
            self._assign(state.variables, totals.sums[1 + notes.terms :], notes)
            if not self.trainable:
                return
            unused = frozenset.intersection(*(note.unused for note in totals.every_note))
            gradients = [None if i in unused else g for i, g in enumerate(state.gradients)]
            values = [state.variables[self._index[id(v)]] for v in self.trainable]
            mapping = list(zip(self.trainable, values, strict=True))
            mapping += zip(self.slot_variables, state.slots, strict=True)
            with keras.StatelessScope(state_mapping=mapping) as scope:
                self.optimizer.apply(gradients, self.trainable)
            for variable, tensor in mapping:
                value = scope.get_current_value(variable)
                if value is not tensor:
                    tensor.copy_(value)

    # Parts of the step.

    def _call(self, x: Any, training: bool) -> Any:
        """The model's outputs, as Keras's own `train_step` gets them."""
        return self.model(x, training=training) if self.model._call_has_training_arg else self.model(x)

    def _extra_losses(self, losses: Sequence[torch.Tensor], context: Context) -> list[torch.Tensor]:
        """This replica's contributions to the `add_loss` terms."""
        effects = self.loss_effects or []
        known = effects if len(effects) == len(losses) else [Effect.MEAN] * len(losses)
        factors = [1.0 if effect is Effect.SUM else context.rows.share for effect in known]
        return [keras.ops.sum(loss) * factor for loss, factor in zip(losses, factors, strict=True)]

    def regularization(self) -> list[torch.Tensor]:
        """The regularizers of the trainable weights, from the values in the current scope."""
        regularized = [v for v in self.model.trainable_weights if v.regularizer is not None]
        return [v.regularizer(v.value) for v in regularized]

    def _loss(
        self,
        y: Any,
        y_pred: Any,
        sample_weight: Any,
        extra: list[torch.Tensor],
        scope: _Scope,
        run: Running,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor | None], list[torch.Tensor]]:
        """Where backward starts: tensors and their gradients; and the loss with its terms, for the record."""
        context = run.context
        if not self._loss_is_merged:
            try:
                parts, terms = list(extra), list[torch.Tensor]()
                if self._shared is not None:
                    value, terms = self._shared(y, y_pred, sample_weight)
                    parts.insert(0, value)
                if context.rank == 0:
                    parts += [keras.ops.sum(value) for value in self.regularization()]
                return self._roots(parts, terms)
            except NotPerSample:
                # On all replicas alike; but the others may still be on their way here, so the model's
                # standing decision is left to the host thread.
                self._found_not_per_sample = True
        return merged_loss(self, y_pred, extra, scope, context)

    def _roots(
        self, parts: list[torch.Tensor], terms: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor | None], list[torch.Tensor]]:
        """Backward from the sum of all parts."""
        if not parts:
            zero = torch.zeros(())
            return [], [], [zero]
        total = parts[0] if len(parts) == 1 else keras.ops.sum(parts)
        scaled = self.optimizer.scale_loss(total)
        found = [scaled] if scaled.requires_grad else []
        return found, [None] * len(found), [total.detach(), *(term.detach() for term in terms)]

    def _prepare_loss(self) -> None:
        """Decide how the loss is computed: as contributions of the replicas, or on the merged outputs."""
        compiled = self.trainer._compile_loss
        if self._own_compute_loss or self._found_not_per_sample:
            self._loss_is_merged = True
        elif self._shared is None and compiled is not None and compiled.built:
            self._shared = SharedLoss(compiled)
            self._loss_is_merged = not self._shared.per_sample

    def _store_gradients(self, state: _State, found: Sequence[torch.Tensor | None]) -> frozenset[int]:
        """Copy gradients into the flat buffer; zeros, and a note, where there are none."""
        unused = frozenset(i for i, gradient in enumerate(found) if gradient is None)
        used = [i for i in range(len(found)) if i not in unused]
        with torch.no_grad():
            if used:
                torch._foreach_copy_([state.gradients[i] for i in used], [found[i] for i in used])
            for i in unused:
                state.gradients[i].zero_()
        return unused

    # Side effects of the forward pass.

    def _effects(self, scope: _Scope, state: _State, run: Running, notes: Notes) -> list[np.ndarray]:
        """The numbers by which assigned variables are put together, and their notes."""
        notes.normalized = [layer for layer, _ in run.moments if not layer.renorm]
        by_moments = {id(v) for layer in notes.normalized for v in (layer.moving_mean, layer.moving_variance)}
        sums = []
        for i, (variable, before) in enumerate(state.mapping):
            value = scope.get_current_value(variable)
            if value is before or id(variable) in by_moments:
                continue
            effect = self._effect(i, variable)
            # Floats are averaged even so: a value that looked constant on the rows tried may depend on others.
            if effect is Effect.SAME and not value.is_floating_point():
                notes.constant.append((i, value.detach()))
                continue
            notes.assigned.append((i, effect))
            moved = value.detach().double() - before.detach().double()
            moved = moved if effect is Effect.SUM else moved * run.context.rows.share
            sums.append(moved.numpy().ravel())
        return sums + [moments.sums() for layer, moments in run.moments if not layer.renorm]

    def _effect(self, index: int, variable: keras.Variable) -> Effect:
        """How an assigned variable's value depends on the rows."""
        if id(variable) in self._seed_ids:
            return Effect.SAME
        if id(variable) in self._metric_ids:
            return Effect.SUM
        return self.effects.get(index, Effect.MEAN if variable.dtype.startswith(("float", "bfloat")) else Effect.SAME)

    def _assign(self, variables: Sequence[torch.Tensor], sums: np.ndarray, notes: Notes) -> None:
        """Give assigned variables their values for the global batch."""
        for i, value in notes.constant:
            variables[i].copy_(value)
        at = 0
        for i, _ in notes.assigned:
            tensor = variables[i]
            moved = torch.from_numpy(sums[at : at + tensor.numel()]).reshape(tensor.shape)
            new = tensor.double() + moved
            tensor.copy_(new if tensor.is_floating_point() else new.round())
            at += tensor.numel()
        for layer in notes.normalized:
            targets = [variables[self._index[id(v)]] for v in (layer.moving_mean, layer.moving_variance)]
            length = 1 + 2 * targets[0].numel()
            for tensor, value in zip(targets, combine(sums[at : at + length]), strict=True):
                # In the variable's own precision, as Keras does it.
                new = torch.from_numpy(value).to(tensor.dtype).reshape(tensor.shape)
                tensor.copy_(tensor * layer.momentum + new * (1.0 - layer.momentum))
            at += length

    # Finding out about side effects.

    def inspect(self, batch: Sequence[np.ndarray], structure: Structure) -> None:
        """Find out, once, how `add_loss` terms and assigned variables depend on the rows.

        Runs the model on two rows of the batch, and on each alone, without changing anything. With fewer
        rows, rows that are all equal, or values that are all zero, the question is asked again at the next step.

        Raises:
            ValueError: an `add_loss` term that cannot be put together from the replicas' rows.
        """
        undecided = Effect.UNDECIDED in (*self.effects.values(), *(self.loss_effects or []))
        if (self.loss_effects is not None and not undecided and not self._tried_equal_rows) or len(batch[0]) < 2:
            return
        other = _unlike_first(batch, structure)
        self._tried_equal_rows = other is None
        pair = [array[[0, other or 1]] for array in batch]
        with replica_aware():
            both = self._try_rows(pair, structure, 0, 2)
            if not both[0] and not both[1]:
                self.loss_effects = []
                self._tried_equal_rows = False
                return
            a, b = (self._try_rows(pair, structure, row, row + 1) for row in (0, 1))
        self.loss_effects = [classify(*values) for values in zip(a[0], b[0], both[0], strict=True)]
        for index, effect in enumerate(self.loss_effects):
            check_loss(effect, index)
        for i in both[1]:
            if i in a[1] and i in b[1]:
                effect = classify(a[1][i], b[1][i], both[1][i])
                self.effects[i] = warn_variable(effect, self.variables[i])

    def _try_rows(
        self, batch: Sequence[np.ndarray], structure: Structure, start: int, stop: int
    ) -> tuple[list[torch.Tensor], dict[int, torch.Tensor]]:
        """The `add_loss` terms of some of two rows, and how far they move each variable."""
        context = Context.alone(batch, structure, start, stop, 2)
        run = Running(context, frozen_moments=True, seed=self._seed)
        mapping = [(v, v.value.detach()) for v in self.variables]
        with torch.no_grad(), replica_scope(run), _Scope(mapping, set()) as scope:
            x, _, _ = unpack(structure.pack([array[start:stop] for array in batch]))
            self._call(x, training=True)
            losses = [keras.ops.sum(loss) for loss in scope.losses]
        normalized = {id(v) for layer in self.model._flatten_layers() for v in _statistics(layer)}
        moved = {}
        for i, (variable, before) in enumerate(mapping):
            value = scope.get_current_value(variable)
            if value is not before and not {id(variable)} & (normalized | self._seed_ids | self._metric_ids):
                moved[i] = value.double() - before.double()
        return losses, moved


class _Scope(keras.StatelessScope):
    """A stateless scope over a replica's tensors.

    A trainable variable that the forward pass assigns (spectral normalization) becomes a new leaf: as in
    plain Keras on torch, the gradient is that of the assigned value.
    """

    def __init__(self, mapping: Sequence[tuple[keras.Variable, torch.Tensor]], leaves: set[int]) -> None:
        super().__init__(state_mapping=None, collect_losses=True, initialize_variables=False)
        self.state_mapping = {id(variable): tensor for variable, tensor in mapping}
        self._leaves = leaves

    def add_update(self, update: tuple[keras.Variable, torch.Tensor]) -> None:
        """Note an assignment."""
        variable, value = update
        value = value.detach().requires_grad_() if id(variable) in self._leaves else value
        super().add_update((variable, value))


def unpack(data: Any) -> tuple[Any, Any, Any]:
    """x, y and sample_weight of a batch."""
    return keras.utils.unpack_x_y_sample_weight(data)


def _unlike_first(batch: Sequence[np.ndarray], structure: Structure) -> int | None:
    """The first row whose inputs differ from those of row 0, if there is one."""
    for row in range(1, len(batch[0])):
        for array, name in zip(batch, structure.names, strict=True):
            if name.startswith("x") and not np.array_equal(array[0], array[row]):
                return row
    return None


def _statistics(layer: keras.layers.Layer) -> list[keras.Variable]:
    """The moving statistics of a BatchNormalization layer; nothing of others."""
    if not isinstance(layer, keras.layers.BatchNormalization):
        return []
    return [v for v in (layer.moving_mean, layer.moving_variance) if v is not None]
