"""The main thread does the first device's part of a step: whatever happens there ends in time and is cleaned up."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

import fastdp
from fastdp.engine import step_scope
from fastdp.program.base import Result
from fastdp.program.functions import FunctionProgram
from fastdp.runtime.select import resolve

LIMIT = 20.0
MAIN = "MainThread"


@pytest.fixture(autouse=True)
def devices(monkeypatch):
    monkeypatch.setattr(step_scope, "CORES", 1)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    fastdp.set_virtual_devices(3)
    yield resolve(3)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)
    fastdp.set_virtual_devices(0)


class Engine(fastdp.DataParallel):
    """An engine whose replicas call `in_train` and `in_update`, and note on which threads."""

    def __init__(self, devices: int = 3, timeout: float = LIMIT) -> None:
        self.threads: list[str] = []
        self.in_train: Callable[[], object] = lambda: None
        self.in_update: Callable[[], object] = lambda: None
        start = {"w": np.linspace(-1, 1, 4, dtype="f4")}
        super().__init__(FunctionProgram(start, self.trains, self.updates, self.predicts), devices, timeout=timeout)

    def trains(self, parameters, batch):
        self.threads.append(threading.current_thread().name)
        self.in_train()
        x = batch[0]
        return float((x @ parameters["w"]).mean()), {"w": x.mean(0)}, []

    def updates(self, parameters, slots, gradients):
        self.in_update()
        return {"w": parameters["w"] - 0.01 * gradients["w"]}, {}

    def predicts(self, parameters, batch):
        return [batch[0] @ parameters["w"]]

    @property
    def weights(self) -> list[bytes]:
        return [replica.memory.variables.buffers["float32"].tobytes() for replica in self.replicas]


def batch(rows: int = 6) -> list[np.ndarray]:
    return [np.arange(4 * rows, dtype="f4").reshape(rows, 4) / rows]


def on_main(work: Callable[[], object]) -> Callable[[], object]:
    """`work` where the main thread runs."""
    return lambda: work() if threading.current_thread() is threading.main_thread() else None


def once(work: Callable[[], object]) -> Callable[[], object]:
    """`work` in the first call."""
    left = [work]
    return lambda: left.pop()() if left else None


def expected(steps: int) -> list[bytes]:
    """The weights after so many steps, without failures."""
    engine = Engine()
    for _ in range(steps):
        engine.train(batch())
    return engine.weights


def test_the_main_thread_does_the_first_devices_part_and_its_worker_never_begins(devices):
    engine = Engine()
    for _ in range(3):
        engine.train(batch())
    assert sorted(engine.threads) == [MAIN] * 3 + ["fastdp-virtual:1"] * 3 + ["fastdp-virtual:2"] * 3
    assert devices[0]._thread is None
    assert len(set(engine.weights)) == 1
    alone = Engine(1)
    for _ in range(3):
        alone.train(batch())
    np.testing.assert_allclose(engine.program.parameters["w"], alone.program.parameters["w"], rtol=1e-6)


def test_with_cores_to_spare_another_thread_or_a_slow_data_set_the_worker_does_it(monkeypatch):
    def threads(**how):
        engine.threads.clear()
        engine.train(batch(), **how)
        return MAIN in engine.threads

    engine = Engine()
    assert threads()
    assert threads(while_running=lambda: time.sleep(0.01))  # not known before
    assert not threads(while_running=lambda: None)
    for _ in range(8):
        engine.train(batch(), while_running=lambda: None)
    assert threads()
    found = []
    other = threading.Thread(target=lambda: found.append(threads()))
    other.start()
    other.join(LIMIT)
    assert found == [False]
    monkeypatch.setattr(step_scope, "CORES", 64)
    assert not threads()


@pytest.mark.parametrize("where", ["in_train", "in_update"])
@pytest.mark.parametrize("hangs", [lambda: threading.Event().wait(LIMIT), lambda: time.sleep(LIMIT)])
def test_a_part_that_hangs_is_given_up_in_time_and_the_next_step_works(where, hangs):
    engine = Engine()
    engine.train(batch())
    engine.timeout, before = 0.3, engine.weights
    setattr(engine, where, on_main(once(hangs)))
    began = time.monotonic()
    with pytest.raises(fastdp.DeviceTimeoutError, match=r"took longer than timeout=0\.3 seconds"):
        engine.train(batch())
    assert time.monotonic() - began < LIMIT / 2
    engine.timeout = LIMIT
    assert before == expected(1)
    engine.train(batch())
    assert engine.weights == expected(2)


def test_a_part_that_takes_no_notice_of_being_given_up_is_given_up_when_it_ends():
    engine = Engine(timeout=0.2)

    def stubborn():
        try:
            time.sleep(LIMIT)
        except BaseException:  # noqa: BLE001
            time.sleep(0.1)

    engine.in_train = on_main(once(stubborn))
    with pytest.raises(fastdp.DeviceTimeoutError, match="in stubborn"):
        engine.train(batch())
    engine.timeout = LIMIT
    engine.train(batch())
    assert engine.weights == expected(1)


def test_a_step_that_ends_as_its_time_does_ends_one_way_or_the_other():
    engine, ways = Engine(), set()
    engine.train(batch())
    engine.timeout = 0.05
    engine.in_train = on_main(lambda: time.sleep(0.05 + next(late)))
    late = iter(np.linspace(-0.004, 0.006, 12))
    for _ in range(12):
        try:
            engine.train(batch())
            ways.add("done")
        except fastdp.DeviceTimeoutError:
            ways.add("late")
    time.sleep(0.1)  # no signal is left
    assert "late" in ways
    engine.in_train, engine.timeout = lambda: None, LIMIT
    engine.train(batch())
    assert len(set(engine.weights)) == 1


@pytest.mark.parametrize("where", ["in_train", "in_update"])
def test_ctrl_c_in_the_main_threads_part_comes_and_leaves_all_replicas_equal(where):
    engine = Engine()
    engine.train(batch())
    setattr(engine, where, on_main(once(lambda: signal.raise_signal(signal.SIGINT))))
    with pytest.raises(KeyboardInterrupt):
        engine.train(batch())
    assert engine.weights[0] == expected(1 if where == "in_train" else 2)[0]  # an update is not left half done
    engine.train(batch())
    assert len(set(engine.weights)) == 1
    assert engine.weights[0] == expected(2 if where == "in_train" else 3)[0]


def test_a_handler_of_the_users_own_is_called_in_the_middle_of_a_step(devices):
    engine, calls = Engine(), []
    user = lambda *_: calls.append(threading.current_thread().name)  # noqa: E731
    signal.signal(signal.SIGINT, user)
    engine.in_train = on_main(lambda: signal.raise_signal(signal.SIGINT))
    engine.train(batch())
    assert calls == [MAIN]
    assert engine.weights == expected(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_step_inside_the_main_threads_part_is_refused():
    engine, other = Engine(), Engine(2)
    engine.in_train = on_main(lambda: other.predict(batch()))
    with pytest.raises(RuntimeError, match="called inside a step of a parallel model"):
        engine.train(batch())
    engine.in_train = lambda: None
    engine.train(batch(), while_running=lambda: other.predict(batch()))  # beside it, it waits
    assert engine.weights == expected(1)


def test_replicas_meet_while_the_main_thread_is_one_of_them():
    class Meets(FunctionProgram):
        def predict(self, state, batch, context):
            values = context.rendezvous.exchange(context.rank, float(batch[0].sum()), "a meeting")
            return Result([np.full(len(batch[0]), sum(values), "f4")])

    start = {"w": np.zeros(4, "f4")}
    program = Meets(start, lambda *_: None, lambda *_: None, lambda p, b: [b[0]])
    engine = fastdp.DataParallel(program, 3, timeout=LIMIT)
    found = engine.predict(batch()).outputs[0]
    np.testing.assert_allclose(found, np.full(6, batch()[0].sum()), rtol=1e-6)


def test_a_failure_on_another_device_ends_the_main_threads_wait_for_it():
    class Fails(FunctionProgram):
        def predict(self, state, batch, context):
            if context.rank:
                raise ZeroDivisionError("planned")
            context.rendezvous.exchange(0, 0, "a meeting")

    program = Fails({"w": np.zeros(4, "f4")}, lambda *_: None, lambda *_: None, lambda p, b: [b[0]])
    engine = fastdp.DataParallel(program, 3, timeout=LIMIT)
    with pytest.raises(ZeroDivisionError, match=r"virtual:[12].*planned"):
        engine.predict(batch())
