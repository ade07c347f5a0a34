"""What one replica contributes to a loss that is a sum over samples.

A Keras loss is a numerator over a denominator. With the loss L_r that Keras computes on a replica's rows
and the denominators D_r of the replica and D of the global batch, the replica's contribution is

    C_r = L_r * D_r / D,       so that       sum C_r = L

for every reduction: D is the number of rows ("sum_over_batch_size", "mean"), the number of unmasked entries (the same
reductions with a mask), or the sum of the weights ("mean_with_sample_weight"). For "sum" D_r / D is 1. The numbers of
rows are known beforehand; the replicas exchange the other denominators in the middle of the step.

This holds for losses that are sums over samples. Keras's own losses are, with a few exceptions; of a user's function
this is unknown. Any other loss is computed on the merged outputs of all replicas, which is always exact, and its
gradient is scattered back.
"""

from __future__ import annotations

from typing import Any

import keras
import torch
from keras.src.losses.loss import Loss, apply_mask
from keras.src.losses.losses import LossFunctionWrapper

from fastdp.program.keras.replica import running

# Keras's functions that compute one value per sample from that sample alone.
_PER_SAMPLE = {
    keras.losses.binary_crossentropy,
    keras.losses.binary_focal_crossentropy,
    keras.losses.categorical_crossentropy,
    keras.losses.categorical_focal_crossentropy,
    keras.losses.categorical_hinge,
    keras.losses.categorical_generalized_cross_entropy,
    keras.losses.cosine_similarity,
    keras.losses.ctc,
    keras.losses.hinge,
    keras.losses.huber,
    keras.losses.kl_divergence,
    keras.losses.log_cosh,
    keras.losses.mean_absolute_error,
    keras.losses.mean_absolute_percentage_error,
    keras.losses.mean_squared_error,
    keras.losses.mean_squared_logarithmic_error,
    keras.losses.poisson,
    keras.losses.sparse_categorical_crossentropy,
    keras.losses.squared_hinge,
}
_REDUCTIONS = ("sum", "mean", "sum_over_batch_size", "mean_with_sample_weight")


class NotPerSample(Exception):
    """A loss did not return one value per sample."""


def is_per_sample(loss: Loss) -> bool:
    """Whether `loss` is known to be a sum over samples, so that replicas can split it."""
    return (
        isinstance(loss, LossFunctionWrapper)
        and type(loss).__call__ is Loss.__call__
        and type(loss).call is LossFunctionWrapper.call
        and loss.fn in _PER_SAMPLE
        and loss.reduction in _REDUCTIONS
        and loss._fn_kwargs.get("axis", -1) in (-1, None)
    )


class SharedLoss:
    """Computes a replica's contribution to the compiled loss of a model.

    Args:
        compiled: the model's `CompileLoss`, built.
    """

    def __init__(self, compiled: Any) -> None:
        self._flat = flat = list(compiled._flat_losses)
        # Keras's own traversal of outputs, targets, weights and loss weights, with other leaves.
        self._compiled = _shallow_copy(compiled)
        self._compiled._flat_losses = [entry._replace(loss=_Contribution(entry.loss)) for entry in flat]
        self._compiled._metrics = [_NoMetric() for _ in compiled.metrics]

    @property
    def per_sample(self) -> bool:
        """Whether all compiled losses, in their current state, can be split by samples."""
        return all(is_per_sample(entry.loss) for entry in self._flat)

    def is_of(self, compiled: Any) -> bool:
        """Whether this was made from the losses that `compiled` has now."""
        return self._flat == compiled._flat_losses

    def __call__(self, y: Any, y_pred: Any, sample_weight: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The replica's contributions to the compiled loss and, unweighted, to each of its terms.

        Raises:
            NotPerSample: a loss did not return one value per row. All replicas raise it.
        """
        terms: list[torch.Tensor] = []
        _Contribution.terms_of_this_thread(terms)
        return self._compiled(y, y_pred, sample_weight), terms


class _NoMetric:
    """Replaces the metric of one loss term, which is updated once with the sum over replicas."""

    def update_state(self, value: Any, sample_weight: Any = None) -> None:
        """Do nothing: `_Contribution` keeps the terms."""


class _Contribution:
    """A Keras loss that returns the replica's contribution."""

    def __init__(self, loss: Loss) -> None:
        self._loss = loss

    @staticmethod
    def terms_of_this_thread(terms: list[torch.Tensor]) -> None:
        """Append the terms that this thread computes from now on to `terms`."""
        state = running()
        assert state is not None, "a contribution is computed by a replica"
        state.terms = terms

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> torch.Tensor:
        """Keras's loss on the replica's rows, times D_r / D."""
        state = running()
        assert state is not None, "a contribution is computed by a replica"
        loss = _shallow_copy(self._loss)
        values: list[torch.Tensor] = []

        def call(y_true: Any, y_pred: Any) -> torch.Tensor:
            values.append(self._loss.call(y_true, y_pred))
            return values[0]

        loss.call = call
        value = loss(y_true, y_pred, own_copy(sample_weight))
        if values[0].ndim == 0 or values[0].shape[0] != state.context.rows.count:
            raise NotPerSample
        mask = _combined_mask(y_pred, values[0])
        contribution = value * self._scale(sample_weight, mask)
        state.terms.append(contribution)
        return contribution

    def _scale(self, sample_weight: Any, mask: torch.Tensor | None) -> float:
        """D_r / D."""
        state = running()
        assert state is not None
        reduction = self._loss.reduction
        if reduction == "sum":
            return 1.0
        weighted = reduction == "mean_with_sample_weight"
        if mask is None and not (weighted and sample_weight is not None):
            return state.context.rows.share
        if weighted:
            weights = own_copy(sample_weight)
            if weights is not None:
                weights = keras.ops.cast(weights, self._loss.dtype)
            denominator = float(apply_mask(weights, mask, dtype=self._loss.dtype, reduction=reduction).sum())
        else:
            denominator = float(keras.ops.sum(mask))
        total = sum(state.context.exchange(denominator, ("the sum of the weights of the loss", self._loss.name)))
        return denominator / total if total else 0.0


def own_copy(weights: Any) -> Any:
    """A copy of the weights that Keras may overwrite: on torch its `apply_mask` multiplies them in place."""
    return keras.tree.map_structure(lambda w: None if w is None else keras.ops.copy(w), weights)


def _combined_mask(y_pred: Any, values: torch.Tensor) -> torch.Tensor | None:
    """The mask that Keras's `Loss.__call__` applies: of the outputs and of the values."""
    masks = [getattr(tensor, "_keras_mask", None) for tensor in (y_pred, values)]
    present = [mask for mask in masks if mask is not None]
    if len(present) == 2:
        return present[0] & present[1]
    return present[0] if present else None


def _shallow_copy(loss: Any) -> Any:
    """A new object with the same attributes. Keras's own copy would go through serialization."""
    twin = object.__new__(type(loss))
    twin.__dict__.update(loss.__dict__)
    return twin
