"""The passes of a replica through a Keras model: forward, loss and backward to train, forward alone to predict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import torch

from fastdp.errors import NotCapturable
from fastdp.program.keras.batch import OutputStructure, flatten_outputs, unpack
from fastdp.program.keras.placement.graph import gradients_of
from fastdp.program.keras.random.augmentation import writes_to_inputs
from fastdp.program.keras.replica import ReplicaContext, keras_device, replica_scope
from fastdp.program.keras.rows.probe import Effects
from fastdp.program.keras.step_sums import SideEffects, StepSums
from fastdp.program.keras.training_loss import TrainingLoss
from fastdp.program.keras.variables import Mapping, ReplicaScope


class ModelCall:
    """Calls a model as Keras's own `train_step` does. A model that writes to its inputs gets copies of them."""

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self._writes_to_inputs = writes_to_inputs(model)

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

    def train(self, mapping: Mapping, nest: Any, run: ReplicaContext) -> StepSums:
        """Run forward, the loss and backward.

        Args:
            mapping: the model's variables, each with the replica's tensor.
            nest: the replica's rows, in the structure of the batch.
            run: the replica.
        """
        x, y, sample_weight = unpack(nest)
        leaf_ids = set(map(id, self._trainable))
        with keras_device(run.context.device), replica_scope(run), ReplicaScope(mapping, leaf_ids) as scope:
            y_pred = self.call(x, training=True)
            extra = self._effects.contributions(scope.losses, run.context)
            roots, seeds, terms = self._loss(y, y_pred, sample_weight, extra, scope, run)
            leaves = [scope.get_current_value(v) for v in self._trainable]
            # Within the scopes, because the user's hooks and gradient functions run in backward for the replica, too.
            found = gradients_of(run, roots, seeds, leaves)
        outputs: list[torch.Tensor] = []
        structure: OutputStructure | None = None
        if run.context.wants_outputs:
            outputs, structure = flatten_outputs(y_pred, self._effects.layouts, run.context.rows)
            if structure.whole and run.draws is not None:
                raise NotCapturable("outputs that are the same for all rows")
        terms = [*terms, *(term.detach() for term in extra)]  # a new list: replicas may share the loss's own
        return StepSums(found, terms, outputs, structure, SideEffects.of(scope, mapping, run), len(extra))

    def predict(self, mapping: Mapping, nest: Any, run: ReplicaContext) -> StepSums:
        """Run forward only. The terms are the contributions of `add_loss`. Arguments as for `train`."""
        x, _, _ = unpack(nest)
        context = run.context
        with (
            keras_device(context.device),
            torch.no_grad(),
            replica_scope(run),
            ReplicaScope(mapping, set()) as scope,
        ):
            y_pred = self.call(x, training=False)
            extra = self._forward_effects.contributions(scope.losses, context)
        outputs, structure = flatten_outputs(y_pred, self._forward_effects.layouts, context.rows)
        return StepSums([], extra, outputs, structure, SideEffects.of(scope, mapping, run))
