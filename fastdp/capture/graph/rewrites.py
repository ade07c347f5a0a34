"""Replaces operations of a graph on a CPU by cheaper ones that give the same bits, and products by oneDNN's.

For every replay:

- A bias and a relu after a convolution would read and write its whole result again: oneDNN fuses them into it.

Before TorchInductor compiles a graph (it fuses elementwise work well and leaves matrix products to their library):

- A product that goes only to a gradient buffer would be computed elsewhere and copied: it is written there directly.
- Products for which oneDNN is faster than torch's BLAS are given to it. They alone get other bits.
- The gradient of pooling without overlapping windows would scatter: the number of each window's largest entry is kept
  instead, which makes the gradient elementwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from fastdp.capture.graph.products import Product, onednn_products, products_in_place, value_of

aten = torch.ops.aten
_FUSED = torch.ops.mkldnn._convolution_pointwise.default if torch.backends.mkldnn.is_available() else None


def for_compiler(module: GraphModule, onednn_is_faster: Callable[[Product], bool]) -> GraphModule:
    """A copy of a graph made by `passes.stored`, rewritten for TorchInductor.

    Nodes have fake values as `meta["val"]`; nodes created here have none.
    """
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    if _on_cpu(graph):
        products_in_place(graph)
        onednn_products(graph, onednn_is_faster)
        _pools_without_scatter(graph)
        graph.eliminate_dead_code()
    return GraphModule(module, graph)


def _on_cpu(graph: Graph) -> bool:
    """Whether all of a graph's inputs are in host memory."""
    return all(value_of(node).device.type == "cpu" for node in graph.find_nodes(op="placeholder"))


def fuse_convolutions(graph: Graph) -> None:
    """Fuse convolution, bias and a relu that follows them into one oneDNN operation. Leaves dead code behind."""
    if _FUSED is None or not _on_cpu(graph):
        return
    for convolution in graph.find_nodes(op="call_function", target=aten.convolution.default):
        permuted = _only_user(convolution, aten.permute.default)
        added = _only_user(permuted, aten.add.Tensor)
        bias = _bias(added, permuted) if added is not None and permuted is not None else None
        if bias is None or not _may_fuse(convolution):
            continue
        x, weights, _, stride, padding, dilation, _, _, groups = convolution.args
        relu = _only_user(added, aten.relu.default)
        last: Any = relu or added
        act = "relu" if relu else "none"
        with graph.inserting_before(last):
            fused = _call(graph, _FUSED, x, weights, bias, padding, stride, dilation, groups, act, [], "")
            fused.meta = dict(convolution.meta)
            again = _call(graph, aten.permute.default, fused, permuted.args[1])  # type: ignore[union-attr]
            again.meta = dict(last.meta)
        last.replace_all_uses_with(again)


def _may_fuse(convolution: Node) -> bool:
    """Whether oneDNN supports this convolution of images and gives its result the memory layout that ATen would.

    With one channel, strides do not determine the operand's layout, and oneDNN would choose the other one.
    """
    value, operand, weights = value_of(convolution), value_of(convolution.args[0]), value_of(convolution.args[1])
    own_bias, transposed = convolution.args[2], convolution.args[6]
    plain = own_bias is None and not transposed and value.ndim == 4 and value.dtype == torch.float32
    return (
        plain
        and operand.shape[1] > 1
        and all(one.is_contiguous(memory_format=torch.channels_last) for one in (value, operand, weights))
    )


def _bias(added: Node, permuted: Node) -> Node | None:
    """The vector of one number per channel that is added to a convolution's channels-last result."""
    other: Any = added.args[1] if added.args[0] is permuted else added.args[0]
    if len(added.args) != 2 or added.kwargs or not isinstance(other, Node) or other.target is not aten.view.default:
        return None
    vector: Any = other.args[0]
    channels = value_of(permuted).shape[-1]
    shaped = list(value_of(other).shape) == [1] * (value_of(permuted).ndim - 1) + [channels]
    return vector if shaped and list(value_of(vector).shape) == [channels] else None


# Pooling.


def _pools_without_scatter(graph: Graph) -> None:
    """Turn pools whose windows do not overlap, and their gradients, into elementwise operations."""
    for pool in graph.find_nodes(op="call_function", target=aten.max_pool2d_with_indices.default):
        window = _window(pool)
        results = {node.args[1]: node for node in pool.users}
        gradients = list(results[1].users) if 1 in results else []
        if window is None or any(
            node.target is not aten.max_pool2d_with_indices_backward.default for node in gradients
        ):
            continue
        with graph.inserting_before(pool):
            largest, place = _pooled(graph, pool, window)
        if 0 in results:
            results[0].replace_all_uses_with(largest)
        for node in gradients:
            with graph.inserting_before(node):
                node.replace_all_uses_with(_unpooled(graph, node, place, window))
            graph.erase_node(node)


