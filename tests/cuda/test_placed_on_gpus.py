"""Layers placed by `fastdp.device` on simulated GPUs: each operation finds its tensors on its own GPU, in order.

Results are held to plain Keras.
"""

from __future__ import annotations

import importlib

import keras
import numpy as np
import pytest
from simulated_memory import RaceError
from torch_work import DeviceError, watched

import fastdp
from fastdp.keras.parallel_model import ParallelModel
from fastdp.options import Options

LIMIT = 30.0
GROUPS = {"one replica": [(0, 1)], "two replicas": [(0, 1), (2, 3)]}


@pytest.fixture
def box(gpus):
    """Four GPUs, whose torch operations are watched until their devices are closed."""
    made = gpus(4)
    with watched(made.sim) as made.work:
        yield made
        for device in made.made:
            device.close(LIMIT)


def parallel_on(box, model, groups, **options):
    devices = box.devices(4)
    groups = [tuple(devices[i] for i in group) for group in groups]
    chosen = Options(timeout=LIMIT, check_replicas=True, **options)
    return ParallelModel(model, [group[0] for group in groups], chosen, device_groups=groups)


def data(rows=7):
    rng = np.random.default_rng(0)
    x = [rng.normal(size=(rows, 5, 3)).astype("float32") for _ in range(2)]
    return x, rng.normal(size=(rows, 2)).astype("float32")


def fitted(runner, model, loss="mse"):
    runner.compile(keras.optimizers.SGD(0.1), loss, metrics=["mae"])
    x, y = data()
    logs = runner.fit(x, y, epochs=3, batch_size=5, shuffle=False, verbose=0).history
    return logs, [np.array(w) for w in model.get_weights()], runner.predict(x, verbose=0)


def branches(left, right, head=None, places=("gpu:0", "gpu:1", "cpu")):
    """Two branches and a head, each where it is placed."""
    a, b = keras.Input((5, 3)), keras.Input((5, 3))
    with fastdp.device(places[0]):
        x = left(a)
    with fastdp.device(places[1]):
        y = right(b)
    with fastdp.device(places[2]):
        outputs = (head or keras.layers.Dense(2))(keras.layers.concatenate([x, y]))
    return keras.Model([a, b], outputs)


def shared_lstm():
    keras.utils.set_random_seed(4)
    lstm = keras.layers.LSTM(4)
    return branches(lstm, lstm)


def all_elsewhere():
    """The outputs, on which the loss is computed, are made on the second device too."""
    keras.utils.set_random_seed(4)
    return branches(keras.layers.GRU(4), keras.layers.LSTM(3), places=("gpu:1", "gpu:1", "gpu:1"))


class Rest(keras.layers.Layer):
    """A draw, an added loss, statistics, a regularizer, and a weight that the forward pass assigns."""

    def __init__(self, *, assigned=True):
        super().__init__()
        self.dropout = keras.layers.Dropout(0.4, seed=3)
        self.norm = keras.layers.BatchNormalization()
        dense = keras.layers.Dense(4, kernel_regularizer="l2")
        self.spectral = keras.layers.SpectralNormalization(dense) if assigned else dense

    def build(self, input_shape):
        self.norm.build(input_shape)
        self.spectral.build(input_shape)

    def call(self, inputs, training=None):
        self.add_loss(0.1 * keras.ops.mean(inputs * inputs))
        x = self.norm(self.dropout(inputs, training=training), training=training)
        return keras.ops.mean(self.spectral(x), 1)


def all_kinds_of_state():
    keras.utils.set_random_seed(5)
    return branches(Rest(), Rest())


def one_layer_with_state():
    """Its second call, on the other device, goes on from what the first has assigned."""
    keras.utils.set_random_seed(5)
    rest = Rest(assigned=False)  # plain Keras cannot go backward through a weight that was assigned twice
    return branches(rest, rest)


def masks():
    """A mask goes with its tensor from device to device."""
    keras.utils.set_random_seed(6)
    a, b = keras.Input((5, 3)), keras.Input((5, 3))
    masked = keras.layers.Masking()(keras.layers.ReLU()(a))
    with fastdp.device(1):
        x = keras.layers.LSTM(3)(masked)
        y = keras.layers.Dense(4)(masked)
    y = keras.layers.GRU(2)(y)
    z = keras.layers.Flatten()(b)
    return keras.Model([a, b], keras.layers.Dense(2)(keras.layers.concatenate([x, y, z])))


