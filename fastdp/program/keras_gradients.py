"""What Keras's trainer leaves behind after a training step: the gradient of each trained variable, `v.value.grad`."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import torch


class LeftGradients:
    """The gradients of the latest step, as views of the first replica's buffer: nothing is copied.

    As in plain Keras they are those of the loss, scaled where the optimizer scales it, before any clipping; None for a
    variable that the loss did not depend on. The next step overwrites the memory.

    Args:
        trainable: the variables that are trained.
    """

    def __init__(self, trainable: Sequence[keras.Variable]) -> None:
        self._trainable = list(trainable)
        self._unused: frozenset[int] = frozenset()

    def note(self, unused: frozenset[int]) -> None:
        """The step that is being updated by had no gradient of these, by number."""
        self._unused = unused

    def leave(self, views: Sequence[torch.Tensor]) -> None:
        """Let the variables have the gradients of the step that is over: `views` of the buffer, in their order."""
        for number, (variable, view) in enumerate(zip(self._trainable, views, strict=True)):
            value = variable._value
            wanted = None if number in self._unused else view
            if value.grad is not wanted and (wanted is None or wanted.device == value.device):
                value.grad = wanted

    def forget(self) -> None:
        """No gradient of the whole batch is anywhere: each replica keeps its own until a later step reduces them."""
        for variable in self._trainable:
            variable._value.grad = None
