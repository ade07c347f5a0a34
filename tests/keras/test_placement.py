"""Layers placed on devices by `fastdp.device`: branches run at the same time, and results stay those of one device."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path

import keras
import numpy as np
import pytest
import torch
from scripts import loaded_python
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import fastdp
from fastdp.comm.context import Context
from fastdp.program.keras.patches import replica_aware
from fastdp.program.keras.placement import graph as placed_graph
from fastdp.program.keras.placement import values as placed_values
from fastdp.program.keras.placement.graph import PlacedGraph, placed_nodes
from fastdp.program.keras.replica import ReplicaContext, replica_scope
from fastdp.program.keras.variables import ReplicaScope
from fastdp.runtime.host.device import HostDevice

ROWS = 7


@pytest.fixture(autouse=True)
def _devices():
    fastdp.set_virtual_devices(6)
    yield
    fastdp.set_virtual_devices(0)


class Meet(torch.autograd.Function):
    """Waits, forward and backward, until as many threads as the barrier wants are here; notes the threads."""

    @staticmethod
    def forward(ctx, inputs, barrier, note):
        ctx.barrier, ctx.note = barrier, note
        note(threading.current_thread().name)
        barrier.wait(30)
        return inputs.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.note("backward " + threading.current_thread().name)
        ctx.barrier.wait(30)
        return gradient, None, None


class Meeting(keras.layers.Layer):
    """A layer that meets its like in training."""

    def __init__(self, barrier, seen):
        super().__init__()
        self.barrier, self.note = barrier, seen.append  # Keras copies lists that layers are given

    def call(self, inputs, training=None):
        return Meet.apply(inputs, self.barrier, self.note) if training else inputs

    def compute_output_shape(self, input_shape):
        return input_shape


def two_branches(places=("gpu:0", "gpu:1"), make=None, shared=True):
    """The FAQ's model: one LSTM that reads two sequences; `make(number)` gives a layer behind each."""
    keras.utils.set_random_seed(4)
    a, b = keras.Input((6, 3)), keras.Input((6, 3))
    lstm = keras.layers.LSTM(4)
    second = lstm if shared else keras.layers.LSTM(4)
    with fastdp.device(places[0]):
        left = lstm(a)
        left = make(0)(left) if make else left
    with fastdp.device(places[1]):
        right = second(b)
        right = make(1)(right) if make else right
    with fastdp.device("cpu"):
        merged = keras.layers.concatenate([left, right])
    return keras.Model([a, b], keras.layers.Dense(2)(merged))


def data(rows=ROWS, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(rows, 6, 3)).astype("float32") for _ in range(2)], rng.normal(size=(rows, 2)).astype("f4")


def fitted(model, gpus=None, **options):
    runner = model if gpus is None else fastdp.wrap(model, gpus=gpus, check_replicas=True, **options)
    runner.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"])
    x, y = data()
    logs = runner.fit(x, y, epochs=3, batch_size=5, shuffle=False, verbose=0).history
    return logs, [np.array(w) for w in model.get_weights()], runner.predict(x, verbose=0)


def assert_same(found, expected):
    for key, values in expected[0].items():
        np.testing.assert_allclose(found[0][key], values, rtol=1e-5)
    for new, old in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[2], expected[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gpus", [[(0, 1)], [(2, 3)], [(0, 1), (2, 3)], [(5, 0), (1, 4), (2, 3)]], ids=str)
def test_fit_of_the_faqs_model_equals_plain_keras(gpus):
    assert_same(fitted(two_branches(), gpus), fitted(two_branches()))


def test_branches_run_at_the_same_time_forward_and_backward():
    barrier, seen = threading.Barrier(2), []
    model = two_branches(make=lambda _: Meeting(barrier, seen), shared=False)
    parallel = fastdp.wrap(model, gpus=[(0, 1)])
    parallel.compile("sgd", "mse")
    x, y = data(1)  # one row: the model is not tried on rows beforehand, where nothing runs at the same time
    parallel.train_on_batch(x, y)
    # Each waited for the other inside of its call: neither could have ended before the other began.
    # The step of a single replica runs on the thread that asks for it.
    workers = ["MainThread", "fastdp-virtual:1"]
    assert sorted(seen[:2]) == workers
    assert sorted(seen[2:]) == [f"backward {name}" for name in workers]


def test_both_branches_may_be_on_other_devices_than_the_first():
    assert_same(fitted(two_branches((1, "virtual:2")), [(0, 1, 2)]), fitted(two_branches()))


class Rest(keras.layers.Layer):
    """Dropout, an added loss and statistics, all of which must come in the graph's order."""

    def __init__(self, seed):
        super().__init__()
        self.dropout = keras.layers.Dropout(0.4, seed=seed)
        self.norm = keras.layers.BatchNormalization()

    def build(self, input_shape):
        self.norm.build(input_shape)

    def call(self, inputs, training=None):
        self.add_loss(0.1 * keras.ops.mean(inputs * inputs))
        return self.norm(self.dropout(inputs, training=training), training=training)


def test_dropout_losses_and_statistics_in_branches_equal_plain_keras():
    make = Rest
    assert_same(fitted(two_branches(make=make), [(0, 1)]), fitted(two_branches(make=make)))


def test_statistics_of_branches_on_two_replicas_are_those_of_replicas_without_places():
    here = fitted(two_branches(("cpu", "cpu"), make=Rest), 2)
    assert_same(fitted(two_branches(make=Rest), [(0, 1), (2, 3)]), here)


def test_one_layer_with_seeds_in_both_branches_draws_in_the_graphs_order():
    def build():
        layer = keras.layers.Dropout(0.4, seed=5)
        return two_branches(make=lambda _: layer)

    assert_same(fitted(build(), [(0, 1), (2, 3)]), fitted(build()))


def test_a_loss_of_the_merged_outputs_trains_placed_layers():
    def run(gpus):
        model = two_branches()
        runner = fastdp.wrap(model, gpus=gpus) if gpus else model
        runner.compile(keras.optimizers.SGD(0.1), lambda y, p: keras.ops.sqrt(keras.ops.mean((y - p) ** 2)))
        x, y = data()
        return [float(runner.train_on_batch(x, y)) for _ in range(3)]

    np.testing.assert_allclose(run([(0, 1), (2, 3)]), run(None), rtol=1e-5)


def test_layers_made_in_a_scope_run_there_in_a_sequential_model():
    seen = []

    class Where(keras.layers.Layer):
        def call(self, inputs):
            seen.append(threading.current_thread().name)
            return inputs

    with fastdp.device("gpu:1"):
        inside = Where()
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), inside, Where()])
    parallel = fastdp.wrap(model, gpus=[(0, 1)])
    seen.clear()
    parallel.predict(np.ones((1, 3), "float32"), verbose=0)
    assert seen == ["fastdp-virtual:1", "MainThread"]  # the step of a single replica runs on the thread that asks


def test_a_failure_on_a_placed_device_stops_the_step_and_the_next_one_works():
    class Failing(keras.layers.Layer):
        fail = True

        def call(self, inputs, training=None):
            if training and self.fail and threading.current_thread().name == "fastdp-virtual:1":
                raise ArithmeticError("on purpose")
            return inputs

    layer = Failing()
    a, b = keras.Input((6, 3)), keras.Input((6, 3))
    with fastdp.device(1):
        right = keras.layers.LSTM(4)(layer(b))  # is skipped, and what failed is told
    merged = keras.layers.concatenate([keras.layers.LSTM(4)(a), right])
    model = keras.Model([a, b], keras.layers.Dense(2)(merged))
    parallel = fastdp.wrap(model, gpus=[(0, 1)])
    parallel.compile("sgd", "mse")
    before = model.get_weights()
    x, y = data()
    with pytest.raises(fastdp.ReplicaError, match="on purpose"):
        parallel.train_on_batch(x, y)
    for new, old in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(new, old)
    layer.fail = False
    assert np.isfinite(parallel.train_on_batch(x, y))


def test_the_constructors_of_keras_are_its_own_outside_of_a_scope():
    before = keras.layers.Layer.__init__
    with fastdp.device(1), fastdp.device("cpu"):
        assert keras.layers.Layer.__init__ is not before
    assert keras.layers.Layer.__init__ is before


