"""`fit`, `evaluate` and `predict` of a parallel model read matrices on disk batch by batch."""

from __future__ import annotations

import h5py
import keras
import numpy as np
import pytest

import fastdp
from fastdp.keras.fit.arguments import RowRange

ROWS = 40


@pytest.fixture(autouse=True)
def _two_devices():
    fastdp.set_virtual_devices(2)
    yield
    fastdp.set_virtual_devices(0)


@pytest.fixture
def path(tmp_path):
    generator = np.random.default_rng(0)
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["x"] = generator.normal(size=(ROWS, 6)).astype("float32")
        file["y"] = generator.normal(size=(ROWS, 1)).astype("float32")
    return tmp_path / "data.h5"


class Recorder(keras.callbacks.Callback):
    """Keeps the validation losses."""

    def __init__(self):
        super().__init__()
        self.logs = []

    def on_epoch_end(self, epoch, logs=None):
        self.logs.append(dict(logs))


def parallel_model():
    keras.utils.set_random_seed(3)
    model = fastdp.wrap(keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)]), gpus=2)
    model.compile(keras.optimizers.SGD(0.05), "mse")
    return model


def arrays(path):
    with h5py.File(path) as file:
        return file["x"][:], file["y"][:]


def test_fit_on_matrices_equals_fit_on_arrays_without_reading_them_whole(path, monkeypatch):
    def whole(self, *args, **kwargs):
        raise AssertionError("the matrix was read whole")

    monkeypatch.setattr(fastdp.HDF5Matrix, "__array__", whole)
    x, y = arrays(path)
    from_arrays, from_disk = parallel_model(), parallel_model()
    expected = from_arrays.fit(x, y, batch_size=9, epochs=2, shuffle=False, verbose=0).history["loss"]
    matrices = fastdp.HDF5Matrix(path, "x"), fastdp.HDF5Matrix(path, "y")
    history = from_disk.fit(*matrices, batch_size=9, epochs=2, shuffle=False, verbose=0).history["loss"]
    np.testing.assert_allclose(history, expected, rtol=1e-6)
    np.testing.assert_allclose(
        from_disk.evaluate(*matrices, verbose=0), from_arrays.evaluate(x, y, verbose=0), rtol=1e-6
    )
    np.testing.assert_allclose(from_disk.predict(matrices[0], verbose=0), from_arrays.predict(x, verbose=0), rtol=1e-6)


def test_fit_takes_h5py_data_sets_and_its_report_says_how_they_were_read(path):
    x, y = arrays(path)
    options = {"batch_size": 9, "shuffle": False, "validation_split": 0.3, "epochs": 2, "verbose": 0}
    expected = parallel_model().fit(x, y, **options).history
    model = parallel_model()
    with h5py.File(path) as file:
        found = model.fit(file["x"], file["y"], **options).history
        assert model.evaluate(file["x"], file["y"], verbose=0) == model.evaluate(x, y, verbose=0)
    assert found == expected
    x_entry, y_entry = model.report().inputs
    assert (x_entry["array"], y_entry["array"], x_entry["how"]) == ("x", "y", "by threads: one piece")
    assert x_entry["batches"] >= 8
    assert x_entry["waited_seconds"] > 0
    assert "How batches came" in str(model.report())


def test_fit_mixes_the_rows_of_chunks_of_arrays_too(path):
    x, y = arrays(path)
    losses = []
    for data in ((x, y), (fastdp.HDF5Matrix(path, "x"), fastdp.HDF5Matrix(path, "y"))):
        model = parallel_model()
        losses.append(model.fit(*data, batch_size=9, shuffle="chunks", epochs=2, verbose=0).history["loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("how", ["split", "data"])
def test_validation_rows_come_from_the_end_and_are_not_shuffled(path, how):
    x, y = arrays(path)
    matrices = fastdp.HDF5Matrix(path, "x"), fastdp.HDF5Matrix(path, "y")
    first, second = parallel_model(), parallel_model()
    expected = first.fit(x[:30], y[:30], validation_data=(x[30:], y[30:]), batch_size=10, shuffle=False, verbose=0)
    if how == "split":
        found = second.fit(*matrices, validation_split=0.25, batch_size=10, shuffle=False, verbose=0)
    else:
        held_out = fastdp.HDF5Matrix(path, "x", 30), fastdp.HDF5Matrix(path, "y", 30)
        found = second.fit(x[:30], y[:30], validation_data=held_out, batch_size=10, shuffle=False, verbose=0)
    np.testing.assert_allclose(found.history["val_loss"], expected.history["val_loss"], rtol=1e-6)


def test_shuffle_batch_keeps_the_rows_of_a_batch_together(monkeypatch):
    model, seen = parallel_model(), []
    engine_train = type(model.engine).train

    def train(self, batch, **kwargs):
        seen.append(batch[0][:, 0].astype(int).tolist())
        return engine_train(self, batch, **kwargs)

    monkeypatch.setattr(type(model.engine), "train", train)
    x = np.repeat(np.arange(24, dtype="float32")[:, None], 6, axis=1) / 1.0
    model.optimizer.learning_rate = 0.0
    model.fit(x, np.zeros((24, 1), "float32"), batch_size=4, epochs=3, shuffle="batch", verbose=0)
    batches = [tuple(range(i, i + 4)) for i in range(0, 24, 4)]
    epochs = [[tuple(rows) for rows in seen[i : i + 6]] for i in (0, 6, 12)]
    assert all(sorted(epoch) == batches for epoch in epochs)
    assert any(epoch != batches for epoch in epochs)


def test_an_empty_part_of_a_validation_split_is_refused(path):
    matrices = fastdp.HDF5Matrix(path, "x"), fastdp.HDF5Matrix(path, "y")
    with pytest.raises(ValueError, match=r"validation_split=0\.999 of 40 rows"):
        parallel_model().fit(*matrices, validation_split=0.999, verbose=0)


def test_row_ranges_slice_and_index_as_the_rows_they_stand_for():
    array = np.arange(20).reshape(10, 2)
    rows = RowRange(array, 3, 8)
    np.testing.assert_array_equal(rows[1:4], array[3:8][1:4])
    np.testing.assert_array_equal(rows[np.array([4, 0])], array[3:8][[4, 0]])
    assert rows.shape == (5, 2)


@pytest.mark.parametrize(("sizes", "expected"), [({}, 32), ({"batch_size": 5}, 5), ({"validation_batch_size": 4}, 4)])
def test_whole_batches_leave_validation_its_batch_size(sizes, expected):
    class Sizes(keras.callbacks.Callback):
        def on_test_batch_end(self, batch, logs=None):
            self.batches = batch + 1

    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(ROWS, 6)).astype("float32"), generator.normal(size=(ROWS, 1)).astype("float32")
    model = fastdp.wrap(keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)]), 2)
    model.compile("sgd", "mse")
    sizes_seen = Sizes()
    model.fit(x, y, shuffle="batch", validation_data=(x, y), callbacks=[sizes_seen], verbose=0, **sizes)
    assert sizes_seen.batches == -(-ROWS // expected)
