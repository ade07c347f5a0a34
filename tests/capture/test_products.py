"""Matrix products of compiled steps go to the faster of torch's libraries, and stay what they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import torch
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import fastdp
from fastdp.capture import product_times
from fastdp.capture.compile import kept_code
from fastdp.capture.graph.passes import optimized, stored
from fastdp.capture.graph.products import Product
from fastdp.capture.graph.rewrites import for_compiler
from fastdp.private_files import cache_folder

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")

aten = torch.ops.aten
WAIT = 240.0
WIDE = Product(((64, 128), (128, 1)), ((128, 64), (64, 1)))


@pytest.fixture(autouse=True)
def _nothing_known(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("FASTDP_REMEMBER", "on")
    forget(monkeypatch)
    yield
    product_times._recall.cache_clear()


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(product_times, "_known", {})
    product_times._recall.cache_clear()


def times(monkeypatch: pytest.MonkeyPatch, blas: float, onednn: float) -> list[Product]:
    """Let all products take these seconds; returns those that are measured."""
    asked: list[Product] = []
    monkeypatch.setattr(product_times, "best_seconds", lambda product: asked.append(product) or (blas, onednn))
    return asked


def rewritten(function: Callable[..., object], *arguments: torch.Tensor, gradients: int = 0) -> GraphModule:
    """The graph with all products that oneDNN can compute given to it."""
    module = optimized(make_fx(function, tracing_mode="fake")(*arguments))
    return for_compiler(stored(module, gradients), lambda product: True)


def names(module: GraphModule) -> set[str]:
    return {str(node.target) for node in module.graph.nodes if node.op == "call_function" and "mm" in str(node.target)}


def matrix(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=dtype)


ARRANGED = {
    "rows": lambda t: t,
    "columns": lambda t: t.t().contiguous().t(),
    "every second": lambda t: torch.stack([t, t], 2)[:, :, 0],
    "part of a row": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "repeated row": lambda t: t[:1].expand(t.shape[0], -1),
}


@pytest.mark.parametrize("right", ARRANGED)
@pytest.mark.parametrize("left", ARRANGED)
def test_products_in_any_memory_layout_are_those_in_float64(left, right):
    a, b = ARRANGED[left](matrix(9, 33, 0)), ARRANGED[right](matrix(33, 17, 1))
    bias, expected = torch.arange(17.0), a.double() @ b.double()

    def function(a, b, bias):
        return [a @ b, torch.addmm(bias, a, b)]

    made = rewritten(function, a, b, bias)
    assert names(made) == {"fastdp.onednn_mm.default"}
    product, with_bias = made(a, b, bias)
    torch.testing.assert_close(product.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(with_bias.double(), expected + bias, rtol=1e-5, atol=1e-5)
    assert product.is_contiguous()
    assert with_bias.is_contiguous()


def test_a_product_is_written_to_its_buffer():
    a, b, buffer = matrix(8, 5, 0), matrix(5, 7, 1), torch.full((8, 7), torch.nan)
    made = rewritten(lambda a, b, buffer: [a @ b], a, b, buffer, gradients=1)
    assert names(made) == {"fastdp.onednn_mm_into.default"}
    made(a, b, buffer)
    torch.testing.assert_close(buffer, a @ b)


def test_infinities_and_nans_go_through():
    a, b = torch.tensor([[torch.inf, 1.0], [torch.nan, 0.0], [1.0, 2.0]]), torch.eye(2)
    made = rewritten(lambda a, b: [a @ b], a, b)
    torch.testing.assert_close(made(a, b)[0], a @ b, equal_nan=True)


@pytest.mark.parametrize(
    ("function", "shapes", "dtype"),
    [
        (lambda a, b: [a @ b], ((4, 5), (5, 6)), torch.float64),
        (lambda a, b: [a @ b], ((4, 5), (5, 6)), torch.bfloat16),
        (lambda a, b: [a @ b], ((4, 0), (0, 6)), torch.float32),
        (lambda a, b: [a @ b], ((0, 5), (5, 6)), torch.float32),
        (lambda a, b: [aten.addmm(b[:1, :1].reshape(1), a, b)], ((4, 5), (5, 6)), torch.float32),  # one number for all
        (lambda a, b: [aten.addmm(b[:4], a, b)], ((4, 5), (5, 6)), torch.float32),  # a matrix
        (lambda a, b: [aten.addmm(b[0], a, b, beta=0.5)], ((4, 5), (5, 6)), torch.float32),
        (lambda a, b: [aten.addmm(b[0], a, b, alpha=2)], ((4, 5), (5, 6)), torch.float32),
    ],
)
def test_other_products_stay_with_torch(function, shapes, dtype):
    a, b = (matrix(*shape, seed, dtype) for seed, shape in enumerate(shapes))
    made = rewritten(function, a, b)
    assert not any("fastdp" in name for name in names(made))
    torch.testing.assert_close(made(a, b), function(a, b))


@pytest.mark.parametrize(("blas", "onednn", "faster"), [(2.0, 1.0, True), (1.0, 2.0, False), (1.05, 1.0, False)])
def test_the_faster_library_is_chosen_if_it_gains_more_than_times_vary(blas, onednn, faster, monkeypatch):
    asked = times(monkeypatch, blas, onednn)
    is_faster = product_times.measured(2)
    assert [is_faster(WIDE), is_faster(WIDE)] == [faster, faster]
    assert asked == [WIDE], "what is known is not measured again"


def test_small_products_are_not_measured(monkeypatch):
    asked = times(monkeypatch, 2.0, 1.0)
    assert not product_times.measured(2)(Product(((16, 16), (16, 1)), ((16, 16), (16, 1))))
    assert not asked


def test_products_are_measured_as_they_are():
    for product in (
        WIDE,
        Product(((64, 128), (1, 64)), ((128, 64), (1, 128)), has_bias=True),
        Product(((64, 128), (0, 1)), ((128, 64), (64, 1)), stored=True),
    ):
        blas, onednn = product_times.best_seconds(product)
        assert 0 < blas < 10
        assert 0 < onednn < 10


def test_measuring_ends_in_time_and_goes_on_with_the_next_graph(monkeypatch):
    asked = times(monkeypatch, 2.0, 1.0)
    monkeypatch.setattr(product_times, "_GRAPH_SECONDS", -1.0)
    assert not product_times.measured(2)(WIDE)
    assert not asked
    monkeypatch.undo()
    monkeypatch.setattr(product_times, "_known", {})
    asked = times(monkeypatch, 2.0, 1.0)
    assert product_times.measured(2)(WIDE)
    assert asked == [WIDE]


def test_the_number_of_cores_stays(monkeypatch):
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(product_times, "best_seconds", lambda _: seen.append(torch.get_num_threads()) or (2.0, 1.0))
    product_times.measured(before + 1)(WIDE)
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


def test_a_later_run_measures_nothing_again(monkeypatch):
    times(monkeypatch, 2.0, 1.0)
    assert product_times.measured(2)(WIDE)
    forget(monkeypatch)
    asked = times(monkeypatch, 1.0, 2.0)
    assert product_times.measured(2)(WIDE)
    assert not asked
    assert not product_times.measured(1)(WIDE), "for another number of cores it is measured"
    assert asked == [WIDE]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"2 x": 3}', b"[" * 100_000])
def test_a_damaged_file_counts_as_none(content, monkeypatch):
    kept_code.put(product_times.FOLDER, product_times._name(2), content)
    asked = times(monkeypatch, 2.0, 1.0)
    assert product_times.measured(2)(WIDE)
    assert asked == [WIDE]
    (file,) = (cache_folder() / product_times.FOLDER).iterdir()
    assert list(json.loads(file.read_bytes()).values()) == [True]


def test_nothing_is_kept_where_that_is_not_wanted(monkeypatch):
    monkeypatch.setenv("FASTDP_REMEMBER", "off")
    times(monkeypatch, 2.0, 1.0)
    assert product_times.measured(2)(WIDE)
    assert not (cache_folder() / product_times.FOLDER).exists()


# Steps.


@pytest.fixture(params=[1, 2])
def devices(request):
    fastdp.set_virtual_devices(request.param)
    yield request.param
    fastdp.set_virtual_devices(0)


def trained(gpus: int, mode: str | None, **options: Any) -> tuple[list[float], list[np.ndarray], Any]:
    """Losses and weights of some steps of a network whose products are large enough."""
    keras.utils.set_random_seed(3)
    layers = [keras.layers.Dense(192, activation="relu"), keras.layers.Dense(192), keras.layers.Dense(10)]
    model = fastdp.wrap(keras.Sequential([keras.Input((96,)), *layers]), gpus=gpus, compile=mode, **options)
    model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    generator = np.random.default_rng(0)
    losses = []
    for _ in range(4):
        x, y = generator.standard_normal((64, 96), np.float32), generator.integers(0, 10, 64)
        losses.append(float(model.train_on_batch(x, y)))
        if mode == "inductor":
            model.wait_compiled(WAIT)
    return losses, model.get_weights(), model


def test_a_compiled_step_uses_the_faster_library_and_trains_the_same(devices, monkeypatch):
    asked = times(monkeypatch, 2.0, 1.0)
    used: list[torch.Tensor] = []
    original = torch.ops.mkldnn._linear_pointwise.default
    expected, weights, _ = trained(devices, None)
    with monkeypatch.context() as patch:
        packet = torch.ops.mkldnn._linear_pointwise
        patch.setattr(packet, "default", lambda *a: used.append(a[0]) or original(*a))
        losses, found, model = trained(devices, "inductor")
    assert model.report()[0]["how"] == "compiled"
    assert {product.stored for product in asked} == {True, False}
    assert used, "the compiled step calls oneDNN"
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for one, other in zip(found, weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_bits_of_deterministic_steps_do_not_depend_on_times(monkeypatch):
    asked = times(monkeypatch, 2.0, 1.0)
    fastdp.set_virtual_devices(1)
    _, _, model = trained(1, "inductor", deterministic=True)
    assert model.report()[0]["how"] == "compiled"
    fastdp.set_virtual_devices(0)
    assert not asked


def test_a_run_that_goes_on_rounds_as_it_did(monkeypatch):
    times(monkeypatch, 2.0, 1.0)
    fastdp.set_virtual_devices(1)
    state = steps_of_torch(None)
    known = product_times.state_dict()
    forget(monkeypatch)
    monkeypatch.setenv("FASTDP_REMEMBER", "off")
    asked = times(monkeypatch, 1.0, 2.0)
    steps_of_torch(state)
    fastdp.set_virtual_devices(0)
    assert product_times.state_dict() == known
    assert set(known.values()) == {True}
    assert not asked


def steps_of_torch(state: Any) -> Any:
    """The state after some steps of a linear module, which are compiled."""
    torch.manual_seed(0)
    module = torch.nn.Linear(96, 96)
    model = fastdp.wrap(module, gpus=1, compile="inductor")
    step = model.train_step(torch.nn.functional.mse_loss, torch.optim.SGD(module.parameters(), 0.1))
    if state is not None:
        step.load_state_dict(state)
    for seed in range(3):
        step(matrix(64, 96, seed), matrix(64, 96, seed + 1))
        model.wait_compiled(WAIT)
    assert model.report()[0]["how"] == "compiled"
    return step.state_dict()
