"""Lets a Keras layer call torch's own random functions on a replica.

All threads share torch's global generator. A replica has its own copy, in the state before the step
(`fastdp.program.keras.random.generators`). It makes each draw for the whole batch and keeps its own rows, so that it
draws what one device would. (Unseeded Dropout layers take one number from the generator where plain Keras draws the
whole mask. In a model with such layers, draws by torch differ from plain Keras's, but are the same on any number of
devices.)

    by rows           functions whose result is shaped like an array of rows: rand, randn, randint, normal, bernoulli,
                      the functions `*_like`, the methods that fill an array, all kinds of dropout, gumbel_softmax
    by all rows       functions whose number of draws depends on the values: multinomial, poisson, binomial, gamma,
                      rrelu. Replicas exchange their rows for these.
    refused           functions whose rows are not first: torch's RNNs and multi-head attention with dropout,
                      fractional pooling; and a permutation of the rows
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from fastdp.program.keras.branches import READ_AS_BOOL, branch_noted
from fastdp.tensors.function_mode import Handler
from fastdp.tensors.random import own_rows, whole_shape
from fastdp.tensors.random_functions import RNNS, draws_in_call, dropout_arguments
from fastdp.tensors.row_effects import NotByRowsError


def _drawn(state: Any, draw: Callable[[], Any], generator: Any, device: Any) -> Any:
    """Draw from the replica's own copy of a generator."""
    state.not_captured("a random op that is not Keras's")
    return state.generators.with_torch(generator, draw, device if device is not None else torch.get_default_device())


def _created(state: Any, function: Any, args: Any, kwargs: Any) -> Any:
    """Handle rand, randn, randint, and normal with a given shape."""
    place = _SIZE_BEHIND[function]
    if state.drawing or kwargs.get("out") is not None or (function is torch.normal and not _is_sized(args, kwargs)):
        return _with_tensors(state, function, args, kwargs)
    args, kwargs = list(args), dict(kwargs)
    if "size" in kwargs:
        shape = tuple(kwargs.pop("size"))
    elif function is torch.randint:
        shape = tuple(args.pop())
    elif function is torch.normal:
        shape = tuple(args.pop(2))
    else:
        shape = tuple(args[0]) if args and not isinstance(args[0], int) else tuple(args)
        args = []
    per_row, rows = state.entries_per_row(shape), state.context.rows
    whole = whole_shape(shape, per_row, rows) if per_row else shape
    drawn = _drawn(
        state, lambda: function(*args[:place], size=whole, **kwargs), kwargs.get("generator"), kwargs.get("device")
    )
    return _as_created(own_rows(drawn, per_row, rows), kwargs)


def _as_created(drawn: torch.Tensor, kwargs: Any) -> torch.Tensor:
    """Make a leaf of a part of a larger draw, if `requires_grad` is given."""
    return drawn.detach().clone().requires_grad_() if kwargs.get("requires_grad") else drawn


def _is_sized(args: Any, kwargs: Any) -> bool:
    return "size" in kwargs or len(args) > 2


def _filled(state: Any, function: Any, args: Any, kwargs: Any) -> Any:
    """Handle the methods that fill an array."""
    x, tensors = args[0], [value for value in (*args[1:], *kwargs.values()) if isinstance(value, torch.Tensor)]
    if state.drawing or x.ndim == 0 or tensors:
        return _with_tensors(state, function, args, kwargs)
    per_row, rows, generator = state.entries_per_row(x.shape), state.context.rows, kwargs.get("generator")
    if not per_row:
        return _drawn(state, lambda: function(*args, **kwargs), generator, x.device)
    whole = torch.empty(whole_shape(x.shape, per_row, rows), dtype=x.dtype, device=x.device)
    _drawn(state, lambda: function(whole, *args[1:], **kwargs), generator, x.device)
    return x.copy_(own_rows(whole, per_row, rows))


def _with_tensors(state: Any, function: Any, args: Any, kwargs: Any) -> Any:
    """Handle a function of arrays of rows."""
    if state.drawing or not _draws(function, args, kwargs):
        return function(*args, **kwargs)
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    generator, device = kwargs.get("generator"), tensors[0].device if tensors else kwargs.get("device")
    per_row = state.entries_per_row(tensors[0].shape) if tensors else 0
    if not per_row:
        return _drawn(state, lambda: function(*args, **kwargs), generator, device)
    if kwargs.get("inplace") or kwargs.get("out") is not None:
        raise NotByRowsError(
            f"A layer calls {function.__name__} of torch's in place on an array of rows. Let it return a new array, "
            "or train the model itself on one device (model.fit)."
        )
    length = tensors[0].shape[0]

    def whole(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.ndim == 0 or value.shape[0] != length:
            return value
        return _with_others(value, per_row, state, function in _BY_VALUES)

    args, kwargs = [whole(value) for value in args], {name: whole(value) for name, value in kwargs.items()}
    drawn = _drawn(state, lambda: function(*args, **kwargs), generator, device)
    return own_rows(drawn, per_row, state.context.rows)


def _draws(function: Any, args: Any, kwargs: Any) -> bool:
    """Whether this call draws anything."""
    if function in _DROPOUTS:
        _, p, training, _ = dropout_arguments(function, args, kwargs)
        return training and 0.0 < p < 1.0
    if function in (F.rrelu, torch.rrelu):
        return bool(args[3] if len(args) > 3 else kwargs.get("training", False))
    return draws_in_call(function, args, kwargs)


def _with_others(value: torch.Tensor, per_row: int, state: Any, by_values: bool) -> torch.Tensor:
    """The replica's rows placed among the other replicas' rows if `by_values`, else among zeros.

    Gradients flow to its own rows only.
    """
    context, rows = state.context, state.context.rows
    if by_values and context.size > 1:
        parts = list(context.exchange(value.detach(), "a draw that depends on values of all rows"))
        parts[context.rank] = value
        return torch.cat(parts)
    if by_values:  # a trial on some of the rows
        state.made_up = True
        return torch.cat(
            [value[:1].detach()] * (rows.start * per_row)
            + [value]
            + [value[:1].detach()] * ((rows.total - rows.stop) * per_row)
        )
    rest = [value.new_zeros(((n * per_row), *value.shape[1:])) for n in (rows.start, rows.total - rows.stop)]
    return torch.cat([rest[0], value, rest[1]])


def _permuted(state: Any, function: Any, args: Any, kwargs: Any) -> Any:
    """Handle torch.randperm."""
    if state.drawing:
        return function(*args, **kwargs)
    if state.entries_per_row((args[0] if args else kwargs["n"],)):
        raise NotByRowsError(
            "A layer permutes the rows of the batch (torch.randperm), which are split between devices. Shuffle the "
            "data instead (fit does), or train the model itself on one device (model.fit)."
        )
    return _drawn(state, lambda: function(*args, **kwargs), kwargs.get("generator"), kwargs.get("device"))


def _refused(state: Any, function: Any, args: Any, kwargs: Any) -> Any:
    """Handle a function whose draws do not have the rows first."""
    rows = state.context.rows
    if draws_in_call(function, args, kwargs) and rows.count < rows.total:
        raise NotByRowsError(
            f"A layer calls torch's {function.__name__} with dropout, which no device can draw for its own rows only. "
            "Set its dropout to 0 and apply dropout between the calls, or train the model itself on one device "
            "(model.fit)."
        )
    if not draws_in_call(function, args, kwargs):
        return function(*args, **kwargs)
    return _drawn(state, lambda: function(*args, **kwargs), None, None)


# The number of arguments before the size, by function.
_SIZE_BEHIND: dict[Any, int] = {torch.rand: 0, torch.randn: 0, torch.randint: 2, torch.normal: 2}
_FILLS = ("normal_", "uniform_", "bernoulli_", "random_", "exponential_", "geometric_", "cauchy_", "log_normal_")
# Their number of draws depends on the values.
_BY_VALUES = {
    *(torch.multinomial, torch.Tensor.multinomial, torch.poisson, torch.binomial, torch.rrelu, F.rrelu),
    *(torch._standard_gamma, torch._sample_dirichlet),
}
_DROPOUTS = {
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
    *(torch.dropout, torch.feature_dropout, torch.alpha_dropout, torch.feature_alpha_dropout),
}
_WITH_TENSORS = (
    *(*_DROPOUTS, F.gumbel_softmax),
    *(torch.rand_like, torch.randn_like, torch.randint_like, torch.bernoulli, torch.Tensor.bernoulli),
    *(F.scaled_dot_product_attention, *_BY_VALUES),
)
_REFUSED = (
    *(*RNNS, F.multi_head_attention_forward),
    *(F.fractional_max_pool2d, F.fractional_max_pool3d),
)

HANDLERS: dict[Any, Handler] = {
    **dict.fromkeys(READ_AS_BOOL, branch_noted),
    **dict.fromkeys(_SIZE_BEHIND, _created),
    **{getattr(torch.Tensor, name): _filled for name in _FILLS},
    **dict.fromkeys(_WITH_TENSORS, _with_tensors),
    **dict.fromkeys(_REFUSED, _refused),
    torch.randperm: _permuted,
}
