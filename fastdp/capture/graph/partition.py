"""Splits the graph of a forward and its backward pass into one graph for each, and finds what forward keeps.

Torch's own partitioner (`torch._functorch.partitioners`) decides by a minimal cut which values forward keeps and which
backward computes again, because they are cheap.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.fx import Graph, GraphModule, Node

from fastdp.capture.graph.passes import base_of

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Parts:
    """The two passes.

    Attributes:
        forward: takes the inputs; returns one list, its results and then the values that it keeps for backward.
        backward: takes inputs, the kept values and the tangents; returns one list of gradients.
        given: the numbers of the inputs that backward takes, in its order.
        kept: how many values forward keeps.
        shared: the numbers of the inputs of whose memory kept values are views.
    """

    forward: GraphModule
    backward: GraphModule
    given: list[int]
    kept: int
    shared: list[int]


def partition(joint: GraphModule, inputs: int, results: int) -> Parts:
    """Split a joint graph.

    Args:
        joint: takes the inputs, then the tangents; returns one list, the results of forward and then the gradients.
            It writes to nothing, and its nodes have fake values as `meta["val"]`. It is changed.
        inputs, results: their numbers.
    """
    graph = joint.graph
    placeholders = graph.find_nodes(op="placeholder")
    for at, node in enumerate(placeholders):  # torch's partitioner goes by the names
        node.name = node.target = f"primals_{at}" if at < inputs else f"tangents_{at - inputs}"
    (output,) = graph.find_nodes(op="output")
    found = list(output.args[0])
    output.args = ([*found[:results], *_apart(graph, output, found[results:])],)
    joint.recompile()
    forward, backward = min_cut_rematerialization_partition(joint, None, num_fwd_outputs=results)
    return _parts(forward, backward, [node.name for node in placeholders[:inputs]], results)


def _apart(graph: Graph, output: Node, gradients: Sequence[Node]) -> list[Node]:
    """The gradients with memory of their own: optimizers and users write to them in place."""
    seen: set[Node] = set()
    apart = []
    for node in gradients:
        base = _memory(node)
        if base in seen or base.op in ("placeholder", "get_attr"):
            apart.append(_copied(graph, output, node))
            continue
        seen.add(base)
        apart.append(node)
    return apart


def _memory(node: Node) -> Node:
    """The value whose memory a value may share: as `base_of`, and through operations that do not say so."""
    while True:
        base: Node = base_of(node)
        source: Any = base.args[0] if base.args else None
        if base.target is aten._unsafe_view.default or (
            base.target is operator.getitem and base_of(source) is not source
        ):
            node = source
        else:
            return base


def _copied(graph: Graph, before: Node, node: Node) -> Node:
    """A copy of a value."""
    with graph.inserting_before(before):
        copy = graph.call_function(aten.clone.default, (node,))
    copy.meta["val"] = node.meta["val"].clone()
    return copy


def _parts(forward: GraphModule, backward: GraphModule, inputs: list[str], results: int) -> Parts:
    """The parts of what the partitioner has made."""
    (output,) = forward.graph.find_nodes(op="output")
    found: list[Node] = list(output.args[0])
    wanted = backward.graph.find_nodes(op="placeholder")
    tangents = [node for node in wanted if node.name.startswith("tangents_")]
    saved = wanted[: len(wanted) - len(tangents)]
    pairs = list(zip(found[results:], saved, strict=True))
    given = [(inputs.index(mine.name), theirs) for mine, theirs in pairs if mine.op == "placeholder"]
    kept = [(mine, theirs) for mine, theirs in pairs if mine.op != "placeholder"]
    memory = {_memory(mine) for mine, _ in kept}
    shared = sorted(inputs.index(base.name) for base in memory if base.op == "placeholder")
    # What the user does in place to an output must not reach what backward needs.
    own = [_copied(forward.graph, output, node) if _memory(node) in memory else node for node in found[:results]]
    output.args = ([*own, *(mine for mine, _ in kept)],)
    ordered = [*(theirs for _, theirs in given), *(theirs for _, theirs in kept), *tangents]
    return Parts(
        _plain(forward, forward.graph), _ordered(backward, ordered), [at for at, _ in given], len(kept), shared
    )


def _plain(module: GraphModule, graph: Graph) -> GraphModule:
    """A graph as a module that runs its own code."""
    copied = Graph()
    copied.output(copied.graph_copy(graph, {}))
    return GraphModule(module, copied)


def _ordered(module: GraphModule, placeholders: Sequence[Node]) -> GraphModule:
    """The graph of a module with its placeholders in this order, and a list as its output."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in placeholders:
        copies[node] = graph.placeholder(str(node.target))
        copies[node].meta = dict(node.meta)
    result: Any = graph.graph_copy(module.graph, copies)
    graph.output(list(result))
    return GraphModule(module, graph)
