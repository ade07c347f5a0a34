"""Wrong labels and indices raise one named error, in eager, traced and compiled steps; no weight is changed."""

from __future__ import annotations

import subprocess
import sys

import keras
import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import fastdp
from fastdp.capture.compile.compiler import BackgroundCompiler
from fastdp.capture.graph.indices import guarded
from fastdp.capture.graph.passes import optimized

L = keras.layers
ROWS = 16


@pytest.fixture(autouse=True)
def _devices():
    yield
    fastdp.set_virtual_devices(0)


@pytest.fixture
def compiles_at_once(monkeypatch):
    """A compiler that gives the graph back as it got it: its checks are those of a compiled one."""
    monkeypatch.setattr("fastdp.capture.steps.missing_compiler", lambda: None)

    class Job:
        seconds = load_seconds = 0.0

    def submit(self, module, threads):
        job = Job()
        job.module = module
        return job

    monkeypatch.setattr(BackgroundCompiler, "submit", submit)
    monkeypatch.setattr(BackgroundCompiler, "done", lambda self, job: True)
    monkeypatch.setattr(BackgroundCompiler, "result", lambda self, job: job.module)


class Own(keras.layers.Layer):
    """Reads a table by indices that it computes."""

    def __init__(self, how):
        super().__init__(name="own")
        self.how = how

    def build(self, shape):
        self.table = self.add_weight(shape=(6, 3), initializer="ones")

    def call(self, x):
        ops, wide = keras.ops, keras.ops.cast(x, "int32")
        if self.how == "take":
            return ops.mean(ops.take(self.table, wide + 1, axis=0), axis=1)
        if self.how == "gather":
            rows = ops.ones_like(x, dtype="float32") * ops.sum(self.table)
            return torch.gather(rows, 1, wide.long())
        if self.how == "scatter":
            return torch.zeros(x.shape[0], 6).scatter(1, wide.long(), 1.0) @ self.table.value
        if self.how == "index_put":
            rows = torch.arange(x.shape[0])[:, None]
            return torch.zeros(x.shape[0], 6).index_put((rows, wide.long()), torch.ones(())) @ self.table.value
        if self.how == "one_hot":
            return ops.matmul(ops.sum(ops.one_hot(wide, 6), axis=1), self.table)
        return ops.cast(12 // (5 - wide), "float32") @ ops.ones((3, 2)) * ops.mean(self.table)


def wrapped(mode, gpus, layers, loss="mse", head=None):
    fastdp.set_virtual_devices(gpus)
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.Input((3,), dtype="int32"), *layers, *([head] if head is not None else [])])
    parallel = fastdp.wrap(model, gpus=gpus, compile=mode)
    parallel.compile("sgd", loss)
    return model, parallel


def fails(step, *arguments):
    with pytest.raises((IndexError, RuntimeError, ValueError)) as caught:
        step(*arguments)
    return caught.value


HOWS = [(None, "eager"), ("trace", "traced"), ("inductor", "compiled")]


@pytest.mark.parametrize("gpus", [1, 2, 8])
@pytest.mark.parametrize(("mode", "how"), HOWS)
def test_a_wrong_label_and_a_wrong_index_are_named(mode, how, gpus, compiles_at_once):
    layers = [L.Embedding(9, 4, name="words"), L.Flatten()]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model, parallel = wrapped(mode, gpus, layers, loss, L.Dense(5))
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 9, (ROWS, 3)).astype("int32"), generator.integers(0, 5, ROWS).astype("int32")
    for _ in range(4):
        parallel.train_on_batch(x, y)
    assert {entry["how"] for entry in parallel.report()} == {how}
    before = parallel.get_weights()
    bad_y, bad_x = y.copy(), x.copy()
    bad_y[11], bad_x[13, 1] = 5, 9

    error = fails(parallel.train_on_batch, x, bad_y)
    assert isinstance(error, IndexError)  # what torch raises, and plain Keras
    assert "The loss 'sparse_categorical_crossentropy' got labels out of range: 0 to 4" in str(error)
    assert "Received: 5 in row 11 of the batch" in str(error)
    error = fails(parallel.train_on_batch, bad_x, y)
    assert isinstance(error, IndexError)
    assert "The layer 'words' (Embedding) got indices out of range: 0 to 8" in str(error)
    assert "Received: 9 in row 13 of the batch" in str(error)
    for step, arguments, said in (
        (parallel.predict_on_batch, (bad_x,), "in row 13"),
        (parallel.test_on_batch, (x, bad_y), "Received: 5 in row 11"),
    ):
        assert said in str(fails(step, *arguments))

    for weight, other in zip(parallel.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, other)
    parallel.train_on_batch(x, y)  # training goes on, as before
    assert {entry["how"] for entry in parallel.report()} == {how}
    plain = keras.models.clone_model(model)
    plain.set_weights(before)
    plain.compile("sgd", loss)
    plain.train_on_batch(x, y)
    for weight, other in zip(parallel.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(weight, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("mode", "how"), HOWS)
@pytest.mark.parametrize("kind", ["take", "gather", "scatter", "index_put", "one_hot", "divisor"])
def test_indices_that_a_layer_computes_are_checked_too(kind, mode, how, compiles_at_once):
    model, parallel = wrapped(mode, 2, [Own(kind)])
    x = np.random.default_rng(1).integers(0, 3, (ROWS, 3)).astype("int32")
    y = np.zeros((ROWS, model.output_shape[1]), "float32")
    for _ in range(4):
        parallel.train_on_batch(x, y)
    assert {entry["how"] for entry in parallel.report()} == {how}
    bad = x.copy()
    bad[14, 2] = {"gather": 3, "divisor": 5, "take": 5}.get(kind, 6)
    expected = fails(model.predict, bad, 32, 0)  # on one device, by plain Keras
    before = parallel.get_weights()
    error = fails(parallel.train_on_batch, bad, y)
    assert [isinstance(error, one) for one in (IndexError, RuntimeError, ValueError)] == [
        isinstance(expected, IndexError),
        True,  # ReplicaError
        isinstance(expected, ValueError),
    ]
    assert "The layer 'own' (Own)" in str(error)
    assert "row 14 of the batch" in str(error)
    for weight, other in zip(parallel.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, other)
    parallel.train_on_batch(x, y)


def test_a_label_in_the_merged_loss_and_one_in_a_step_of_the_models_own_are_named():
    def loss(y_true, y_pred):
        return keras.ops.mean(keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True))

    _, parallel = wrapped(None, 2, [L.Embedding(9, 4), L.Flatten()], loss, L.Dense(5))
    x, y = np.zeros((ROWS, 3), "int32"), np.zeros(ROWS, "int32")
    parallel.train_on_batch(x, y)
    y[12] = 7
    assert "Received: 7 in row 12 of the batch" in str(fails(parallel.train_on_batch, x, y))

    class Mine(keras.Model):
        def train_step(self, data):
            x = data[0]
            self.zero_grad()
            loss = keras.ops.mean(self(x, training=True) ** 2)
            loss.backward()
            self.optimizer.apply([v.value.grad for v in self.trainable_weights], self.trainable_weights)
            return {"loss": loss}

    inputs = keras.Input((3,), dtype="int32")
    model = Mine(inputs, L.Dense(2)(L.Flatten()(L.Embedding(9, 4, name="words")(inputs))))
    parallel = fastdp.wrap(model, gpus=2)
    parallel.compile("sgd")
    x = np.random.default_rng(0).integers(0, 9, (ROWS, 3)).astype("int32")
    parallel.fit(x, np.zeros((ROWS, 2)), batch_size=ROWS, verbose=0)
    x[9, 0] = 9
    error = fails(parallel.train_on_batch, x, np.zeros((ROWS, 2)))
    assert "The layer 'words' (Embedding) got indices out of range: 0 to 8 expected. Received: 9 in row 9" in str(error)