def _window(pool: Node) -> tuple[int, int] | None:
    """The height and width of a pool's windows if they tile the image: side by side, without padding."""
    x, kernel, stride, padding, dilation, ceil = _pool_arguments(pool)
    value = value_of(x)
    plain = value.ndim == 4 and value.dtype.is_floating_point and value.is_contiguous(memory_format=torch.channels_last)
    apart = list(stride or kernel) == list(kernel) and set(padding) == {0} and set(dilation) == {1} and not ceil
    return (kernel[0], kernel[1]) if plain and apart and len(kernel) == 2 else None


def _pool_arguments(pool: Node) -> list[Any]:
    """x, kernel, stride, padding, dilation and ceil mode of a pool, with their defaults."""
    defaults = [None, None, [], [0, 0], [1, 1], False]
    return [*pool.args, *defaults[len(pool.args) :]]


def _pooled(graph: Graph, pool: Node, window: tuple[int, int]) -> tuple[Node, Node]:
    """The pool's result, and the number of the largest entry of each window, rows first.

    As in ATen, the first of equal entries and the last of NaNs wins. The numbers are floats, so that the compiler uses
    the same vectors as for the values. They are channels-last, (rows, height, width, channels).
    """
    call = functools.partial(_call, graph)
    height, width = window
    image = call(aten.permute.default, pool.args[0], [0, 2, 3, 1])
    n, channels, rows, columns = value_of(pool)[0].shape
    entries = []
    for number in range(height * width):
        row, column = divmod(number, width)
        part = call(aten.slice.Tensor, image, 1, row, height * rows, height)
        entries.append(call(aten.slice.Tensor, part, 2, column, width * columns, width))
    largest, place = entries[0], call(aten.zeros_like.default, entries[0])
    for number, entry in enumerate(entries[1:], 1):
        more = call(aten.bitwise_or.Tensor, call(aten.gt.Tensor, entry, largest), call(aten.ne.Tensor, entry, entry))
        largest = call(aten.where.self, more, entry, largest)
        numbered = call(aten.full_like.default, place, float(number))
        place = call(aten.where.self, more, numbered, place)
    # as_strided forces the compiler to store it: otherwise it would keep comparisons, and vectors of bools are slow.
    strides = [rows * columns * channels, columns * channels, channels, 1]
    place = call(aten.as_strided.default, place, [n, rows, columns, channels], strides)
    return call(aten.permute.default, largest, [0, 3, 1, 2]), place


def _unpooled(graph: Graph, backward: Node, place: Node, window: tuple[int, int]) -> Node:
    """The gradient of the pool's operand: the gradient of each window goes to its largest entry."""
    call = functools.partial(_call, graph)
    height, width = window
    gradient, pooled = backward.args[:2]
    n, channels, rows, columns = value_of(gradient).shape
    image = call(aten.permute.default, gradient, [0, 2, 3, 1])
    wide = [n, rows, 1, columns, 1, channels]
    value, device = value_of(gradient), value_of(gradient).device
    numbers = call(aten.arange.start_step, 0, height * width, 1, dtype=value.dtype, device=device)
    numbers = call(aten.reshape.default, numbers, [1, 1, height, 1, width, 1])
    here = call(aten.eq.Tensor, call(aten.reshape.default, place, wide), numbers)
    zero = call(aten.full.default, [], 0.0, dtype=value.dtype, device=device)
    spread = call(aten.where.self, here, call(aten.reshape.default, image, wide), zero)
    spread = call(aten.reshape.default, spread, [n, rows * height, columns * width, channels])
    rest = [
        size - covered
        for size, covered in zip(value_of(pooled).shape[2:], (rows * height, columns * width), strict=True)
    ]
    if any(rest):
        spread = call(aten.constant_pad_nd.default, spread, [0, 0, 0, rest[1], 0, rest[0]], 0.0)
    return call(aten.permute.default, spread, [0, 3, 1, 2])


def _call(graph: Graph, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
    """Add a node to the graph."""
    return graph.call_function(target, args, kwargs)


def _only_user(node: Node | None, target: Any) -> Node | None:
    """The single user of a node, if it calls `target`; None otherwise."""
    if node is None or len(node.users) != 1:
        return None
    (user,) = node.users
    return user if user.target is target else None
