"""A replica's gradients: from backward into the flat buffer, at once or at the end of a window of calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

_NO_STEP = -1


@dataclass(slots=True)
class Gradients:
    """The gradients of a replica's parameters, by position.

    `flat` are the views that the engine reduces. `fresh` is what the step `fresh_step` gave, not counted
    before the step has succeeded everywhere; `held` the sum of the earlier calls of a window of gradient
    accumulation.
    """

    parameters: list[torch.Tensor]
    flat: list[torch.Tensor]
    fresh: dict[int, torch.Tensor] = field(default_factory=dict)
    fresh_step: int = _NO_STEP
    held: dict[int, torch.Tensor] = field(default_factory=dict)

    def begin(self, users: Sequence[torch.Tensor]) -> None:
        """No gradients, and the `requires_grad` of the user's parameters."""
        for own, user in zip(self.parameters, users, strict=True):
            own.grad = None
            if own.requires_grad is not user.requires_grad:
                own.requires_grad_(user.requires_grad)

    def collect(self, direct: dict[int, torch.Tensor], step: int) -> None:
        """Take what backward left on the parameters, made dense, and the gradients found beside it."""
        self.fresh, self.fresh_step = {}, step
        for i, parameter in enumerate(self.parameters):
            if parameter.grad is not None:
                self.fresh[i] = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
                parameter.grad = None
        for i, gradient in direct.items():
            self.fresh[i] = self.fresh[i] + gradient if i in self.fresh else gradient

    def store(self, idle: Sequence[Gradients]) -> frozenset[int]:
        """Write the sum over the window to the flat buffer, zeros where there is nothing; say where there is.

        Args:
            idle: gradients of replicas without rows in this step, for which this one gives what they hold.
        """
        parts = [self.fresh, self.held, *(other.held for other in idle)]
        with torch.no_grad():
            for i, view in enumerate(self.flat):
                found = [part[i] for part in parts if i in part]
                if found:
                    view.copy_(found[0])
                else:
                    view.zero_()
                for more in found[1:]:
                    view.add_(more)
        return frozenset().union(*parts)

    def hold(self, step: int) -> None:
        """Count the gradient of step `step`, if this replica had rows in it."""
        if self.fresh_step == step:
            for i, gradient in self.fresh.items():
                self.held[i] = self.held[i] + gradient if i in self.held else gradient

    def forget_fresh(self) -> None:
        """The step is over."""
        self.fresh, self.fresh_step = {}, _NO_STEP
