"""`fastdp.callbacks.Monitor`: what it measures, where it shows and writes it, and that it changes nothing."""

from __future__ import annotations

import copy
import csv
import importlib.util
import sys
import types

import keras
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fastdp
from fastdp.callbacks import Monitor, TensorBoard

X = np.random.default_rng(0).normal(size=(22, 3)).astype("float32")
Y = X.sum(axis=1, keepdims=True)
FIT = {"batch_size": 8, "shuffle": False, "verbose": 0}


@pytest.fixture(autouse=True)
def devices(tmp_path, monkeypatch):
    """Three devices, in a folder of the test's own; plain Keras afterwards."""
    monkeypatch.chdir(tmp_path)
    fastdp.set_virtual_devices(3)
    yield
    fastdp.uninstall()
    fastdp.set_virtual_devices(0)


def plain(kind=keras.Sequential):
    keras.utils.set_random_seed(3)
    model = kind([keras.Input((3,)), keras.layers.Dense(4, activation="tanh"), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


def parallel(gpus, **options):
    made = fastdp.wrap(plain(), gpus=gpus, compile=options.pop("compile", None), **options)
    made.compile("sgd", "mse")
    return made


def rows(path="monitor.csv"):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("gpus", [1, 2, 3])
def test_epochs_and_steps_are_in_the_csv_file_with_each_device(gpus):
    made = parallel(gpus)
    history = made.fit(X, Y, epochs=2, validation_data=(X, Y), callbacks=[Monitor("csv", every=2)], **FIT).history
    found = rows()
    assert [(row["kind"], row["epoch"], row["step"]) for row in found] == [
        ("steps", "0", "2"), ("epoch", "0", "3"), ("steps", "1", "4"), ("steps", "1", "6"), ("epoch", "1", "6"),
    ]  # fmt: skip
    epochs = [row for row in found if row["kind"] == "epoch"]
    for name in ("loss", "val_loss"):
        assert [float(row[name]) for row in epochs] == pytest.approx(history[name])
    for row in found:
        assert float(row["samples_per_second"]) > 0
        assert 0 <= float(row["input_wait"]) <= 1
        assert float(row["memory_mb"]) > 10
        assert [0 < float(row[f"utilization_{rank}"]) <= 1 for rank in range(gpus)] == [True] * gpus
        assert [float(row[f"memory_mb_{rank}"]) > 0 for rank in range(gpus)] == [True] * gpus
        assert f"utilization_{gpus}" not in row
    for row in epochs:
        ratio = float(row["samples_per_second"]) / float(row["steps_per_second"])
        assert ratio == pytest.approx(len(X) / 3, rel=1e-3)
    assert history["samples_per_second"] == pytest.approx([float(row["samples_per_second"]) for row in epochs], rel=0.2)


@pytest.mark.parametrize("kind", ["plain", "installed"])
def test_plain_models_and_those_under_install_are_measured_too(kind):
    if kind == "installed":
        fastdp.install(gpus=3, compile=None)
    model = plain()
    model.fit(X, Y, epochs=2, validation_split=0.1, callbacks=[Monitor("csv")], **FIT)
    for row in rows():
        ratio = float(row["samples_per_second"]) / float(row["steps_per_second"])
        assert ratio == pytest.approx(19 / 3, rel=1e-3)
        assert ("utilization_2" in row) == (kind == "installed")


class OwnStep(keras.Sequential):
    """A model that trains by a step of its own, which tells Keras no rows."""

    def train_step(self, data):
        x, y = data
        self.zero_grad()
        loss = self.compute_loss(y=y, y_pred=self(x, training=True))
        loss.backward()
        weights = self.trainable_weights
        self.optimizer.apply([weight.value.grad for weight in weights], weights)
        return {"loss": loss}


@pytest.mark.parametrize("split", [False, True])
def test_a_train_step_of_the_models_own_is_counted_in_rows_where_fastdp_runs_it(split):
    model = plain(OwnStep)
    if split:
        model = fastdp.wrap(model, gpus=2)
        model.compile("sgd", "mse")
    history = model.fit(X, Y, callbacks=[Monitor("csv")], **FIT).history
    (row,) = rows()
    assert float(row["steps_per_second"]) > 0
    assert ("samples_per_second" in history) == split
    if split:
        assert float(row["samples_per_second"]) / float(row["steps_per_second"]) == pytest.approx(22 / 3, rel=1e-3)


@pytest.mark.parametrize("gpus", [None, 1, 3])
def test_weights_are_the_same_bit_for_bit_and_steps_are_captured(gpus):
    def weights(callbacks):
        model = plain() if gpus is None else parallel(gpus, compile="trace")
        model.fit(X, Y, epochs=3, callbacks=callbacks, **FIT)
        if gpus is not None:
            assert {entry["how"] for entry in model.report()} == {"traced"}
        return model.get_weights()

    without = weights([])
    watched = weights([Monitor(["csv", "tensorboard"], every=1, interval=0)])
    for one, other in zip(without, watched, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_progress_bar_tells_the_numbers_and_can_be_left_alone(capsys):
    made = parallel(2)
    made.fit(X, Y, batch_size=8, verbose=1, callbacks=[Monitor(interval=0)])
    shown = capsys.readouterr().out
    for name in ("loss", "samples_per_second", "input_wait", "memory_mb", "utilization_0", "utilization_1"):
        assert f" - {name}: " in shown
    history = made.fit(X, Y, batch_size=8, verbose=1, callbacks=[Monitor(bar=False)]).history
    assert "samples_per_second" not in capsys.readouterr().out
    assert set(history) == {"loss"}


def test_many_devices_have_one_mean_in_the_bar_and_each_its_own_in_the_log():
    fastdp.set_virtual_devices(5)
    history = parallel(5).fit(X, Y, callbacks=[Monitor("csv")], **FIT).history
    assert {name for name in history if "utilization" in name} == {"utilization"}
    assert float(rows()[0]["utilization_4"]) > 0


class Waits(keras.utils.PyDataset):
    """Batches that come late, by the test's clock."""

    def __init__(self, clock):
        super().__init__()
        self._clock = clock

    def __len__(self):
        return 4

    def __getitem__(self, index):
        self._clock[0] += 3.0
        return X[:8], Y[:8]


def test_waiting_for_input_is_told_from_steps_and_validation_is_left_out(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    class Slow(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            clock[0] += 1.0

        def on_test_batch_begin(self, batch, logs=None):
            clock[0] += 100.0

    plain().fit(Waits(clock), validation_data=(X, Y), verbose=0, callbacks=[Monitor("csv"), Slow()])
    (row,) = rows()
    assert float(row["input_wait"]) == pytest.approx(0.75)
    assert float(row["samples_per_second"]) == pytest.approx(2.0)
    assert float(row["steps_per_second"]) == pytest.approx(0.25)


def test_a_second_fit_goes_on_and_a_second_run_appends_if_asked():
    made = parallel(2)
    monitor = Monitor("csv")
    for epoch in range(2):
        made.fit(X, Y, epochs=epoch + 1, initial_epoch=epoch, callbacks=[monitor], **FIT)
    made.fit(X, Y, callbacks=[Monitor("csv", append=True)], **FIT)
    assert [row["step"] for row in rows()] == ["3", "6", "9"]
    made.fit(X, Y, callbacks=[Monitor("csv")], **FIT)
    assert [row["step"] for row in rows()] == ["3"]


def scalars(folder):
    found = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_event_files_have_epochs_and_steps(tmp_path):
    parallel(2).fit(X, Y, epochs=2, callbacks=[Monitor(["tensorboard", tmp_path / "other"], every=2)], **FIT)
    found = scalars("logs/monitor")
    assert [step for step, _ in found["monitor_epoch/samples_per_second"]] == [0, 1]
    assert [step for step, _ in found["monitor/utilization_1"]] == [2, 4, 6]
    assert {"monitor/loss", "monitor_epoch/memory_mb_0"} <= set(found)
    assert set(scalars(tmp_path / "other")) == set(found)


class Fails(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 1:
            raise ArithmeticError("a callback's own")


def test_after_an_error_files_are_closed_and_have_what_was_written(tmp_path):
    made, monitor = parallel(2), Monitor(["csv", "tensorboard"], every=1)
    with pytest.raises(ArithmeticError, match="a callback's own"):
        made.fit(X, Y, callbacks=[monitor, Fails()], **FIT)
    assert [row["step"] for row in rows()] == ["1", "2"]
    assert [step for step, _ in scalars("logs/monitor")["monitor/loss"]] == [1, 2]
    assert monitor._logs[1]._file._writer is None
    made.fit(X, Y, callbacks=[monitor], **FIT)
    assert [row["step"] for row in rows()] == ["1", "2", "3", "4", "5", "5"]


def test_with_a_plain_model_files_are_closed_by_with_or_with_the_callback(tmp_path):
    with Monitor("tensorboard") as monitor, pytest.raises(ArithmeticError):
        plain().fit(X, Y, callbacks=[monitor, Fails()], **FIT)
    assert monitor._logs[0]._file._writer is None
    closing = Monitor("tensorboard")._closing
    assert not closing.alive


class Run:
    """A run of Weights & Biases, as its documentation describes it."""

    def __init__(self):
        self.logged, self.metrics, self.finished = [], [], False

    def define_metric(self, name, step_metric=None, hidden=None):
        self.metrics.append((name, step_metric))

    def log(self, data):
        self.logged.append(data)

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the module wandb, without an active run."""
    made = types.ModuleType("wandb")
    made.__spec__ = importlib.util.spec_from_loader("wandb", loader=None)
    made.run, made.begun = None, []
    made.init = lambda: made.begun.append(Run()) or made.begun[-1]
    monkeypatch.setitem(sys.modules, "wandb", made)
    return made


def test_wandb_gets_a_run_of_its_own_if_there_is_none(wandb):
    parallel(2).fit(X, Y, callbacks=[Monitor("wandb", every=3)], **FIT)
    (run,) = wandb.begun
    assert run.finished
    assert run.metrics == [("fastdp/step", None), ("fastdp/*", "fastdp/step")]
    steps, epoch = run.logged
    assert steps["fastdp/step"] == epoch["fastdp/step"] == 3
    assert {"fastdp/loss", "fastdp/samples_per_second", "fastdp/utilization_1"} <= set(steps)
    assert {"fastdp/epoch/loss", "fastdp/epoch/samples_per_second"} <= set(epoch)


def test_an_active_run_of_wandb_is_used_and_left_open(wandb):
    wandb.run = Run()
    parallel(2).fit(X, Y, callbacks=[Monitor("wandb")], **FIT)
    assert (wandb.begun, wandb.run.finished, len(wandb.run.logged)) == ([], False, 1)


def test_missing_libraries_are_errors_with_the_remedy(monkeypatch):
    find = importlib.util.find_spec
    missing = ("wandb", "tensorboard", "tensorboardX")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find(name))
    with pytest.raises(ImportError, match=r"needs the package wandb.*pip install 'fastdp\[wandb\]'"):
        Monitor("wandb")
    with pytest.raises(ImportError, match=r"tensorboard \(or tensorboardX\).*pip install 'fastdp\[tensorboard\]'"):
        Monitor("tensorboard")


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"logs": "tensorbord"}, ValueError, r'`logs` must be "csv", .*\(./tensorbord\).*Received: \'tensorbord\''),
        ({"logs": 3}, TypeError, "`logs` must be a name, a path, or a list of them. Received: a int"),
        ({"every": 0}, ValueError, "`every` must be a number of steps, at least 1, or None. Received: 0"),
        ({"every": 2.5}, ValueError, "`every` must be a number of steps, at least 1, or None. Received: 2.5"),
        ({"every": "epoch"}, ValueError, "`every` must be a number of steps, at least 1, or None. Received: 'epoch'"),
        ({"interval": -1}, ValueError, "`interval` must be a number of seconds, at least 0. Received: -1"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, said):
    with pytest.raises(error, match=said):
        Monitor(**arguments)


def test_a_callback_of_another_thread_that_comes_late_adds_no_waiting(monkeypatch):
    """On GPUs Keras tells of a batch's end in another thread, perhaps after the next batch has begun."""
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    assert not Monitor().async_safe
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monitor = Monitor()
    assert monitor.async_safe
    monitor.set_model(plain())
    monitor.on_train_begin()
    monitor.on_epoch_begin(0)
    for batch in range(3):  # each takes two seconds; its end is told in the middle of the next one
        monitor.on_train_batch_begin(batch)
        clock[0] += 1.0
        if batch:
            monitor.on_train_batch_end(batch - 1, {})
        clock[0] += 1.0
    assert (monitor._counts.waited, monitor._counts.steps) == (0.0, 2)


def test_copies_as_tuners_make_them_have_the_same_arguments_and_begin_anew():
    x, y = np.ones((8, 3), np.float32), np.ones((8, 1), np.float32)
    monitor, board = Monitor(logs="m.csv", every=1, append=True), TensorBoard("board", update_freq=2, histogram_freq=1)
    for _ in range(2):
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        model.fit(x, y, batch_size=4, verbose=0, callbacks=copy.deepcopy([monitor, board]))
    assert [row["step"] for row in rows("m.csv") if row["kind"] == "steps"] == ["1", "2", "3", "4"]
    copied = copy.deepcopy(board)
    assert (copied.log_dir, copied.update_freq, copied.histogram_freq) == ("board", 2, 1)
