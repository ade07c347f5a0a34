"""Operations for matrix products that compiled steps write to their place, or give to oneDNN, and who uses them.

Torch computes products of fp32 matrices by its BLAS. oneDNN has kernels of its own, which torch uses for convolutions
and low precision alone. Which one is faster depends on processor, shape, strides and cores: MKL's kernels for AMX and
AVX-512 are for Intel's processors only. `onednn_products` gives oneDNN those for which the caller says so. Results of
the two differ in rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten
Operand = tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides


@dataclass(frozen=True, slots=True)
class Product:
    """A product of two matrices of fp32 numbers.

    `a` and `b` are shapes and strides; `has_bias` says that a row is added to each row, `stored` that the product goes
    to given memory.
    """

    a: Operand
    b: Operand
    has_bias: bool = False
    stored: bool = False

    @property
    def multiplications(self) -> int:
        """Their number."""
        return self.a[0][0] * self.a[0][1] * self.b[0][1]


# Not torch.library.custom_op: its autograd layers take longer than a small product.
_LIBRARY = torch.library.Library("fastdp", "FRAGMENT")
_LIBRARY.define("mm_into(Tensor(a!) out, Tensor a, Tensor b) -> ()")
_LIBRARY.define("onednn_mm(Tensor a, Tensor b, Tensor? bias) -> Tensor")
_LIBRARY.define("onednn_mm_into(Tensor(a!) out, Tensor a, Tensor b) -> ()")


def _mm_into(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Write the matrix product of a and b to `out`, which has the product's shape and dtype."""
    torch.mm(a, b, out=out)


def _onednn_mm(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The matrix product of a and b, plus the bias in each row, as contiguous memory."""
    return torch.ops.mkldnn._linear_pointwise.default(a, b.t(), bias, "none", [], "")


def _onednn_mm_into(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """As `mm_into`. OneDNN's result is copied: torch has no way to give it the memory."""
    out.copy_(_onednn_mm(a, b, None))


_LIBRARY.impl("mm_into", _mm_into, "CPU")
_LIBRARY.impl("onednn_mm", _onednn_mm, "CPU")
_LIBRARY.impl("onednn_mm_into", _onednn_mm_into, "CPU")
_LIBRARY.impl("mm_into", lambda out, a, b: None, "Meta")
_LIBRARY.impl("onednn_mm", lambda a, b, bias: a.new_empty(a.shape[0], b.shape[1]), "Meta")
_LIBRARY.impl("onednn_mm_into", lambda out, a, b: None, "Meta")


def products_in_place(graph: Graph) -> None:
    """Write products that are only copied to a buffer directly to that buffer."""
    for node in graph.find_nodes(op="call_function", target=aten.copy_.default):
        buffer, product = node.args
        if isinstance(product, Node) and product.target is aten.mm.default and len(product.users) == 1:
            with graph.inserting_before(node):
                graph.call_function(torch.ops.fastdp.mm_into.default, (buffer, *product.args))
            graph.erase_node(node)
            graph.erase_node(product)


def onednn_products(graph: Graph, is_faster: Callable[[Product], bool]) -> None:
    """Give products of fp32 matrices to oneDNN where it `is_faster`. The graph is for a CPU."""
    if not torch.backends.mkldnn.is_available():
        return
    operations = torch.ops.fastdp
    for node in list(graph.nodes):
        product = _product(node)
        if product is None or not is_faster(product):
            continue
        with graph.inserting_before(node):
            if product.stored:
                made = graph.call_function(operations.onednn_mm_into.default, node.args)
            else:
                bias, a, b = node.args if product.has_bias else (None, *node.args)
                made = graph.call_function(operations.onednn_mm.default, (a, b, bias))
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        graph.erase_node(node)


def _product(node: Node) -> Product | None:
    """The product that a node computes, if oneDNN can compute it."""
    arguments: Any = node.args
    if node.kwargs:  # addmm's factors
        return None
    if node.target is aten.mm.default:
        return _of(*arguments)
    if node.target is torch.ops.fastdp.mm_into.default:
        return _of(*arguments[1:], stored=True)
    if node.target is aten.addmm.default and value_of(arguments[0]).ndim == 1:
        wide = value_of(arguments[0]).shape == value_of(arguments[2]).shape[1:]  # not one number for all columns
        return _of(*arguments[1:], has_bias=True) if wide else None
    return None


def _of(a: Node, b: Node, *, has_bias: bool = False, stored: bool = False) -> Product | None:
    """The product of two nodes; None if it has no numbers, or others than fp32."""
    values = value_of(a), value_of(b)
    if any(one.dtype != torch.float32 or one.numel() == 0 for one in values):
        return None
    left, right = ((tuple(one.shape), tuple(one.stride())) for one in values)
    return Product(left, right, has_bias=has_bias, stored=stored)


def value_of(node: Any) -> Any:
    """The fake value of a node: its shape, strides and dtype."""
    return node.meta["val"]
