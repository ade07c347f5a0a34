"""The passes of a replica through a Keras model: forward, loss and backward to train, forward alone to predict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import torch

from fastdp.errors import NotCapturable
from fastdp.program.keras.augmented import AugmentedModel
from fastdp.program.keras.batch import OutputStructure, flatten_outputs, unpack
from fastdp.program.keras.placement.graph import gradients_of
from fastdp.program.keras.random.augmentation import writes_to_inputs
from fastdp.program.keras.replica import ReplicaContext, keras_device, replica_scope
from fastdp.program.keras.rows.probe import Effects
from fastdp.program.keras.step_sums import SideEffects, StepSums
from fastdp.program.keras.training_loss import TrainingLoss
from fastdp.program.keras.variables import Mapping, ReplicaScope
from fastdp.shard import Rows
from fastdp.tensors.row_effects import ROWS_FIRST


class ModelCall:
    """Calls a model as Keras's own `train_step` does. A model that writes to its inputs gets copies of them."""

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self._writes_to_inputs = writes_to_inputs(model)

    @property
    def augmented(self) -> AugmentedModel | None:
        """The model, if it has layers in front of it."""
        return self._model if isinstance(self._model, AugmentedModel) else None

    def of_batch(self, nest: Any, training: bool, *, prepared: bool = False) -> tuple[Any, Any, Any, bool]:
        """The model's outputs; targets, weights; whether the targets have moved along with augmented inputs.

        Args:
            nest: rows of a batch.
            training: whether to train.
            prepared: whether they have gone through `prepare` already.
        """
        model = self.augmented
        if model is None:
            x, y, sample_weight = unpack(nest)
            return self(x, training), y, sample_weight, False
        x, y, sample_weight = unpack(nest if prepared else self.prepare(nest, training))
        return model.of_prepared(x, training=training), y, sample_weight, model.moves(y)

    def prepare(self, nest: Any, training: bool) -> tuple[Any, Any, Any]:
        """Rows of a batch behind the layers in front of the model."""
        assert self.augmented is not None
        x, y, sample_weight = unpack(nest)
        if self._writes_to_inputs:
            x = keras.tree.map_structure(torch.clone, x)
        x, y = self.augmented.prepared(x, y, sample_weight, training=training)
        return x, y, sample_weight

    def __call__(self, x: Any, training: bool) -> Any:
        """The model's outputs."""
        if self._writes_to_inputs:
            x = keras.tree.map_structure(torch.clone, x)
        return self._model(x, training=training) if self._model._call_has_training_arg else self._model(x)


class Passes:
    """The pure part of a step: from variables and a batch to gradients, outputs and new values.

    Args:
        call: calls the model.
        loss: the loss of a training step.
        trainable: the variables that have a gradient.
        effects, forward_effects: how outputs and side effects depend on the rows, in training and outside.
    """

    def __init__(
        self,
        call: ModelCall,
        loss: TrainingLoss,
        trainable: Sequence[keras.Variable],
        effects: Effects,
        forward_effects: Effects,
    ) -> None:
        self.call = call
        self._loss = loss
        self._trainable = list(trainable)
        self._effects, self._forward_effects = effects, forward_effects

    def train(self, mapping: Mapping, nest: Any, run: ReplicaContext, *, prepared: bool = False) -> StepSums:
        """Run forward, the loss and backward.

        Args:
            mapping: the model's variables, each with the replica's tensor.
            nest: the replica's rows, in the structure of the batch.
            run: the replica.
            prepared: whether the rows have gone through the layers in front of the model.
        """
        leaf_ids = set(map(id, self._trainable))
        with keras_device(run.context.device), replica_scope(run), ReplicaScope(mapping, leaf_ids) as scope:
            y_pred, y, sample_weight, moved = self.call.of_batch(nest, training=True, prepared=prepared)
            branches = tuple(run.branches)
            extra = self._effects.contributions(scope.losses, run.context)
            roots, seeds, terms = self._loss(y, y_pred, sample_weight, extra, scope, run, moved=moved)
            leaves = [scope.get_current_value(v) for v in self._trainable]
            # Within the scopes, because the user's hooks and gradient functions run in backward for the replica, too.
            found = gradients_of(run, roots, seeds, leaves)
        outputs: list[torch.Tensor] = []
        structure: OutputStructure | None = None
        if run.context.wants_outputs:
            outputs, structure = _with_targets(y_pred, y if moved else None, self._effects, run.context.rows)
            if structure.whole and run.draws is not None:
                raise NotCapturable("outputs that are the same for all rows")
        terms = [*terms, *(term.detach() for term in extra)]  # a new list: replicas may share the loss's own
        return StepSums(found, terms, outputs, structure, SideEffects.of(scope, mapping, run), len(extra), branches)

    def predict(self, mapping: Mapping, nest: Any, run: ReplicaContext) -> StepSums:
        """Run forward only. The terms are the contributions of `add_loss`. Arguments as for `train`."""
        context = run.context
        with (
            keras_device(context.device),
            torch.no_grad(),
            replica_scope(run),
            ReplicaScope(mapping, set()) as scope,
        ):
            y_pred, y, _, moved = self.call.of_batch(nest, training=False)
            branches = tuple(run.branches)
            extra = self._forward_effects.contributions(scope.losses, context)
        outputs, structure = _with_targets(y_pred, y if moved else None, self._forward_effects, context.rows)
        side_effects = SideEffects.of(scope, mapping, run)
        return StepSums([], extra, outputs, structure, side_effects, branches=branches)


def _with_targets(y_pred: Any, y: Any, effects: Effects, rows: Rows) -> tuple[list[torch.Tensor], OutputStructure]:
    """The outputs of a replica, with targets that have moved along with its inputs, if any: as `(outputs, targets)`."""
    if y is None:
        return flatten_outputs(y_pred, effects.layouts, rows)
    known = effects.layouts
    if known is not None:
        known = [*known, *(ROWS_FIRST for leaf in keras.tree.flatten(y) if isinstance(leaf, torch.Tensor))]
    return flatten_outputs((y_pred, y), known, rows)
