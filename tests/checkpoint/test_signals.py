"""SIGTERM and Ctrl-C let a step end and save; the process then ends as it should, and handlers are as before."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import keras
import numpy as np
import pytest
from killed_runs import Moment, run
from torch import nn

import fastdp
from fastdp.callbacks import Checkpoint

X = np.zeros((12, 2), "float32")
HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}


@pytest.fixture(autouse=True)
def handlers_are_as_before():
    yield
    assert {number: signal.getsignal(number) for number in HANDLERS} == HANDLERS


@pytest.mark.parametrize(("script", "how"), [("torch_run", "loop"), ("keras_run", "wrapped")])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 1)])
def test_a_signal_ends_the_process_with_its_status_and_one_line(tmp_path, script, how, number, status):
    """The status of an interrupt is that of multiprocessing; plain Python's is 130."""
    command = (Path(__file__).with_name(f"{script}.py"), 2, how, tmp_path / "run", tmp_path / "run.pt")
    printed = run(*command, moment=Moment(5, 0.0, number), status=status)
    told = [line for line in printed.splitlines() if line.startswith("fastdp: ")]
    assert len(told) == 1
    newest = max(path.name for path in (tmp_path / "run").glob("step-*"))
    assert told[0] == f"fastdp: {number.name}: saved {tmp_path / 'run' / newest}"
    assert int(newest.removeprefix("step-")) > 1
    assert ("KeyboardInterrupt" in printed) is (number == signal.SIGINT)
    run(*command)


def model():
    made = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    made.compile("sgd", "mse")
    return made


class Sends(keras.callbacks.Callback):
    """Sends a signal in the second batch."""

    def __init__(self, number, error=None):
        super().__init__()
        self.number, self.error, self.after = number, error, 0

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 1:
            os.kill(os.getpid(), self.number)
            if self.error is not None:
                raise self.error
        self.after = batch


def test_ctrl_c_in_plain_keras_saves_after_the_step_and_raises(tmp_path, capsys):
    sends = Sends(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        model().fit(X, X[:, :1], batch_size=2, verbose=0, callbacks=[sends, Checkpoint(tmp_path)])
    assert sends.after == 1
    assert capsys.readouterr().err == f"fastdp: SIGINT: saved {tmp_path / 'step-00000002'}\n"


def test_a_handler_of_ones_own_runs_after_the_saving_and_training_goes_on(tmp_path):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(sorted(tmp_path.glob("step-*"))))
    try:
        sends = Sends(signal.SIGTERM)
        model().fit(X, X[:, :1], batch_size=2, verbose=0, callbacks=[sends, Checkpoint(tmp_path)])
        assert signal.getsignal(signal.SIGTERM) is not HANDLERS[signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [[tmp_path / "step-00000002"]]
    assert sends.after == 5


def test_a_second_signal_does_not_wait(tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        fastdp.Checkpoint(tmp_path, model=nn.Linear(1, 1)),
    ):
        twice()
    assert list(tmp_path.glob("step-*")) == []


def twice():
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)


def test_after_a_fit_that_has_failed_signals_come_through(tmp_path):
    checkpoint = Checkpoint(tmp_path)
    error = KeyError("mine")
    try:
        with pytest.raises(KeyError, match="mine"):
            model().fit(X, X[:, :1], batch_size=2, verbose=0, callbacks=[Sends(signal.SIGWINCH, error), checkpoint])
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        checkpoint.close()


def test_on_another_thread_signals_are_left_alone(tmp_path):
    found = {}

    def work():
        with fastdp.Checkpoint(tmp_path, model=nn.Linear(1, 1)):
            found.update({number: signal.getsignal(number) for number in HANDLERS})

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert found == HANDLERS


def test_a_fit_that_cannot_begin_leaves_no_handler(tmp_path):
    model().fit(X, X[:, :1], verbose=0, callbacks=[Checkpoint(tmp_path)])
    other = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    other.compile("sgd", "mse")
    for _ in range(2):  # the folder is free again, too
        with pytest.raises(ValueError, match="could not be loaded"):
            other.fit(X, X[:, :1], epochs=2, verbose=0, callbacks=[Checkpoint(tmp_path)])
    assert {number: signal.getsignal(number) for number in HANDLERS} == HANDLERS


def test_handlers_of_runs_within_runs_pass_what_is_not_theirs(tmp_path):
    module = nn.Linear(1, 1)
    outer, inner = (fastdp.Checkpoint(tmp_path / name, model=module) for name in ("outer", "inner"))
    before = signal.getsignal(signal.SIGINT)
    outer.__enter__()
    inner.__enter__()
    outer.close()  # in the wrong order
    inner.close()
    try:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        for number, handler in HANDLERS.items():
            signal.signal(number, handler)
    assert before is HANDLERS[signal.SIGINT]
