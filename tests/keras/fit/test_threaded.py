"""A data set that asks for worker processes is read by threads: nothing is forked, and a failing one ends the fit."""

from __future__ import annotations

import os
import threading

import keras
import numpy as np
import pytest

import fastdp

LIMIT = 60.0


@pytest.fixture(scope="module", autouse=True)
def two_devices():
    fastdp.set_virtual_devices(2)
    yield
    fastdp.set_virtual_devices(0)


class Batches(keras.utils.PyDataset):
    """Four batches of six rows; notes who reads them."""

    def __init__(self, fails_at=None, **kwargs):
        super().__init__(**kwargs)
        self.fails_at, self.readers, self.epochs = fails_at, set(), []

    def __len__(self):
        return 4

    def __getitem__(self, index):
        self.readers.add((os.getpid(), threading.current_thread().name))
        if index == self.fails_at:
            raise OSError("the disk is gone")
        rng = np.random.default_rng(index)
        return rng.normal(size=(6, 3)).astype("float32"), rng.normal(size=(6, 1)).astype("float32")

    def on_epoch_begin(self):
        self.epochs.append("begin")

    def on_epoch_end(self):
        self.epochs.append("end")


def parallel():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    made = fastdp.wrap(keras.Model(inputs, keras.layers.Dense(1)(inputs)), gpus=2, timeout=LIMIT)
    made.compile("sgd", "mse")
    return made


def test_worker_processes_become_threads_with_the_same_result():
    # Two workers: Keras then begins with another batch than with one.
    plain, forking = Batches(workers=2), Batches(workers=2, use_multiprocessing=True, max_queue_size=3)
    wanted = parallel().fit(plain, epochs=2, shuffle=False, verbose=0).history["loss"]
    with pytest.warns(UserWarning, match=r"use_multiprocessing=True.* of x would fork.*2 workers run as threads"):
        found = parallel().fit(forking, epochs=2, shuffle=False, verbose=0).history["loss"]
    assert found == pytest.approx(wanted, rel=1e-6)
    assert {pid for pid, _ in forking.readers} == {os.getpid()}
    assert forking.epochs == plain.epochs != []
    assert forking.use_multiprocessing is True  # the user's object is as it was


@pytest.mark.parametrize("method", ["evaluate", "predict"])
def test_forward_passes_fork_nothing_either(method):
    data, model = Batches(workers=1, use_multiprocessing=True), parallel()
    with pytest.warns(UserWarning, match="threads instead"):
        getattr(model, method)(data, verbose=0)
    assert {pid for pid, _ in data.readers} == {os.getpid()}


def test_a_worker_that_fails_ends_the_fit_with_its_error():
    data = Batches(fails_at=2, workers=2, use_multiprocessing=True)
    with pytest.warns(UserWarning, match="threads"), pytest.raises(OSError, match="the disk is gone"):
        parallel().fit(data, verbose=0)
