"""Leaves `v.value.grad` behind after a training step, as Keras's own trainer does."""

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
        self._views: list[torch.Tensor | None] | None = None

    def note(self, unused: frozenset[int]) -> None:
        """The step that is being updated by had no gradient of these, by number."""
        self._unused = unused

    def leave(self, views: Sequence[torch.Tensor]) -> None:
        """Let the variables have the gradients of the step that is over: `views` of the buffer, in their order."""
        if self._views is None:  # a gradient cannot lie on a GPU whose variable is in host memory
            pairs = zip(self._trainable, views, strict=True)
            self._views = [view if view.device == variable._value.device else None for variable, view in pairs]
        for variable, view in zip(self._trainable, self._views, strict=True):
            if variable._value.grad is not view:
                variable._value.grad = view
        for number in self._unused:
            self._trainable[number]._value.grad = None

    def forget(self) -> None:
        """No gradient of the whole batch is anywhere: each replica keeps its own until a later step reduces them."""
        for variable in self._trainable:
            variable._value.grad = None
