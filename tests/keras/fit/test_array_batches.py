"""ArrayBatches against plain arrays, and HDF5Matrix in Keras's own fit, evaluate and predict."""

import h5py
import keras
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdp.data.hdf5 import HDF5Matrix
from fastdp.keras.fit.array_batches import ArrayBatches

ROWS = 23
X = np.random.default_rng(0).normal(size=(ROWS, 5)).astype(np.float32)
Y = np.arange(ROWS, dtype=np.float32)[:, None]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    name = tmp_path_factory.mktemp("data_sets") / "data.h5"
    with h5py.File(name, "w") as file:
        file["x"], file["y"] = X, Y
    return name


@pytest.fixture
def matrices(path):
    return HDF5Matrix(path, "x"), HDF5Matrix(path, "y")


def linear_model(seed=1):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(1)])
    model.compile(optimizer=keras.optimizers.SGD(0.01), loss="mse")
    return model


def row_numbers(batches):
    return [batches[i][1][:, 0].astype(int).tolist() for i in range(len(batches))]


@given(
    batch_size=st.integers(1, ROWS + 3),
    shuffle=st.sampled_from([True, False, "batch"]),
    seed=st.integers(0, 9),
)
def test_each_epoch_gives_each_row_once_with_its_target(batch_size, shuffle, seed):
    batches = ArrayBatches(X, Y, batch_size=batch_size, shuffle=shuffle, seed=seed)
    for _ in range(2):
        seen = [batches[i] for i in range(len(batches))]
        rows = np.concatenate([y for _, y in seen])[:, 0].astype(int)
        assert sorted(rows) == list(range(ROWS))
        np.testing.assert_array_equal(np.concatenate([x for x, _ in seen]), X[rows])
        assert [len(x) for x, _ in seen[:-1]] == [batch_size] * (len(seen) - 1)
        batches.on_epoch_end()


def test_without_shuffle_the_order_is_that_of_the_arrays_in_each_epoch(matrices):
    batches = ArrayBatches(*matrices, batch_size=10, shuffle=False)
    batches.on_epoch_end()
    assert row_numbers(batches) == [list(range(10)), list(range(10, 20)), list(range(20, 23))]


def test_batch_shuffle_moves_whole_batches_and_leaves_an_incomplete_one_last(matrices):
    batches = ArrayBatches(*matrices, batch_size=4, shuffle="batch", seed=0)
    whole = [list(range(first, first + 4)) for first in range(0, 20, 4)]
    orders = []
    for _ in range(6):
        seen = row_numbers(batches)
        assert seen[-1] == [20, 21, 22]
        assert sorted(seen[:-1]) == whole
        orders.append(tuple(rows[0] for rows in seen[:-1]))
        batches.on_epoch_end()
    assert len(set(orders)) > 1


def test_batch_shuffle_moves_all_batches_where_none_is_incomplete():
    batches = ArrayBatches(X[:20], Y[:20], batch_size=5, shuffle="batch", seed=3)
    lasts = set()
    for _ in range(20):
        lasts.add(row_numbers(batches)[-1][0])
        batches.on_epoch_end()
    assert lasts == {0, 5, 10, 15}


def test_row_shuffle_mixes_rows_within_a_batch_too(matrices):
    rows = row_numbers(ArrayBatches(*matrices, batch_size=ROWS, shuffle=True, seed=0))[0]
    assert rows != sorted(rows)


def test_the_same_seed_gives_the_same_order_and_each_epoch_another():
    first, second = (ArrayBatches(X, Y, batch_size=4, shuffle=True, seed=5) for _ in range(2))
    other = ArrayBatches(X, Y, batch_size=4, shuffle=True, seed=6)
    before = row_numbers(first)
    assert before == row_numbers(second) != row_numbers(other)
    first.on_epoch_end()
    assert row_numbers(first) != before


def test_without_a_seed_the_order_follows_set_random_seed():
    orders = []
    for seed in (1, 1, 2):
        keras.utils.set_random_seed(seed)
        orders.append(row_numbers(ArrayBatches(X, Y, batch_size=4)))
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("shuffle", [True, False, "batch"])
def test_all_kinds_of_arrays_give_the_same_batches(path, matrices, shuffle, tmp_path):
    np.save(tmp_path / "x.npy", X)
    with h5py.File(path, "r") as file:
        kinds = [X, matrices[0], file["x"], torch.from_numpy(X), np.load(tmp_path / "x.npy", mmap_mode="r")]
        found = [ArrayBatches(kind, batch_size=8, shuffle=shuffle, seed=2)[1][0] for kind in kinds]
    for batch in found:
        np.testing.assert_array_equal(batch, found[0], strict=True)
        assert type(batch) is np.ndarray


def test_structures_of_arrays_keep_their_shape_and_rows_stay_together(matrices):
    batches = ArrayBatches({"a": X, "b": [Y, matrices[0]]}, (Y, X), Y[:, 0], batch_size=6, seed=1)
    x, (y, _), weight = batches[2]
    np.testing.assert_array_equal(x["a"], x["b"][1])
    np.testing.assert_array_equal(x["b"][0], y)
    np.testing.assert_array_equal(weight, y[:, 0])


def test_floats_come_in_floatx_and_other_dtypes_as_they_are():
    x, y = ArrayBatches(X.astype(np.float64), Y.astype(np.uint8))[0]
    assert (x.dtype, y.dtype) == (np.float32, np.uint8)


