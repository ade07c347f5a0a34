"""One virtual device's step runs on the calling thread without a queue, with the same outcome and the same failures."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

import fastdp
from fastdp.errors import ReplicaError
from fastdp.program.functions import FunctionProgram
from fastdp.runtime.host.device import HostDevice
from fastdp.runtime.queue import QueueDevice

LIMIT = 20.0
ROWS = np.arange(24, dtype="f4").reshape(6, 4)


class Engine(fastdp.DataParallel):
    """An engine on one device that calls `in_train` and `in_update`."""

    def __init__(self, device) -> None:
        self.in_train: Callable[[], object] = lambda: None
        self.in_update: Callable[[], object] = lambda: None
        start = {"w": np.linspace(-1, 1, 4, dtype="f4")}
        super().__init__(FunctionProgram(start, self.trains, self.updates, self.predicts), [device], timeout=LIMIT)

    def trains(self, parameters, batch):
        self.in_train()
        x = batch[0]
        return float((x @ parameters["w"]).mean()), {"w": x.mean(0)}, [x @ parameters["w"]]

    def updates(self, parameters, slots, gradients):
        self.in_update()
        return {"w": parameters["w"] - 0.01 * gradients["w"]}, {}

    def predicts(self, parameters, batch):
        return [batch[0] @ parameters["w"]]

    @property
    def weights(self):
        return self.replicas[0].memory.variables.buffers["float32"].tobytes()


@pytest.fixture
def device():
    made = HostDevice(0)
    yield made
    made.delay = None
    made.close(LIMIT)


def test_a_step_enqueues_nothing_and_equals_one_of_the_worker(device, monkeypatch):
    engine, pushed = Engine(device), []
    push = QueueDevice.push
    monkeypatch.setattr(QueueDevice, "push", lambda self, *given: (pushed.append(given), push(self, *given)))
    here = [engine.train([ROWS * (1 + i)]) for i in range(3)]
    assert not pushed
    assert device._thread is None
    other = HostDevice(1)
    other.delay = lambda: time.sleep(0.001)  # which keeps the worker at its work
    by_worker = Engine(other)
    there = [by_worker.train([ROWS * (1 + i)]) for i in range(3)]
    assert pushed
    assert engine.weights == by_worker.weights
    for mine, theirs in zip(here, there, strict=True):
        assert mine.sums.tobytes() == theirs.sums.tobytes()
        assert mine.outputs[0].tobytes() == theirs.outputs[0].tobytes()
    other.delay = None
    other.close(LIMIT)


@pytest.mark.parametrize(("where", "verb"), [("in_train", "run"), ("in_update", "update")])
def test_a_failed_step_says_where_and_changes_nothing(device, where, verb):
    engine = Engine(device)
    engine.train([ROWS])
    before = engine.weights

    def fail():
        raise ArithmeticError("as it was told")

    setattr(engine, where, fail)
    with pytest.raises(ReplicaError, match=rf"ArithmeticError: as it was told\nThe step was stopped in .{verb}."):
        engine.train([ROWS])
    assert engine.weights == before
    setattr(engine, where, lambda: None)
    engine.train([ROWS])
    assert engine.weights != before


@pytest.mark.parametrize("where", ["in_train", "in_update"])
def test_an_interrupt_comes_at_once_and_the_next_step_runs(device, where):
    engine = Engine(device)
    engine.train([ROWS])
    before = engine.weights

    def interrupt():
        raise KeyboardInterrupt

    setattr(engine, where, interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.train([ROWS])
    assert engine.weights == before
    setattr(engine, where, lambda: None)
    assert engine.train([ROWS]).rows == len(ROWS)
    assert engine.weights != before
