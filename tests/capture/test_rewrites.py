"""Captured graphs are rewritten for the CPU without changing a bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from fastdp.capture.graph.passes import optimized, stored
from fastdp.capture.graph.rewrites import for_compiler
from fastdp.capture.product_times import never

F = torch.nn.functional
aten = torch.ops.aten


def traced(function: Callable[..., Any], *arguments: torch.Tensor) -> GraphModule:
    return make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*arguments)


def targets(module: GraphModule) -> Counter[str]:
    return Counter(str(node.target) for node in module.graph.nodes if node.op == "call_function")


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    """Channels-last memory, as Keras's arrays are; halves, so that windows have ties."""
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(2).round().div(2)
    return made.contiguous(memory_format=torch.channels_last)


def same(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def pooled(window: Any, stride: Any = None, padding: Any = 0) -> Callable[..., Any]:
    """Max pooling and its gradient."""

    def function(x: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor]:
        y, places = aten.max_pool2d_with_indices(x, window, stride or window, padding)
        back = aten.max_pool2d_with_indices_backward(
            gradient, x, window, stride or window, padding, [1, 1], False, places
        )
        return [y, back]

    return function


def test_other_names_of_a_value_are_gone_in_a_replay():
    x = torch.arange(3.0)
    module = optimized(traced(lambda x: [aten.alias(x.detach()) + 1], x))
    assert targets(module) == {"aten.add.Tensor": 1}
    same(module(x), [x + 1])


@pytest.mark.parametrize(
    ("shape", "window"),
    [((2, 3, 8, 8), [2, 2]), ((3, 5, 11, 7), [2, 2]), ((2, 4, 9, 10), [3, 2]), ((1, 1, 6, 5), [1, 5])],
)
def test_pools_side_by_side_become_elementwise_with_the_same_gradients(shape, window):
    x = images(*shape)
    gradient = images(*shape[:2], shape[2] // window[0], shape[3] // window[1], seed=1)
    module = optimized(traced(pooled(window), x, gradient))
    made = for_compiler(module, never)
    assert not any("max_pool2d" in name for name in targets(made))
    x[0, 0, 1, :2] = float("nan")
    with torch.no_grad():
        same(made(x, gradient), module(x, gradient))


@pytest.mark.parametrize(("window", "stride", "padding"), [([3, 3], [2, 2], [0, 0]), ([2, 2], [2, 2], [1, 1])])
def test_other_pools_stay_as_they_are(window, stride, padding):
    x = images(2, 3, 8, 8)
    rows = aten.max_pool2d_with_indices(x, window, stride, padding)[0].shape
    made = for_compiler(optimized(traced(pooled(window, stride, padding), x, images(*rows, seed=1))), never)
    assert targets(made)["aten.max_pool2d_with_indices_backward.default"] == 1


def test_a_pool_whose_places_are_looked_at_stays():
    x = images(2, 3, 8, 8)
    made = for_compiler(optimized(traced(lambda x: list(aten.max_pool2d_with_indices(x, [2, 2], [2, 2])), x)), never)
    assert targets(made)["aten.max_pool2d_with_indices.default"] == 1


def test_products_that_only_go_to_a_buffer_are_written_there():
    a, b = torch.randn(4, 5), torch.randn(5, 6)
    buffers = torch.full((4, 6), 7.0), torch.full((4, 6), 7.0)

    def function(a: torch.Tensor, b: torch.Tensor, *buffers: torch.Tensor) -> list[torch.Tensor]:
        alone, read = torch.mm(a, b), torch.mm(a, b * 2)
        return [alone, read, read.sum()]

    made = for_compiler(stored(optimized(traced(function, a, b, *buffers)), 2), never)
    assert targets(made)["fastdp.mm_into.default"] == 1, "the second product is read once more"
    (total,) = made(a, b, *buffers)
    same(buffers, [torch.mm(a, b), torch.mm(a, b * 2)])
    same([total], [torch.mm(a, b * 2).sum()])


def convolved(relu: bool) -> Callable[..., Any]:
    """A convolution as Keras's torch backend computes it on channels-last arrays."""

    def function(x: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        kernel = kernel.permute(3, 2, 0, 1).clone(memory_format=torch.channels_last)
        y = aten.convolution(x.permute(0, 3, 1, 2), kernel, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
        y = y.permute(0, 2, 3, 1) + bias.view(1, 1, 1, -1)
        return torch.relu(y) if relu else y

    return function


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("channels", [1, 3, 16])
def test_bias_and_relu_go_into_the_convolution(channels, relu):
    arguments = torch.randn(4, 9, 9, channels), torch.randn(3, 3, channels, 8), torch.randn(8)
    module = traced(convolved(relu), *arguments)
    expected = module(*arguments)
    made = optimized(module)
    fused = targets(made)["mkldnn._convolution_pointwise.default"]
    assert fused == (channels > 1), "one channel leaves oneDNN the choice of the layout"
    assert targets(made)["aten.relu.default"] == (relu and not fused)
    torch.testing.assert_close(made(*arguments), expected, rtol=1e-6, atol=1e-6)


def test_a_bias_that_is_none_is_left_alone():
    """One number per column, not per channel."""
    arguments = torch.randn(4, 9, 9, 3), torch.randn(3, 3, 3, 8), torch.randn(7)

    def function(x: torch.Tensor, kernel: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        y = convolved(False)(x, kernel, torch.zeros(8))
        return y + column.view(1, 1, 7, 1)

    module = traced(function, *arguments)
    expected = module(*arguments)
    torch.testing.assert_close(optimized(module)(*arguments), expected, rtol=1e-6, atol=1e-6)
