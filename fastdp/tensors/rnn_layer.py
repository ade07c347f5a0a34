"""Runs oneDNN's recurrent layer, forward and backward, with its rows in parts that are computed at once.

`aten::mkldnn_rnn_layer` is what ATen runs for one direction of a layer of an LSTM. It keeps a workspace that its
backward reads, only while gradients are enabled, and of a size that oneDNN alone knows. Here nothing is recorded, and
each part of the rows has a workspace of its own.

Shapes: x (steps, rows, features), four weights as ATen has them, h and c (rows, units), outputs (steps, rows, units).
The options are ATen's arguments behind c, in its order. Results own their memory and are contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdp.tensors.at_once import at_once, is_small, parts_of

_AXES = (1, -2, -2)  # the rows of x or outputs, of h, and of c


def layer_parts(rows: int, steps: int, features: int, units: int) -> int:
    """Into how many parts the rows of an LSTM are best cut, with the cores that torch has now."""
    return parts_of(rows, 4 * units * (features + units) * rows * steps)


def rnn_layer(
    x: Tensor, weights: Sequence[Tensor], h: Tensor, c: Tensor, options: Sequence[Any], parts: int, keep: bool = True
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Outputs, the last h and the last c, and a workspace for each part, which is empty unless it is to be kept."""
    weights = [weight.detach() for weight in weights]
    cut = [_cut(tensor, axis, parts) for tensor, axis in zip((x, h, c), _AXES, strict=True)]
    results = x.new_empty(*x.shape[:2], h.shape[-1]), torch.empty_like(h), torch.empty_like(c)
    places = [_cut(result, axis, parts) for result, axis in zip(results, _AXES, strict=True)]

    def compute(part: int) -> Any:
        of_x, of_h, of_c = (_contiguous(pieces[part]) for pieces in cut)
        with torch.set_grad_enabled(keep):
            found = torch.ops.aten.mkldnn_rnn_layer.default(of_x, *weights, of_h, of_c, *options)
        _write(found, places, part)
        return found[3]

    found = at_once(compute, parts, one_core=is_small(h.shape[-2], h.shape[-1]))
    return *results, [x.new_empty(0, dtype=torch.uint8) if one is None else one for one in found]


def rnn_layer_backward(
    x: Tensor,
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    results: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    options: Sequence[Any],
    workspaces: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """The gradients of x, of the four weights, of h and of c.

    Args:
        states: h and c.
        results: outputs, the last h and the last c.
        gradients: those of the results.
        options: ATen's arguments between the gradients and the workspace.
        workspaces: those of forward, one for each part.
    """
    parts, backward = len(workspaces), torch.ops.aten.mkldnn_rnn_layer_backward.default
    weights = [weight.detach() for weight in weights]
    axes = (*_AXES, *_AXES, *_AXES)
    cut = [_cut(tensor, axis, parts) for tensor, axis in zip((x, *states, *results, *gradients), axes, strict=True)]
    of_inputs = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (x, *states)]
    places = [_cut(gradient, axis, parts) for gradient, axis in zip(of_inputs, _AXES, strict=True)]

    def compute(part: int) -> Any:
        of_x, *others = (_contiguous(pieces[part]) for pieces in cut)
        with torch.no_grad():
            found = backward(of_x, *weights, *others, *options, workspaces[part])
        _write((found[0], *found[5:]), places, part)
        return [weight.contiguous() for weight in found[1:5]]

    found = at_once(compute, parts, one_core=is_small(*states[0].shape[-2:]))
    first, *rest = found
    for one in rest:  # in the order of rows
        for total, more in zip(first[:3], one, strict=False):
            total.add_(more)
    first[3] = first[2].clone()  # both biases have one gradient, and results of an operation must not share memory
    return of_inputs[0], *first, *of_inputs[1:]


def _cut(tensor: Tensor | None, axis: int, parts: int) -> Sequence[Tensor | None]:
    """The parts of a tensor's rows, detached."""
    return [None] * parts if tensor is None else tensor.detach().tensor_split(parts, axis)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _write(found: Sequence[Tensor], places: Sequence[Sequence[Tensor | None]], part: int) -> None:
    """Write the results of a part to its places in those of all rows, which the other parts fill at once."""
    for result, pieces in zip(found, places, strict=False):
        place = pieces[part]
        assert place is not None
        place.copy_(result.detach())
