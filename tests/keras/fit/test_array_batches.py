"""ArrayBatches against plain arrays, and HDF5Matrix in Keras's own fit, evaluate and predict."""

import threading

import h5py
import keras
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdp.data import h5_cache, read_ahead
from fastdp.data.h5_codecs import Pipeline
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
    shuffle=st.sampled_from([True, False, "batch", "chunks"]),
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


def stored_numbers(path, rows=600, chunk=16):
    """A data set whose rows are their numbers, in chunks of 16 rows, and one of targets in other chunks."""
    numbers = np.arange(rows, dtype=np.float32)
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=np.repeat(numbers[:, None], 200, 1), chunks=(chunk, 200), compression="gzip")
        file.create_dataset("y", data=numbers[:, None], chunks=(100, 1))
    return path


def test_shuffled_chunks_mix_rows_and_decode_each_chunk_once(tmp_path, monkeypatch):
    path, decoded = stored_numbers(tmp_path / "a.h5"), []
    real = Pipeline.decode
    monkeypatch.setattr(Pipeline, "decode", lambda self, *rest: decoded.append(self.nbytes) or real(self, *rest))
    with HDF5Matrix(path, "x", 5, 590) as x, HDF5Matrix(path, "y", 5, 590) as y:
        batches = ArrayBatches(x, y, batch_size=24, shuffle="chunks", seed=3)
        batches.on_epoch_end()
        found = [batches[number] for number in range(len(batches))]
        for inputs, targets in found:
            np.testing.assert_array_equal(inputs, np.repeat(targets, 200, 1))
        order = np.concatenate([targets[:, 0] for _, targets in found]).astype(int)
        assert sorted(order) == list(range(5, 590))
        assert decoded.count(16 * 200 * 4) == 37  # the chunks that hold rows 5 to 589
        # Rows are mixed: neighbors come from different chunks, and the order is another one in the next epoch.
        assert np.mean(order[1:] // 16 == order[:-1] // 16) < 0.3
        assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.5
        batches.on_epoch_end()
        assert batches[0][1][:, 0].astype(int).tolist() != order[:24].tolist()
        again = ArrayBatches(x, y, batch_size=24, shuffle="chunks", seed=3)
        again.on_epoch_end()
        np.testing.assert_array_equal(again[5][1], found[5][1])


def test_batches_are_read_ahead_in_their_order_and_no_further_than_asked_for(matrices):
    batches = ArrayBatches(*matrices, batch_size=2, shuffle=False, ahead=3)
    read, real = [], batches._read_batch
    batches.reading._read = lambda number: read.append(number) or real(number)
    for number in (0, 1, 7, 8):
        np.testing.assert_array_equal(batches[number][0], X[2 * number : 2 * number + 2])
        batches.reading._pool.submit(lambda: None).result(10)
        assert read[-1] == number + 3
    for number in range(9, 12):
        batches[number]
    assert read == [0, 1, 2, 3, 4, 7, 8, 9, 10, 11]
    assert batches.reading.taken == 7
    batches.reading.close()


def test_an_error_of_a_batch_read_ahead_comes_with_that_batch(path):
    with h5py.File(path) as file:
        batches = ArrayBatches(file["x"], batch_size=2, shuffle=False)
        real = batches._read_batch

        def read(number):
            if number == 2:
                raise OSError("of batch 2")
            return real(number)

        batches.reading._read = read
        batches[0], batches[1]
        with pytest.raises(OSError, match="of batch 2"):
            batches[2]
        assert batches[3][0].shape == (2, 5)
        batches.reading.close()


def test_a_slow_source_is_named_and_a_dead_one_is_an_error(matrices, monkeypatch):
    batches, answer = ArrayBatches(*matrices, batch_size=2, shuffle=False), threading.Event()
    monkeypatch.setattr(read_ahead, "SLOW_SECONDS", 0.05)
    monkeypatch.setattr(read_ahead, "MOST_SECONDS", 0.2)
    batches.reading._read = lambda number: answer.wait(30)
    slow = pytest.warns(UserWarning, match=r"batch 0 of '.*data\.h5'.* has been read for")
    with slow, pytest.raises(TimeoutError, match=r"Batch 0 of '.*data\.h5' was not read in"):
        batches[0]
    answer.set()
    batches.reading.close()


def test_a_uniform_order_over_large_compressed_chunks_is_told_of(tmp_path, monkeypatch):
    path = stored_numbers(tmp_path / "a.h5")
    monkeypatch.setattr(h5_cache.ChunkCache.__init__, "__defaults__", (1 << 15,))
    told = pytest.warns(UserWarning, match=r"decodes each chunk of '/x' .* times an epoch.*shuffle=\"chunks\"")
    with HDF5Matrix(path, "x") as x, told:
        ArrayBatches(x, batch_size=10, seed=0)


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
        ((X,), {"shuffle": "rows"}, ValueError, """shuffle must be True, False, "batch" or "chunks", got 'rows'"""),
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
