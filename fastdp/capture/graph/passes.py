"""Optimizes a traced graph without changing its numbers: dead code, copies, stores into gradient buffers.

A traced step is a flat graph of ATen operations. Keras leaves much in it that a replay need not do: detaches, values
computed twice, constant subexpressions and, around each convolution of its torch backend, changes of memory layout.
The arrays of a Keras model (rows, height, width, channels) are channels-last memory when viewed in torch's order, so
the passes remove clones to torch's own layout and back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from fastdp.capture.graph.common_subexpressions import SAME, merge_equal
from fastdp.capture.graph.recurrent import keep_workspaces
from fastdp.capture.graph.rewrites import fuse_convolutions
from fastdp.errors import NotCapturable

aten = torch.ops.aten
SMALL = 4096  # most elements of a folded constant

# Operations whose values do not depend on the strides of a four-dimensional operand.
_ANY_LAYOUT = {
    aten.convolution.default,
    aten.convolution_backward.default,
    aten.max_pool2d_with_indices.default,
    aten.max_pool2d_with_indices_backward.default,
    aten.avg_pool2d.default,
    aten.avg_pool2d_backward.default,
    aten.constant_pad_nd.default,
    aten.clone.default,
    aten.relu.default,
    aten.threshold_backward.default,
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.permute.default,
    aten.mean.dim,
    aten.sum.dim_IntList,
}

# Gradients that have the memory layout of the padded value, although torch 2.13 tells TorchInductor that they are
# contiguous. They use only the shape of that value.
_LAYOUT_OF_PADDED = {
    aten.replication_pad2d_backward.default,
    aten.replication_pad3d_backward.default,
    aten.reflection_pad2d_backward.default,
}


def optimized(module: GraphModule) -> GraphModule:
    """The graph without operations that a replay need not do. Results are bitwise equal, except that a reduction over
    another memory layout may add in another order.

    Raises:
        NotCapturable: the graph draws random numbers, which a replay could not repeat.
    """
    graph = module.graph
    _without_meta(graph)
    _refuse_draws(graph)
    _without_detaches(graph)
    _with_constants(module)
    _without_layout_changes(graph)
    _contiguous_paddings(graph)
    fuse_convolutions(graph)
    keep_workspaces(graph)
    graph.eliminate_dead_code()
    merge_equal(graph)
    return GraphModule(module, graph)


def stored(module: GraphModule, gradients: int) -> GraphModule:
    """Make the graph write its first results into buffers, its last inputs, instead of returning them.

    Each result is written as soon as it is computed, so that a bucket of gradients completes while backward goes on.

    Args:
        module: a graph whose output is one list; changed in place.
        gradients: the number of results to write. Their buffers are the last placeholders, in the same order.
    """
    graph = module.graph
    buffers = [node for node in graph.nodes if node.op == "placeholder"][-gradients:] if gradients else []
    (output,) = graph.find_nodes(op="output")
    results = list(output.args[0])
    place = _places(graph, results[:gradients])
    for result, buffer in zip(results[:gradients], buffers, strict=True):
        with graph.inserting_before(place[result]):
            graph.call_function(aten.copy_.default, (buffer, result))
    output.args = (results[gradients:],)
    module.recompile()
    return module


def _places(graph: Graph, values: list[Node]) -> dict[Node, Node]:
    """For each value the first node before which the value is final: computed, and not written to later."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    nodes = list(order)
    computing = next(i for i, node in enumerate(nodes) if node.op not in ("placeholder", "get_attr"))
    written = {base_of(node.args[0]): order[node] for node in _calls(graph) if _mutates(node)}  # the last time
    return {value: nodes[max(order[value] + 1, written.get(base_of(value), -1) + 1, computing)] for value in values}


def in_place(module: GraphModule) -> GraphModule:
    """A copy of a graph made by `stored` that writes matrix products directly to their buffers."""
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.find_nodes(op="call_function", target=aten.copy_.default):
        buffer, product = node.args
        if isinstance(product, Node) and product.target is aten.mm.default and len(product.users) == 1:
            with graph.inserting_before(node):
                graph.call_function(aten.mm.out, product.args, {"out": buffer})
            graph.erase_node(node)
            graph.erase_node(product)
    return GraphModule(module, graph)


def _without_meta(graph: Graph) -> None:
    """Remove operations on tensors without memory, which only told shapes: also random ones."""
    for node in reversed(list(_calls(graph))):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.device.type == "meta" and not node.users:
            graph.erase_node(node)


def _refuse_draws(graph: Graph) -> None:
    """Refuse to capture a step with draws that fastdp does not control."""
    for node in _calls(graph):
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and not _drops_nothing(node):
            raise NotCapturable(f"{node.target}, a random op that fastdp does not draw")


def writes(graph: Graph) -> bool:
    """Whether an operation writes into one of its operands."""
    return any(map(_mutates, _calls(graph)))


# Operations that write to running statistics, their fourth and fifth operands, and do not say so.
_NORMALIZES = {aten.native_batch_norm.default, aten.cudnn_batch_norm.default, aten.miopen_batch_norm.default}


