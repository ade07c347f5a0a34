"""Turns traced graphs into bytes and back, for the process that compiles them.

Torch pickles a `GraphModule` such that loading traces it again, which runs operations without operands (`zeros`)
immediately and turns them into constants. This module writes the nodes themselves.
"""

from __future__ import annotations

import io
import operator
import pickle
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.node import map_aggregate, map_arg


@dataclass(frozen=True, slots=True)
class _Ref:
    """A reference to a node by its number."""

    number: int


@dataclass(frozen=True, slots=True)
class _Input:
    """Shape, strides and dtype of a graph's input."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class _Pickler(pickle.Pickler):
    """Writes torch's dtypes, layouts and memory formats by their names in torch.

    Pickle itself would refer to the first module that contains the constant, which may be one of the user's: the other
    process would then import that.
    """

    def reducer_override(self, value: Any) -> Any:
        """How to rebuild a value."""
        if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
            return _constant, (str(value).removeprefix("torch."),)
        return NotImplemented


def _constant(name: str) -> Any:
    """A constant of torch."""
    return getattr(torch, name)


def to_bytes(module: GraphModule) -> tuple[bytes, list[torch.Tensor]]:
    """Serialize a graph whose placeholders have fake tensors as `meta["val"]`.

    Constants of one element are written into the graph. Others become additional inputs after its own; they are the
    second result.
    """
    numbers: dict[Node, int] = {}
    inputs: list[_Input] = []
    constants: list[torch.Tensor] = []
    nodes: list[tuple[Any, ...]] = []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            inputs.append(_input(node.meta["val"]))
            written: tuple[Any, ...] = ("placeholder", len(inputs) - 1)
        elif node.op == "get_attr":
            value = getattr(module, str(node.target))
            if value.numel() == 1:
                options = {"dtype": value.dtype, "device": value.device}
                written = ("call", "aten.full.default", (list(value.shape), value.item()), options)
            else:
                constants.append(value)
                written = ("constant", len(constants) - 1)
        else:
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: _Ref(numbers[n]))
            args, kwargs = _plain(args), _plain(kwargs)
            written = ("output", args) if node.op == "output" else ("call", _name(node.target), args, kwargs)
        numbers[node] = len(nodes)
        nodes.append(written)
    data = io.BytesIO()
    deterministic = torch.are_deterministic_algorithms_enabled()
    _Pickler(data).dump((nodes, inputs, [_input(value) for value in constants], deterministic))
    return data.getvalue(), constants


def from_bytes(data: bytes) -> tuple[GraphModule, list[torch.Tensor], FakeTensorMode]:
    """Rebuild the graph; return it with fake tensors for its inputs and their fake mode."""
    nodes, inputs, constants, _ = pickle.loads(data)
    graph = Graph()
    mode = FakeTensorMode(shape_env=ShapeEnv())
    made: list[Node] = []
    placeholders = [graph.placeholder(f"input_{i}") for i in range(len(inputs) + len(constants))]
    for kind, *rest in nodes:
        if kind == "placeholder":
            made.append(placeholders[rest[0]])
        elif kind == "constant":
            made.append(placeholders[len(inputs) + rest[0]])
        elif kind == "call":
            args, kwargs = map_aggregate(tuple(rest[1:]), lambda a: made[a.number] if isinstance(a, _Ref) else a)
            made.append(graph.call_function(_target(rest[0]), args, kwargs))
        else:
            made.append(graph.output(map_aggregate(rest[0][0], lambda a: made[a.number] if isinstance(a, _Ref) else a)))
    with mode:
        fakes = [
            torch.empty_strided(one.shape, one.strides, dtype=one.dtype, device=one.device)
            for one in (*inputs, *constants)
        ]
    return GraphModule(torch.nn.Module(), graph), fakes, mode


def is_deterministic(data: bytes) -> bool:
    """Whether torch's deterministic algorithms were enabled when the graph was written: they forbid atomic sums."""
    return bool(pickle.loads(data)[3])


def _input(tensor: torch.Tensor) -> _Input:
    """The properties of an input that a graph depends on."""
    return _Input(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.device)


def _plain(value: Any) -> Any:
    """Replace torch's immutable lists and dicts by plain ones."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value)) if type(value) is tuple else [_plain(one) for one in value]
    return value


def _name(target: Any) -> str:
    """The name of an operation."""
    return "getitem" if target is operator.getitem else str(target)


def _target(name: str) -> Any:
    """The operation of that name."""
    if name == "getitem":
        return operator.getitem
    namespace, packet, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)