def test_indices_of_several_rows_at_once_have_no_row_and_other_errors_pass():
    class Wild(keras.layers.Layer):
        def call(self, x):
            if float(x[0, 0]) < 0:
                raise IndexError("of my own")
            return x

    fastdp.set_virtual_devices(2)
    model = keras.Sequential([keras.Input((2,)), Wild(), L.Dense(1)])
    parallel = fastdp.wrap(model, gpus=2, compile=None)
    parallel.compile("sgd", "mse")
    x = np.random.default_rng(0).uniform(1, 2, (8, 2)).astype("float32")
    parallel.train_on_batch(x, np.zeros((8, 1)))
    x[4] = -1
    assert "of my own" in str(fails(parallel.train_on_batch, x, np.zeros((8, 1))))


def step_of(function, *arguments):
    return optimized(make_fx(function, tracing_mode="fake")(*arguments))


def test_a_guarded_graph_gives_the_same_and_says_whether_an_index_was_wrong():
    def step(table, at, labels):
        picked = torch.nn.functional.embedding(at, table)
        loss = torch.nn.functional.nll_loss(picked.log_softmax(1), labels, reduction="none")
        return [loss, table.index_select(1, labels.clamp(0, 2))[at[:, None], at - 4], table.take(at)]

    table, at, labels = torch.randn(4, 3), torch.tensor([0, 3, 2]), torch.tensor([2, -100, 0])
    graph = step_of(step, table, at[:, None].squeeze(1), labels)
    module = guarded(graph)
    with pytest.raises(IndexError):
        step(table, at, labels)  # -4 - 0 is outside of three columns
    assert bool(module(table, at, labels)[-1])
    for ats, targets, wrong in ((at + 1, labels, True), (at, labels + 1, True)):
        assert bool(module(table, ats, targets)[-1]) is wrong
    fine = torch.tensor([3, 1, 2])
    *results, wrong = module(table, fine, labels)
    assert not bool(wrong)
    for value, other in zip(results, graph(table, fine, labels), strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=0)


def test_operations_whose_indices_are_not_known_are_not_compiled():
    def step(x, at):
        return [torch.nn.functional.max_unpool2d(x, at, 2)]

    graph = make_fx(step, tracing_mode="fake")(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, dtype=torch.int64))
    with pytest.raises(NotImplementedError, match="max_unpool2d"):
        guarded(graph)


@pytest.mark.slow
def test_a_wrong_label_in_a_compiled_step_on_two_threads_does_not_end_the_process():
    code = (
        "import numpy as np, fastdp\n"
        "fastdp.set_virtual_devices(1)\n"
        "import keras, torch\n"
        "m = keras.Sequential([keras.Input((4,), dtype='int32'), keras.layers.Embedding(50, 8),"
        " keras.layers.Flatten(), keras.layers.Dense(10, activation='softmax')])\n"
        "p = fastdp.wrap(m, gpus=1, compile='inductor')\n"
        "p.compile('sgd', 'sparse_categorical_crossentropy')\n"
        "x, y = np.random.randint(0, 50, (4096, 4)), np.random.randint(0, 10, 4096)\n"
        "for _ in range(3): p.train_on_batch(x, y)\n"
        "p.wait_compiled(400)\n"
        "p.train_on_batch(x, y)\n"
        "print(p.report()[0]['how'])\n"
        "for x_at, y_at in ((0, 10), (50, 0)):\n"
        "    bad_x, bad_y = x.copy(), y.copy()\n"
        "    bad_x[3000, 1], bad_y[3000] = x_at, y_at\n"
        "    try: p.train_on_batch(bad_x, bad_y)\n"
        "    except IndexError as error: print(error)\n"
        "print(p.report()[0]['how'], float(p.train_on_batch(x, y)) > 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("in row 3000 of the batch") == 2
    assert done.stdout.startswith("compiled")
    assert "compiled True" in done.stdout
