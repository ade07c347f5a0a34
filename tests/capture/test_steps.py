"""Captured steps give what eager steps give, and what cannot be captured runs eagerly and says why."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest
import torch

import fastdp
from fastdp.capture.trace import Captured
from fastdp.tensors.replica_sums import in_graph

L = keras.layers


@pytest.fixture(autouse=True)
def _devices():
    fastdp.set_virtual_devices(4)
    yield
    fastdp.set_virtual_devices(0)


class SumOfOutputs(L.Layer):
    """Adds a loss that is a sum over rows."""

    def call(self, inputs):
        self.add_loss(0.01 * keras.ops.sum(keras.ops.square(inputs)))
        return inputs


def dense():
    return [
        keras.Input((6,)),
        L.Dense(8, "relu", kernel_regularizer="l2"),
        L.Dropout(0.4, seed=1),
        L.Dense(3, "softmax"),
    ]


def unseeded():
    return [keras.Input((6,)), L.Dense(8, "tanh"), L.GaussianNoise(0.1), L.Dropout(0.4), L.Dense(3, "softmax")]


def normalized():
    return [keras.Input((6,)), L.Dense(8), L.BatchNormalization(), L.Activation("relu"), L.Dense(3, "softmax")]


def with_losses():
    return [keras.Input((6,)), L.Dense(8, activity_regularizer="l2"), SumOfOutputs(), L.Dense(3, "softmax")]


def convolutional():
    return [keras.Input((6,)), L.Reshape((6, 1)), L.Conv1D(4, 3), L.Flatten(), L.Dense(3, "softmax")]


def recurrent():
    return [keras.Input((6,)), L.Reshape((3, 2)), L.GRU(4), L.Dense(3, "softmax")]


class Attention(L.Layer):
    """Attention of a row's two halves, by torch's fused operation."""

    def __init__(self, dropped=0.0):
        super().__init__()
        self.dropped = dropped

    def call(self, inputs):
        x = inputs.reshape(-1, 1, 2, 3)
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=self.dropped).reshape(-1, 6)


def attentive():
    return [keras.Input((6,)), L.Dense(6), Attention(), L.Dense(3, "softmax")]


def batches(count=6, sizes=(8, 8, 7)):
    generator = np.random.default_rng(0)
    for i in range(count):
        rows = sizes[i % len(sizes)]
        labels = generator.integers(0, 3, rows)
        yield generator.normal(size=(rows, 6)).astype("float32"), np.eye(3, dtype="float32")[labels]


def train(layers, gpus, mode, count=9, **options):
    """Losses and weights after some steps, and the parallel model."""
    keras.utils.set_random_seed(5)
    model = keras.Sequential(layers())
    options = {"loss": "categorical_crossentropy", "metrics": ["accuracy"], **options}
    parallel = fastdp.wrap(model, gpus=gpus, compile=mode, check_replicas=True)
    parallel.compile(keras.optimizers.Adam(0.01), **options)
    losses = [parallel.train_on_batch(x, y) for x, y in batches(count)]
    return losses, model.get_weights(), parallel


def hows(parallel):
    return {entry["how"] for entry in parallel.report()}


@pytest.mark.parametrize("gpus", [1, 3])
@pytest.mark.parametrize("layers", [dense, unseeded, normalized, with_losses, convolutional, recurrent, attentive])
def test_traced_steps_equal_eager_ones(layers, gpus):
    expected, expected_weights, _ = train(layers, gpus, None)
    losses, weights, parallel = train(layers, gpus, "trace")
    assert hows(parallel) == {"traced"}
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)
    for weight, other in zip(weights, expected_weights, strict=True):
        np.testing.assert_allclose(weight, other, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The outputs of")
def test_fused_attention_that_draws_by_itself_is_not_captured():
    layers = [keras.Input((6,)), L.Dense(6), Attention(0.5), L.Dense(3, "softmax")]
    with pytest.warns(UserWarning, match="a random op that is not Keras's"):
        _, _, parallel = train(lambda: layers, 1, "trace", count=3)
    assert hows(parallel) == {"eager"}


def test_masks_are_drawn_anew_in_each_replay():
    keras.utils.set_random_seed(5)
    model = keras.Sequential([keras.Input((6,)), L.Dropout(0.5), L.Dense(1, trainable=False)])
    model.add(L.Dense(1))
    parallel = fastdp.wrap(model, gpus=2, compile="trace")
    parallel.compile(keras.optimizers.SGD(0.0), "mse")
    x, y = np.ones((8, 6), "float32"), np.ones((8, 1), "float32")
    losses = [parallel.train_on_batch(x, y) for _ in range(6)]
    assert hows(parallel) == {"traced"}
    assert len(set(losses)) == 6


@pytest.mark.parametrize("gpus", [2, 4])
def test_unseeded_masks_of_a_replay_do_not_depend_on_the_number_of_devices(gpus):
    expected, expected_weights, _ = train(unseeded, 1, "trace")
    losses, weights, parallel = train(unseeded, gpus, "trace")
    assert hows(parallel) == {"traced"}
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)
    for weight, other in zip(weights, expected_weights, strict=True):
        np.testing.assert_allclose(weight, other, rtol=1e-4, atol=1e-5)


def test_a_replay_sees_weights_and_learning_rates_that_are_set_between_steps():
    results = []
    for mode in (None, "trace"):
        _, _, parallel = train(dense, 2, mode)
        parallel.set_weights([np.full_like(weight, 0.1) for weight in parallel.get_weights()])
        parallel.optimizer.learning_rate = 0.5
        x, y = next(batches())
        results.append([parallel.train_on_batch(x, y)[0] for _ in range(2)])
    np.testing.assert_allclose(results[1], results[0], rtol=1e-5)


def test_the_first_step_of_a_shape_is_eager_and_the_second_is_captured():
    _, _, parallel = train(dense, 2, "trace", count=1)
    assert hows(parallel) == {"eager"}
    x, y = next(batches())
    parallel.train_on_batch(x, y)
    report = parallel.report()
    assert hows(parallel) == {"traced"}
    assert all(entry["steps"] == 2 and entry["of"] == 8 for entry in report)
    assert [entry["rows"] for entry in report] == [4, 4]  # the first replica counts the regularizers
    assert all(entry["operations"] > 20 and entry["trace_seconds"] > 0 for entry in report)


def test_only_so_many_shapes_are_captured():
    keras.utils.set_random_seed(5)
    model = keras.Sequential([keras.Input((6,)), L.Dense(1)])
    parallel = fastdp.wrap(model, gpus=1, compile="trace")
    parallel.compile("sgd", "mse")
    for rows in [*range(1, 12), *range(1, 12)]:
        parallel.train_on_batch(np.ones((rows, 6), "float32"), np.ones((rows, 1), "float32"))
    captured = [entry["how"] == "traced" for entry in parallel.report()]
    assert (captured.count(True), captured.count(False)) == (8, 3)
    assert "8 other shapes" in parallel.report()[-1]["why"]


class ReadsOnTheHost(L.Layer):
    """Branches on a value."""

    def call(self, inputs):
        return inputs * 2.0 if float(keras.ops.max(inputs)) > 0 else inputs


def reads_on_the_host():
    return [keras.Input((6,)), ReadsOnTheHost(name="reads"), L.Dense(3, "softmax")]


def shuffled():
    return [keras.Input((6,)), L.Lambda(lambda x: keras.random.shuffle(x, axis=1, seed=1)), L.Dense(3, "softmax")]


def whole_batch(y_true, y_pred):
    return keras.ops.mean(keras.ops.square(y_true - y_pred)) / (1.0 + keras.ops.mean(y_pred))


@pytest.mark.parametrize(
    ("layers", "options", "why"),
    [
        (
            reads_on_the_host,
            {},
            "_local_scalar_dense.default, which needs values on the host, in the layer 'reads'",
        ),
        (shuffled, {}, "not drawn by rows"),
        (dense, {"loss": whole_batch}, "exchange in the middle"),
    ],
)
def test_what_cannot_be_captured_runs_eagerly_with_one_warning_that_says_why(layers, options, why):
    expected, _, _ = train(layers, 2, None, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses, _, parallel = train(layers, 2, "trace", **options)
    ours = [str(w.message) for w in caught if "eagerly" in str(w.message)]
    assert len(ours) == 1
    assert why in ours[0]
    (entry,) = parallel.report()
    assert entry["how"] == "eager"
    assert why in entry["why"]
    np.testing.assert_allclose(losses, expected, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:fastdp runs")
def test_a_loss_of_the_whole_batch_is_not_captured_on_one_device_either():
    expected, _, _ = train(dense, 1, None, loss=whole_batch)
    losses, _, parallel = train(dense, 1, "trace", loss=whole_batch)
    assert hows(parallel) == {"eager"}
    np.testing.assert_allclose(losses, expected, rtol=1e-6)


def synchronized(layers=normalized, **options):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(layers())
    parallel = fastdp.wrap(model, sync_batch_norm=True, check_replicas=True, **options)
    parallel.compile(keras.optimizers.SGD(0.1, 0.9), "mse")
    losses = [parallel.train_on_batch(x, y) for x, y in batches(7)]
    return losses, parallel.get_weights(), parallel


def images_normalized():
    normalize = [L.BatchNormalization(name="one"), L.BatchNormalization(name="two"), L.Activation("relu")]
    return [keras.Input((6,)), L.Reshape((2, 3, 1)), L.Conv2D(4, 2), *normalize, L.Flatten(), L.Dense(3)]


@pytest.mark.parametrize("layers", [normalized, images_normalized])
@pytest.mark.parametrize("gpus", [2, 3])
def test_replicas_meet_inside_a_captured_step_for_synchronized_batch_norm(gpus, layers):
    expected, weights, eager = synchronized(layers, gpus=gpus, compile=None)
    losses, found, parallel = synchronized(layers, gpus=gpus, compile="trace")
    assert {entry["how"] for entry in eager.report()} == {"eager"}
    assert hows(parallel) == {"traced"}
    assert losses == expected  # sums in rank order, as in eager steps
    for one, other in zip(found, weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)
    alone, _, _ = synchronized(layers, gpus=[0], compile=None)
    np.testing.assert_allclose(losses, alone, rtol=1e-5)


def test_a_step_in_which_replicas_meet_is_not_compiled_and_one_device_meets_nobody():
    _, _, parallel = synchronized(gpus=2, compile="inductor")
    assert not parallel.compiling
    assert {entry["why"] for entry in parallel.report()} == {"replicas meet in the middle of the step"}
    _, _, alone = synchronized(gpus=[0], compile="trace")
    assert hows(alone) == {"traced"}
    assert not any(shape.captured.meets for shape in alone._steps.captures._shapes.values())


def test_a_replica_that_fails_before_the_meeting_ends_the_step_of_all(monkeypatch):
    _, before, parallel = synchronized(gpus=2, compile="trace")
    replay = Captured.replay

    def fails(self, replica, batch, context):
        if context.rank == 1:
            raise MemoryError("no memory left")
        return replay(self, replica, batch, context)

    monkeypatch.setattr(Captured, "replay", fails)
    with pytest.raises(fastdp.ReplicaError, match="no memory left"):
        parallel.train_on_batch(*next(batches(1)))
    for one, other in zip(parallel.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, other)
    monkeypatch.undo()
    parallel.train_on_batch(*next(batches(1)))


def test_a_sum_over_replicas_outside_of_a_replay_is_an_error():
    with pytest.raises(RuntimeError, match="came to the place on a thread that replays no replica"):
        in_graph(torch.ones(2), "the place")


@pytest.mark.filterwarnings("ignore:fastdp runs")
def test_loss_scaling_is_known_not_to_be_captured():
    scaled = fastdp.wrap(keras.Sequential(convolutional()), gpus=2, compile="trace")
    scaled.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()), "mse")
    for x, y in batches(3):
        scaled.train_on_batch(x, y)
    assert "loss scaling" in scaled.report()[0]["why"]


def test_without_capture_the_report_says_so():
    _, _, parallel = train(dense, 2, None, count=1)
    assert list(parallel.report()) == [{"how": "eager", "why": "compile=None"}]


def test_an_unknown_way_to_compile_is_refused():
    with pytest.raises(ValueError, match=r"`compile` must be one of .*'trace'.* Received: compile='fast'"):
        fastdp.wrap(keras.Sequential(dense()), gpus=2, compile="fast")
    with pytest.raises(ValueError, match=r"`compile` must be one of"):
        fastdp.wrap(torch.nn.Linear(2, 2), gpus=2, compile="fast")


def test_two_models_are_captured_in_two_threads_at_once():
    made = []
    for seed in (1, 2):
        keras.utils.set_random_seed(seed)
        plain = keras.Sequential(dense())
        parallel = fastdp.wrap(keras.models.clone_model(plain), gpus=2, compile="trace")
        parallel.template.set_weights(plain.get_weights())
        for model in (plain, parallel):
            model.compile("sgd", "categorical_crossentropy")
        made.append((plain, parallel))
    data = list(batches(count=9))

    def train(model):
        for x, y in data:
            model.train_on_batch(x, y)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(train, [parallel for _, parallel in made], timeout=300))
    for plain, parallel in made:
        train(plain)
        assert [entry["how"] for entry in parallel.report()] == ["traced"] * len(parallel.report())
        for found, expected in zip(parallel.get_weights(), plain.get_weights(), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
