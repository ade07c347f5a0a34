"""Keeps oneDNN's workspace of recurrent layers in a replay, which runs without gradients; backward needs it.

`torch.nn.LSTM` on a CPU runs `aten::mkldnn_rnn_layer`, whose backward reads a workspace. ATen makes it only while
gradients are enabled. A graph calls an operation of our own instead, which enables them for the layer alone. Another
one is its backward, whose gradients are contiguous and apart, as TorchInductor takes them to be.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Graph

aten = torch.ops.aten
_TRAIN = 15  # the place of the argument `train`

_LIBRARY = torch.library.Library("fastdp", "FRAGMENT")
_LIBRARY.define(
    "rnn_layer(Tensor x, Tensor w0, Tensor w1, Tensor w2, Tensor w3, Tensor h, Tensor c, bool reverse, "
    "int[] batch_sizes, int mode, int hidden, int layers, bool has_biases, bool bidirectional, bool batch_first, "
    "bool train) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "rnn_layer_backward(Tensor x, Tensor w0, Tensor w1, Tensor w2, Tensor w3, Tensor h, Tensor c, Tensor output, "
    "Tensor last_h, Tensor last_c, Tensor? grad_output, Tensor? grad_h, Tensor? grad_c, bool reverse, int mode, "
    "int hidden, int layers, bool has_biases, bool train, bool bidirectional, int[] batch_sizes, bool batch_first, "
    "Tensor workspace) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _rnn_layer(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`aten::mkldnn_rnn_layer` with its workspace, of detached values: nothing is recorded."""
    values = [value.detach() if isinstance(value, Tensor) else value for value in args]
    with torch.enable_grad():
        outputs, last_h, last_c, workspace = aten.mkldnn_rnn_layer.default(*values)
    return outputs.contiguous(), last_h.contiguous(), last_c.contiguous(), workspace


def _rnn_layer_backward(*args: Any) -> tuple[Tensor, ...]:
    """The gradients of x, of the four weights, of h and of c."""
    found = [gradient.contiguous() for gradient in aten.mkldnn_rnn_layer_backward.default(*args)]
    found[4] = found[4].clone()  # both biases have one gradient, and results of an operation must not share memory
    return tuple(found)


def _rnn_layer_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes of the results. Only oneDNN knows its workspace: the layer runs once on zeros."""
    tensors = tuple((tuple(map(int, value.shape)), value.dtype) for value in args[:7])
    options = tuple(tuple(value) if isinstance(value, list) else value for value in args[7:])
    made = (args[0].new_empty(shape, dtype=dtype) for shape, dtype in _results(tensors, options))
    outputs, last_h, last_c, workspace = made
    return outputs, last_h, last_c, workspace


@functools.cache
def _results(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shape and dtype of each result of a layer with these operands."""
    with unset_fake_temporarily():
        zeros = [torch.zeros(shape, dtype=dtype) for shape, dtype in tensors]
        found = _rnn_layer(*zeros, *(list(value) if isinstance(value, tuple) else value for value in options))
    return tuple((tuple(one.shape), one.dtype) for one in found)


def _rnn_layer_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    """Gradients have the shapes of their tensors, and are contiguous."""
    return tuple(one.new_empty(one.shape) for one in args[:7])


_LIBRARY.impl("rnn_layer", _rnn_layer, "CPU")
_LIBRARY.impl("rnn_layer_backward", _rnn_layer_backward, "CPU")
torch.library.register_fake("fastdp::rnn_layer", _rnn_layer_fake, lib=_LIBRARY)
torch.library.register_fake("fastdp::rnn_layer_backward", _rnn_layer_backward_fake, lib=_LIBRARY)


def keep_workspaces(graph: Graph) -> None:
    """Let the recurrent layers of a training step keep what their backward reads."""
    for node in graph.find_nodes(op="call_function", target=aten.mkldnn_rnn_layer.default):
        if node.args[_TRAIN]:
            node.target = torch.ops.fastdp.rnn_layer.default
    for node in graph.find_nodes(op="call_function", target=aten.mkldnn_rnn_layer_backward.default):
        node.target = torch.ops.fastdp.rnn_layer_backward.default
