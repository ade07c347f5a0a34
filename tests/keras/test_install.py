"""`fastdp.install`: the user's own model on all devices, and plain Keras where that cannot be."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Iterator
from contextlib import nullcontext

import keras
import numpy as np
import pytest
import torch
from keras.src.backend.torch.trainer import TorchTrainer
from numpy.random import rand  # by name: out of fastdp's reach

import fastdp
from fastdp.data import DeviceDataset
from fastdp.engine.data_parallel import DataParallel


def drawn_like(x: torch.Tensor) -> torch.Tensor:
    return torch.tensor(rand(*x.shape)).float()  # noqa: NPY002


X = np.random.default_rng(0).normal(size=(21, 3)).astype("float32")
Y = X.sum(axis=1, keepdims=True)


@pytest.fixture(autouse=True)
def devices() -> Iterator[None]:
    """Two devices; plain Keras afterwards."""
    fastdp.set_virtual_devices(2)
    yield
    fastdp.uninstall()
    fastdp.set_virtual_devices(0)


@pytest.fixture
def steps(monkeypatch) -> list[tuple[str, int]]:
    """The engine's steps: kind, and rows. A call of a layer or a model is a "predict" too."""
    seen = []

    def noted(kind, original):
        return lambda self, batch, *work, **kw: seen.append((kind, len(batch[0]))) or original(self, batch, *work, **kw)

    for name, kind in (("train", "train"), ("predict", "predict"), ("call", "predict")):
        monkeypatch.setattr(DataParallel, name, noted(kind, getattr(DataParallel, name)))
    return seen


def small(*first):
    keras.utils.set_random_seed(3)
    dense = [keras.layers.Dense(4, activation="tanh"), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    model = keras.Sequential([*first, *dense])
    model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])
    return model


def everything(model):
    """All that a model's loops give, one after the other."""
    fit = model.fit(X, Y, batch_size=8, epochs=3, verbose=0, validation_split=0.2).history
    on_batch = [model.train_on_batch(X, Y), model.test_on_batch(X, Y)]
    rest = [model.evaluate(X, Y, verbose=0), model.predict(X, batch_size=4, verbose=0), model.predict_on_batch(X)]
    return [*fit.values(), *on_batch, *rest]


@pytest.mark.parametrize("first", [[], [keras.Input((3,))]])  # built by its first batch, or before
def test_every_loop_runs_on_the_devices_and_gives_what_plain_keras_gives(first, steps):
    expected = everything(small(*first))
    assert steps == []
    fastdp.install(gpus=2)
    for found, wanted in zip(everything(small(*first)), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-6)
    assert steps.count(("train", 8)) == 6
    assert ("train", 21) in steps
    assert ("predict", 21) in steps


