"""The loss of a training step on a replica, of its own rows or of the merged outputs: where backward starts."""

from __future__ import annotations

from typing import Any

import keras
import torch

from fastdp.program.keras.loss.merged import merged_loss
from fastdp.program.keras.loss.per_sample import NotPerSample, SharedLoss
from fastdp.program.keras.random.ops import whole_batch
from fastdp.program.keras.replica import ReplicaContext
from fastdp.program.keras.rows.probe import Effects
from fastdp.program.keras.variables import ReplicaScope

# Where backward starts: tensors, their gradients (None means 1), and the loss and its terms to record.
Roots = tuple[list[torch.Tensor], list[torch.Tensor | None], list[torch.Tensor]]


class TrainingLoss:
    """The loss that a model was compiled with.

    Args:
        model: the template.
        trainer: the model with the compile settings.
        optimizer: scales the loss.
        effects: how the model's outputs depend on the rows in training.

    Attributes:
        is_own: whether the model computes the loss itself.
        is_merged: whether the loss is computed on the merged outputs of all replicas, because the model computes it
            itself or it is not a sum over samples.
    """

    def __init__(self, model: keras.Model, trainer: Any, optimizer: Any, effects: Effects) -> None:
        self.model, self.trainer, self.optimizer, self.effects = model, trainer, optimizer, effects
        self.is_own = type(model).compute_loss is not keras.Model.compute_loss
        self.is_merged = False
        self._shared: SharedLoss | None = None
        self._found_not_per_sample = False

    def prepare(self) -> None:
        """Decide whether to compute the loss as contributions of the replicas or on the merged outputs."""
        compiled = self.trainer._compile_loss
        if self.is_own or self._found_not_per_sample or not self.effects.outputs_are_plain:
            self.is_merged = True
        elif compiled is not None and compiled.built:
            if self._shared is None or not self._shared.is_of(compiled):
                self._shared = SharedLoss(compiled)
            self.is_merged = not self._shared.per_sample

    def regularization(self) -> list[torch.Tensor]:
        """The regularizers of the trainable weights, from the values in the current scope."""
        regularized = [v for v in self.model.trainable_weights if v.regularizer is not None]
        return [v.regularizer(v.value) for v in regularized]

    def __call__(
        self,
        y: Any,
        y_pred: Any,
        sample_weight: Any,
        extra: list[torch.Tensor],
        scope: ReplicaScope,
        run: ReplicaContext,
        *,
        moved: bool = False,
    ) -> Roots:
        """Compute the loss; returns where the replica's backward starts.

        Args:
            y, sample_weight: the replica's rows.
            y_pred: the replica's outputs.
            extra: the replica's contributions to the `add_loss` terms.
            scope: the replica's stateless scope, which must be active.
            run: the replica.
            moved: whether `y` is not that of the batch, but has moved along with the inputs.
        """
        context = run.context
        if not self.is_merged:
            try:
                parts, terms = list(extra), list[torch.Tensor]()
                if self._shared is not None:
                    value, terms = self._shared(y, y_pred, sample_weight)
                    parts.insert(0, value)
                if context.rank == 0:
                    with whole_batch(run):
                        parts += [keras.ops.sum(value) for value in self.regularization()]
                    if not parts:  # Keras's own message
                        raise ValueError("No loss to compute. Provide a `loss` argument in `compile()`.")
                return self._roots(parts, terms)
            except NotPerSample:
                # All replicas get here, but some may still be on the way, so the host thread changes the decision for
                # the next steps.
                self._found_not_per_sample = True
        return merged_loss(self, y_pred, extra, scope, context, y if moved else None)

    def _roots(self, parts: list[torch.Tensor], terms: list[torch.Tensor]) -> Roots:
        """The roots for a backward pass from the sum of all parts."""
        if not parts:
            return [], [], [torch.zeros(())]
        total = parts[0] if len(parts) == 1 else keras.ops.sum(parts)
        scaled = self.optimizer.scale_loss(total)
        found = [scaled] if scaled.requires_grad else []
        return found, [None] * len(found), [total.detach(), *(term.detach() for term in terms)]
