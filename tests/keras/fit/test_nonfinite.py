"""on_nonfinite of a Keras model, and a data set that stalls in `fit`."""

from __future__ import annotations

import time

import keras
import numpy as np
import pytest

import fastdp


@pytest.fixture(autouse=True)
def three_devices():
    fastdp.set_virtual_devices(3)
    yield
    fastdp.set_virtual_devices(0)


def compiled(**options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.BatchNormalization()])
    parallel = fastdp.wrap(model, 3, compile=None, **options)
    parallel.compile("adam", "mse", metrics=["mae"])
    return model, parallel


def data(bad=None):
    x = np.linspace(-1, 1, 36, dtype="f4").reshape(12, 3)
    if bad is not None:
        x[bad] = np.nan
    return x, np.ones((12, 4), "f4")


def everything(model, parallel):
    return [np.array(v) for v in (*model.variables, *parallel.optimizer.variables)]


def test_raise_names_device_and_rows_and_changes_nothing():
    model, parallel = compiled(on_nonfinite="raise")
    parallel.train_on_batch(*data())
    before = everything(model, parallel)
    with pytest.raises(FloatingPointError, match=r"virtual:2 \(rows 8 to 12 of the batch's 12\).*loss is nan"):
        parallel.train_on_batch(*data(9))
    for one, other in zip(before, everything(model, parallel), strict=True):
        np.testing.assert_array_equal(one, other)


def test_skip_leaves_the_batch_out_of_weights_and_metrics():
    model, parallel = compiled(on_nonfinite="skip")
    other_model, other = compiled()
    bad, good = data(0), data()
    both = np.concatenate([good[0], bad[0]]), np.concatenate([good[1], bad[1]])
    with pytest.warns(UserWarning, match="a step changed nothing"):
        logs = parallel.fit(*both, batch_size=12, shuffle=False, verbose=0).history
    expected = other.fit(*good, batch_size=12, shuffle=False, verbose=0).history
    assert logs == expected
    for one, two in zip(everything(model, parallel), everything(other_model, other), strict=True):
        np.testing.assert_array_equal(one, two)


class Stalling(keras.utils.PyDataset):
    """Its second batch does not come."""

    def __len__(self):
        return 3

    def __getitem__(self, number):
        if number == 1:
            time.sleep(30)
        return data()


def test_a_data_set_that_stalls_is_an_error_that_names_where_it_hangs():
    _, parallel = compiled(timeout=0.5)
    began = time.monotonic()
    with pytest.raises(
        fastdp.DeviceTimeoutError, match=r"next batch of the data set \(.*Stalling\) took longer than"
    ) as caught:
        parallel.fit(Stalling(), shuffle=False, verbose=0)
    assert time.monotonic() - began < 20
    assert "in __getitem__" in str(caught.value)
