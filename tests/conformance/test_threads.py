"""What users of multi_gpu_model complained about, and what must be true here; each test names the threads.

Where another file holds a complaint's tests: files in test_files.py and tests/keras/h5_files/test_by_name.py, old
parallel files in tests/keras/h5_files/test_convert.py, `gpus` in test_gpus.py, metrics, losses, masks and
BatchNormalization in tests/exactness/, wrong input in test_bad_input.py.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras.src.losses.losses import LossFunctionWrapper

import fastdp
from fastdp.utils import load_model

layers = keras.layers
ROWS = 22
X = np.random.default_rng(0).normal(size=(ROWS, 3)).astype("float32")
Y = np.random.default_rng(1).normal(size=(ROWS, 1)).astype("float32")
FIT = {"batch_size": 8, "shuffle": False, "verbose": 0}


def build() -> keras.Model:
    return keras.Sequential([keras.Input((3,)), layers.Dense(4, activation="tanh"), layers.Dense(1)], name="net")


def made(gpus: Any, **options: Any) -> keras.Model:
    """A compiled model, plain where `gpus` is None, with the same weights each time."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(2)
    model = build() if gpus is None else fastdp.wrap(build(), gpus=gpus, **options)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), keras.losses.MeanSquaredError(), metrics=["mae"])
    return model


