"""The update of a module: the norm of its gradient, the check for NaN, clipping, and the optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real

import torch
from torch.amp import GradScaler
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fastdp.program.torch.optimizer import Optimizers


@dataclass(frozen=True, slots=True)
class UpdateRules:
    """What happens to a gradient before the optimizer uses it.

    Args:
        clip_grad_norm: the largest norm of the gradient; None for no limit.
        grad_norm: whether the norm is wanted, though nothing is clipped.
        skip_nonfinite: make no update if the loss or the gradient has an infinite number or a NaN.
        scaler: has scaled the loss, and steps the optimizers.

    Raises:
        ValueError: a `clip_grad_norm` that is not positive.
        TypeError: a `scaler` that is none.
    """

    clip_grad_norm: float | None = None
    grad_norm: bool = False
    skip_nonfinite: bool = False
    scaler: GradScaler | None = None

    def __post_init__(self) -> None:
        limit = self.clip_grad_norm
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, Real) or not limit > 0):
            raise ValueError(f"`clip_grad_norm` must be None or a number above 0. Received: clip_grad_norm={limit!r}")
        if self.scaler is not None and not isinstance(self.scaler, GradScaler):
            raise TypeError(
                '`scaler` must be a torch.amp.GradScaler("cpu" or "cuda"), or None. Received: '
                f"{self.scaler!r} (of type {type(self.scaler).__name__})"
            )

    @property
    def checks(self) -> bool:
        """Whether anything is asked of a gradient, or done to it, before the optimizers use it."""
        return self.needs_norm or self.skip_nonfinite

    @property
    def needs_norm(self) -> bool:
        """Whether updates compute the norm of the gradient."""
        return self.grad_norm or self.clip_grad_norm is not None

    @property
    def are_reliable(self) -> bool:
        """Whether none of the user's code runs in an update."""
        return self.scaler is None or type(self.scaler).__module__.startswith("torch.")


@dataclass(frozen=True, slots=True)
class Applied:
    """What an update tells: the norm of the gradient before clipping, if there is one, and whether it was skipped.

    It may be both made and skipped, for different optimizers.
    """

    grad_norm: torch.Tensor | None = None
    updated: bool = True
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
    scaler = rules.scaler
    if scaler is None or not scaler.is_enabled():
        return _apply(optimizers, parameters, losses, rules)
    with _begun_anew_on_failure(scaler, parameters[0].device):
        if rules.checks:
            for one in optimizers.all:
                scaler.unscale_(one)
        applied = _apply(optimizers, parameters, losses, rules)
        scaler.update()
    return applied


def _apply(optimizers: Optimizers, parameters: Sequence[torch.Tensor], losses: float, rules: UpdateRules) -> Applied:
    """Update the parameters by gradients that are not scaled, or not yet unscaled where nothing depends on them."""
    if not rules.checks:
        return _step(optimizers, rules, None)
    gradients = [_values(parameter.grad) for parameter in parameters if parameter.grad is not None]
    norm = get_total_norm(gradients) if rules.needs_norm else None
    if rules.skip_nonfinite and not (math.isfinite(losses) and _are_finite(gradients, norm)):
        return Applied(norm, updated=False, skipped=True)
    if rules.clip_grad_norm is not None:
        assert norm is not None
        clip_grads_with_norm_(parameters, rules.clip_grad_norm, norm)
    return _step(optimizers, rules, norm)


def _step(optimizers: Optimizers, rules: UpdateRules, norm: torch.Tensor | None) -> Applied:
    """Let each optimizer make its step, unless the scaler skips it."""
    scaler = rules.scaler
    if scaler is None or not scaler.is_enabled():
        optimizers.step()
        return Applied(norm)
    skipped = []
    for one in optimizers.all:
        scaler.step(one)
        skipped.append(any(found.item() for found in scaler._found_inf_per_device(one).values()))
    return Applied(norm, updated=not all(skipped), skipped=any(skipped))


@contextmanager
def _begun_anew_on_failure(scaler: GradScaler, device: torch.device) -> Iterator[None]:
    """Let the scaler forget the optimizers that it has unscaled in an update that fails. The scale stays."""
    scaler.scale(torch.ones((), device=device))  # makes its tensors, if this is the first loss
    try:
        yield
    except BaseException:
        scaler.update(scaler.get_scale())
        raise


def _are_finite(gradients: Sequence[torch.Tensor], norm: torch.Tensor | None) -> bool:
    """Whether all numbers are finite. A norm that has overflowed does not tell; the largest number does."""
    if norm is not None and norm.isfinite():
        return True
    return bool(get_total_norm(gradients, math.inf).isfinite())


def _values(gradient: torch.Tensor) -> torch.Tensor:
    """The numbers of a gradient, which may be sparse."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient
