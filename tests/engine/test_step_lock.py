"""A step that hangs holds up only those who need its devices."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from faults import Fault, injected
from torch import nn

import fastdp
from fastdp.comm.algorithm import Choice
from fastdp.engine import data_parallel, step_lock
from fastdp.engine.step_lock import StepLock
from fastdp.program.functions import FunctionProgram
from fastdp.runtime.select import resolve

X, Y = np.ones((4, 2), "f4"), np.ones((4, 1), "f4")


@pytest.fixture(autouse=True)
def _devices(monkeypatch):
    monkeypatch.setattr(step_lock, "PATIENCE", 0.3)
    fastdp.set_virtual_devices(4)
    yield
    fastdp.set_virtual_devices(0)


class Hang:
    """What steps wait for while it is on."""

    def __init__(self):
        self.began, self.over = threading.Event(), threading.Event()

    def __call__(self):
        self.began.set()
        assert self.over.wait(60)


def engine(devices, inside=lambda: None, **options):
    def train(parameters, batch):
        inside()
        x, y = batch
        error = x @ parameters["w"] - y
        return float((error**2).mean()), {"w": 2 / len(x) * x.T @ error}, [error]

    def update(parameters, slots, gradients):
        return {"w": parameters["w"] - 0.1 * gradients["w"]}, slots

    program = FunctionProgram({"w": np.zeros((2, 1), "f4")}, train, update, lambda p, batch: [batch[0] @ p["w"]])
    return fastdp.DataParallel(program, devices, **options), program


def weights(program):
    return program.state_dict()["parameters"]["w"].copy()


def test_models_on_other_devices_go_on_while_a_step_hangs():
    hang = Hang()
    hanging, program = engine([0, 1], hang)
    others, twin = engine([2, 3])
    expected = engine([0, 1])
    with ThreadPoolExecutor(1) as threads:
        try:
            step = threads.submit(hanging.train, [X, Y])
            assert hang.began.wait(60)
            for _ in range(3):
                others.train([X, Y])
            assert others.predict([X, Y]).rows == 4
            assert others.stage([X, Y])
            assert not step.done()
        finally:
            hang.over.set()
        step.result(60)
    expected[0].train([X, Y])
    np.testing.assert_array_equal(weights(program), weights(expected[1]))
    for _ in range(2):
        expected[0].train([X, Y])
    np.testing.assert_array_equal(weights(twin), weights(expected[1]))


def test_a_model_on_the_devices_of_a_step_that_hangs_gets_an_error_that_names_its_own():
    hang = Hang()
    hanging, _ = engine([0, 1], hang)
    waiting, _ = engine([1, 2], timeout=1)
    with ThreadPoolExecutor(1) as threads:
        try:
            step = threads.submit(hanging.train, [X, Y])
            assert hang.began.wait(60)
            with pytest.raises(fastdp.DeviceTimeoutError, match="Another model kept virtual:1 or virtual:2 busy"):
                waiting.train([X, Y])
        finally:
            hang.over.set()
        step.result(60)
    waiting.train([X, Y])


def test_steps_stay_eager_beside_one_that_hangs_and_are_traced_later():
    hang = Hang()
    hanging, _ = engine([0, 1], hang)
    torch.manual_seed(0)
    module, twin = nn.Linear(2, 1), nn.Linear(2, 1)
    twin.load_state_dict(module.state_dict())
    parallel = fastdp.wrap(module, [2, 3], compile="trace")
    step = parallel.train_step(nn.MSELoss(), lambda p: torch.optim.SGD(p, 0.1))
    x, y = torch.from_numpy(X), torch.from_numpy(Y)
    with ThreadPoolExecutor(1) as threads:
        try:
            hung = threads.submit(hanging.train, [X, Y])
            assert hang.began.wait(60)
            for _ in range(3):
                step(x, y)
            assert {entry["how"] for entry in parallel.report().steps} == {"eager"}
        finally:
            hang.over.set()
        hung.result(60)
    for _ in range(2):
        step(x, y)
    assert {entry["how"] for entry in parallel.report().steps} == {"traced"}
    optimizer = torch.optim.SGD(twin.parameters(), 0.1)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.mse_loss(twin(x), y).backward()
        optimizer.step()
    torch.testing.assert_close(module.weight, twin.weight)


def test_a_deterministic_model_waits_for_a_step_that_hangs_as_long_as_its_own_timeout_and_keeps_its_form():
    hang = Hang()
    hanging, _ = engine([0, 1], hang)
    torch.manual_seed(0)
    parallel = fastdp.wrap(nn.Linear(2, 1), [2, 3], compile="trace", deterministic=True, timeout=0.6)
    step = parallel.train_step(nn.MSELoss(), lambda p: torch.optim.SGD(p, 0.1))
    x, y = torch.from_numpy(X), torch.from_numpy(Y)
    with ThreadPoolExecutor(1) as threads:
        try:
            hung = threads.submit(hanging.train, [X, Y])
            assert hang.began.wait(60)
            step(x, y)  # the first one of a shape is eager
            with (
                pytest.warns(UserWarning, match="waits, at most timeout=0.6 seconds"),
                pytest.raises(fastdp.DeviceTimeoutError, match=r"Another model has kept.*the next step tries again"),
            ):
                step(x, y)
            assert not hung.done()
        finally:
            hang.over.set()
        hung.result(60)
    step(x, y)
    (told,) = parallel.report().steps
    assert (told["how"], told["steps"]) == ("traced", 2)


@pytest.mark.filterwarnings("ignore:fastdp. virtual")
def test_a_model_leaves_a_device_of_its_own_beside_a_step_that_hangs():
    hang = Hang()
    hanging, _ = engine([0, 1], hang)
    others, twin = engine([2, 3], timeout=20, on_device_loss="continue")
    with ThreadPoolExecutor(1) as threads:
        try:
            step = threads.submit(hanging.train, [X, Y])
            assert hang.began.wait(60)
            with injected(Fault("run", "virtual:3", "lose")) as fault:
                others.train([X, Y])
            assert fault.struck
            assert [device.name for device in others.devices] == ["virtual:2"]
            assert others.rejoin_devices() == ["virtual:3"]
            others.train([X, Y])
            assert len(others.devices) == 2
            assert not step.done()
        finally:
            hang.over.set()
        step.result(60)
    expected = engine([0, 1])
    for _ in range(2):
        expected[0].train([X, Y])
    np.testing.assert_allclose(weights(twin), weights(expected[1]), rtol=1e-6)


def test_all_reduces_are_not_measured_beside_a_step_that_hangs(monkeypatch):
    hang, measured = Hang(), []
    hanging, _ = engine([0, 1], hang)
    monkeypatch.setattr(Choice, "untuned", True)
    monkeypatch.setattr(data_parallel, "tune", lambda *_: measured.append(step.done()))
    with ThreadPoolExecutor(1) as threads:
        try:
            step = threads.submit(hanging.train, [X, Y])
            assert hang.began.wait(60)
            engine([2, 3])[0].train([X, Y])
            assert measured == []
        finally:
            hang.over.set()
        step.result(60)
    engine([2, 3])
    assert measured == [True]


def test_within_its_patience_a_step_is_waited_for_and_one_that_must_be_alone_always(monkeypatch):
    monkeypatch.setattr(step_lock, "PATIENCE", 60.0)
    lock, devices = StepLock(), resolve(4)

    def elsewhere(where, seconds):
        with ThreadPoolExecutor(1) as threads:
            return threads.submit(lambda: lock.acquire(where, seconds) and (lock.release() or True)).result(60)

    assert lock.acquire(devices[:2], 0)
    assert not elsewhere(devices[2:], 0.1)
    monkeypatch.setattr(step_lock, "PATIENCE", 0.0)
    assert elsewhere(devices[2:], 0.1)
    assert not elsewhere(devices[1:3], 0.1)
    assert not elsewhere(None, 0.1)
    assert lock.acquire(None, 0)  # a thread may take it several times, and may need more then
    assert not elsewhere(devices[2:], 0.1)
    lock.release()
    lock.release()
    assert elsewhere(None, 0.1)
    with pytest.raises(KeyError):
        lock.release()
