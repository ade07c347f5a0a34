"""Leaves `v.value.grad` behind after a training step, as Keras's own trainer does."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import torch


class LeftGradients:
    """The gradients of the latest step, as views of the first replica's buffer, without a copy.

    As in plain Keras, they are the gradients of the loss before any clipping, scaled if the optimizer scales the loss,
    and None for a variable that the loss did not depend on. The next step overwrites the memory.

    Args:
        trainable: the variables that are trained.
    """

    def __init__(self, trainable: Sequence[keras.Variable]) -> None:
        self._trainable = list(trainable)
        self._unused: frozenset[int] = frozenset()
        self._views: list[torch.Tensor | None] | None = None

    def note(self, unused: frozenset[int]) -> None:
        """Record the numbers of the variables without a gradient in the current step."""
        self._unused = unused

    def leave(self, views: Sequence[torch.Tensor]) -> None:
        """Set the gradients of the finished step. `views` are the buffer's views, in the order of the variables."""
        if self._views is None:  # a variable in host memory cannot have its gradient on a GPU
            pairs = zip(self._trainable, views, strict=True)
            self._views = [view if view.device == variable._value.device else None for variable, view in pairs]
        for variable, view in zip(self._trainable, self._views, strict=True):
            if variable._value.grad is not view:
                variable._value.grad = view
        for number in self._unused:
            self._trainable[number]._value.grad = None

    def forget(self) -> None:
        """Remove the gradients: each replica keeps its own, unreduced, until a later step reduces them."""
        for variable in self._trainable:
            variable._value.grad = None
