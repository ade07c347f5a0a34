"""Detects recurrent layers and attention whose batch axis is not the first.

Torch's own default is time first, `(steps, batch, features)`. fastdp would split such a batch by its time steps: each
device would run a part of the sequence, and nothing would fail. So this module detects it and warns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from fastdp.program.torch.random.handlers import HANDLERS as BY_ROWS
from fastdp.program.torch.replica import ReplicaContext
from fastdp.tensors.function_mode import Handler
from fastdp.warn import warn_user

_BATCH_FIRST = 8  # position of `batch_first` among the arguments of torch's recurrent functions
_RECURRENT = {torch.lstm: "LSTM", torch.gru: "GRU", torch.rnn_tanh: "RNN", torch.rnn_relu: "RNN"}


def _recurrent(running: ReplicaContext, function: Any, args: Any, kwargs: Any) -> Any:
    """Check a recurrent layer, unless its input is a packed sequence, whose first axis is neither time nor batch."""
    if args[0].ndim == 3 and len(args) > _BATCH_FIRST and not args[_BATCH_FIRST]:
        _look(running, f"an {_RECURRENT[function]}", args[0])
    return BY_ROWS[function](running, function, args, kwargs)


def _attention(running: ReplicaContext, function: Any, args: Any, kwargs: Any) -> Any:
    """Check attention. This function gets time first whatever `batch_first` is."""
    query = args[0] if args else kwargs["query"]
    if query.ndim == 3:
        _look(running, "attention", query)
    return BY_ROWS[function](running, function, args, kwargs)


def _look(running: ReplicaContext, layer: str, inputs: torch.Tensor) -> None:
    """Warn once if the rows of the replica are the time steps of a layer instead of its batch."""
    steps, entries = inputs.shape[:2]
    suspect = steps == running.rows.count < running.rows.total and entries != steps
    if not suspect or running.context.rank or running.told:
        return
    running.told.add(layer)
    warn_user(
        f"The module runs {layer} along the first axis of a tensor of shape {tuple(inputs.shape)}, and fastdp splits "
        f"the rows of a batch along that axis: this device has {steps} of {running.rows.total}. If these are time "
        "steps, each device sees a part of every sequence, and results are wrong. Give the batch with its rows first, "
        "to layers with batch_first=True, or transpose it inside the module."
    )


HANDLERS: dict[Any, Handler] = {
    **dict.fromkeys(_RECURRENT, _recurrent),
    F.multi_head_attention_forward: _attention,
}