def assert_same_weights(one: keras.Model, many: keras.Model) -> None:
    for expected, found in zip(one.get_weights(), many.get_weights(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


# Saving: keras-team/keras #8764 #9548 #8446 #8463 #11253 #9197.


@pytest.mark.parametrize("ending", ["keras", "h5", "weights.h5"])
def test_checkpoints_of_every_second_batch_are_those_of_one_device(ending: str, tmp_path: Path) -> None:
    for name, gpus in (("one", None), ("many", 3)):
        pattern = str(tmp_path / name / f"{{epoch}}-{{batch}}.{ending}")
        callback = keras.callbacks.ModelCheckpoint(pattern, save_freq=2, save_weights_only=ending == "weights.h5")
        made(gpus).fit(X, Y, epochs=2, callbacks=[callback], **FIT)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(files) == 3
    assert files == sorted(path.name for path in (tmp_path / "many").iterdir())
    for file in files:
        pair = [build(), build()]
        for model, name in zip(pair, ("one", "many"), strict=True):
            model.load_weights(tmp_path / name / file)
        assert_same_weights(*pair)


@pytest.mark.parametrize("gpus", [None, 1, 2, 5])
@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_a_checkpoint_resumes_with_the_same_losses_on_any_number_of_devices(
    gpus: Any, ending: str, tmp_path: Path
) -> None:
    whole = made(3)
    path = tmp_path / f"last.{ending}"
    whole.fit(X, Y, epochs=2, callbacks=[keras.callbacks.ModelCheckpoint(path)], **FIT)
    expected = whole.fit(X, Y, epochs=3, **FIT).history
    model = load_model(path)
    if gpus is not None:
        loaded, model = model, fastdp.wrap(model, gpus=gpus)
        model.compile(loaded.optimizer, loaded.loss, metrics=["mae"])
    found = model.fit(X, Y, epochs=3, **FIT).history
    for key in ("loss", "mae"):
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-5)
    assert_same_weights(whole, model)


class Stop(keras.callbacks.Callback):
    """Breaks off after so many batches, as a killed process would."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("gpus", [1, 5])
def test_a_backup_in_the_middle_of_an_epoch_resumes_on_another_number_of_devices(gpus: int, tmp_path: Path) -> None:
    """The batches from the backup on are trained, as Keras does it: the epoch's first ones are seen again."""

    def resumed(first: Any, then: Any, folder: Path) -> keras.Model:
        backup = keras.callbacks.BackupAndRestore(folder, save_freq=1)
        with pytest.raises(KeyboardInterrupt):
            made(first).fit(X, Y, epochs=3, callbacks=[backup, Stop(5)], **FIT)
        model = made(then)
        model.fit(X, Y, epochs=3, callbacks=[keras.callbacks.BackupAndRestore(folder, save_freq=1)], **FIT)
        return model

    one, many = resumed(None, None, tmp_path / "one"), resumed(3, gpus, tmp_path / "many")
    assert int(one.optimizer.iterations) == int(many.optimizer.iterations)
    assert_same_weights(one, many)


# Callbacks: keras-team/keras #9043.


class Reads(keras.callbacks.Callback):
    """Keeps what a callback may look at, as plain numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        weights = [float(np.abs(w).sum()) for w in self.model.get_weights()]
        self.seen += [int(self.model.optimizer.iterations), float(self.model.optimizer.learning_rate), *weights]
        self.seen += [logs["loss"], logs["mae"], self.model.count_params(), self.model.stop_training]

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seen += [float(np.abs(self.model.predict(X, verbose=0)).sum()), *self.model.evaluate(X, Y, verbose=0)]


def test_all_callbacks_together_see_what_they_see_of_a_plain_model(tmp_path: Path) -> None:
    found = []
    for gpus in (None, 3):
        reads, losses = Reads(), []
        callbacks = [
            keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=10.0),
            keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.9),
            keras.callbacks.EarlyStopping("val_loss", patience=2, min_delta=10.0, restore_best_weights=True),
            keras.callbacks.TerminateOnNaN(),
            keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs, keep=losses: keep.append(logs["val_mae"])),
            keras.callbacks.CSVLogger(tmp_path / "log.csv", append=True),
            reads,
        ]
        model = made(gpus)
        history = model.fit(X, Y, epochs=9, validation_data=(X, Y), callbacks=callbacks, **FIT)
        found.append([*reads.seen, *losses, *np.concatenate([w.ravel() for w in model.get_weights()])])
        assert history.epoch == [0, 1, 2], "stopped early"
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-6)
    lines = (tmp_path / "log.csv").read_text().splitlines()
    table = np.array([line.split(",") for line in lines[1:]], float)
    np.testing.assert_allclose(table[3:], table[:3], rtol=1e-5)


class Sets(keras.callbacks.Callback):
    """Sets weights and the learning rate by all the ways there are, at the boundaries of batches."""

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        net = self.model.template if isinstance(self.model, fastdp.ParallelModel) else self.model
        if batch == 1:
            net.layers[0].set_weights([w * 0.5 for w in net.layers[0].get_weights()])
        if batch == 2:
            net.layers[1].kernel.assign(net.layers[1].kernel * 2.0)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch == 0:
            self.model.set_weights([w + 0.25 for w in self.model.get_weights()])
        if batch == 1:
            self.model.optimizer.learning_rate = 0.02
        if batch == 2:
            slot = self.model.optimizer.variables[2]
            slot.assign(slot * 0.0)


@pytest.mark.parametrize(
    "options", [{}, {"update": "each"}, {"compile": "trace"}], ids=["first updates", "each updates", "captured"]
)
def test_what_a_callback_sets_at_the_boundary_of_a_batch_counts_on_all_devices(options: dict[str, Any]) -> None:
    one, many = made(None), made(3, check_replicas=True, **options)
    for model in (one, many):
        model.fit(X, Y, epochs=3, callbacks=[Sets()], **FIT)
    assert_same_weights(one, many)


class FreezesAndChanges(keras.callbacks.Callback):
    """Freezes a layer for the second epoch, in its middle, and takes another optimizer for the third."""

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        net = self.model.template if isinstance(self.model, fastdp.ParallelModel) else self.model
        net.layers[0].trainable = self.epoch != 1 or batch != 1

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.epoch = epoch
        if epoch == 2:
            self.model.optimizer = keras.optimizers.SGD(0.01)


@pytest.mark.parametrize(
    "options", [{}, {"update": "each"}, {"compile": "trace"}], ids=["first updates", "each updates", "captured"]
)
def test_layers_that_a_callback_freezes_and_its_optimizer_count_from_the_next_batch_on(options: dict[str, Any]) -> None:
    one, many = made(None), made(3, check_replicas=True, **options)
    for model in (one, many):
        model.fit(X, Y, epochs=3, callbacks=[FreezesAndChanges()], **FIT)
    assert_same_weights(one, many)


TENSORBOARD = """
    import glob
    import fastdp
    import keras
    import numpy as np
    import tensorflow as tf

    fastdp.set_virtual_devices(3)
    x = np.random.default_rng(0).normal(size=(22, 3)).astype("float32")

    def written(gpus):
        keras.utils.clear_session()
        keras.utils.set_random_seed(2)
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(1)])
        model = model if gpus is None else fastdp.wrap(model, gpus=gpus)
        model.compile("sgd", "mse", metrics=["mae"])
        board = keras.callbacks.TensorBoard(f"logs{gpus}", histogram_freq=1, update_freq=1, write_graph=False)
        data = {"validation_data": (x, x[:, :1]), "batch_size": 8, "shuffle": False, "verbose": 0}
        model.fit(x, x[:, :1], epochs=2, callbacks=[board], **data)
        found = {}
        for file in sorted(glob.glob(f"logs{gpus}/**/*.v2", recursive=True)):
            for event in tf.compat.v1.train.summary_iterator(file):
                for value in event.summary.value:
                    key = (file.split("/")[1], value.tag, event.step)
                    found[key] = tf.make_ndarray(value.tensor)
        return found

    one, many = written(None), written(3)
    assert len(one) > 20 and list(one) == list(many), (list(one), list(many))
    for key, value in one.items():
        np.testing.assert_allclose(many[key], value, rtol=1e-4, atol=1e-5, err_msg=str(key))
    print("the same", len(one))
