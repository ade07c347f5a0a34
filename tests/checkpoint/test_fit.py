"""`fastdp.callbacks.Checkpoint` in one process: kinds of data, states of callbacks, errors, and threads."""

from __future__ import annotations

import threading

import h5py
import keras
import numpy as np
import pytest
import torch

import fastdp
from fastdp.callbacks import Checkpoint
from fastdp.checkpoint.background import NAME

X = np.random.default_rng(0).normal(size=(40, 4)).astype("float32")
Y = X.sum(1, keepdims=True)


class Stop(Exception):
    """Ends a `fit` in the middle of an epoch."""


class StopsAt(keras.callbacks.Callback):
    def __init__(self, steps):
        super().__init__()
        self.left = steps

    def on_train_batch_begin(self, batch, logs=None):
        if not self.left:
            raise Stop
        self.left -= 1


def fresh(devices=0, seed=1, accumulate=None):
    """A script's model, from a seed."""
    keras.utils.set_random_seed(seed)
    layers = [keras.layers.Dense(5, activation="tanh"), keras.layers.Dropout(0.3, seed=3), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    fastdp.set_virtual_devices(devices)
    parallel = fastdp.wrap(model, gpus=devices, compile=None) if devices else model
    parallel.compile(keras.optimizers.Adam(0.01, gradient_accumulation_steps=accumulate), "mse")
    return parallel


@pytest.fixture(autouse=True)
def no_devices_and_no_thread_afterwards():
    yield
    fastdp.set_virtual_devices(0)
    assert NAME not in [thread.name for thread in threading.enumerate()]


class Shuffled(keras.utils.PyDataset):
    """Changes its order at the end of an epoch."""

    order = np.arange(10)

    def __len__(self):
        return 10

    def __getitem__(self, index):
        rows = slice(self.order[index] * 4, self.order[index] * 4 + 4)
        return X[rows], Y[rows]

    def on_epoch_end(self):
        self.order = np.random.permutation(10)  # noqa: NPY002 - as users do


class Known(Shuffled):
    """Tells its order."""

    def state_dict(self):
        return {"order": self.order.copy()}

    def load_state_dict(self, state):
        self.order = state["order"]


class Steady(Shuffled):
    on_epoch_end = keras.utils.PyDataset.on_epoch_end


def loader():
    data = torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y))
    generator = torch.Generator().manual_seed(5)
    return torch.utils.data.DataLoader(data, batch_size=4, shuffle=True, generator=generator)


def matrices(folder):
    path = folder / "data.h5"
    if not path.exists():
        with h5py.File(path, "w") as file:
            file["x"], file["y"] = X, Y
    return {"x": fastdp.HDF5Matrix(str(path), "x"), "y": fastdp.HDF5Matrix(str(path), "y"), "batch_size": 4}


KINDS = {
    "loader": lambda folder: {"x": loader(), "shuffle": False},
    "a data set that tells its order": lambda folder: {"x": Known()},
    "a steady data set": lambda folder: {"x": Steady()},
    "shuffled within batches": lambda folder: {"x": X, "y": Y, "batch_size": 4, "shuffle": "batch"},
    "matrices on disk": lambda folder: {**matrices(folder), "shuffle": "batch"},
}


@pytest.mark.parametrize(("kind", "devices"), [*((kind, 2) for kind in KINDS), ("shuffled within batches", 0)])
def test_data_of_each_kind_go_on_in_mid_epoch(tmp_path, kind, devices):
    weights = []
    for name, stops in (("whole", None), ("cut", 13), ("cut", 3), ("cut", None)):
        model = fresh(devices)
        callbacks = [Checkpoint(tmp_path / name, every_steps=1)]
        if stops:
            with pytest.raises(Stop):
                model.fit(**KINDS[kind](tmp_path), epochs=2, verbose=0, callbacks=[*callbacks, StopsAt(stops)])
            callbacks[0].close()
        else:
            model.fit(**KINDS[kind](tmp_path), epochs=2, verbose=0, callbacks=callbacks)
            weights.append(model.get_weights())
    for whole, cut in zip(*weights, strict=True):
        np.testing.assert_array_equal(whole, cut)


@pytest.mark.parametrize(("stops", "steps"), [(2, 8), (4, 14)])  # ten batches: executions of 4, 4 and 2 steps
def test_several_steps_per_execution_go_on_between_two_executions(tmp_path, stops, steps):
    weights = []
    for name, stop in (("whole", None), ("cut", stops), ("cut", None)):
        model = fresh(1)
        model.compile(keras.optimizers.Adam(0.01), "mse", steps_per_execution=4)
        callbacks = [Checkpoint(tmp_path / name, every_steps=1)]
        if stop:
            with pytest.raises(Stop):
                model.fit(X, Y, batch_size=4, epochs=2, verbose=0, callbacks=[*callbacks, StopsAt(stop)])
            callbacks[0].close()
            assert max(path.name for path in (tmp_path / name).glob("step-*")) == f"step-{steps:08}"
        else:
            model.fit(X, Y, batch_size=4, epochs=2, verbose=0, callbacks=callbacks)
            assert int(model.optimizer.iterations) == 20
            weights.append(model.get_weights())
    for whole, cut in zip(*weights, strict=True):
        np.testing.assert_array_equal(whole, cut)


