"""Steps that recurrent layers lead compute all else on one core, and the layers by parts of rows on all."""

from __future__ import annotations

import threading
from typing import Any

import keras
import numpy as np
import pytest
import torch
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx

import fastdp
from fastdp.capture.graph.cores import layers_lead
from fastdp.capture.graph.recurrent import keep_workspaces
from fastdp.tensors import at_once
from fastdp.tensors.recurrent_ops import lstm_onednn
from fastdp.tensors.threads import cores_of_parts, one_core

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
UNITS = 16


def layer(parts: int) -> Any:
    """A function of x, with an LSTM in so many parts and a product of a thousandth of its work."""
    h, weights = torch.zeros(32, UNITS), [torch.ones(8, 4 * UNITS), torch.ones(UNITS, 4 * UNITS), torch.ones(4 * UNITS)]
    return lambda x: lstm_onednn(x, h, h, *weights, True, parts)[0][-1] @ torch.ones(UNITS, 2)


def graph_of(function: Any, *arguments: torch.Tensor) -> Graph:
    return make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*arguments).graph


X = torch.ones(32, 60, 8)


def test_a_layer_in_parts_leads():
    assert layers_lead(graph_of(layer(2), X))


@pytest.mark.parametrize(
    "function",
    [
        layer(1),
        lambda x: x @ torch.ones(8, 8),
        lambda x: layer(2)(x) + (torch.ones(200, 200) @ x.new_ones(200, 200)).sum(),
        lambda x: layer(2)(x) + x.new_ones(200, 200).exp().sum(),
        lambda x: layer(2)(x) + torch.conv2d(x.new_ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1)).sum(),
    ],
    ids=["in one part", "no layer", "a large product", "many elements", "a convolution"],
)
def test_else_operations_keep_their_cores(function):
    assert not layers_lead(graph_of(function, X))


@pytest.mark.parametrize("cores", [1, 2])
def test_layers_of_torch_lead_too(cores, monkeypatch):
    monkeypatch.setattr(at_once, "LEAST_WORK", 1)
    monkeypatch.setattr(at_once, "cores_of_parts", lambda: cores)
    lstm = torch.nn.LSTM(8, UNITS)
    graph = graph_of(lambda x: lstm(x.transpose(0, 1))[0].sum(), X)
    keep_workspaces(graph)
    assert layers_lead(graph) is (cores == 2)


def test_one_core_is_for_operations_and_not_for_parts():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    with one_core(), one_core():
        assert torch.get_num_threads() == 1
        assert cores_of_parts() == 3
        other: list[int] = []
        thread = threading.Thread(target=lambda: other.append(cores_of_parts()))
        thread.start()
        thread.join(60)
    assert (torch.get_num_threads(), cores_of_parts()) == (3, 3)
    torch.set_num_threads(before)
    assert len(other) == 1


@pytest.mark.parametrize("mode", ["trace", "inductor"])
def test_a_step_runs_on_one_core_with_its_layer_in_parts(mode, monkeypatch):
    monkeypatch.setattr(at_once, "LEAST_WORK", 1)
    counts: list[tuple[int, int]] = []
    run = at_once._THREADS.run

    def noting(jobs: list[Any], most: int) -> None:
        counts.append((torch.get_num_threads(), most))
        run(jobs, most)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    fastdp.set_virtual_devices(1)
    keras.utils.set_random_seed(0)
    layers = [keras.layers.LSTM(UNITS), keras.layers.Dense(1)]
    template = keras.Sequential([keras.Input((60, 8)), *layers])
    expected = keras.models.clone_model(template)
    expected.set_weights(template.get_weights())
    model = fastdp.wrap(template, gpus=1, compile=mode)
    x, y = (
        np.random.default_rng(seed).standard_normal(shape, np.float32)
        for seed, shape in enumerate(((32, 60, 8), (32, 1)))
    )
    losses = []
    for one in (model, expected):
        one.compile(keras.optimizers.SGD(0.1), "mse")
        for step in range(3):
            if one is model and step == 2:
                model.wait_compiled(240)
                monkeypatch.setattr(at_once._THREADS, "run", noting)
            losses.append(float(one.train_on_batch(x, y)))
    monkeypatch.undo()
    torch.set_num_threads(before)
    fastdp.set_virtual_devices(0)
    assert model.report()[0]["how"] == {"trace": "traced", "inductor": "compiled"}[mode]
    assert counts == [(1, 2), (1, 2)], "forward and backward"
    np.testing.assert_allclose(losses[:3], losses[3:], rtol=1e-5)


def test_graphs_are_looked_at_where_no_recurrent_operation_is_loaded(monkeypatch):
    graph = Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.ops.aten.mul.Tensor, (x, x)))
    monkeypatch.setattr(torch.ops, "fastdp", object())  # Keras's recurrent layers load them
    assert not layers_lead(graph)
