"""Replaces operations in place by ones that make new values, so that a step that has them is traced once.

Torch's `functionalize` does that for any graph, by tracing it again, which takes two thirds of the time of the first
trace. Most writes need none of it: normalizations and activations write to a value that nobody else has.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fastdp.capture.graph.common_subexpressions import SAME, storage_of

aten = torch.ops.aten


def without_writes(module: GraphModule) -> bool:
    """Rewrite a traced graph so that no operation writes into an operand, and say whether that was possible.

    The graph is unchanged where it was not: where somebody reads a view of a value from before a write after it, or
    writes to a view.

    Args:
        module: with the tensors of the trace as `meta["val"]` of its nodes, views on the memory of what they view.
    """
    order = {node: at for at, node in enumerate(module.graph.nodes)}
    storages = {node: storage for node in order if (storage := storage_of(node)) is not None}
    writes = [node for node in order if node.op == "call_function" and _mutates(node.target)]
    written_by, written = set(writes), defaultdict[int, list[int]](list)  # when
    for node in writes:
        if _functional(node) is None or storages.get(node) != storages.get(node.args[0]):
            return False
        written[storages[node]].append(order[node])
    whole: set[Node] = set()  # nodes that are all of a written value
    made_by: dict[int, Node] = {}
    for node, storage in storages.items():
        first = made_by.setdefault(storage, node)
        follows = node.target in SAME or node in written_by
        if storage in written and (node is first or (follows and node.args[0] in whole)):
            whole.add(node)
    for node, storage in storages.items():
        if storage not in written:
            continue
        if node.op in ("placeholder", "get_attr") or (node in written_by and node.args[0] not in whole):
            return False
        later = next((at for at in written[storage] if at > order[node]), len(order))
        if node not in whole and any(order[user] >= later for user in node.users):
            return False
    _rewrite(module, storages, whole, written_by)
    return True


def _rewrite(module: GraphModule, storages: dict[Node, int], whole: set[Node], writes: set[Node]) -> None:
    """Let each operation take what its operands hold by then."""
    graph, present = module.graph, dict[int, Node]()
    for node in [*graph.nodes]:
        args, kwargs = map_arg(
            (node.args, node.kwargs), lambda one: present.get(storages[one], one) if one in whole else one
        )
        if node not in writes:
            node.args, node.kwargs = args, kwargs
            continue
        with graph.inserting_before(node):
            made = graph.call_function(_functional(node), args, kwargs)
        made.meta = node.meta
        present[storages[node]] = made
    for node in reversed([*graph.nodes]):
        if node in writes:
            graph.erase_node(node)
    module.recompile()


def _functional(node: Node) -> Any:
    """The operation that makes a new value equal to what this one leaves in its first operand; None if there is none,
    or if its dtype, shape or strides would be others."""
    target: Any = node.target
    arguments, first = target._schema.arguments, node.args[0] if node.args else None
    name = target._schema.name.removeprefix("aten::")
    packet = getattr(aten, name[:-1], None) if name.endswith("_") else None
    overload = getattr(packet, target._overloadname, None)
    written = [at for at, one in enumerate(arguments) if one.alias_info is not None and one.alias_info.is_write]
    if overload is None or overload._schema.is_mutable or written != [0] or not isinstance(first, Node):
        return None
    if [one.name for one in overload._schema.arguments] != [one.name for one in arguments]:
        return None
    values = map_arg((node.args, node.kwargs), lambda one: one.meta.get("val"))
    tensors = [one.meta.get("val") for one in node.all_input_nodes]
    if not all(isinstance(value, torch.Tensor) for value in tensors):
        return None
    before, after, made = first.meta["val"], node.meta.get("val"), overload(*values[0], **values[1])
    alike = all(isinstance(one, torch.Tensor) and _form(one) == _form(before) for one in (after, made))
    return overload if alike else None


def _form(value: torch.Tensor) -> tuple[Any, ...]:
    return value.dtype, value.shape, value.stride(), value.device


def _mutates(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