def refuse_writes(graph: Graph) -> None:
    """Check that a step does not write to what it is given.

    Raises:
        NotCapturable: it does.
    """
    for node in _calls(graph):
        if _mutates(node) and getattr(base_of(node.args[0]), "op", "") in ("placeholder", "get_attr"):
            raise NotCapturable(f"{node.target}, which writes to what the step is given")
        if node.target in _NORMALIZES and node.args[3] is not None and node.args[5]:
            raise NotCapturable("batch statistics that do not come from torch.nn.functional.batch_norm")


def _drops_nothing(node: Node) -> bool:
    """Whether an operation with built-in dropout (attention) has a rate of zero, and so draws nothing."""
    target: Any = node.target
    arguments = [argument.name for argument in target._schema.arguments]
    if "dropout_p" not in arguments:
        return False
    at = arguments.index("dropout_p")
    return (node.args[at] if at < len(node.args) else node.kwargs.get("dropout_p", 0.0)) == 0.0


def _without_detaches(graph: Graph) -> None:
    """Remove detaches and aliases: a replay is not differentiated."""
    for node in [found for target in SAME for found in graph.find_nodes(op="call_function", target=target)]:
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)


def _with_constants(module: GraphModule) -> None:
    """Fold constants: compute once what depends on no input."""
    graph = module.graph
    mutated = {base_of(node.args[0]) for node in _calls(graph) if _mutates(node)}
    known: dict[Node, torch.Tensor] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr":
            value = getattr(module, str(node.target))
            if value.numel() > SMALL:  # may belong to the model: the next step must read what is written to it
                continue
        elif (
            node.op == "call_function"
            and isinstance(node.target, torch._ops.OpOverload)
            and isinstance(node.meta.get("val"), torch.Tensor)
            and node.meta["val"].numel() <= SMALL
            and all(argument in known for argument in node.all_input_nodes)
            and not _mutates(node)
        ):
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: known[n])
            value = node.target(*args, **kwargs)
        else:
            continue
        if isinstance(value, torch.Tensor) and base_of(node) not in mutated:
            known[node] = value
    for number, (node, value) in enumerate(known.items()):
        if node.op == "get_attr" or all(user in known for user in node.users):
            continue
        name = f"_folded_{number}"
        module.register_buffer(name, value.clone(), persistent=False)
        with graph.inserting_before(node):
            constant = graph.get_attr(name)
        constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant)


def _without_layout_changes(graph: Graph) -> None:
    """Keep channels-last values: remove clones that only change the memory layout of what convolutions and pools
    read, and recompute the strides of what follows."""
    mutated = {base_of(node.args[0]) for node in _calls(graph) if _mutates(node)}
    stale: set[Node] = set()
    for node in list(_calls(graph)):
        if node in stale:
            stale.discard(node)
            _restride(node, stale)
        if node.target is not aten.clone.default or {base_of(node), base_of(node.args[0])} & mutated:
            continue
        source: Any = node.args[0]
        before, after = source.meta["val"], node.meta["val"]
        same = before.stride() == after.stride() and before.storage_offset() == 0 and source.op != "placeholder"
        to_contiguous = (
            before.ndim == 4
            and before.is_contiguous(memory_format=torch.channels_last)
            and node.kwargs.get("memory_format") in (torch.contiguous_format, torch.channels_last)
            and all(user.target in _ANY_LAYOUT for user in node.users)
        )
        if same or to_contiguous:
            if not same:
                stale.update(node.users)
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _contiguous_paddings(graph: Graph) -> None:
    """Make gradients of paddings contiguous: pass an empty contiguous value in place of the padded one."""
    for node in list(_calls(graph)):
        if node.target not in _LAYOUT_OF_PADDED:
            continue
        padded: Any = node.args[1]
        value = padded.meta["val"]
        with graph.inserting_before(node):
            shape = graph.call_function(aten.new_empty.default, (padded, list(value.shape)))
        shape.meta["val"] = value.new_empty(value.shape)
        node.update_arg(1, shape)


def _restride(node: Node, stale: set[Node]) -> None:
    """Recompute a node's strides after its operands' changed. If they differ, mark its users as stale."""
    if node.target is aten.view.default:
        node.target = aten.reshape.default
    before = node.meta.get("val")
    target: Any = node.target
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    node.meta["val"] = value = target(*args, **kwargs)
    if not (isinstance(value, torch.Tensor) and value.stride() == before.stride()):
        stale.update(user for user in node.users if user.op == "call_function")


def _calls(graph: Graph) -> Iterator[Node]:
    """The operations of a graph."""
    return (node for node in graph.nodes if node.op == "call_function")


def _mutates(node: Node) -> bool:
    """Whether an operation writes into one of its operands."""
    target: Callable[..., Any] | Any = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def base_of(node: Any) -> Any:
    """The value that owns a node's memory, looking through views and in-place operations."""
    while isinstance(node, Node) and node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        aliases = node.target._schema.returns and node.target._schema.returns[0].alias_info is not None
        if not aliases or not node.args or not isinstance(node.args[0], Node):
            return node
        node = node.args[0]
    return node