@pytest.mark.parametrize("place", ["gpu", "tpu:0", -1, True, None, 1.0, "gpu:x"])
def test_an_unknown_place_is_refused(place):
    with pytest.raises(ValueError, match=r"`place` must be.*Received: place="), fastdp.device(place):
        pass


@pytest.mark.parametrize("place", [0, "gpu:0", "/gpu:1", "GPU:1", "cuda:1", "virtual:1", "cpu", "/cpu:0"])
def test_a_place_may_be_named_in_several_ways(place):
    with fastdp.device(place):
        pass


@pytest.mark.parametrize(
    ("gpus", "message"),
    [
        (2, r"needs 2 devices.*gpus=\[\(0, 1\)\]"),
        ([(0,)], r"has 1 device\(s\).*needs 2"),
        ([(0, 1), 2], r"group of devices for each replica"),
        ([(0, 1), (1, 2)], "each device once"),
    ],
)
def test_groups_that_do_not_fit_the_model_are_refused(gpus, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        fastdp.wrap(two_branches(), gpus=gpus)


def test_several_devices_for_a_model_without_places_are_refused():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match=r"No layer of .* is placed"):
        fastdp.wrap(model, gpus=[(0, 1)])


def test_places_inside_an_inner_model_are_refused():
    inner = two_branches()
    inputs = [keras.Input((6, 3)), keras.Input((6, 3))]
    outer = keras.Model(inputs, inner(inputs))
    with pytest.raises(ValueError, match="Place the call of the whole inner model"):
        fastdp.wrap(outer, gpus=[(0, 1)])


def test_synchronized_statistics_in_a_branch_of_several_replicas_are_refused():
    parallel = fastdp.wrap(two_branches(make=Rest), gpus=[(0, 1), (2, 3)], sync_batch_norm=True)
    parallel.compile("sgd", "mse")
    with pytest.raises(fastdp.ReplicaError, match="Place it on the host, or use one replica"):
        parallel.train_on_batch(*data())


