"""Runs the hooks that a script has put on a model's weights (`v.value.register_hook`) on the reduced gradients.

A replica differentiates tensors of its own, and finds a part of each gradient. So hooks do not run in its backward
pass, but before its update, with the gradient of the whole batch, as on one device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import torch
from torch.utils.hooks import RemovableHandle


def has_hooks(trainable: Sequence[keras.Variable]) -> bool:
    """Whether a weight has hooks on its gradient."""
    return any(v._value._backward_hooks or v._value._post_accumulate_grad_hooks for v in trainable)


class WeightHooks:
    """The hooks on some weights; true if there are any. Looks at all weights only after something was hooked anywhere.

    Args:
        trainable: the variables that are trained.
    """

    def __init__(self, trainable: Sequence[keras.Variable]) -> None:
        self._trainable = trainable
        self._looked, self._are_there = -1, False

    def __bool__(self) -> bool:
        if self._are_there or RemovableHandle.next_id != self._looked:
            self._looked = RemovableHandle.next_id
            self._are_there = has_hooks(self._trainable)
        return self._are_there

    def run(self, gradients: Sequence[torch.Tensor], unused: frozenset[int]) -> None:
        """Run the hooks of each weight, as torch does, and leave what they make of its gradient in its place.

        Args:
            gradients: the reduced gradients, in the order of the variables.
            unused: numbers of the variables without a gradient.
        """
        for i, (variable, gradient) in enumerate(zip(self._trainable, gradients, strict=True)):
            user: Any = variable._value
            if i in unused or not (user._backward_hooks or user._post_accumulate_grad_hooks):
                continue
            found = gradient.clone()
            for hook in list((user._backward_hooks or {}).values()):
                changed = hook(found)
                found = found if changed is None else changed
            if user._post_accumulate_grad_hooks:
                before, user.grad = user.grad, found
                for hook in list(user._post_accumulate_grad_hooks.values()):
                    hook(user)
                found, user.grad = user.grad, before
            gradient.copy_(torch.zeros_like(gradient) if found is None else found)