@pytest.mark.parametrize("shuffle", [True, False, "batch"])
def test_batches_belong_to_the_caller(shuffle):
    source = X.copy()
    ArrayBatches(source, batch_size=4, shuffle=shuffle)[0][0][:] = 0
    np.testing.assert_array_equal(source, X)


class NoWhole:
    """Rows that refuse to be read all at once."""

    def __init__(self, data):
        self.data, self.shape = data, data.shape

    def __getitem__(self, key):
        block = self.data[key]
        assert len(block) <= 4, "more than a batch was read"
        return block


@pytest.mark.parametrize("shuffle", [True, False, "batch"])
def test_no_more_than_a_batch_is_read_at_once_in_fit_evaluate_and_predict(shuffle):
    batches = ArrayBatches(NoWhole(X), NoWhole(Y), batch_size=4, shuffle=shuffle)
    model = linear_model()
    model.fit(batches, shuffle=False, epochs=2, verbose=0)
    model.evaluate(batches, verbose=0)
    assert model.predict(ArrayBatches(NoWhole(X), batch_size=4, shuffle=False), verbose=0).shape == (ROWS, 1)


def test_fit_on_batches_equals_fit_on_arrays(matrices):
    model, reference = linear_model(), linear_model()
    history = model.fit(ArrayBatches(*matrices, batch_size=6, shuffle=False), shuffle=False, epochs=3, verbose=0)
    wanted = reference.fit(X, Y, batch_size=6, shuffle=False, epochs=3, verbose=0)
    np.testing.assert_allclose(history.history["loss"], wanted.history["loss"], rtol=1e-6)
    np.testing.assert_allclose(model.layers[0].kernel.numpy(), reference.layers[0].kernel.numpy(), rtol=1e-5)


def test_fit_honours_sample_weights_and_class_weights():
    labels, weights = (Y % 2).astype(np.int64), np.linspace(0, 1, ROWS, dtype=np.float32)
    pairs = [
        (ArrayBatches(X, labels, weights, batch_size=6, shuffle=False), {}, {"sample_weight": weights}),
        (ArrayBatches(X, labels, batch_size=6, shuffle=False), {"class_weight": {0: 1.0, 1: 3.0}}, None),
    ]
    for batches, options, array_options in pairs:
        model, reference = linear_model(), linear_model()
        model.fit(batches, shuffle=False, verbose=0, **options)
        reference.fit(X, labels, batch_size=6, shuffle=False, verbose=0, **(array_options or options))
        np.testing.assert_allclose(model.layers[0].kernel.numpy(), reference.layers[0].kernel.numpy(), rtol=1e-5)


@pytest.mark.parametrize("workers", [1, 2])
def test_fit_takes_a_new_order_each_epoch(matrices, workers):
    batches = ArrayBatches(*matrices, batch_size=6, seed=0, workers=workers)
    seen = []
    watch = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: seen.append(batches.epoch))
    linear_model().fit(batches, shuffle=False, epochs=3, callbacks=[watch], verbose=0)
    assert len(set(seen)) == 3


@pytest.mark.parametrize("shuffle", [True, False, "batch"])
def test_keras_itself_takes_hdf5_matrices_in_fit_evaluate_and_predict(matrices, shuffle):
    x, y = matrices
    model, reference = linear_model(), linear_model()
    for one, data in ((model, (x, y)), (reference, (X, Y))):
        keras.utils.set_random_seed(3)
        one.fit(*data, batch_size=6, shuffle=shuffle, epochs=2, validation_data=data, verbose=0)
    np.testing.assert_array_equal(model.layers[0].kernel.numpy(), reference.layers[0].kernel.numpy())
    assert model.evaluate(x, y, batch_size=7, verbose=0) == reference.evaluate(X, Y, batch_size=7, verbose=0)
    np.testing.assert_array_equal(model.predict(x, verbose=0), reference.predict(X, verbose=0))


def test_keras_splits_hdf5_matrices_for_validation(matrices):
    model, reference = linear_model(), linear_model()
    options = {"batch_size": 6, "shuffle": False, "validation_split": 0.25, "verbose": 0}
    found, wanted = model.fit(*matrices, **options).history, reference.fit(X, Y, **options).history
    assert found == wanted


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X, Y[1:]), {}, ValueError, r"same number of rows.*x: \[23\], y: \[22\]"),
        ((X[:0], Y[:0]), {}, ValueError, "at least 1"),
        ((X, None, Y), {}, ValueError, "y must be given along with sample_weight"),
        ((X,), {"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ((X,), {"batch_size": 2.5}, TypeError, "float"),
        ((X,), {"shuffle": "rows"}, ValueError, "shuffle must be True, False or .batch., got 'rows'"),
        (([1.0, 2.0],), {}, TypeError, "x must hold arrays with rows, got float"),
        ((X, 3), {}, TypeError, "y must hold arrays with rows, got int"),
    ],
)
def test_wrong_arguments_are_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ArrayBatches(*arguments, **options)


@pytest.mark.parametrize("index", [6, -7])
def test_a_batch_past_the_end_is_an_index_error(index):
    with pytest.raises(IndexError, match=rf"from 0 to 5, got {index}"):
        ArrayBatches(X, batch_size=4)[index]