def test_callbacks_see_the_users_model_and_can_stop_it(steps):
    class Look(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            assert self.model is model

        def on_epoch_end(self, epoch, logs=None):
            assert self.model.optimizer is model.optimizer
            self.model.stop_training = epoch == 1

    fastdp.install()
    model = small()
    history = model.fit(X, Y, epochs=9, verbose=0, callbacks=[Look()])
    assert history is model.history
    assert history.epoch == [0, 1]
    assert steps


def test_uninstall_gives_plain_keras_back(steps):
    original = TorchTrainer.make_train_function
    fastdp.install(gpus=2)
    model = small()
    model.fit(X, Y, verbose=0)
    count = len(steps)
    assert count
    fastdp.uninstall()
    assert TorchTrainer.make_train_function is original
    model.fit(X, Y, verbose=0)
    model.predict(X, verbose=0)
    assert len(steps) == count


def test_uninstall_in_the_middle_of_a_step_of_the_models_own_leaves_keras_s_functions_behind():
    class Model(keras.Model):
        def train_step(self, data):
            fastdp.uninstall()
            self.layers[-1](data[0])
            return {"loss": 1.0}

    before = [getattr(TorchTrainer, f"make_{kind}_function") for kind in ("train", "test", "predict")]
    call = keras.Layer.__call__
    inputs = keras.Input((3,))
    model = Model(inputs, keras.layers.Dense(1)(inputs))
    model.compile("sgd", "mse")
    fastdp.install(gpus=2)
    model.train_on_batch(X, Y)
    assert [getattr(TorchTrainer, f"make_{kind}_function") for kind in ("train", "test", "predict")] == before
    assert keras.Layer.__call__ is call


def over(function):
    """A function of a script's own that calls this one."""

    def theirs(*args, **kwargs):
        return function(*args, **kwargs)

    return theirs


def test_what_a_script_has_put_over_fastdps_functions_stays_and_runs_plain_keras_after_uninstall(steps):
    call, make = keras.Layer.__call__, TorchTrainer.make_train_function
    model = small(keras.Input((3,)))
    fastdp.install(gpus=2)
    ours, made = keras.Layer.__call__, TorchTrainer.make_train_function
    try:
        keras.Layer.__call__ = over(ours)
        TorchTrainer.make_train_function = over(made)
        fastdp.uninstall()
        model(X)
        model.train_on_batch(X, Y)
        assert steps == []
        assert keras.Layer.__call__.__name__ == TorchTrainer.make_train_function.__name__ == "theirs"
        fastdp.install(gpus=2)
        model(X)
        model.train_on_batch(X, Y)
        assert [kind for kind, _ in steps] == ["predict", "train"]
        fastdp.uninstall()
    finally:
        keras.Layer.__call__, TorchTrainer.make_train_function = call, make


def test_a_model_fitted_before_install_runs_on_the_devices_after_it(steps):
    model = small()
    model.fit(X, Y, verbose=0)
    assert steps == []
    fastdp.install(gpus=2)
    model.fit(X, Y, verbose=0)
    assert steps


def test_compiling_and_freezing_anew_trains_what_keras_trains(steps):
    def weights(model):
        model.fit(X, Y, epochs=1, verbose=0, shuffle=False)
        model.layers[0].trainable = False
        model.compile("sgd", "mae")
        model.fit(X, Y, epochs=1, verbose=0, shuffle=False)
        return model.get_weights()

    expected = weights(small())
    fastdp.install(gpus=2)
    for found, wanted in zip(weights(small()), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_split_runs_as_plain_keras_with_one_warning(steps):
    model = keras.Sequential([keras.Input(batch_shape=(7, 5, 3)), keras.layers.LSTM(2, stateful=True, name="memory")])
    x = np.ones((14, 5, 3), "float32")
    fastdp.install(gpus=2)
    with pytest.warns(UserWarning, match="predict steps of .* one device, as plain Keras: .*'memory' is stateful"):
        model.predict(x, batch_size=7, verbose=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastdp")
        model.predict(x, batch_size=7, verbose=0)
    assert steps == []


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (lambda: keras.layers.Lambda(lambda x: x * drawn_like(x), output_shape=(1,)), "by name"),
        (lambda: keras.layers.Dense(1, activity_regularizer=lambda y: keras.ops.max(y**2)), "neither a mean"),
    ],
    ids=["draws that devices cannot share", "a loss that is no sum"],
)
def test_what_turns_out_not_to_go_by_rows_runs_as_plain_keras_with_one_warning(layer, why, steps):
    def losses():
        keras.utils.set_random_seed(3)
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1), layer()])
        model.compile("sgd", "mse")
        return model, model.fit(X[:20], Y[:20, 0], epochs=2, verbose=0, batch_size=4, shuffle=False).history["loss"]

    _, expected = losses()
    fastdp.install(gpus=2)
    with pytest.warns(UserWarning, match=f"train steps of .* one device, as plain Keras: .*{why}") as told:
        model, found = losses()
    assert len([one for one in told if "fastdp" in str(one.message)]) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastdp")
        model.fit(X[:20], Y[:20, 0], verbose=0, batch_size=4)
    assert found == expected
    assert steps == []


def test_a_step_of_the_models_own_runs_its_layers_on_the_devices(steps):
    class Own(keras.Model):
        def train_step(self, data):
            return {**super().train_step(data), "ten": 10.0}

    def losses():
        keras.utils.set_random_seed(3)
        inputs = keras.Input((3,))
        model = Own(inputs, keras.layers.Dense(1)(inputs))
        model.compile("sgd", "mse")
        return model.fit(X, Y, epochs=2, verbose=0, batch_size=8, shuffle=False).history

    expected = losses()
    fastdp.install(gpus=2)
    found = losses()
    assert found["ten"] == [10.0, 10.0]
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)
    assert ("predict", 8) in steps


