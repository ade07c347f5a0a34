"""A replica's gradients: from backward into the flat buffer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(slots=True)
class Gradients:
    """The gradients of a replica's parameters, by position. `flat` are the views that the engine reduces."""

    parameters: list[torch.Tensor]
    flat: list[torch.Tensor]

    def begin(self, users: Sequence[torch.Tensor]) -> None:
        """No gradients, and the `requires_grad` of the user's parameters."""
        for own, user in zip(self.parameters, users, strict=True):
            own.grad = None
            if own.requires_grad is not user.requires_grad:
                own.requires_grad_(user.requires_grad)

    def store(self, direct: dict[int, torch.Tensor]) -> frozenset[int]:
        """Write what backward left on the parameters, and the gradients found beside it, to the flat buffer.

        Zeros where there is nothing; says where there is.
        """
        used = set()
        with torch.no_grad():
            for i, (parameter, view) in enumerate(zip(self.parameters, self.flat, strict=True)):
                found = [g for g in (parameter.grad, direct.get(i)) if g is not None]
                parameter.grad = None
                if found:
                    used.add(i)
                    view.copy_(found[0].to_dense() if found[0].is_sparse else found[0])
                else:
                    view.zero_()
                for more in found[1:]:
                    view.add_(more)
        return frozenset(used)
