"""The update of a module: the norm of its gradient, the check for NaN, clipping, and the optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fastdp.program.torch.optimizer import Optimizers


@dataclass(frozen=True, slots=True)
class UpdateRules:
    """What happens to a gradient before the optimizer uses it.

    Args:
        clip_grad_norm: the largest norm of the gradient; None for no limit.
        grad_norm: whether the norm is wanted, though nothing is clipped.
        skip_nonfinite: make no update if the loss or the gradient has an infinite number or a NaN.
    """

    clip_grad_norm: float | None = None
    grad_norm: bool = False
    skip_nonfinite: bool = False

    def __post_init__(self) -> None:
        limit = self.clip_grad_norm
        if limit is not None and not limit > 0:
            raise ValueError(f"`clip_grad_norm` must be None or above 0. Received: clip_grad_norm={limit!r}")

    @property
    def needs_norm(self) -> bool:
        """Whether updates compute the norm of the gradient."""
        return self.grad_norm or self.clip_grad_norm is not None


@dataclass(frozen=True, slots=True)
class Applied:
    """What an update tells: the norm of the gradient before clipping, if there is one, and whether it was skipped."""

    grad_norm: torch.Tensor | None = None
    skipped: bool = False


@contextmanager
def grads_restored(parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    """Give parameters back the `grad` that they have now, which is the user's."""
    before = [parameter.grad for parameter in parameters]
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient


def apply(optimizers: Optimizers, parameters: Sequence[torch.Tensor], losses: float, rules: UpdateRules) -> Applied:
    """Update the parameters by their `grad`.

    Args:
        optimizers: over the parameters.
        parameters: the module's; `grad` is the gradient of the global batch, and is clipped in place.
        losses: the sum of the global batch's losses in the calls of the window.
        rules: what to do before the step.
    """
    if not (rules.needs_norm or rules.skip_nonfinite):
        optimizers.step()
        return _DONE
    gradients = [_values(parameter.grad) for parameter in parameters if parameter.grad is not None]
    norm = get_total_norm(gradients) if rules.needs_norm else None
    if rules.skip_nonfinite and not (math.isfinite(losses) and _are_finite(gradients, norm)):
        return Applied(norm, skipped=True)
    if rules.clip_grad_norm is not None:
        assert norm is not None
        clip_grads_with_norm_(parameters, rules.clip_grad_norm, norm)
    optimizers.step()
    return Applied(norm)


_DONE = Applied()


def _are_finite(gradients: Sequence[torch.Tensor], norm: torch.Tensor | None) -> bool:
    """Whether all numbers are finite. A norm that has overflowed does not tell; the largest number does."""
    if norm is not None and norm.isfinite():
        return True
    return bool(get_total_norm(gradients, math.inf).isfinite())


def _values(gradient: torch.Tensor) -> torch.Tensor:
    """The numbers of a gradient, which may be sparse."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient
