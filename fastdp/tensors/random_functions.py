"""Reads calls of torch's random functions: the arguments of dropouts, and whether a call draws at all."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

RNNS = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)


def dropout_arguments(function: Any, args: Any, kwargs: Any) -> tuple[torch.Tensor, float, bool, bool]:
    """The input, the probability, whether dropout is active, and whether it is in place.

    Raises:
        ValueError: a probability outside [0, 1].
    """
    named = dict(zip(("input", "p", "training", "inplace"), args, strict=False)) | kwargs
    named["p"] = named.pop("train_p", named.get("p", 0.5))
    training = named.get("training", named.get("train", function is not F.alpha_dropout))
    if not 0.0 <= named["p"] <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {named['p']}")
    return named["input"], float(named["p"]), bool(training), bool(named.get("inplace", False))


def draws_in_call(function: Any, args: Any, kwargs: Any) -> bool:
    """Whether this call draws random numbers. Attention without dropout, for example, need not wait for others."""
    if function is F.scaled_dot_product_attention:
        return (args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)) > 0.0
    if function is F.multi_head_attention_forward:
        return kwargs.get("training", True) and (args[10] if len(args) > 10 else kwargs["dropout_p"]) > 0.0
    if function in RNNS:
        # (..., has_biases, num_layers, dropout, train, bidirectional[, batch_first])
        numbers = [a for a in args if isinstance(a, (bool, int, float))]
        return float(numbers[2]) > 0.0 and bool(numbers[3])
    return True
