"""Weighs losses of torch that forward computes, means over what counts, by a replica's part of the whole count.

The sum of two means in which rows do not count alike (the start and the end of an answer, masked words and the next
sentence) is no mean over rows. If each of the two is weighed where it is computed, it is one.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn import functional as F

from fastdp.errors import NotCapturable
from fastdp.program.torch.replica import ReplicaContext
from fastdp.tensors.collectives import peers
from fastdp.tensors.function_mode import Handler

_BY_CLASSES = (F.cross_entropy, F.nll_loss)
_BY_ELEMENTS = (
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
)
_SIGNATURES = {function: inspect.signature(function) for function in (*_BY_CLASSES, *_BY_ELEMENTS)}


def _loss(running: ReplicaContext, function: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """A loss on a replica's rows whose mean over rows is the loss of the whole batch."""
    rows, running.has_losses = running.rows, True
    if not running.weighs or not (running.tried or running.backward) or running.context.size == 1:
        return function(*args, **kwargs)
    given = _SIGNATURES[function].bind(*args, **kwargs)
    given.apply_defaults()
    named = given.arguments
    if named["reduction"] != "mean" or named.get("size_average") is not None or named.get("reduce") is not None:
        return function(*args, **kwargs)
    own = _count(function, named)
    if own is None:
        return function(*args, **kwargs)
    if running.traced:
        raise NotCapturable("losses in forward that devices weigh by what counts in the whole batch")
    among = peers()
    total = among.total(own) if isinstance(among, Totals) else sum(running.context.exchange(own, "what a loss counts"))
    named["reduction"] = "sum"
    return function(**named) / (total * rows.count / rows.total)


def _count(function: Any, named: dict[str, Any]) -> float | None:
    """By what a loss divides its sum; None if it is not known."""
    x, target, weight = named["input"], named["target"], named.get("weight")
    if function in _BY_ELEMENTS:
        is_factor = function in (F.binary_cross_entropy, F.binary_cross_entropy_with_logits)
        return float(x.numel()) if x.shape == target.shape and (weight is None or is_factor) else None
    if target.is_floating_point():
        return float(x.numel() // x.shape[1 if x.ndim > 1 else 0])
    counts = target != named["ignore_index"]
    return float(counts.sum() if weight is None else weight.detach()[target[counts]].sum(dtype=torch.float64))


class Totals:
    """Gives the parts of a trial what the run on all rows has counted.

    Args:
        known: of that run, in order.
        is_whole: this is that run.
    """

    def __init__(self, known: list[float], *, is_whole: bool) -> None:
        self._known, self._is_whole, self._asked = known, is_whole, 0

    def total(self, own: float) -> float:
        """The count of all rows."""
        if self._is_whole:
            self._known.append(own)
        self._asked += 1
        return self._known[self._asked - 1] if self._asked <= len(self._known) else own


HANDLERS: dict[Any, Handler] = dict.fromkeys(_SIGNATURES, _loss)
