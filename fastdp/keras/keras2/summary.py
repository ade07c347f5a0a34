"""`print_summary`: the table of a model's layers, as Keras 2 laid it out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras

HEADER = ("Layer (type)", "Output Shape", "Param #", "Connected to")
CHAIN_WIDTH, CHAIN_POSITIONS = 65, (0.45, 0.85, 1.0)
GRAPH_WIDTH, GRAPH_POSITIONS = 98, (0.33, 0.55, 0.67, 1.0)


def print_summary(
    model: keras.Model,
    line_length: int | None = None,
    positions: Sequence[float] | None = None,
    print_fn: Callable[[str], object] | None = None,
) -> None:
    """Print a table of the layers of a built model with their output shapes and parameter counts.

    Models that branch, merge or share layers get a fourth column, "Connected to".

    Args:
        model: a built Keras model.
        line_length: characters in a line; 65, or 98 with four columns, unless given.
        positions: the rising end of each column: fractions of the line if the last one is at most 1, else
            numbers of characters. Positions of columns that are not shown are ignored.
        print_fn: called with each line; None prints it.

    Parameters of shared layers are counted once.

    Raises:
        ValueError: the model is not built, or `line_length` or `positions` are invalid.

    Example:
        >>> lines = []
        >>> print_summary(model, line_length=80, positions=[0.5, 0.8, 1.0], print_fn=lines.append)
    """
    if not model.built:
        raise ValueError(f"model must be built, got {model.name!r} without weights: call build() or fit first")
    nodes = None if _is_chain(model) else _nodes(model)
    layers = model.operations if nodes is not None else model.layers
    line_length, ends = _table_columns(line_length, positions, is_chain=nodes is None)
    show = print_fn or print

    def show_row(fields: Sequence[str]) -> None:
        show(_format_row(fields, ends))

    show(f'Model: "{model.name}"')
    show("_" * line_length)
    show_row(HEADER[: len(ends)])
    show("=" * line_length)
    for number, layer in enumerate(layers, start=1):
        fields = [f"{layer.name} ({type(layer).__name__})", _output_shape(layer), _parameter_count(layer)]
        connections = [] if nodes is None else _connections(layer, nodes)
        show_row(fields + connections[:1])
        for connection in connections[1:]:
            show_row(["", "", "", connection])
        show(("=" if number == len(layers) else "_") * line_length)
    trainable, frozen = _count(model.trainable_weights), _count(model.non_trainable_weights)
    show(f"Total params: {trainable + frozen:,}")
    show(f"Trainable params: {trainable:,}")
    show(f"Non-trainable params: {frozen:,}")
    show("_" * line_length)


def _table_columns(
    line_length: int | None, positions: Sequence[float] | None, *, is_chain: bool
) -> tuple[int, list[int]]:
    """The line's length and the column ends in characters."""
    length = line_length if line_length is not None else (CHAIN_WIDTH if is_chain else GRAPH_WIDTH)
    if length < 1:
        raise ValueError(f"line_length must be at least 1 character, got {line_length}: 65 to 120 reads well")
    wanted = 3 if is_chain else 4
    usual = CHAIN_POSITIONS if is_chain else GRAPH_POSITIONS
    given = list(usual if positions is None else positions)
    scale = length if given and given[-1] <= 1 else 1
    ends = [int(scale * position) for position in given][:wanted]
    if len(ends) < wanted or any(end <= start for start, end in zip([0, *ends], ends, strict=False)):
        raise ValueError(
            f"positions must be {wanted} rising column ends, as fractions of line_length={length} or in "
            f"characters, got {positions!r}: for example {list(usual)}"
        )
    return length, ends


def _format_row(fields: Sequence[str], ends: Sequence[int]) -> str:
    """Format one line: truncate or pad each field to its column's end, with a space before the next field."""
    line = ""
    for field, end in zip(fields, ends, strict=False):
        line = f"{line[:-1]} {field}" if line else field
        line = line[:end].ljust(end)
    return line


def _nodes(model: Any) -> list[Any]:
    """The calls of layers that make up a functional model."""
    return [node for nodes in model._nodes_by_depth.values() for node in nodes]


def _is_chain(model: Any) -> bool:
    """Whether the layers form a chain, each called once. Subclassed models are shown as a chain too."""
    if isinstance(model, keras.Sequential) or not hasattr(model, "_nodes_by_depth"):
        return True
    depths = list(model._nodes_by_depth.values())
    layers = [node.operation for node in _nodes(model)]
    return (
        all(len(nodes) == 1 and len(nodes[0].input_tensors) <= 1 for nodes in depths)
        and len({id(layer) for layer in layers}) == len(layers)
        and len(layers) == len(model.layers)
    )


def _connections(layer: Any, nodes: list[Any]) -> list[str]:
    """The tensors that enter a layer, as `name[call][output]`."""
    entering = []
    for node in nodes:
        if node.operation is layer:
            for tensor in node.input_tensors:
                origin, call, output = tensor._keras_history
                entering.append(f"{origin.name}[{call}][{output}]")
    return entering


def _output_shape(layer: Any) -> str:
    """The shape or shapes of a layer's first output; "?" if no graph has them."""
    try:
        output = layer.output
    except (AttributeError, ValueError):  # never called on a symbolic tensor
        return "?"
    if isinstance(output, (list, tuple)) and len(output) == 1:
        output = output[0]
    shapes = keras.tree.map_structure(lambda tensor: str(tuple(tensor.shape)), output)
    return shapes if isinstance(shapes, str) else str(shapes).replace("'", "")


def _parameter_count(layer: Any) -> str:
    if not hasattr(layer, "count_params"):
        return "0"  # a bare operation, such as a sum of two tensors
    return str(layer.count_params()) if layer.built else "0 (unbuilt)"


def _count(weights: Sequence[Any]) -> int:
    """The number of elements of all weights; each weight counts once."""
    distinct = {id(weight): weight for weight in weights}
    return sum(int(keras.ops.size(weight)) for weight in distinct.values())
