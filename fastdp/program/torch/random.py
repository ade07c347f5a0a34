"""Torch's random functions with draws indexed by the row of the global batch.

A draw has a key: the seed of the step and the number of the draw. The seed is one number from torch's global
generator, taken only if the step draws at all, so `torch.manual_seed` makes a run repeatable. From the key
Philox, a counter-based generator, derives a sequence of random numbers for each row of the global batch; a
replica computes only the sequences of its rows. So 1, 2 and 8 devices drop the same units. The numbers differ
from plain torch, where all threads share one global generator.

    exact over device counts    dropout of activations with rows first; rand, randn, bernoulli, uniform_,
                                normal_ with the replica's rows first; draws that do not depend on rows
    repeatable, but different   everything in `ALONE` (attention and RNN dropout, multinomial, ...), and
    on each device              dropout of activations whose first axis is not made of rows
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from fastdp.program.torch.replica import ReplicaContext
from fastdp.tensors.function_mode import Handler
from fastdp.tensors.random import global_generator, uniform_tensor
from fastdp.tensors.random_functions import RNNS, draws_in_call, dropout_arguments

_SELU_LIMIT = -1.7580993408473766  # replaces values dropped by alpha dropout: -scale * alpha of SELU


def uniform(running: ReplicaContext, shape: Sequence[int], *, by_replica: bool = False) -> torch.Tensor:
    """fp32 numbers in [0, 1) for an array of a replica.

    Args:
        running: the replica.
        shape: the shape of the array. If its first axis has `k` entries for each of the replica's rows, the
            numbers belong to these rows of the global batch.
        by_replica: an array that is not made of rows gets different numbers on each replica.
    """
    seed, number = running.next_draw()
    shape, rows = tuple(shape), running.rows
    of_rows = bool(shape) and shape[0] >= rows.count and shape[0] % rows.count == 0
    if not of_rows:
        number += (running.context.rank if by_replica else 0) << 32
    count, first = (rows.count, rows.start) if of_rows else (1, 0)
    return uniform_tensor((seed, number), first, count, shape, running.context.torch_device)


def normal(running: ReplicaContext, shape: Sequence[int]) -> torch.Tensor:
    """fp32 numbers of the standard normal distribution, by Box-Muller; rows as in `uniform`."""
    radius = torch.sqrt(-2.0 * torch.log1p(-uniform(running, shape)))
    return radius * torch.cos(2.0 * math.pi * uniform(running, shape))


def _dropout(running: ReplicaContext, function: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """F.dropout and torch.dropout, and F.dropout1d to F.dropout3d, which drop whole channels."""
    x, p, training, inplace = dropout_arguments(function, args, kwargs)
    if not training or p == 0.0:
        return x
    if p == 1.0:
        return x.zero_() if inplace else x * 0.0
    shape = _mask_shape(function, x)
    keep = (uniform(running, shape, by_replica=True) >= p).to(x.dtype).div_(1.0 - p)
    return x.mul_(keep) if inplace else x * keep


def _alpha_dropout(running: ReplicaContext, function: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """F.alpha_dropout and F.feature_alpha_dropout: dropped values saturate; mean and variance are kept."""
    x, p, training, inplace = dropout_arguments(function, args, kwargs)
    if not training or p == 0.0:
        return x
    if p == 1.0:
        return x.zero_() if inplace else x * 0.0
    keep = (uniform(running, _mask_shape(function, x), by_replica=True) >= p).to(x.dtype)
    scale = 1.0 / math.sqrt((1.0 - p) * (1.0 + p * _SELU_LIMIT**2))
    shift = scale * _SELU_LIMIT * ((1.0 - keep) - p)
    return x.mul_(keep * scale).add_(shift) if inplace else x * (keep * scale) + shift


_CHANNEL_AXES = {F.dropout1d: 2, F.dropout2d: 3, F.dropout3d: 4}  # axes of an input without rows
_LIKE_CHANNELS = (F.feature_alpha_dropout, torch.feature_dropout)


def _mask_shape(function: Any, x: torch.Tensor) -> tuple[int, ...]:
    """The shape of a mask: one value per element, or per channel."""
    if function in _LIKE_CHANNELS:
        return (*x.shape[:2], *(1 for _ in x.shape[2:]))
    if function not in _CHANNEL_AXES:
        return tuple(x.shape)
    # As in torch, dropout2d takes 3-d input as (rows, channels, length); the others take it as without rows.
    channels = 1 if x.ndim < _CHANNEL_AXES[function] or (x.ndim == 2 and function is F.dropout1d) else 2
    if function is F.dropout2d and x.ndim == 3:
        channels = 2
    elif function is not F.dropout2d and x.ndim == _CHANNEL_AXES[function]:
        channels = 1
    return (*x.shape[:channels], *(1 for _ in x.shape[channels:]))


def _created(running: ReplicaContext, function: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """torch.rand and torch.randn, and their `_like`s."""
    if "generator" in kwargs:
        return function(*args, **kwargs)
    kwargs = dict(kwargs)
    out = kwargs.pop("out", None)
    if function in (torch.rand_like, torch.randn_like):
        result = torch.empty_like(*args, **kwargs)
    else:
        result = torch.empty(*args, **kwargs)
    draw = normal if function in (torch.randn, torch.randn_like) else uniform
    with torch.no_grad():
        result.copy_(draw(running, result.shape))
    return result if out is None else out.copy_(result)


def _bernoulli(running: ReplicaContext, function: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """torch.bernoulli(probabilities), as a function or a method."""
    if len(args) > 1 or kwargs:
        return _alone(running, function, args, kwargs)
    drawn = uniform(running, args[0].shape, by_replica=True).to(args[0].device)
    return (drawn < args[0]).to(args[0].dtype)


def _filled(running: ReplicaContext, function: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """Tensor.bernoulli_, Tensor.uniform_ and Tensor.normal_."""
    if kwargs.get("generator") is not None:
        return function(*args, **kwargs)
    x = args[0]
    if function is torch.Tensor.bernoulli_:
        p = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
        return x.copy_(uniform(running, x.shape) < p)
    names = ("from", "to") if function is torch.Tensor.uniform_ else ("mean", "std")
    low, high = ({names[0]: 0.0, names[1]: 1.0} | dict(zip(names, args[1:], strict=False)) | kwargs).values()
    if function is torch.Tensor.uniform_:
        return x.copy_(uniform(running, x.shape) * (high - low) + low)
    return x.copy_(normal(running, x.shape) * high + low)


def _alone(running: ReplicaContext, function: Any, args: Any, kwargs: Any) -> Any:
    """Run a function that draws internally: one thread at a time, with the global generator seeded and restored."""
    if kwargs.get("generator") is not None or not draws_in_call(function, args, kwargs):
        return function(*args, **kwargs)
    seed, number = running.next_draw()
    with global_generator:
        before = torch.get_rng_state()
        torch.default_generator.manual_seed((seed + 7919 * number + 104729 * running.context.rank) % 2**63)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_rng_state(before)


ALONE = (
    *RNNS,
    F.scaled_dot_product_attention,
    F.multi_head_attention_forward,
    F.gumbel_softmax,
    F.rrelu,
    torch.rrelu,
    torch.normal,
    torch.poisson,
    torch.multinomial,
    torch.Tensor.multinomial,
    torch.binomial,
    torch.randint,
    torch.randint_like,
    torch.randperm,
    torch.Tensor.random_,
    torch.Tensor.exponential_,
    torch.Tensor.geometric_,
    torch.Tensor.cauchy_,
    torch.Tensor.log_normal_,
    F.fractional_max_pool2d,
    F.fractional_max_pool3d,
)

HANDLERS: dict[Any, Handler] = {
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout, torch.feature_dropout), _dropout),
    **dict.fromkeys((F.alpha_dropout, F.feature_alpha_dropout), _alpha_dropout),
    **dict.fromkeys((torch.rand, torch.randn, torch.rand_like, torch.randn_like), _created),
    **dict.fromkeys((torch.bernoulli, torch.Tensor.bernoulli), _bernoulli),
    **dict.fromkeys((torch.Tensor.bernoulli_, torch.Tensor.uniform_, torch.Tensor.normal_), _filled),
    **dict.fromkeys(ALONE, _alone),
}
