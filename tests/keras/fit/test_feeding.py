"""What `fit`, `evaluate` and `predict` are fed is read ahead by a thread, and is what plain Keras would get."""

import gc
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import ahead_threads
import h5py
import keras
import numpy as np
import pytest
from ahead_threads import LIMIT, alive, wait_until
from fed_sources import BATCHES, SOURCES, Data, Stop, X, Y, batch, generator
from keras.src.trainers.data_adapters.tf_dataset_adapter import TFDatasetAdapter

import fastdp
from fastdp.data import ahead_guard, ring
from fastdp.keras.fit import sources
from fastdp.options import Options


@pytest.fixture(autouse=True)
def _two_devices(monkeypatch):
    monkeypatch.setattr(ahead_guard, "LOOK_SECONDS", 0.0)
    fastdp.set_virtual_devices(2, kind="host")
    yield
    fastdp.set_virtual_devices(0)
    gc.collect()
    wait_until(lambda: not alive())


def model(ahead=2):
    keras.utils.set_random_seed(1)
    parallel = fastdp.wrap(keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]), gpus=2, compile=None)
    parallel.compile("sgd", "mse")
    parallel.prefetch = ahead
    return parallel


class IterDataset:
    """By the protocol of grain."""

    def __iter__(self):
        return generator(BATCHES)


IterDataset.__module__ = "grain._src.python.dataset"


def trained(source, ahead, **options):
    parallel = model(ahead)
    arguments = {"shuffle": False, **SOURCES[source]()} if source in SOURCES else {}
    history = parallel.fit(**{**arguments, "epochs": 2, "verbose": 0, **options}).history
    return history, parallel.get_weights(), parallel.report()


@pytest.mark.parametrize("source", SOURCES)
def test_each_source_trains_as_without_a_thread_and_is_read_ahead(source, monkeypatch):
    monkeypatch.setattr(sources, "LARGE_NBYTES", 1)
    history, weights, report = trained(source, 2)
    plain, expected, still = trained(source, 0)
    assert history == plain
    for one, other in zip(weights, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    (entry,), (before,) = report.inputs, still.inputs
    assert entry["read_ahead"] >= 7 > before["read_ahead"] == 0
    assert entry["batches"] == before["batches"] >= 12
    assert "read ahead by" in entry["how"]
    assert 0 < entry["wait_per_step"] <= entry["waited_seconds"]
    assert "How batches came" in str(report)


def slow(count, seconds):
    for one in generator(count):
        threading.Event().wait(seconds)
        yield one


def test_by_default_a_thread_reads_what_takes_long_to_make_and_leaves_alone_what_does_not():
    quick = trained("generator", None)[2].inputs[0]
    assert quick["read_ahead"] == 0
    assert "faster than a thread would hand them over" in quick["how"]
    slow_one = trained("none", None, x=slow(12, 2 * ring.WORTH_SECONDS), steps_per_epoch=6, shuffle=False)[2].inputs[0]
    assert slow_one["read_ahead"] >= 6
    assert "read ahead by a thread, up to 2 batches" in slow_one["how"]


def test_grain_and_tf_data_are_read_ahead_by_their_protocol():
    source = sources.source_of(type("Adapter", (), {"_dataset": IterDataset()})(), [])
    assert (source.guard.why, source.copies, source.by) == (None, True, None)
    source = sources.source_of(object.__new__(TFDatasetAdapter), [])
    assert (source.name, source.guard, source.by) == ("a tf.data.Dataset", None, None)


def test_evaluate_and_predict_are_fed_too():
    parallel, plain = model(2), model(0)
    assert parallel.evaluate(Data(), verbose=0) == plain.evaluate(Data(), verbose=0)
    np.testing.assert_array_equal(parallel.predict(Data(), verbose=0), plain.predict(Data(), verbose=0))
    names = []

    class Looking(Data):
        def __getitem__(self, i):
            names.append(threading.current_thread() in alive())
            return super().__getitem__(i)

    parallel.predict(Looking(), verbose=0)
    assert names == [False, False, *[True] * 5]


def test_validation_data_are_fed_in_each_epoch():
    runs = [model(ahead).fit(X, Y, validation_data=Data(), epochs=2, verbose=0).history for ahead in (2, 0)]
    assert runs[0] == runs[1]


def test_a_generator_is_asked_for_no_batch_beyond_the_epoch_and_goes_on_in_the_next_fit():
    asked = []
    data, parallel = generator(asked=asked), model()
    for fits in (1, 2):
        parallel.fit(data, steps_per_epoch=5, epochs=2, verbose=0, shuffle=False)
        assert asked == list(range(10 * fits))
        assert not alive()


@pytest.mark.parametrize("error", [None, ZeroDivisionError("of the loop"), KeyboardInterrupt()])
@pytest.mark.parametrize("fetch_ahead", [False, True])
def test_a_fit_that_stops_in_mid_epoch_loses_no_batch_of_a_generator(error, fetch_ahead):
    seen, data = [], generator()

    def noted():
        for x, y in data:
            seen.append(float(x[0, 0]))
            yield x, y

    source, parallel = noted(), model()
    parallel.fetch_ahead = fetch_ahead
    try:
        parallel.fit(source, steps_per_epoch=20, verbose=0, shuffle=False, callbacks=[Stop(5, error)])
    except (ZeroDivisionError, KeyboardInterrupt) as caught:
        assert caught is error  # noqa: PT017 - one of the runs raises nothing
    assert not alive()
    trained_on = []

    class Rows(keras.callbacks.Callback):
        def on_train_batch_begin(self, step, logs=None):
            trained_on.append(step)

    before = len(seen)
    assert before > 6  # some were read ahead
    made = sources.continued(source)
    following = [float(next(made)[0][0, 0]) for _ in range(3)]
    assert following == [float(batch(i)[0][0, 0]) for i in (6, 7, 8)]


def test_an_error_of_the_data_set_reaches_the_user_with_its_own_class_and_place():
    class Fails(Data):
        def __getitem__(self, i):
            if i == 4:
                raise LookupError("batch 4 is broken")
            return super().__getitem__(i)

    steps = []
    count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda step, logs: steps.append(step))
    with pytest.raises(LookupError, match="batch 4 is broken"):
        model().fit(Fails(), verbose=0, shuffle=False, callbacks=[count])
    assert steps == [0, 1, 2, 3]


