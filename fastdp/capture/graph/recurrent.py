"""Keeps oneDNN's workspace of recurrent layers in a replay, which runs without gradients; backward needs it.

`torch.nn.LSTM` on a CPU runs `aten::mkldnn_rnn_layer`, whose backward reads a workspace. ATen makes it only while
gradients are enabled. A graph calls an operation of our own instead, which enables them for the layer alone, and
computes parts of the rows at once (`tensors/rnn_layer.py`). Another one is its backward, whose gradients are contiguous
and apart, as TorchInductor takes them to be.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Graph, Node

from fastdp.tensors.rnn_layer import layer_parts, rnn_layer, rnn_layer_backward

aten = torch.ops.aten
_BATCH_SIZES, _TRAIN = 8, 15  # places among the arguments of ATen's forward

_LIBRARY = torch.library.Library("fastdp", "FRAGMENT")
_LIBRARY.define(
    "rnn_layer(Tensor x, Tensor w0, Tensor w1, Tensor w2, Tensor w3, Tensor h, Tensor c, bool reverse, "
    "int[] batch_sizes, int mode, int hidden, int layers, bool has_biases, bool bidirectional, bool batch_first, "
    "bool train, int parts) -> (Tensor, Tensor, Tensor, Tensor[])"
)
_LIBRARY.define(
    "rnn_layer_backward(Tensor x, Tensor w0, Tensor w1, Tensor w2, Tensor w3, Tensor h, Tensor c, Tensor output, "
    "Tensor last_h, Tensor last_c, Tensor? grad_output, Tensor? grad_h, Tensor? grad_c, bool reverse, int mode, "
    "int hidden, int layers, bool has_biases, bool train, bool bidirectional, int[] batch_sizes, bool batch_first, "
    "Tensor[] workspaces) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _rnn_layer(*args: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Outputs, the last states, and the workspace of each part."""
    return rnn_layer(args[0], args[1:5], args[5], args[6], args[7:16], args[16])


def _rnn_layer_backward(*args: Any) -> tuple[Tensor, ...]:
    """The gradients of x, of the four weights, of h and of c."""
    return rnn_layer_backward(args[0], args[1:5], args[5:7], args[7:10], args[10:13], args[13:22], args[22])


def _rnn_layer_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Shapes and dtypes of the results. Only oneDNN knows its workspaces: the layer runs once on zeros."""
    tensors = tuple((tuple(map(int, value.shape)), value.dtype) for value in args[:7])
    options = tuple(tuple(value) if isinstance(value, list) else value for value in args[7:])
    results = [args[0].new_empty(shape, dtype=dtype) for shape, dtype in _results(tensors, options)]
    return results[0], results[1], results[2], results[3:]


@functools.cache
def _results(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shape and dtype of each result of a layer with these operands, and of each workspace."""
    with unset_fake_temporarily():
        zeros = [torch.zeros(shape, dtype=dtype) for shape, dtype in tensors]
        found = _rnn_layer(*zeros, *(list(value) if isinstance(value, tuple) else value for value in options))
    return tuple((tuple(one.shape), one.dtype) for one in (*found[:3], *found[3]))


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
            node.args = (*node.args, _parts(node))
    for node in graph.find_nodes(op="call_function", target=aten.mkldnn_rnn_layer_backward.default):
        node.target = torch.ops.fastdp.rnn_layer_backward.default


def _parts(node: Node) -> int:
    """Into how many parts a layer's rows are cut. Packed sequences, whose rows end one after the other, stay whole."""
    x, recurrent = (node.args[place].meta["val"] for place in (0, 2))
    steps, rows, features = map(int, x.shape)
    return 1 if node.args[_BATCH_SIZES] else layer_parts(rows, steps, features, int(recurrent.shape[1]))
