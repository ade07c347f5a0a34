"""Torch's own losses, of which each replica can compute its part of the whole batch's without the others' outputs.

A mean over elements is the mean of the replicas' means, weighted by rows. A mean over the rows that count (class
weights, `ignore_index`) is a sum divided by a number that depends on the targets alone, which are in host memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fastdp.program.torch.reach import HOOKS
from fastdp.tensors.row_effects import Effect, Layout

_BY_ELEMENTS = {
    nn.MSELoss: F.mse_loss,
    nn.L1Loss: F.l1_loss,
    nn.SmoothL1Loss: F.smooth_l1_loss,
    nn.HuberLoss: F.huber_loss,
    nn.BCELoss: F.binary_cross_entropy,
    nn.BCEWithLogitsLoss: F.binary_cross_entropy_with_logits,
    nn.SoftMarginLoss: F.soft_margin_loss,
    nn.KLDivLoss: F.kl_div,
}
_BY_CLASSES = {nn.CrossEntropyLoss: F.cross_entropy, nn.NLLLoss: F.nll_loss}
_FUNCTIONS = frozenset((*_BY_ELEMENTS.values(), *_BY_CLASSES.values()))
_MULTIPLY_BY_WEIGHTS = (F.binary_cross_entropy, F.binary_cross_entropy_with_logits)
_WEIGHTS = ("weight", "pos_weight")


class KnownLoss:
    """A loss of torch's own on one output and one target.

    Args:
        function: the function of torch.nn.functional.
        arguments: reads its present keyword arguments.
    """

    def __init__(self, function: Callable[..., torch.Tensor], arguments: Callable[[], dict[str, Any]]) -> None:
        self._function, self._arguments = function, arguments
        self._by_classes = function in _BY_CLASSES.values()

    def divides(self, target: torch.Tensor) -> bool:
        """Whether the loss is a sum divided by a number that depends on the targets."""
        is_mean = self._arguments().get("reduction", "mean") == "mean"
        return is_mean and self._by_classes and not target.is_floating_point()

    def divisor(self, target: torch.Tensor) -> torch.Tensor:
        """The number by which the loss of the whole batch divides its sum: a float64 tensor without axes.

        Args:
            target: of the whole batch, in host memory.
        """
        arguments = self._arguments()
        counts = target != arguments.get("ignore_index", -100)
        weight = arguments.get("weight")
        if weight is None:
            return counts.sum(dtype=torch.float64)
        return weight.detach().cpu()[target[counts]].sum(dtype=torch.float64)

    def why_not(self, outputs: Any, targets: Sequence[Any], layouts: Sequence[Layout]) -> str:
        """Why a replica cannot compute its part of the loss of these outputs; empty if it can."""
        if not isinstance(outputs, torch.Tensor) or len(targets) != 1 or not isinstance(targets[0], torch.Tensor):
            return "it is not of one output and one target"
        target, arguments = targets[0], self._arguments()
        if layouts[0].effect is not Effect.ROWS or layouts[0].axis != 0:
            return "its output does not have the rows along the first axis"
        if arguments.get("reduction", "mean") not in ("mean", "sum", "batchmean"):
            return f"its reduction is {arguments['reduction']!r}"
        if self._by_classes:
            shape = outputs.shape if target.is_floating_point() else (outputs.shape[0], *outputs.shape[2:])
            fits = outputs.ndim > 1 and target.shape == shape
        else:
            weights = [arguments[name] for name in _WEIGHTS if arguments.get(name) is not None]
            if weights and self._function not in _MULTIPLY_BY_WEIGHTS:
                return "it divides by the sum of its weights"
            fits = target.shape == outputs.shape and all(
                one.ndim < outputs.ndim or (one.ndim == outputs.ndim and one.shape[0] == 1) for one in weights
            )
        return "" if fits else "output and target (or weights) differ in shape, so rows may meet"

    def part(
        self, outputs: torch.Tensor, target: torch.Tensor, share: float, divisor: torch.Tensor | None
    ) -> torch.Tensor:
        """A replica's part: the parts of all replicas add up to the loss of the whole batch.

        Args:
            outputs, target: the replica's.
            share: its share of the rows.
            divisor: as from `divisor`, if the loss `divides`.
        """
        arguments = self._arguments()
        if divisor is not None:
            loss = self._function(outputs, target, **{**arguments, "reduction": "sum"})
            return loss / divisor.to(loss.dtype)
        loss = self._function(outputs, target, **arguments)
        return loss if arguments.get("reduction", "mean") == "sum" else loss * share


def known_loss(loss_fn: Any) -> KnownLoss | None:
    """A loss function as one of torch's own; None if it is none of those."""
    if isinstance(loss_fn, functools.partial) and not loss_fn.args:
        given = loss_fn.keywords
        return KnownLoss(loss_fn.func, lambda: given) if _is_known(loss_fn.func) and _has_reduction(given) else None
    if _is_known(loss_fn):
        return KnownLoss(loss_fn, dict)
    function: Any = _BY_ELEMENTS.get(type(loss_fn)) or _BY_CLASSES.get(type(loss_fn))
    if function is None or "forward" in vars(loss_fn) or any(getattr(loss_fn, name) for name in HOOKS):
        return None
    return KnownLoss(function, functools.partial(_arguments_of, loss_fn))


def _is_known(function: Any) -> bool:
    return isinstance(function, type(F.mse_loss)) and function in _FUNCTIONS


def _has_reduction(given: dict[str, Any]) -> bool:
    """Whether these arguments of a loss are those of today's torch."""
    return "size_average" not in given and "reduce" not in given


_NAMES = ("weight", "pos_weight", "ignore_index", "reduction", "label_smoothing", "beta", "delta", "log_target")


def _arguments_of(loss: nn.Module) -> dict[str, Any]:
    """The keyword arguments that a loss module passes on."""
    return {name: getattr(loss, name) for name in _NAMES if hasattr(loss, name)}