def test_a_hung_data_set_is_named():
    gate = threading.Event()

    class Hangs(Data):
        def __getitem__(self, i):
            if i == 4:
                threading.Timer(1.0, gate.set).start()
                gate.wait(LIMIT)
            return super().__getitem__(i)

    parallel = model()
    parallel._options = Options(timeout=0.3)
    with pytest.raises(fastdp.DeviceTimeoutError, match=r"next batch of the data set \(.*Hangs\) took longer"):
        parallel.fit(Hangs(), verbose=0, shuffle=False)


class Level:
    value = 0.0


class Curriculum(keras.callbacks.Callback):
    def __init__(self, level):
        super().__init__()
        self._level = level

    def on_train_batch_end(self, step, logs=None):
        self._level.value += 1.0


def looked(data, callbacks=(), draw=None):
    """What batches had when they were made; and why they were not read ahead."""
    parallel = model()
    parallel.fit(data, verbose=0, shuffle=False, callbacks=list(callbacks), steps_per_epoch=6)
    (entry,) = parallel.report().inputs
    assert entry["read_ahead"] == 0
    return entry["how"]


def test_data_that_callbacks_change_models_that_data_read_and_draws_are_not_read_ahead():
    level, seen = Level(), []

    def by_level():
        for i in range(99):
            seen.append(level.value)
            yield batch(i)

    assert "a callback refers to its Level too" in looked(by_level(), [Curriculum(level)])
    assert seen == [0, 0, 0, 1, 2, 3] or seen[2:] == [2.0, 3.0, 4.0, 5.0]  # Keras asks for the first two before
    template = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])

    def by_model():
        for i in range(99):
            x, y = batch(i)
            yield x + template.get_weights()[1], y

    assert "its code refers to the model or layer Sequential" in looked(by_model())

    def by_draws():
        for i in range(99):
            x, y = batch(i)
            yield x + np.random.rand(), y  # noqa: NPY002

    assert "NumPy's generator moves" in looked(by_draws())

    def by_keras():
        for i in range(99):
            x, y = batch(i)
            yield x + np.asarray(keras.random.uniform(())), y

    assert "Keras's generator moves" in looked(by_keras())


def fit_from_file(path, folder, kill_at=0):
    """Weights of a fit, which ends by SIGKILL behind a batch."""

    class Kill(keras.callbacks.Callback):
        left = kill_at

        def on_train_batch_end(self, step, logs=None):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    keras.utils.set_random_seed(2)
    parallel = fastdp.wrap(keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)]), gpus=2, compile=None)
    parallel.compile(keras.optimizers.Adam(0.01), "mse")
    callbacks = [fastdp.callbacks.Checkpoint(folder, every_steps=2), Kill()]
    with h5py.File(path) as file:
        options = {"batch_size": 8, "epochs": 2, "verbose": 0, "shuffle": "chunks", "callbacks": callbacks}
        parallel.fit(file["x"], file["y"], **options)
    return parallel.get_weights()


CHILD = """
import os, sys
os.environ["KERAS_BACKEND"] = "torch"
sys.path[:0] = sys.argv[3:]
import fastdp, test_feeding
fastdp.set_virtual_devices(2, kind="host")
test_feeding.fit_from_file(sys.argv[1], sys.argv[2], kill_at=17)
"""


@pytest.mark.filterwarnings("ignore:The checkpoint .* was a part of one")  # it was being written
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no SIGKILL")
def test_a_killed_fit_from_hdf5_goes_on_in_mid_epoch_with_the_same_bits(tmp_path):
    path, rng = str(tmp_path / "a.h5"), np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=rng.normal(size=(80, 8)).astype("f4"), chunks=(16, 8), compression="gzip")
        file["y"] = rng.normal(size=(80, 3)).astype("f4")
    whole = fit_from_file(path, tmp_path / "whole")
    folders = [str(Path(__file__).parent), str(Path(ahead_threads.__file__).parent)]
    child = [sys.executable, "-c", CHILD, path, str(tmp_path / "killed"), *folders]
    done = subprocess.run(child, check=False, timeout=300, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    for one, other in zip(fit_from_file(path, tmp_path / "killed"), whole, strict=True):
        np.testing.assert_array_equal(one, other)