def weights_of_another_layer():
    """A placed call reads a weight that belongs to a layer on the first device."""
    keras.utils.set_random_seed(7)
    first = keras.layers.Dense(3, use_bias=False)

    class Transposed(keras.layers.Layer):
        def call(self, inputs):
            return keras.ops.mean(keras.ops.matmul(inputs, keras.ops.transpose(first.kernel)), 1)

    return branches(keras.Sequential([keras.Input((5, 3)), first, keras.layers.Flatten()]), Transposed())


MODELS = [shared_lstm, all_elsewhere, all_kinds_of_state, one_layer_with_state, masks, weights_of_another_layer]


def assert_same(found, expected):
    for key, values in expected[0].items():
        np.testing.assert_allclose(found[0][key], values, rtol=2e-5, err_msg=key)
    for new, old in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(new, old, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(found[2], expected[2], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_each_operation_finds_its_tensors_on_its_gpu_and_in_order(box, make):
    plain, model = make(), make()
    expected = fitted(plain, plain)
    assert_same(fitted(parallel_on(box, model, [(0, 1)]), model), expected)
    assert box.work.copies


@pytest.mark.parametrize("make", [shared_lstm, all_elsewhere], ids=lambda make: make.__name__)
def test_two_replicas_of_two_gpus_each(box, make):
    plain, model = make(), make()
    expected = fitted(plain, plain)
    assert_same(fitted(parallel_on(box, model, [(0, 1), (2, 3)]), model), expected)


def test_a_loss_of_the_merged_outputs(box):
    def loss(y, p):
        return keras.ops.sqrt(keras.ops.mean((y - p) ** 2))

    plain, model = all_elsewhere(), all_elsewhere()
    expected = fitted(plain, plain, loss)
    assert_same(fitted(parallel_on(box, model, [(0, 1), (2, 3)]), model, loss), expected)


def test_a_variable_is_copied_once_in_a_step_and_device(box):
    inputs = keras.Input((4,))
    dense = keras.layers.Dense(4)
    with fastdp.device(1):
        outputs = dense(dense(dense(inputs)))
    parallel = parallel_on(box, keras.Model(inputs, outputs), [(0, 1)])
    for _ in range(2):
        before = box.work.copies
        parallel.predict_on_batch(np.ones((2, 4), "float32"))
        assert box.work.copies - before == 4  # the input, kernel and bias; and the output back


def replaced(box, monkeypatch, owner, name, function):
    monkeypatch.setattr(owner, name, function)
    return parallel_on(box, shared_lstm(), [(0, 1)])


def violation(box, parallel):
    """What the simulation says of a step that is wrong on purpose."""
    parallel.compile("sgd", "mse")
    x, y = data()
    with pytest.raises(fastdp.ReplicaError):
        parallel.train_on_batch(x, y)
    found = type(box.sim.violations[0]), str(box.sim.violations[0])
    box.sim.violations.clear()
    for device in box.made:
        device.synchronize(LIMIT)
    return found


def test_a_weight_left_on_the_first_gpu_is_found(box, monkeypatch):
    spread = importlib.import_module("fastdp.program.keras.placement.values")
    read = spread.PlacedScope.get_current_value

    def on_the_first(scope, variable):
        read(scope, variable)
        return scope._variables[id(variable)]._value

    kind, text = violation(box, replaced(box, monkeypatch, spread.PlacedScope, "get_current_value", on_the_first))
    assert kind is DeviceError, text
    assert "on GPU 1 takes a tensor of GPU 0" in text


def test_an_output_taken_too_early_is_found(box, monkeypatch):
    streams = importlib.import_module("fastdp.runtime.cuda.streams")
    issued_only = streams.QueueStream.follow
    kind, text = violation(box, replaced(box, monkeypatch, streams.CudaStream, "follow", issued_only))
    assert kind is RaceError, text


def test_gradients_that_a_placed_call_takes_too_early_are_found(box, monkeypatch):
    streams = importlib.import_module("fastdp.runtime.cuda.streams")
    queue = importlib.import_module("fastdp.runtime.queue")

    def unmarked(stream):
        event = queue.QueueEvent()
        event.complete()
        return event

    kind, text = violation(box, replaced(box, monkeypatch, streams.CudaStream, "now", unmarked))
    assert kind is RaceError, text
