"""Tells graphs on a CPU whose operations are best computed on one core each, since recurrent layers use the cores.

A recurrent layer computes parts of its rows at once, on one core each (`tensors/at_once.py`), and does nearly all the
work of the graphs that have one. Operations on several cores beside it gain little: their helper threads are made anew
behind each layer, since they would hold its cores otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from fastdp.capture.graph.products import value_of

aten = torch.ops.aten

# The layers take at least this many times as long as all else.
LEAD = 4
# To read and write an element takes as long as about so many multiply-adds of a product.
_ELEMENT = 32
_GATES = 4  # of an LSTM
_PASSES = 3  # multiply-adds of forward and backward, by those of forward
_PRODUCTS = {aten.mm.default: 0, aten.bmm.default: 0, aten.addmm.default: 1, aten.baddbmm.default: 1}
_LSTM, _RNN = "fastdp::lstm_onednn", "fastdp::rnn_layer"
_LAYERS = {_LSTM, _RNN, f"{_LSTM}_backward", f"{_RNN}_backward"}
_OTHER_WORK = ("aten::convolution", "aten::embedding_dense_backward")


def layers_lead(graph: Graph) -> bool:
    """Whether recurrent layers in parts do nearly all the work of a graph. Nodes have fake values as `meta["val"]`."""
    layers = [work for node in graph.nodes for work in _layer(node)]
    if not layers:
        return False
    rest = 0
    for node in graph.nodes:
        name = _name_of(node)
        if name.startswith(_OTHER_WORK) or "attention" in name:
            return False
        rest += 0 if name in _LAYERS else _work(node)
    return _PASSES * sum(layers) >= LEAD * rest


def _name_of(node: Node) -> str:
    """The name of a node's operation. Those of fastdp are known to torch only where something has loaded them."""
    return node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""


def _layer(node: Node) -> Iterator[int]:
    """The multiply-adds of the forward pass of a layer whose rows are in several parts, if a node is one."""
    arguments: Any = node.args
    if _name_of(node) == _LSTM:
        (rows, steps, features), units = value_of(arguments[0]).shape, value_of(arguments[1]).shape[-1]
    elif _name_of(node) == _RNN:
        (steps, rows, features), units = value_of(arguments[0]).shape, value_of(arguments[5]).shape[-1]
    else:
        return
    if arguments[-1] > 1:
        yield _GATES * int(units) * int(features + units) * int(rows * steps)


def _work(node: Node) -> int:
    """The work of an operation, as multiply-adds."""
    arguments: Any = node.args
    if node.target in _PRODUCTS:
        a, b = (value_of(one).shape for one in arguments[_PRODUCTS[node.target] :][:2])
        return math.prod(a) * b[-1]
    value = node.meta.get("val")
    copies = isinstance(value, torch.Tensor) and isinstance(node.target, torch._ops.OpOverload) and not _is_view(node)
    return _ELEMENT * int(value.numel()) if copies else 0


def _is_view(node: Node) -> bool:
    """Whether an operation only gives another name to memory."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.returns) and schema.returns[0].alias_info is not None