"""


@pytest.mark.slow
def test_tensorboard_logs_are_those_of_one_device(tmp_path: Path) -> None:
    missing = [name for name in ("tensorflow", "tensorboard") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"keras.callbacks.TensorBoard needs {' and '.join(missing)}, not installed here")
    (tmp_path / "board.py").write_text(textwrap.dedent(TENSORBOARD), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "board.py"],
        cwd=tmp_path,
        env={**os.environ, "KERAS_BACKEND": "torch", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the same" in done.stdout


# Memory: keras-team/keras #12280 and relatives.


def test_the_loss_is_computed_by_each_replica_for_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Keras 2 the loss and the metrics of the whole batch lived on the first GPU, which ran out of memory."""
    seen: list[tuple[str, int]] = []
    original = (
        LossFunctionWrapper.call
    )  # where Keras's own losses have it from: a `call` of its own would be the user's

    def call(self: Any, y: Any, predicted: Any) -> Any:
        seen.append((threading.current_thread().name.rsplit("-")[-1], int(predicted.shape[0])))
        return original(self, y, predicted)

    model = made(4)
    model.train_on_batch(X, Y)  # the first batch also tries rows out
    monkeypatch.setattr(LossFunctionWrapper, "call", call)
    seen.clear()
    model.train_on_batch(X, Y)
    assert sorted(rows for _, rows in seen) == [5, 5, 6, 6]
    assert len({thread for thread, _ in seen}) == 4


def test_only_the_listed_devices_work() -> None:
    """TensorFlow took memory on all GPUs that it saw."""
    fastdp.set_virtual_devices(0)
    before = set(threading.enumerate())
    fastdp.set_virtual_devices(6)
    try:
        fastdp.wrap(build(), gpus=[1, 4]).predict(X, verbose=0)
        started = {thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("fastdp")}
        assert started
        assert {"4"} <= {name[-1] for name in started} <= {"1", "4"}, started  # the caller may do the part of the first
    finally:
        fastdp.set_virtual_devices(8)


# Uneven batches: keras-team/keras #11844 #11434 #11858.


@pytest.mark.parametrize("rows", [1, 2, 5, 9, 17])
def test_any_number_of_rows_trains_and_tests_as_one_device(rows: int) -> None:
    one, many = made(None), made(8)
    for model in (one, many):
        model.fit(X[:rows], Y[:rows], epochs=2, validation_data=(X[-rows:], Y[-rows:]), **FIT)
    for key, expected in one.history.history.items():
        np.testing.assert_allclose(many.history.history[key], expected, rtol=1e-5, atol=1e-7)
    assert_same_weights(one, many)
    assert many.predict(X[:rows], batch_size=8, verbose=0).shape == (rows, 1)


def test_batch_norm_of_every_odd_number_of_rows_stays_finite() -> None:
    """#11858: an empty slice made NaN."""
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization(momentum=0.5), layers.Dense(1)])
    parallel = fastdp.multi_gpu_model(model, gpus=8)
    parallel.compile("sgd", "mse")
    for rows in range(1, 20, 2):
        assert np.isfinite(parallel.train_on_batch(X[:rows], Y[:rows]))
    assert all(np.isfinite(w).all() for w in parallel.get_weights())


# Generators and workers: keras-team/keras #11634 #10948.


class Batches(keras.utils.PyDataset):
    """Three batches; fails at one of them where told to."""

    def __init__(self, fails: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.fails = fails

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        if self.fails and index == 1:
            raise OSError("the disk is gone")
        rows = slice(8 * index, 8 * index + 8)
        return X[rows], Y[rows]


def endless(fails: bool) -> Iterator[Any]:
    batches = Batches(fails)
    while True:
        yield from (batches[i] for i in range(3))


@pytest.mark.parametrize(
    "source",
    [lambda f: Batches(f, workers=2), lambda f: Batches(f, workers=2, max_queue_size=1), endless],
    ids=["workers", "one in the queue", "generator"],
)
def test_a_source_that_fails_raises_leaves_no_thread_and_the_model_trains_on(source: Callable[[bool], Any]) -> None:
    model = made(3)
    before = {thread for thread in threading.enumerate() if thread.is_alive()}
    with pytest.raises(OSError, match="the disk is gone"):
        model.fit(source(True), steps_per_epoch=3, epochs=2, shuffle=False, verbose=0)
    left = [thread for thread in threading.enumerate() if thread not in before]
    for thread in left:
        thread.join(60)
    assert not [thread.name for thread in left if thread.is_alive() and not thread.name.startswith("fastdp")]
    model.compile("sgd", "mse")
    losses = model.fit(source(False), steps_per_epoch=3, epochs=2, shuffle=False, verbose=0).history["loss"]
    assert np.isfinite(losses).all()
    # The order in which Keras takes the batches of several workers varies: what follows has none.
    one = made(None)
    one.set_weights(model.get_weights())
    for each in (one, model):
        each.compile("sgd", "mse")
        each.fit(Batches(), epochs=2, shuffle=False, verbose=0)
    assert_same_weights(one, model)
