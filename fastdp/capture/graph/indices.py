"""Makes compiled steps report indices out of range instead of ending the process.

A kernel that TorchInductor makes checks each index, and throws, in a parallel region, where nothing can catch it: the
process ends. Turning the check off would read other memory in silence. So in the graph that is compiled each index is
compared with its range first, and what is outside is replaced by one that is inside; one more result says whether there
was any. The comparisons are fused into the kernels. Whoever runs the graph looks at that result before anything else.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, GraphModule, Node

from fastdp.tensors.indices import Use, bound, uses

aten = torch.ops.aten


def guarded(module: GraphModule) -> GraphModule:
    """A copy of a captured graph with a last result more, a bool without axes: whether an index was out of range.

    Args:
        module: a graph whose output is one list, and whose nodes have fake values as `meta["val"]`.

    Raises:
        NotImplementedError: an operation has indices, of which fastdp does not know the range.
    """
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    safe: dict[tuple[Node, int, int | None, int | None], Node] = {}
    flags: list[Node] = []
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        for use in uses(node.target, bound(node.target, node.args, node.kwargs), _value):
            if isinstance(use.value, Node):
                key = use.value, use.low, use.high, use.ignored
                if key not in safe:
                    with graph.inserting_before(node):
                        safe[key], flag = _checked(graph, use)
                    flags.append(flag)
                _replace(node, use.place, safe[key])
    (output,) = graph.find_nodes(op="output")
    with graph.inserting_before(output):
        output.args = ([*output.args[0], _any_of(graph, flags)],)
    return GraphModule(module, graph)


def _checked(graph: Graph, use: Use) -> tuple[Node, Node]:
    """A use's value with what is wrong replaced, and whether anything was."""
    call, value = graph.call_function, use.value
    if use.high is None:
        wrong = call(aten.eq.Scalar, (value, 0))
    else:
        below, beyond = call(aten.lt.Scalar, (value, use.low)), call(aten.ge.Scalar, (value, use.high))
        wrong = call(aten.logical_or.default, (below, beyond))
        if use.ignored is not None:
            wrong = call(aten.logical_and.default, (wrong, call(aten.ne.Scalar, (value, use.ignored))))
    inside = call(aten.full_like.default, (value, 1 if use.high is None else 0))
    right = call(aten.where.self, (wrong, inside, value))
    right.meta = dict(value.meta)
    return right, call(aten.any.default, (wrong,))


def _any_of(graph: Graph, flags: list[Node]) -> Node:
    """Whether any of these is true."""
    if not flags:
        return graph.call_function(aten.full.default, ([], False), {"dtype": torch.bool})
    found = flags[0]
    for flag in flags[1:]:
        found = graph.call_function(aten.logical_or.default, (found, flag))
    return found


def _replace(node: Node, place: tuple[int, int | None], value: Node) -> None:
    """Put another value in one place of a call."""
    at, within = place
    args = bound(node.target, node.args, node.kwargs)
    if within is None:
        replaced = value
    else:
        replaced = list(args[at])
        replaced[within] = value
    if at < len(node.args):
        node.args = (*node.args[:at], replaced, *node.args[at + 1 :])
    else:
        name = node.target._schema.arguments[at].name
        node.kwargs = {**node.kwargs, name: replaced}


def _value(value: object) -> object:
    """What a node gave when it was traced; other arguments are themselves."""
    return value.meta.get("val") if isinstance(value, Node) else value