def test_gradients_that_wait_in_two_devices_go_on(tmp_path):
    weights = []
    for name, stops in (("whole", None), ("cut", 13), ("cut", None)):
        model, checkpoint = fresh(2, accumulate=4), Checkpoint(tmp_path / name, every_steps=1)
        callbacks = [checkpoint, StopsAt(stops or 99)]
        if stops:
            with pytest.raises(Stop):
                model.fit(X, Y, batch_size=4, epochs=2, verbose=0, callbacks=callbacks)
        else:
            model.fit(X, Y, batch_size=4, epochs=2, verbose=0, callbacks=callbacks)
            weights.append(model.get_weights())
    for whole, cut in zip(*weights, strict=True):
        np.testing.assert_array_equal(whole, cut)


def batches():
    while True:
        for i in range(10):
            yield X[4 * i : 4 * i + 4], Y[4 * i : 4 * i + 4]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (lambda: {"x": batches(), "steps_per_epoch": 10, "shuffle": False}, r"data of this kind \(a generator"),
        (lambda: {"x": Shuffled(), "shuffle": False}, "Shuffled changes from epoch to epoch"),
    ],
)
def test_data_that_cannot_come_again_let_the_epoch_begin_anew_with_a_warning(tmp_path, data, said):
    checkpoint = Checkpoint(tmp_path, every_steps=1)
    with pytest.raises(Stop):
        fresh().fit(**data(), epochs=2, verbose=0, callbacks=[checkpoint, StopsAt(13)])
    checkpoint.close()
    begun = []
    told = keras.callbacks.LambdaCallback(on_train_batch_begin=lambda batch, logs: begun.append(batch))
    with pytest.warns(UserWarning, match=f"made after [23] batches of an epoch, and .*{said}.*begins anew"):
        fresh().fit(**data(), epochs=2, verbose=0, callbacks=[told, Checkpoint(tmp_path)])
    assert begun == list(range(10))


def test_callbacks_go_on_with_what_they_have_found_out_and_keep_how_they_are_set_up(tmp_path):
    class Counts(keras.callbacks.Callback):
        epochs = 0

        def on_epoch_end(self, epoch, logs=None):
            self.epochs += 1

        def state_dict(self):
            return {"epochs": self.epochs}

        def load_state_dict(self, state):
            self.epochs = state["epochs"]

    def callbacks(patience):
        stopping = keras.callbacks.EarlyStopping("loss", patience=patience, min_delta=0.1, restore_best_weights=True)
        return [stopping, Counts()]

    checkpoint = Checkpoint(tmp_path, every_steps=1)
    first = callbacks(patience=50)
    with pytest.raises(Stop):
        fresh().fit(X, Y, batch_size=4, epochs=9, verbose=0, callbacks=[*first, checkpoint, StopsAt(25)])
    checkpoint.close()
    second = callbacks(patience=60)
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(Stop):
        fresh().fit(X, Y, batch_size=4, epochs=9, verbose=0, callbacks=[*second, checkpoint, StopsAt(1)])
    checkpoint.close()
    assert (second[0].best, second[0].wait) == (first[0].best, first[0].wait)
    assert second[0].best is not None
    np.testing.assert_array_equal(second[0].best_weights[0], first[0].best_weights[0])
    assert second[0].patience == 60
    assert second[1].epochs == 2


def test_the_history_of_epochs_before_is_there_and_more_epochs_go_on(tmp_path):
    first = fresh().fit(X, Y, epochs=2, verbose=0, callbacks=[Checkpoint(tmp_path)]).history["loss"]
    model = fresh()
    history = model.fit(X, Y, epochs=3, verbose=0, callbacks=[Checkpoint(tmp_path)])
    assert history.history["loss"][:2] == first
    assert history.epoch == [0, 1, 2]
    assert len(model.fit(X, Y, epochs=2, verbose=0).epoch) == 2  # another fit begins at its beginning


def test_a_second_fit_with_the_same_one_is_an_error(tmp_path):
    model, checkpoint = fresh(), Checkpoint(tmp_path)
    model.fit(X, Y, verbose=0, callbacks=[checkpoint])
    with pytest.raises(ValueError, match="A folder belongs to one `fit`"):
        model.fit(X, Y, verbose=0, callbacks=[checkpoint])


def test_a_checkpoint_of_another_model_is_an_error(tmp_path):
    fresh().fit(X, Y, epochs=1, verbose=0, callbacks=[Checkpoint(tmp_path)])
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    other.compile("adam", "mse")
    with pytest.raises(ValueError, match="could not be loaded"):
        other.fit(X, Y, epochs=2, verbose=0, callbacks=[Checkpoint(tmp_path)])


def test_outside_of_fit_it_says_what_to_use(tmp_path):
    checkpoint = Checkpoint(tmp_path)
    checkpoint.set_model(fresh())
    with pytest.raises(RuntimeError, match=r"works in Keras's own `fit`.*fastdp\.Checkpoint"):
        checkpoint.on_train_begin()
    checkpoint.close()


def test_a_full_disk_ends_fit_with_an_error_that_names_the_checkpoint(tmp_path, monkeypatch):
    def full(self, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastdp.keras.checkpoint.model_file.ModelSnapshot.write", full)
    with pytest.raises(OSError, match=r"step-00000003 could not be written: No space left"):
        fresh(2).fit(X, Y, batch_size=4, verbose=0, callbacks=[Checkpoint(tmp_path, every_steps=3)])
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
