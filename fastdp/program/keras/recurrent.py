"""Keras's LSTM and GRU on a replica: all time steps as one operation instead of a Python loop.

Keras's own code runs unchanged if a layer uses features that the operations do not support (other activations, dropout
within the recurrence, a custom cell), and if Keras would call cuDNN itself.

A mask says which steps of a row count; at the other steps, state and output keep their values. So the operation runs on
the counted steps, moved to the front of each row, and its outputs are scattered back to their places.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import torch
from keras.src.backend.torch.rnn import cudnn_ok

from fastdp.program.keras.replica import running
from fastdp.tensors.recurrent_ops import gru_scan, has_onednn, lstm_onednn, lstm_scan
from fastdp.tensors.rnn_layer import layer_parts

_Outputs = tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]


def fused(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `inner_loop` of Keras's recurrent layers: on a replica's thread it runs as one operation."""

    def inner_loop(layer: Any, sequences: Any, initial_state: Any, mask: Any, training: Any = False) -> Any:
        found = keras.tree.flatten(mask)
        mask = found[0] if found else None
        if running() is None or not _fits(layer, sequences, mask, training):
            return original(layer, sequences, initial_state, mask, training)
        cell = layer.cell
        if training and cell.dropout:
            sequences = sequences * cell.get_dropout_mask(sequences[:, 0, :])[:, None]
        if layer.go_backwards:
            sequences = sequences.flip(1)
            mask = None if mask is None else mask.flip(1)
        return _run(layer, sequences, keras.tree.flatten(initial_state), mask)

    return inner_loop


def _fits(layer: Any, sequences: Any, mask: Any, training: Any) -> bool:
    """Whether the operations support all settings of the layer, and Keras has nothing faster."""
    cell = layer.cell
    # Keras's loop respects the dtype policy of a cell in keras.layers.RNN and the hooks of subclasses.
    plain = type(cell) in (keras.layers.LSTMCell, keras.layers.GRUCell)
    if (
        not plain
        or type(layer) not in _LAYERS
        or cell.compute_dtype != layer.compute_dtype
        or cell.activity_regularizer
    ):
        return False
    if cell.activation is not keras.activations.tanh or cell.recurrent_activation is not keras.activations.sigmoid:
        return False
    if training and (cell.recurrent_dropout or cell.dropout == 1.0 or (cell.dropout and cell.implementation == 1)):
        return False
    if sequences.ndim != 3 or not sequences.is_floating_point() or 0 in sequences.shape:
        return False
    cudnn = getattr(layer, "use_cudnn", False)
    if mask is not None:
        # Keras's own code raises for what Keras does not support.
        return mask.ndim == 2 and cudnn is not True and not (layer.unroll and layer.go_backwards)
    by_itself = cudnn_ok(cell.activation, cell.recurrent_activation, layer.unroll, cell.use_bias)
    return not (sequences.is_cuda and cudnn and by_itself and getattr(cell, "reset_after", True))


def _run(layer: Any, sequences: torch.Tensor, states: list[torch.Tensor], mask: torch.Tensor | None) -> _Outputs:
    """The last output, all outputs, and the last states."""
    steps = None if mask is None else _Steps(mask.bool())
    given = sequences.dtype
    # Half precision is computed in single precision and rounded at the end, which is more accurate than rounding each
    # step.
    dtype = given if given == torch.float64 else torch.float32
    x = (sequences if steps is None else steps.gathered(sequences)).to(dtype)
    states = [state.to(dtype) for state in states]
    if isinstance(layer.cell, keras.layers.LSTMCell):
        every, last = _lstm(layer, x, states, whole=steps is not None and (layer.return_state or layer.stateful))
    else:
        every, last = _gru(layer.cell, x, states)
    if steps is None:
        outputs = every[0]
        last = last or [sequence[:, -1] for sequence in every]
    else:
        # A layer that returns no state does not use the last c, so any value will do.
        last = [steps.last(*pair) for pair in zip(every, states, strict=False)] + states[len(every) :]
        outputs = steps.scattered(every[0], layer.zero_output_for_mask)
    return outputs[:, -1].to(given), outputs.to(given), [state.to(given) for state in last]


def _lstm(
    layer: Any, x: torch.Tensor, states: list[torch.Tensor], whole: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """h of all steps, and the last h and c; with `whole`, h and c of all steps, and no last states."""
    kernel, recurrent, bias = (_weight(layer.cell, name, x) for name in ("kernel", "recurrent_kernel", "bias"))
    if bias is None:
        bias = x.new_zeros(kernel.shape[1])
    if has_onednn(x) and not whole:
        parts = layer_parts(*(int(size) for size in (*x.shape, recurrent.shape[0])))
        outputs, h, c, _ = lstm_onednn(x, *states, kernel, recurrent, bias, torch.is_grad_enabled(), parts)
        return [outputs.transpose(0, 1)], [h, c]
    every_h, every_c, _ = lstm_scan(x, *states, kernel, recurrent, bias)
    return [every_h.permute(2, 0, 1), every_c.permute(2, 0, 1)], []


def _gru(cell: Any, x: torch.Tensor, states: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """h of all steps."""
    kernel, recurrent, bias = (_weight(cell, name, x) for name in ("kernel", "recurrent_kernel", "bias"))
    none = x.new_zeros(kernel.shape[1])
    biases = (none, none) if bias is None else (bias, none) if bias.ndim == 1 else (bias[0], bias[1])
    every, _, _ = gru_scan(x, *states, kernel, recurrent, *biases, cell.reset_after)
    return [every.permute(2, 0, 1)], []


def _weight(cell: Any, name: str, x: torch.Tensor) -> Any:
    """A weight of a cell, rounded to the policy's precision as Keras does it."""
    variable = getattr(cell, name)
    return None if variable is None else keras.ops.convert_to_tensor(variable).to(x.dtype)


class _Steps:
    """The positions of the counted steps in each row.

    Args:
        mask: of shape (rows, steps), true where a step counts.
    """

    def __init__(self, mask: torch.Tensor) -> None:
        self._mask = mask
        self._order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
        self._count = mask.cumsum(1)

    def gathered(self, sequences: torch.Tensor) -> torch.Tensor:
        """The sequences with the counted steps moved to the front, in order."""
        return sequences.gather(1, _expanded(self._order, sequences))

    def scattered(self, sequences: torch.Tensor, zeros: bool) -> torch.Tensor:
        """Move each counted step's output back to its place; other steps get the output before them, or zeros."""
        placed = sequences.gather(1, _expanded((self._count - 1).clamp(min=0), sequences))
        shown = self._mask if zeros else self._count > 0
        return torch.where(shown[..., None], placed, torch.zeros((), dtype=placed.dtype, device=placed.device))

    def last(self, sequences: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """The state after the last counted step; the initial state if no step counts."""
        count = self._count[:, -1:]
        found = sequences.gather(1, _expanded((count - 1).clamp(min=0), sequences))[:, 0]
        return torch.where(count > 0, found, first)


def _expanded(index: torch.Tensor, sequences: torch.Tensor) -> torch.Tensor:
    """An index of steps, expanded to all features."""
    return index[..., None].expand(-1, -1, sequences.shape[2])


_LAYERS = (keras.layers.LSTM, keras.layers.GRU, keras.layers.RNN)
