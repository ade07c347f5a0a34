"""Cuts a captured step where a bucket of gradients is complete, so that its all-reduce overlaps with backward.

A segment is a run of consecutive operations as a separate graph. It returns the values that later segments need. Run
in order, the segments compute the same operations as the whole graph. Each is recorded as a CUDA graph
(`fastdp.capture.cuda_graphs.recording`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from fastdp.tracing.spans import span

Tensors = Sequence[torch.Tensor]


@dataclass(slots=True)
class Segment:
    """One part of a step.

    Attributes:
        run: takes tensors, gives tensors.
        inputs, outputs: the numbers of the values that it takes and gives.
        last: the numbers of inputs that no later segment uses.
        buckets: the gradient buckets that are complete at its end.
    """

    run: Callable[..., Tensors]
    inputs: list[int]
    outputs: list[int]
    last: list[int] = field(default_factory=list)
    buckets: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Segments:
    """A step in parts. Values are numbered, beginning with the step's arguments; `results` are the step's results."""

    parts: list[Segment]
    results: list[int]

    def __call__(self, arguments: Tensors, ready: Callable[[int], None]) -> Tensors:
        """Run the step; call `ready(i)` when bucket i is complete."""
        if len(self.parts) == 1:
            (part,) = self.parts
            with span("segment"):
                found = part.run(*arguments)
            for bucket in part.buckets:
                ready(bucket)
            return found

        def call(part: Segment, given: list[torch.Tensor]) -> Tensors:
            with span("segment"):
                found = part.run(*given)
            for bucket in part.buckets:
                ready(bucket)
            return found

        return self.walk(arguments, call)

    def walk(self, arguments: Tensors, call: Callable[[Segment, list[torch.Tensor]], Tensors]) -> Tensors:
        """Call `call(part, inputs)` for each part in order, passing on values between parts. Returns the results."""
        values = dict(enumerate(arguments))
        for part in self.parts:
            given = [values[number] for number in part.inputs]
            for number in part.last:
                del values[number]
            values.update(zip(part.outputs, call(part, given), strict=True))
        return [values[number] for number in self.results]


def whole(run: Callable[..., Tensors], arguments: int, results: int, buckets: Iterable[int]) -> Segments:
    """A step as a single part. All buckets are complete at its end."""
    numbers = list(range(arguments, arguments + results))
    return Segments([Segment(run, list(range(arguments)), numbers, buckets=list(buckets))], numbers)


def cut(module: GraphModule, stores: Mapping[int, int], buckets: Sequence[int]) -> Segments:
    """Cut a graph into segments. Each ends where one or more buckets are complete.

    Args:
        module: a graph whose output is one list and which writes its gradients into some of its arguments.
        stores: maps the numbers of those arguments to the bucket of the gradient. If all buckets are complete at once,
            or the mapping is empty, the graph stays whole.
        buckets: the numbers of all buckets. A bucket that the graph does not write is complete with the first segment.
    """
    places = module.graph.find_nodes(op="placeholder")
    gradients = {places[number]: bucket for number, bucket in stores.items()}
    nodes = [node for node in module.graph.nodes if node.op == "call_function"]
    complete = dict.fromkeys(buckets, 0)
    for at, node in enumerate(nodes):
        for buffer in _written(node):
            if buffer in gradients:
                complete[gradients[buffer]] = max(complete[gradients[buffer]], at)
    ends = sorted({at for at in complete.values() if at > 0})
    if len(ends) < 2:
        (output,) = module.graph.find_nodes(op="output")
        return whole(module, len(places), len(output.args[0]), buckets)
    ends[-1] = len(nodes) - 1  # little follows the last gradient: no segment for it
    starts = [0, *(end + 1 for end in ends[:-1])]
    chunks = [nodes[start : end + 1] for start, end in zip(starts, ends, strict=True)]
    segments = _linked(module, chunks)
    for bucket, at in complete.items():
        number = next(i for i, end in enumerate(ends) if at <= end)
        segments.parts[number].buckets.append(bucket)
    return segments


def placed(module: GraphModule, before: torch.device, device: torch.device) -> GraphModule:
    """A copy of a graph traced on one device for another one: moves its constants and device arguments."""
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    copy = GraphModule(module, graph)

    def moved(value: Any) -> Any:
        same = isinstance(value, torch.device) and value.type == before.type and value.index in (None, before.index)
        return device if same else value

    for node in graph.nodes:
        if node.op == "call_function":
            node.args, node.kwargs = map_aggregate(node.args, moved), map_aggregate(node.kwargs, moved)
        elif node.op == "get_attr" and getattr(module, node.target).device == before:
            delattr(copy, node.target)
            copy.register_buffer(node.target, getattr(module, node.target).to(device), persistent=False)
    copy.recompile()
    return copy


def _written(node: Node) -> Iterator[Node]:
    """The placeholders that an operation writes into."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return
    for i, argument in enumerate(target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            if isinstance(value, Node) and value.op == "placeholder":
                yield value


def _linked(module: GraphModule, chunks: list[list[Node]]) -> Segments:
    """Make a graph of each chunk of operations, and number the values that pass between them."""
    (output,) = module.graph.find_nodes(op="output")
    results: list[Node] = list(output.args[0])
    numbers = {node: i for i, node in enumerate(module.graph.find_nodes(op="placeholder"))}
    # Each segment has its own copy of a constant; a constant among the results is returned by the last segment.
    taken = [_taken(chunk) for chunk in chunks]
    parts = []
    for at, chunk in enumerate(chunks):
        here = set(chunk)
        constants = [node for node in dict.fromkeys(results) if node.op == "get_attr"] if at == len(chunks) - 1 else []
        wanted = {node for later in taken[at + 1 :] for node in later} | set(results)
        given = [node for node in (*chunk, *constants) if node in wanted]
        inputs = [node for node in taken[at] if node not in here]
        for node in given:
            numbers.setdefault(node, len(numbers))
        last = [numbers[node] for node in inputs if node not in wanted]
        run = _graph(module, inputs, [*constants, *chunk], given)
        parts.append(Segment(run, [numbers[n] for n in inputs], [numbers[n] for n in given], last))
    return Segments(parts, [numbers[node] for node in results])


def _taken(chunk: list[Node]) -> list[Node]:
    """The values that a chunk's operations take, including values of the chunk itself, each once. No constants."""
    found = {node: None for user in chunk for node in user.all_input_nodes if node.op != "get_attr"}
    return list(found)


def _graph(module: GraphModule, inputs: list[Node], nodes: list[Node], given: list[Node]) -> GraphModule:
    """A graph of some operations of another graph."""
    graph = Graph()
    copies = {node: graph.placeholder(f"value_{i}") for i, node in enumerate(inputs)}
    for before, copied in copies.items():
        copied.meta = dict(before.meta)

    def copy(node: Node) -> Node:
        if node not in copies:
            copies[node] = graph.node_copy(node, copy)
        return copies[node]

    for node in nodes:
        copy(node)
    graph.output([copies[node] for node in given])
    return GraphModule(module, graph)
