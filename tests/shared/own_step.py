"""A Keras model with a training step of its own, as people write it on torch: backward, then the optimizer."""

from __future__ import annotations

from typing import Any

import keras
import torch


class OwnStep(keras.Model):
    """Runs another model, and trains it by the mean squared error and the losses of its layers.

    Args:
        inner: the other model; None for a subclass with a `call` of its own.
    """

    def __init__(self, inner: keras.Model | None = None) -> None:
        super().__init__()
        if inner is not None:
            self.inner, self.built = inner, True

    def call(self, x: Any) -> Any:
        return self.inner(x)

    def loss_of(self, x: Any, y: Any) -> Any:
        return keras.ops.mean(keras.ops.square(y - self(x, training=True))) + sum(self.losses)

    def train_step(self, data: Any) -> Any:
        x, y = data
        self.zero_grad()
        loss = self.loss_of(x, y)
        loss.backward()
        with torch.no_grad():
            self.optimizer.apply([v.value.grad for v in self.trainable_weights], self.trainable_weights)
        self._loss_tracker.update_state(loss)
        return {"loss": self._loss_tracker.result()}
