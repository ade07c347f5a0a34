"""Computes equal expressions of a graph once.

Torch's own pass would import all of TorchInductor, for most of a second. Graphs have no writes here
(`fastdp.capture.trace.graph_of`), so operations with equal operands have equal results.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten

# All of a value under another name: the same memory, shape and strides. Torch traces `detach` as `alias` from 2.14 on.
SAME = (aten.detach.default, aten.alias.default)


def merge_equal(graph: Graph) -> None:
    """Let each operation that an earlier one equals give way to it, unless its memory is part of a result.

    Results that are equal keep memory of their own, as in an eager step.
    """
    (output,) = graph.find_nodes(op="output")
    given = {storage for node in output.all_input_nodes if (storage := storage_of(node)) is not None}
    first: dict[Hashable, Node] = {}
    for node in [*graph.nodes]:
        if node.op != "call_function" or _is_its_own(node) or storage_of(node) in given:
            continue
        same = first.setdefault((node.target, _key(node.args), _key(node.kwargs)), node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)


def _is_its_own(node: Node) -> bool:
    """Whether an operation with equal operands may have another result: one that draws, or that leaves memory as is."""
    drawn = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return drawn or getattr(node.target, "overloadpacket", None) in (aten.empty, aten.empty_like, aten.empty_strided)


def storage_of(node: Node) -> int | None:
    """The identity of the memory behind a node's tensor; None if it is no tensor."""
    value = node.meta.get("val")
    strided = isinstance(value, torch.Tensor) and value.layout is torch.strided
    return value.untyped_storage()._cdata if strided else None


def _key(value: Any) -> Hashable:
    """What two equal operands have in common. 1, 1.0 and True are three operands, and so are 0.0 and -0.0."""
    if isinstance(value, Node):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(map(_key, value))
    if isinstance(value, dict):
        return tuple((name, _key(one)) for name, one in value.items())
    if isinstance(value, slice):
        return slice, _key((value.start, value.stop, value.step))
    return type(value), repr(value) if isinstance(value, (float, complex)) else value
