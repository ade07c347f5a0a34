"""Plain models under `fastdp.install` get their batches from a thread: those that Keras alone deals out."""

from __future__ import annotations

import gc
import threading

import keras
import numpy as np
import pytest
import torch
from ahead_threads import alive, wait_until
from fed_sources import BATCHES, ROWS, SOURCES, Data, Stop, X, Y, batch, generator
from torch.utils.data import DataLoader

import fastdp
from fastdp.data import ahead_guard
from fastdp.keras import install
from fastdp.keras.fit import resident_loops, sources


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(ahead_guard, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(sources, "LARGE_NBYTES", 1)
    fastdp.set_virtual_devices(2, kind="host")
    yield fastdp.install(gpus=2, compile=None)
    fastdp.uninstall()
    fastdp.set_virtual_devices(0)
    gc.collect()
    wait_until(lambda: not alive())


def model(*, built=True, stateful=False):
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(2)]
    layers[0].stateful = stateful
    made = keras.Sequential([keras.Input((3,)), *layers] if built else layers)
    made.compile("sgd", "mse", metrics=["mae"])
    return made


def trained(source, made):
    history = made.fit(**{"shuffle": False, **SOURCES[source](), "epochs": 2, "verbose": 0}).history
    return [history, made.get_weights(), made.evaluate(Data(), verbose=0), made.predict(Data(), verbose=0)]


def assert_same(found, want):
    keras.tree.map_structure(np.testing.assert_array_equal, found, want)


@pytest.mark.parametrize("source", SOURCES)
def test_each_source_trains_as_by_keras_own_loop(source, installed, monkeypatch):
    found = []
    for ahead in (2, 0):
        installed.prefetch = ahead
        found.append(trained(source, model()))
        (entry,) = installed.inputs
        assert (entry["read_ahead"] >= 7) == (ahead == 2)
        assert entry["batches"] >= 12
        assert not alive()
    if source != "zarr":  # which Keras would read whole
        monkeypatch.setattr(install, "begin_here", lambda: None)
        found.append(trained(source, model()))
        assert not installed.inputs
    for other in found[1:]:
        assert_same(other, found[0])


@pytest.mark.filterwarnings("ignore:fastdp. .* steps of the model")
@pytest.mark.parametrize("kind", [{"built": False}, {"stateful": True}])
def test_models_that_keras_builds_on_a_batch_or_runs_alone_lose_none(kind, installed, monkeypatch):
    """A first batch builds the model before the loop begins; a model that cannot be split runs in plain Keras."""
    installed.prefetch = 2
    found = []
    for _ in range(2):
        asked = []
        made = model(**kind)
        made.fit(generator(asked=asked), steps_per_epoch=4, epochs=2, verbose=0, shuffle=False)
        found.append([made.get_weights(), asked])
        monkeypatch.setattr(install, "begin_here", lambda: None)
    assert_same(*found)


def test_a_generator_goes_on_where_a_fit_has_stopped(installed):
    installed.prefetch = 2
    asked, made = [], model()
    data = generator(asked=asked)
    made.fit(data, steps_per_epoch=20, verbose=0, shuffle=False, callbacks=[Stop(5)])
    assert len(asked) > 6
    assert not alive()
    following = sources.continued(data)
    assert [float(next(following)[0][0, 0]) for _ in range(3)] == [float(batch(i)[0][0, 0]) for i in (6, 7, 8)]


def test_validation_is_fed_in_each_epoch_and_its_thread_ends_with_it(installed, monkeypatch):
    installed.prefetch = 2
    names, left, found = [], [], []

    class Looking(Data):
        def __getitem__(self, i):
            names.append(threading.current_thread() in alive())
            return super().__getitem__(i)

    class Alive(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            left.append(len(alive()))

    for _ in range(2):
        data = {"validation_data": Looking(), "validation_steps": 3, "callbacks": [Alive()]}
        found.append(model().fit(X, Y, epochs=2, batch_size=ROWS, shuffle=False, verbose=0, **data).history)
        if len(found) == 1:
            assert (len(names), left) == (6, [0, 0])
            assert names[2] is names[5] is True
            monkeypatch.setattr(install, "begin_here", lambda: None)
    assert_same(*found)


def test_a_step_function_of_the_script_and_a_parallel_model_are_not_fed_twice(installed):
    installed.prefetch = 2
    made = model()
    made.train_function = lambda data: {"loss": float(next(iter(data))[0].sum())}
    made.fit(Data(), verbose=0, shuffle=False)
    assert not installed.inputs
    made = model()
    made.train_function = None
    made.fit(Data(), verbose=0, shuffle=False)
    assert installed.inputs[0]["read_ahead"] == BATCHES - 2
    parallel = fastdp.wrap(model(), gpus=2, compile=None)
    parallel.compile("sgd", "mse")
    parallel.prefetch = 0
    parallel.fit(Data(), verbose=0, shuffle=False)
    assert parallel.report().inputs[0]["read_ahead"] == 0


@pytest.mark.filterwarnings("ignore:fastdp. .* steps of the model")
def test_a_plain_step_finds_its_batch_where_keras_would_have_put_it(installed, monkeypatch):
    monkeypatch.setattr(resident_loops, "get_device", lambda: "meta")
    rows = list(zip(X, Y, strict=True))
    for given, want in (({"x": X, "y": Y}, "meta"), ({"x": DataLoader(rows, ROWS)}, "cpu"), ({"x": Data()}, "meta")):
        made, seen = model(stateful=True), []

        def noted(data, seen=seen):
            seen.append(data[0].device.type)
            return {"loss": torch.zeros(())}

        made.train_step = noted
        made.fit(**given, verbose=0, shuffle=False)
        assert set(seen) == {want}
    assert resident_loops.on_keras_device((torch.ones(1),))[0].device.type == "cpu"  # in no loop


def test_nothing_is_left_of_it_after_uninstall(installed):
    installed.prefetch = 2
    fastdp.uninstall()
    model().fit(Data(), verbose=0, shuffle=False)
    assert not installed.inputs