def test_wrong_arguments_say_so_at_once():
    with pytest.raises(ValueError, match="gpus=3"):
        fastdp.install(gpus=3)
    with pytest.raises(TypeError, match="no option"):
        fastdp.install(gpus=2, devices=2)
    fastdp.uninstall()  # nothing is installed: nothing happens


def test_graph_is_checked_before_anything_is_installed():
    with pytest.raises(ValueError, match=r"`graph` must be one of .* Received: graph='all'"):
        fastdp.install(gpus=2, compile="trace", graph="all")
    assert TorchTrainer.make_train_function.__qualname__.startswith("TorchTrainer.")


@pytest.mark.parametrize("graph", ["bucket", "step"])
def test_graphs_that_are_asked_for_where_there_are_none_are_warned_of(graph):
    with pytest.warns(UserWarning, match=f'graph="{graph}" has nothing to record on virtual devices'):
        fastdp.install(gpus=2, compile="trace", graph=graph)
    assert not TorchTrainer.make_train_function.__qualname__.startswith("TorchTrainer.")


# Calls by the script, and what runs plain.


def test_a_layer_that_is_never_called_keeps_no_model_plain(steps):
    class Rollback(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense, self.never = keras.layers.Dense(1), keras.layers.Dense(5)

        def call(self, x):
            return self.dense(x)

    def losses():
        keras.utils.set_random_seed(3)
        model = Rollback()
        model.compile("sgd", "mse")
        return model.fit(X, Y, epochs=2, batch_size=8, shuffle=False, verbose=0).history["loss"]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`build\(\)` was called on layer")
        expected = losses()
        fastdp.install(gpus=2)
        np.testing.assert_allclose(losses(), expected, rtol=1e-5)
        parallel = fastdp.wrap(built(Rollback()), gpus=2)
    assert steps.count(("train", 8)) >= 3  # but for the first batch, which may build what training alone calls
    parallel.compile("sgd", "mse")
    parallel.fit(X, Y, verbose=0)


def built(model):
    model(X[:1])
    return model


def test_a_model_that_stays_unbuilt_says_so():
    class Undone(keras.Sequential):
        def call(self, *args, **kwargs):
            try:
                return super().call(*args, **kwargs)
            finally:
                self.built = False

    model = Undone([keras.Input((3,)), keras.layers.Dense(1)])
    model.built = False
    fastdp.install(gpus=2)

    def predict_three_times():
        for _ in range(3):
            model.predict_on_batch(X)
            model.built = False

    with pytest.warns(UserWarning, match="predict steps of .* one device, as plain Keras: it is not built") as told:
        predict_three_times()
    assert [one.filename for one in told if "fastdp" in str(one.message)] == [__file__]


@pytest.mark.parametrize("where", ["object", "class"])
def test_a_train_step_put_in_the_place_of_keras_own_is_run(where, steps, monkeypatch):
    def halved(self, data):
        x, y = data
        loss = ((self(x, training=True) - y) ** 2).mean() / 2
        self.zero_grad()
        loss.backward()
        with torch.no_grad():
            self.optimizer.apply([v.value.grad for v in self.trainable_weights], self.trainable_weights)
        return {"loss": loss.detach()}

    def losses(how):
        model = small(keras.Input((3,)))
        if where == "object":
            model.train_step = types.MethodType(halved, model)
        else:
            monkeypatch.setattr(keras.Model, "train_step", halved, raising=False)
        parallel = fastdp.wrap(model, gpus=2, sync_batch_norm=True) if how == "wrapped" else model
        if how == "wrapped":
            parallel.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])
        if how == "installed":
            fastdp.install(gpus=2)
        return parallel.fit(X, Y, epochs=2, batch_size=8, shuffle=False, verbose=0).history["loss"]

    expected = losses("plain")
    assert steps == []
    for how in ("wrapped", "installed"):
        np.testing.assert_allclose(losses(how), expected, rtol=1e-5)
        assert ("predict", 8) in steps
        steps.clear()