def test_the_faqs_example_runs(tmp_path):
    script = Path(__file__).parents[2] / "examples" / "faq" / "two_branches.py"
    done = loaded_python(str(script), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "two branches on virtual:0 and virtual:1: loss" in done.stdout


class OwnStep(keras.Model):
    """Backward twice through one forward pass, and the gradient of the inputs."""

    def train_step(self, data):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        x = [one.clone().requires_grad_() for one in x]
        outputs = self(x, training=True)
        loss = keras.ops.mean((outputs - y) ** 2)
        (slope,) = torch.autograd.grad(loss, [x[1]], retain_graph=True)
        self.zero_grad()
        loss.backward()
        gradients = [v.value.grad for v in self.trainable_weights]
        with torch.no_grad():
            self.optimizer.apply(gradients, self.trainable_weights)
        return {"loss": loss.detach(), "slope": slope.norm(), "same": (x[1].grad - slope).norm()}


@pytest.mark.parametrize("gpus", [[(0, 1)], [(0, 1), (2, 3)]], ids=str)
def test_a_train_step_of_the_models_own_goes_through_placed_layers(gpus):
    def made(groups):
        placed = two_branches()
        model = OwnStep(placed.inputs, placed.outputs)
        runner = fastdp.wrap(model, gpus=groups) if groups else model
        runner.compile(keras.optimizers.SGD(0.1))
        x, y = data()
        logs = runner.fit(x, y, epochs=2, batch_size=5, shuffle=False, verbose=0).history
        return logs, [np.array(w) for w in model.get_weights()], runner.predict(x, verbose=0)

    found, expected = made(gpus), made(None)
    assert found[0]["same"] == expected[0]["same"] == [0.0, 0.0]
    assert_same(found, expected)


def test_a_step_leaves_no_activations_behind():
    kept = []

    class Noted(keras.layers.Layer):
        def call(self, inputs):
            outputs = inputs * 2.0
            kept.append(weakref.ref(outputs))
            return outputs

    parallel = fastdp.wrap(two_branches(make=lambda _: Noted()), gpus=[(0, 1)])
    parallel.compile("sgd", "mse")
    for _ in range(2):
        kept.clear()
        parallel.train_on_batch(*data())
    gc.collect()
    assert [one() for one in kept] == [None, None]


def test_a_model_that_runs_through_its_placed_layers_twice_is_refused():
    class Twice(keras.Model):
        def call(self, inputs, training=None):
            return super().call(inputs) + super().call(inputs)

    placed = two_branches()
    parallel = fastdp.wrap(Twice(placed.inputs, placed.outputs), gpus=[(0, 1)])
    parallel.compile("sgd", "mse")
    with pytest.raises(NotImplementedError, match="more than once in a step"):
        parallel.train_on_batch(*data())


class FakeGpu(HostDevice):
    """A GPU whose tensors have a shape and a place, and no values: torch refuses operations between places."""

    on_gpu = True
    mode = None

    def __init__(self, index):
        super().__init__(index)
        self.torch_device = f"cuda:{index}"

    def _worker_scope(self):
        return self.mode


class Transfers(TorchDispatchMode):
    """Notes copies from GPU to GPU that torch or Keras makes of its own accord."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        taken = [a.device for a in args if isinstance(a, torch.Tensor)]
        if isinstance(made, torch.Tensor) and any(there.type == "cuda" and there != made.device for there in taken):
            self.found.append(f"{func} from {taken} to {made.device}")
        return made


@pytest.fixture
def fake_gpus(monkeypatch):
    """Two such GPUs; copies between them are told apart from those that nobody asked for."""
    transfers = Transfers()
    monkeypatch.setattr(FakeGpu, "mode", FakeTensorMode(allow_non_fake_inputs=True))
    monkeypatch.setattr(placed_graph, "prepare_worker", lambda threads, device: None)
    brought = []

    def arrived(value, device):
        if str(value.device) == device.torch_device:
            return value
        brought.append(device.torch_device)
        with _disable_current_modes(), FakeGpu.mode:
            return value.detach().to(device.torch_device)

    work, one_at_a_time = placed_graph._forward, threading.Lock()  # torch's fake mode is of one thread

    def watched(*args):
        with one_at_a_time, transfers:
            work(*args)

    monkeypatch.setattr(placed_graph, "_forward", watched)
    for module in (placed_graph, placed_values):
        monkeypatch.setattr(module, "arrived", arrived)
    gpus = [FakeGpu(0), FakeGpu(1)]
    yield gpus, brought, transfers.found
    for gpu in gpus:
        gpu.close()


def test_what_a_placed_layer_makes_and_takes_is_on_its_gpu(fake_gpus):
    gpus, brought, found = fake_gpus
    a, b = keras.Input((6, 3)), keras.Input((6, 3))
    left = keras.layers.Flatten()(keras.layers.Dense(2)(a))
    with fastdp.device(1):
        right = keras.layers.Normalization(mean=1.0, variance=2.0)(b)
        right = keras.layers.Dense(4, "relu")(keras.layers.BatchNormalization()(right))
        right = keras.layers.Add()([right, keras.layers.Dense(4)(right)])
        right = keras.layers.GlobalAveragePooling1D()(keras.layers.LayerNormalization()(right))
    outputs = keras.layers.Dense(2)(keras.layers.concatenate([left, right]))
    model = keras.Model([a, b], outputs)
    context = Context.alone([], None, 0, 4, 4)
    context.device = gpus[0]
    run = ReplicaContext(context)
    run.placed = model, PlacedGraph(gpus)
    with FakeGpu.mode, torch.no_grad(), keras.device("cuda:0"):
        values = [(v, torch.empty(v.shape, device="cuda:0")) for v in model.variables]
        x = [torch.empty(4, 6, 3, device="cuda:0") for _ in range(2)]
        with replica_aware(), replica_scope(run), ReplicaScope(values, set()):
            made = model(x, training=False)
    assert made.device == torch.device("cuda:0")
    assert found == []
    assert brought.count("cuda:0") == 1  # the branch's output
    weights = [v for node, _ in placed_nodes(model) for v in node.operation.weights]
    assert brought.count("cuda:1") == 1 + len(weights)  # the branch's input
