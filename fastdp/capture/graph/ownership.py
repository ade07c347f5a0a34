"""Lets the results of a traced graph share memory where they do in an eager pass, and nowhere else.

A replay that hands its results to the user must not keep their memory: a folded constant would be handed out again, and
two results that a pass has taken for one would both change if the user writes to one.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fastdp.capture.graph.passes import base_of
from fastdp.errors import NotCapturable

# What has the memory of a tensor: an argument of the graph, by number, or the tensor itself and others with this label.
Memory = Hashable


def separated(module: GraphModule, expected: Sequence[Memory | None]) -> GraphModule:
    """Copy results that share memory in the graph and not in an eager pass.

    Args:
        module: a graph whose output is one list; changed in place.
        expected: what has the memory of each result in an eager pass: the number of an argument, another label that is
            equal for results that share memory, or None where it does not matter.

    Raises:
        NotCapturable: results share memory in an eager pass and not in the graph.
    """
    graph = module.graph
    arguments = {node: number for number, node in enumerate(graph.find_nodes(op="placeholder"))}
    (output,) = graph.find_nodes(op="output")
    results = list(output.args[0])
    label_of: dict[Node, Memory] = {}
    node_of: dict[Memory, Node] = {}
    for i, (node, label) in enumerate(zip(results, expected, strict=True)):
        if label is None:
            continue
        base = _owner(node)
        if isinstance(label, int):
            if arguments.get(base) != label:
                raise NotCapturable("an output that shares memory with what forward writes to")
            continue
        if base in arguments or base.op == "get_attr" or label_of.get(base, label) != label:
            with graph.inserting_before(output):
                results[i] = base = graph.call_function(torch.ops.aten.clone.default, (node,))
            base.meta["val"] = node.meta["val"].clone()
        label_of[base] = label
        if node_of.setdefault(label, base) is not base:
            raise NotCapturable("outputs that share memory")
    output.args = (results,)
    module.recompile()
    return module


def memory_of(tensors: Sequence[torch.Tensor], arguments: Sequence[torch.Tensor]) -> list[Memory]:
    """What has the memory of each tensor: the number of an argument, or a label."""
    owners: dict[int, Memory] = {}
    for number, argument in enumerate(arguments):
        owners.setdefault(argument.untyped_storage()._cdata, number)
    return [owners.setdefault(one.untyped_storage()._cdata, f"result {i}") for i, one in enumerate(tensors)]


def _owner(node: Any) -> Node:
    """The value that owns a result's memory. One of several results may be a view, as the schema says."""
    while True:
        base = base_of(node)
        if base.target is not operator.getitem:
            return base
        source = base.args[0]
        returns = getattr(source.target, "_schema", None)
        if returns is None or not any(one.alias_info is not None for one in returns.returns):
            return base
        node = source.args[0]