def test_loops_of_a_models_own_run_on_the_devices(steps):
    class Loops(keras.Sequential):
        def make_train_function(self, force=False):
            self.train_function = lambda data: self.train_step(data[0])
            return self.train_function

        def fit(self, x, y):
            return [float(self.train_on_batch(x[:8], y[:8])), super().fit(x, y, verbose=0).history["loss"][0]]

    def losses():
        keras.utils.set_random_seed(3)
        model = Loops([keras.Input((3,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        return model.fit(X, Y)

    expected = losses()
    fastdp.install(gpus=2)
    np.testing.assert_allclose(losses(), expected, rtol=1e-5)
    assert steps[:2] == [("predict", 8)] * 2  # forward and backward


def test_callbacks_threads_and_models_in_models_use_the_devices(steps):
    def losses():
        inner = small(keras.Input((3,)))
        outer = keras.Sequential([keras.Input((3,)), inner, keras.layers.Dense(1)])
        outer.compile("sgd", "mse")
        sums = []
        look = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: sums.append(float(inner(X).detach().sum()))
        )
        arguments = {"batch_size": 8, "shuffle": False, "verbose": 0}
        fit = lambda: sums.extend(outer.fit(X, Y, callbacks=[look], **arguments).history["loss"])  # noqa: E731
        thread = threading.Thread(target=fit)
        thread.start()
        thread.join()
        copy = keras.models.clone_model(outer)
        copy.set_weights(outer.get_weights())
        copy.compile("sgd", "mse", run_eagerly=True)
        return [*sums, *copy.fit(X, Y, **arguments).history["loss"]]

    expected = losses()
    assert steps == []
    fastdp.install(gpus=2)
    np.testing.assert_allclose(losses(), expected, rtol=1e-5)
    assert steps.count(("train", 8)) == 4
    assert ("predict", 21) in steps


SCRIPT = """
import warnings
import keras, numpy as np
import fastdp

class Stateful(keras.Model):
    def __init__(self):
        super().__init__()
        self.total = self.add_weight(shape=(), initializer="zeros", trainable=False, name="total")
        self.dense = keras.layers.Dense(1)

    def call(self, x):
        self.total.assign(keras.ops.max(x) + self.total)
        return self.dense(x) + keras.ops.mean(x)

def main():
    x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
    model = Stateful()
    model(x)
    if HOW == "installed":
        fastdp.install(gpus=2)
    else:
        model = fastdp.wrap(model, gpus=2)
    model.compile("sgd", "mse")
    try:
        model.fit(x, x[:, :1], verbose=0)
        model.fit({"a": x}, {"b": [object()] * 8}, verbose=0)
    except Exception:
        pass
    model(x)
    model(x, training=True)
    keras.Sequential([keras.Input((3,)), model])

main()
"""


@pytest.mark.parametrize("how", ["installed", "wrapped"])
def test_every_warning_of_fastdp_points_at_a_line_of_the_script(how, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("HOW", repr(how)))
    command = [sys.executable, "-W", "always", str(script)]
    environment = {**os.environ, "FASTDP_VIRTUAL_DEVICES": "2", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    told = [line for line in result.stderr.splitlines() if re.match(r".*\.py:\d+: \w*Warning: ", line)]
    own = [line for line in told if f"{os.sep}site-packages{os.sep}" not in line]
    assert own, result.stderr
    assert all(line.startswith(f"{script}:") for line in own), own


@pytest.mark.parametrize(("splits", "sharded"), [(True, False), (False, False), (True, True)])
def test_a_data_set_on_the_devices_gives_what_arrays_give(splits, sharded, steps):
    installed = fastdp.install(gpus=2)
    data = DeviceDataset((X, Y), installed, sharded=sharded)
    assert installed.devices[0].name == "virtual:0"
    found = []
    for given in ({"x": X, "y": Y}, {"x": data}):
        model = small()
        model.layers[0].stateful = not splits  # refused: plain Keras gets the rows on the host
        with nullcontext() if splits else pytest.warns(UserWarning, match="is stateful"):
            history = model.fit(**given, batch_size=7, epochs=2, validation_data=(X, Y), shuffle=splits, verbose=0)
            results = (
                model.evaluate(**given, batch_size=7, verbose=0),
                model.predict(given["x"], batch_size=7, verbose=0),
            )
            rows = [1, 5, 2, 4, 0, 3, 6]
            batch = {"x": X[rows], "y": Y[rows]} if "y" in given else {"x": data.rows(rows)}
            results += (model.train_on_batch(**batch), model.test_on_batch(**batch), model.predict_on_batch(batch["x"]))
        found.append((history.history, *results))
    for ours, theirs in zip(found[1], found[0], strict=True):
        keras.tree.map_structure(np.testing.assert_array_equal, ours, theirs)
    assert bool(steps) == splits
