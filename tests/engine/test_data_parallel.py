"""N devices equal one; failures, timeouts and interrupts leave weights and engine as they were."""

from __future__ import annotations

import builtins
import os
import random
import signal
import sys
import threading
import time

import numpy as np
import pytest
from least_squares import WIDTH, predict, train

import fastdp
from fastdp.engine import recovery
from fastdp.engine.step_scope import alone
from fastdp.program.functions import FunctionProgram
from fastdp.runtime.host.device import HostDevice
from fastdp.runtime.queue import QueueEvent
from fastdp.runtime.select import resolve

LIMIT = 20.0


def on_thread_of(first: int = 0) -> str:
    """The name of the worker whose part the calling thread does. The main thread may do that of the first device."""
    return threading.current_thread().name.replace("MainThread", f"fastdp-virtual:{first}")


@pytest.fixture(autouse=True)
def eight_devices():
    fastdp.set_virtual_devices(8)
    yield resolve(8)
    for device in resolve(8):
        device.delay = None
    fastdp.set_virtual_devices(0)


def update(parameters, slots, gradients):
    """SGD with momentum."""
    new = {name: 0.9 * slots[name] + gradients[name] for name in slots}
    return {name: parameters[name] - 0.05 * new[name] for name in new}, new


def start():
    return {"w": np.linspace(-1, 1, WIDTH, dtype=np.float32), "b": np.float32(0.5)}


def zeros():
    return {"w": np.zeros(WIDTH, np.float32), "b": np.float32(0)}


def program(train=train, update=update, predict=predict):
    return FunctionProgram(start(), train, update, predict, zeros())


def batches(count, seed=0, most=40):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, most, count)
    return [[rng.normal(size=(n, WIDTH)).astype("f4"), rng.normal(size=n).astype("f4")] for n in sizes]


class Mode:
    """Where updates are applied, in the test that is running."""

    update = "first"


@pytest.fixture(params=["first", "each"], autouse=True)
def _mode(request, monkeypatch):
    monkeypatch.setattr(Mode, "update", request.param)


def parallel(devices, model=None, **options):
    options = {"timeout": LIMIT, "update": Mode.update, **options}
    return fastdp.DataParallel(model or program(), resolve(devices), **options)


def weights(engine):
    """Copies of every replica's variables and slots, as bytes; slots are the first's where it alone has them."""
    first = engine.replicas[0]
    lasting = [(r.memory.variables, (r if engine.update == "each" else first).memory.slots) for r in engine.replicas]
    return [b"".join(b.tobytes() for flat in flats for b in flat.buffers.values()) for flats in lasting]


def wait_until(condition):
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.001)


def delay_all(devices, most=0.001):
    for number, device in enumerate(devices):
        draw = random.Random(number)
        device.delay = lambda draw=draw: time.sleep(draw.random() * most)


# N devices equal one.


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_fifty_uneven_batches_equal_one_device_and_replicas_stay_bitwise_equal(count):
    engine = parallel(count, check_replicas=True)
    values = {name: np.asarray(v, np.float64) for name, v in start().items()}
    slots = {name: np.zeros_like(v) for name, v in values.items()}
    for batch in batches(50):
        exact = [array.astype(np.float64) for array in batch]
        loss, gradients, (error,) = train(values, exact)
        result = engine.train(batch)
        assert result.sums[0] == pytest.approx(loss, rel=1e-4)
        np.testing.assert_allclose(result.outputs[0], error, atol=1e-4)
        assert result.rows == len(batch[1])
        values, slots = update(values, slots, gradients)
    for name, value in values.items():
        np.testing.assert_allclose(engine.program.parameters[name], value, rtol=1e-5, atol=1e-6)
    probe = batches(1, seed=9)[0]
    np.testing.assert_allclose(engine.predict(probe).outputs[0], predict(values, probe)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", range(1, 9))
def test_with_fewer_rows_than_devices_fewer_run_and_all_stay_in_step(rows):
    seen = []

    def counting(parameters, batch):
        seen.append(len(batch[0]))
        return train(parameters, batch)

    engine, one = parallel(8, program(counting)), parallel(1)
    rng = np.random.default_rng(rows)
    for size in (rows, 8, rows):
        batch = [rng.normal(size=(size, WIDTH)).astype("f4"), rng.normal(size=size).astype("f4")]
        seen.clear()
        engine.train(batch)
        one.train(batch)
        assert seen == [1] * size
        assert len(set(weights(engine))) == 1
    np.testing.assert_allclose(engine.program.parameters["w"], one.program.parameters["w"], rtol=1e-5, atol=1e-6)


def run(count, delays=()):
    engine = parallel(count)
    delay_all(delays)
    results = [engine.train(batch) for batch in batches(12, seed=3)]
    for device in delays:
        device.delay = None
    return weights(engine), [(r.sums.tobytes(), r.outputs[0].tobytes()) for r in results]


@pytest.mark.parametrize("count", [1, 3, 8])
def test_a_run_repeats_bit_for_bit_also_when_devices_are_slow_at_random(count, eight_devices):
    first = run(count)
    assert len(set(first[0])) == 1
    assert run(count) == first
    assert run(count, eight_devices[:count]) == first


def test_the_order_of_the_devices_is_the_order_of_the_rows(eight_devices):
    here = {}

    def predict(parameters, batch):
        here[on_thread_of(first=5)] = batch[0][0, 0]
        return [batch[0]]

    engine = fastdp.DataParallel(program(predict=predict), [eight_devices[5], eight_devices[2]])
    batch = [np.arange(4 * WIDTH, dtype="f4").reshape(4, WIDTH)]
    np.testing.assert_array_equal(engine.predict(batch).outputs[0], batch[0])
    assert here == {"fastdp-virtual:5": 0.0, "fastdp-virtual:2": 2 * WIDTH}


# Whoever changes the parameters.


def test_set_parameters_reaches_all_replicas():
    engine = parallel(4)
    batch = batches(1, seed=5, most=40)[0]
    engine.train(batch)
    for step in (engine.predict, engine.train):
        engine.program.set_parameters({"w": np.full(WIDTH, 2.0), "b": 1.0})
        result = step(batch)
        expected = batch[0] @ np.full(WIDTH, 2.0) + 1.0 - (batch[1] if step == engine.train else 0)
        np.testing.assert_allclose(result.outputs[0], expected, rtol=1e-4, atol=1e-4)
    assert len(set(weights(engine))) == 1


@pytest.mark.parametrize("ranges", [((0, 3), (0, 3)), ((0, 4), (0, 2)), ((0, 3), (3, 8))])
def test_two_engines_on_one_program_follow_each_other_with_their_momentum(ranges, eight_devices):
    model = program()
    engines = [fastdp.DataParallel(model, eight_devices[slice(*span)]) for span in ranges]
    one = parallel(1)
    for number, batch in enumerate(batches(12, seed=7)):
        engines[number // 2 % 2].train(batch)
        one.train(batch)
        np.testing.assert_allclose(model.parameters["w"], one.program.parameters["w"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            engines[1 - number // 2 % 2].predict(batch).outputs[0],
            one.predict(batch).outputs[0],
            rtol=1e-4,
            atol=1e-4,
        )


def test_predict_after_set_parameters_does_not_hide_the_change_from_the_other_engine():
    model = program()
    first, second = parallel(3, model), parallel(4, model)
    batch = [np.ones((12, WIDTH), "f4")]
    first.predict(batch)
    second.predict(batch)
    model.set_parameters({"w": np.full(WIDTH, 3.0), "b": 0.0})
    for engine in (first, second):
        np.testing.assert_array_equal(engine.predict(batch).outputs[0], np.full(12, 3.0 * WIDTH, "f4"))


# Failures.


class Trouble:
    """Makes the function it wraps fail, where and as told."""

    def __init__(self):
        self.error, self.device, self.after = None, None, None

    def __call__(self, function):
        def wrapped(*arguments):
            hit = self.error is not None and on_thread_of() == f"fastdp-virtual:{self.device}"
            if hit and self.after is None:
                raise self.error
            result = function(*arguments)
            if hit:
                self.after(result)
            return result

        return wrapped


STAGES = ["train", "update", "predict"]


def failing(stage, trouble, devices=4, **options):
    functions = {"train": train, "update": update, "predict": predict}
    functions[stage] = trouble(functions[stage])
    return parallel(devices, program(**functions), **options)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("device", [0, 2, 3])
def test_a_failure_names_device_and_rows_changes_no_weight_and_the_next_call_works(stage, device):
    trouble = Trouble()
    # An update that is to fail on another device than the first must run there.
    engine, one = failing(stage, trouble, update="each" if stage == "update" and device else Mode.update), parallel(1)
    rng = np.random.default_rng(0)
    batch = [rng.normal(size=(10, WIDTH)).astype("f4"), rng.normal(size=10).astype("f4")]
    engine.train(batch)
    one.train(batch)
    before = weights(engine)
    trouble.error, trouble.device = ZeroDivisionError("planned"), device
    with pytest.raises(ZeroDivisionError, match=f"virtual:{device}.*ZeroDivisionError: planned") as caught:
        (engine.predict if stage == "predict" else engine.train)(batch)
    assert isinstance(caught.value, fastdp.ReplicaError)
    assert caught.value.__cause__ is trouble.error
    assert caught.value.device == f"virtual:{device}"
    assert caught.value.rows == [(0, 3), (3, 6), (6, 8), (8, 10)][device]
    assert "rows {} to {} of the batch's 10".format(*caught.value.rows) in str(caught.value)
    assert "no replica's weights were changed" in str(caught.value)
    assert weights(engine) == before
    trouble.error = None
    for _ in range(3):
        engine.train(batch)
        one.train(batch)
    assert len(set(weights(engine))) == 1
    np.testing.assert_allclose(engine.program.parameters["w"], one.program.parameters["w"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(engine.predict(batch).outputs[0], one.predict(batch).outputs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", [None, 0, 3])
def test_an_update_that_fails_half_way_is_taken_back_on_all_replicas(device, eight_devices):
    """None: on every device, as a mistake in the update would."""
    wrong = []

    def broken(parameters, slots, gradients):
        values, new = update(parameters, slots, gradients)
        if wrong and on_thread_of() in wrong:
            values["b"] = np.zeros(7)  # cannot be written, after "w" was
        return values, new

    engine = parallel(4, program(update=broken), update="each" if device else Mode.update)
    batch = batches(1, seed=2, most=30)[0]
    engine.train(batch)
    before = weights(engine)
    wrong.extend(f"fastdp-virtual:{i}" for i in ([device] if device is not None else range(4)))
    delay_all(eight_devices)
    with pytest.raises(ValueError, match="broadcast"):
        engine.train(batch)
    assert weights(engine) == before
    wrong.clear()
    engine.train(batch)
    assert len(set(weights(engine))) == 1
    assert weights(engine) != before


@pytest.mark.parametrize("kind", [KeyError, ValueError, RuntimeError, NotImplementedError, MemoryError, IndexError])
def test_the_error_is_also_of_the_class_it_came_as_and_readable(kind):
    trouble = Trouble()
    engine = failing("train", trouble)
    trouble.error, trouble.device = kind("why"), 1
    with pytest.raises(kind, match=r"virtual:1 \(rows ") as caught:
        engine.train(batches(1, most=30)[0])
    assert isinstance(caught.value, fastdp.ReplicaError)
    assert "\nThe step was stopped" in str(caught.value)


class OwnError(ValueError):
    """A class that is not built in."""


class SpeechlessError(Exception):
    """Its own text fails."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    "error",
    [
        SpeechlessError(),
        OSError(28, "disk full"),
        OwnError("own"),
        UnicodeDecodeError("utf-8", b"x", 0, 1, "bad byte"),
        SyntaxError("odd"),
        StopIteration(3),
    ],
    ids=lambda error: type(error).__name__,
)
def test_any_other_failure_is_a_readable_replica_error_with_its_cause(error):
    trouble = Trouble()
    engine = failing("train", trouble)
    trouble.error, trouble.device = error, 0
    batch = batches(1, most=30)[0]
    with pytest.raises(fastdp.ReplicaError, match=f"virtual:0 .*failed with {type(error).__name__}: ") as caught:
        engine.train(batch)
    assert caught.value.__cause__ is error
    trouble.error = None
    engine.train(batch)


@pytest.mark.parametrize("error", [KeyboardInterrupt("in the worker"), SystemExit(3)], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("device", [0, 2])
def test_what_ends_a_program_ends_it_from_a_replica_too(error, device):
    trouble = Trouble()
    engine = failing("train", trouble)
    trouble.error, trouble.device = error, device
    batch = batches(1, most=30)[0]
    with pytest.raises(type(error)) as caught:
        engine.train(batch)
    assert caught.value is error
    trouble.error = None
    engine.train(batch)


def test_outputs_that_cannot_be_merged_are_a_failure_of_their_replica():
    trouble = Trouble()
    trouble.error, trouble.device = True, 2
    trouble.after = lambda result: result.append(np.zeros(3))
    engine = failing("predict", trouble)
    with pytest.raises(ValueError, match=r"virtual:2|same number of outputs"):
        engine.predict([np.zeros((12, WIDTH), "f4")])


class Exchanging(FunctionProgram):
    """Replicas that meet in the middle of `train`, as merged losses do."""

    before_exchange = staticmethod(lambda rank: None)

    def train(self, state, batch, context):
        self.before_exchange(context.rank)
        everyone = context.exchange(context.rank, "before the step")
        assert everyone == list(range(context.size))
        return super().train(state, batch, context)


def exchanging(devices=4, **options):
    return parallel(devices, Exchanging(start(), train, update, predict, zeros()), **options)


@pytest.mark.parametrize("device", [0, 2])
def test_a_failure_while_others_wait_in_an_exchange_does_not_hang(device):
    engine = exchanging()
    rng = np.random.default_rng(0)
    batch = [rng.normal(size=(8, WIDTH)).astype("f4"), rng.normal(size=8).astype("f4")]
    engine.train(batch)
    before = weights(engine)

    def fail(rank):
        if rank == device:
            time.sleep(0.02)  # the others wait by now
            raise FloatingPointError("planned")

    engine.program.before_exchange = fail
    began = time.monotonic()
    with pytest.raises(FloatingPointError, match=f"virtual:{device}"):
        engine.train(batch)
    assert time.monotonic() - began < LIMIT / 4
    assert weights(engine) == before
    engine.program.before_exchange = lambda rank: None
    engine.train(batch)
    assert len(set(weights(engine))) == 1


def test_a_device_that_is_dropped_fails_the_step_at_once_even_when_others_wait_in_an_exchange(eight_devices):
    engine = exchanging()
    batch = batches(1, seed=1)[0]
    engine.train(batch)
    eight_devices[3].close(LIMIT)
    for _ in range(2):
        began = time.monotonic()
        with pytest.raises(RuntimeError, match="virtual:3 is closed"):
            engine.train([np.ones((8, WIDTH), "f4"), np.ones(8, "f4")])
        assert time.monotonic() - began < LIMIT / 4
    parallel(3).train(batch)


# Timeouts and interrupts.


def gated(gate, device=1):
    def slow(parameters, batch):
        if on_thread_of() == f"fastdp-virtual:{device}":
            assert gate.wait(LIMIT)
        return train(parameters, batch)

    return slow


def test_a_step_that_takes_too_long_raises_is_never_applied_and_a_later_one_works():
    gate = threading.Event()
    engine, one = parallel(3, program(gated(gate)), timeout=0.2), parallel(1)
    batch = batches(1, seed=4)[0]
    before = weights(engine)[0]
    with pytest.raises(fastdp.DeviceTimeoutError, match=r"on \['virtual:1'\] took longer than timeout=0\.2"):
        engine.train(batch)
    hung = r"^\['virtual:1'\] were not done with an earlier step within another timeout=0\.2"
    with pytest.raises(fastdp.DeviceTimeoutError, match=hung):
        engine.train(batch)
    gate.set()
    engine.devices[1].synchronize(LIMIT)
    assert weights(engine)[0] == before
    engine.timeout = LIMIT
    engine.train(batch)
    one.train(batch)
    assert len(set(weights(engine))) == 1
    np.testing.assert_allclose(engine.program.parameters["w"], one.program.parameters["w"], rtol=1e-5, atol=1e-6)


@pytest.fixture
def sigint_is_pythons():
    """Ctrl-C raises KeyboardInterrupt, also where the tests run in a shell's background: there SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_in_an_update_on_the_main_thread_comes_when_the_update_is_over(sigint_is_pythons):
    ended = []

    def interrupted(parameters, slots, gradients):
        if len(ended) == 1:
            signal.raise_signal(signal.SIGINT)
        new = update(parameters, slots, gradients)
        ended.append(new[0]["w"].tobytes())
        return new

    handler = signal.getsignal(signal.SIGINT)
    engine, data = parallel(1, program(update=interrupted)), batches(3)
    engine.train(data[0])
    with pytest.raises(KeyboardInterrupt):
        engine.train(data[1])
    assert len(ended) == 2
    assert signal.getsignal(signal.SIGINT) is handler
    assert engine.program.parameters["w"].tobytes() == ended[1]
    engine.train(data[2])
    reference = parallel(1)
    for batch in data:
        reference.train(batch)
    assert weights(engine) == weights(reference)


@pytest.mark.parametrize("where", ["train", "update"])
@pytest.mark.parametrize("devices", [2, 3])
def test_a_step_that_ctrl_c_leaves_is_over_when_control_comes_back(where, devices, sigint_is_pythons):
    armed, once = [False], iter([True])

    def slowly(work):
        def interrupted(*args):
            if armed[0]:
                if next(once, False):  # a second one would end the wait
                    os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.05)
            return work(*args)

        return interrupted

    changed = {"train": train, "update": update}
    changed[where] = slowly(changed[where])
    engine, data, reference = parallel(devices, program(**changed)), batches(3), parallel(devices)
    for one in (engine, reference):
        one.train(data[0])
    armed[0] = True
    with pytest.raises(KeyboardInterrupt):
        engine.train(data[1])
    armed[0] = False
    found, before = weights(engine), weights(reference)
    time.sleep(0.1)
    assert weights(engine) == found
    reference.train(data[1])
    assert found in (before, weights(reference))
    assert len(set(found)) == 1
    engine.train(data[2])
    assert len(set(weights(engine))) == 1


def test_a_step_that_ctrl_c_leaves_and_that_hangs_is_named(sigint_is_pythons, monkeypatch):
    monkeypatch.setattr(recovery, "PATIENCE", 0.1)
    gate = threading.Event()

    once = iter([True])

    def hangs(*args):
        if next(once, False):  # a second one would end the wait
            os.kill(os.getpid(), signal.SIGINT)
        gate.wait(LIMIT)
        return train(*args)

    engine, reference, batch = parallel(2, program(hangs)), parallel(2), batches(1)[0]
    try:
        with (
            pytest.warns(
                UserWarning, match=r"left by KeyboardInterrupt, and devices are still at work on it after 0\.1"
            ),
            pytest.raises(KeyboardInterrupt),
        ):
            engine.train(batch)
    finally:
        gate.set()
    engine.train(batch)
    once_or_twice = []
    for _ in range(2):
        reference.train(batch)
        once_or_twice.append(weights(reference))
    assert weights(engine) in once_or_twice


@pytest.mark.parametrize("exchange", [False, True])
def test_an_interrupt_while_waiting_leaves_the_engine_and_others_on_its_devices_usable(exchange, monkeypatch):
    gate = threading.Event()
    engine = exchanging() if exchange else parallel(4, program(gated(gate)))
    if exchange:
        engine.program.before_exchange = lambda rank: rank != 1 or gate.wait(LIMIT)
    other, batch = parallel(2), batches(1, seed=6, most=30)[0]
    before = weights(engine)

    def interrupted(self, timeout=None):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(QueueEvent, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.train(batch)
    threading.Timer(0.05, gate.set).start()
    other.train(batch)  # shares devices with what was interrupted
    assert weights(engine)[0] == before[0]
    engine.train(batch)
    assert len(set(weights(engine))) == 1
    np.testing.assert_allclose(engine.program.parameters["w"], other.program.parameters["w"], rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups came with Python 3.11")
def test_a_group_of_failures_is_a_readable_replica_error():
    trouble = Trouble()
    engine = failing("train", trouble)
    trouble.error, trouble.device = builtins.ExceptionGroup("several", [ValueError("one")]), 0
    with pytest.raises(fastdp.ReplicaError, match=r"virtual:0 .*failed with ExceptionGroup: several"):
        engine.train(batches(1, most=30)[0])


# Threads of the caller.


def test_a_second_thread_that_trains_is_refused_and_one_that_predicts_waits():
    gate = threading.Event()
    engine, batch, found = parallel(3, program(gated(gate))), batches(1, seed=4)[0], []
    first = threading.Thread(target=engine.train, args=(batch,))
    first.start()
    wait_until(engine._state.busy.locked)
    with pytest.raises(RuntimeError, match="already running a step in another thread"):
        engine.train(batch)
    second = threading.Thread(target=lambda: found.append(engine.predict(batch).outputs[0]))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    gate.set()
    for thread in (first, second):
        thread.join(LIMIT)
        assert not thread.is_alive()
    np.testing.assert_array_equal(found[0], engine.predict(batch).outputs[0])


def test_training_waits_for_a_thread_that_predicts():
    gate = threading.Event()

    def slow(parameters, batch):
        if on_thread_of() == "fastdp-virtual:1":
            assert gate.wait(LIMIT)
        return predict(parameters, batch)

    engine, batch = parallel(2, program(predict=slow)), batches(1, seed=4)[0]
    first = threading.Thread(target=engine.predict, args=(batch,))
    first.start()
    wait_until(engine._state.busy.locked)
    threading.Timer(0.2, gate.set).start()
    engine.train(batch)
    first.join(LIMIT)
    assert not first.is_alive()


def test_two_engines_on_the_same_devices_from_two_threads_both_finish_as_if_alone():
    engines, alone = [exchanging(8), exchanging(8)], exchanging(8)
    work = batches(25, seed=8)
    threads = [threading.Thread(target=lambda e=engine: [e.train(b) for b in work]) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive()
    for batch in work:
        alone.train(batch)
    assert set(weights(engines[0])) == set(weights(engines[1])) == set(weights(alone))


# Arguments and memory.


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([], "empty batch"),
        ([np.zeros((0, WIDTH)), np.zeros(0)], "at least one row"),
        ([np.zeros((3, WIDTH)), np.zeros(4)], "same number of rows.*3.*4"),
        ([np.zeros((3, WIDTH)), np.float32(1).reshape(())], "no axis"),
    ],
)
def test_a_batch_that_cannot_be_scattered_is_refused_and_leaves_the_engine_free(batch, message):
    engine = parallel(2)
    for step in (engine.train, engine.predict):
        with pytest.raises(ValueError, match=message):
            step(batch)
    assert engine.steps == 0
    engine.train(batches(1)[0])


def test_an_engine_needs_different_devices(eight_devices):
    with pytest.raises(ValueError, match="one or more different devices"):
        fastdp.DataParallel(program(), [eight_devices[0]] * 2)


@pytest.mark.parametrize(("devices", "names"), [(2, [0, 1]), ([3, 1], [3, 1]), (None, range(8)), ([], range(8))])
def test_an_engine_takes_devices_as_gpus_does(devices, names, eight_devices):
    engine = fastdp.DataParallel(program(), devices)
    assert [device.name for device in engine.devices] == [f"virtual:{i}" for i in names]


def test_steps_allocate_no_device_memory(monkeypatch):
    calls, kept = [], HostDevice.empty
    monkeypatch.setattr(HostDevice, "empty", lambda *a: calls.append(a) or kept(*a))
    engine = parallel(5)
    assert calls
    calls.clear()
    for batch in batches(10):
        engine.train(batch)
        engine.predict(batch)
    assert calls == []


def test_outputs_nobody_wants_are_not_merged_and_all_outputs_are_the_callers_own():
    engine, batch = parallel(3), batches(1, seed=2)[0]
    assert engine.train(batch, wants_outputs=False).outputs == []
    first = engine.predict(batch).outputs[0]
    kept = first.copy()
    engine.train(batch)
    engine.predict(batch)
    np.testing.assert_array_equal(first, kept)


def test_updating_on_the_first_device_or_on_each_gives_the_same_bits():
    results = []
    for update_on in ("first", "each"):
        engine = parallel(3, update=update_on)
        for batch in batches(20, seed=4):
            engine.train(batch)
        results.append([replica.memory.variables.buffers["float32"].tobytes() for replica in engine.replicas])
    assert results[0] == results[1]
    assert len(set(results[0])) == 1


def test_an_unknown_place_for_updates_is_refused():
    with pytest.raises(ValueError, match=r"`update` must be one of .*\. Received: update='all'"):
        parallel(2, update="all")


def test_the_replica_check_finds_one_changed_bit():
    engine = parallel(3)
    engine.train(batches(1)[0])
    engine.assert_replicas_equal()
    what = "slots" if engine.update == "each" else "variables"
    getattr(engine.replicas[2].memory, what).buffers["float32"].view(np.uint8)[0] ^= 1
    with pytest.raises(RuntimeError, match=rf"{what} on virtual:2 differ from those on virtual:0"):
        engine.assert_replicas_equal()


def test_a_thread_that_has_just_taken_the_engine_to_look_does_not_pass_for_a_trainer():
    engine, (first, second) = parallel(2), batches(2)
    engine.train(first)
    engine._state.busy.acquire()  # as whoever looks does, before it says that it does not train
    release = threading.Timer(0.2, engine._state.busy.release)
    release.start()
    try:
        assert engine.train(second).rows == len(second[1])
    finally:
        release.join(LIMIT)


def test_devices_that_another_model_keeps_are_a_timeout_of_devices():
    engine, (first, second) = parallel(2, timeout=0.1), batches(2)
    engine.train(first)
    begun, over = threading.Event(), threading.Event()

    def keep():
        with alone():
            begun.set()
            over.wait(LIMIT)

    other = threading.Thread(target=keep)
    other.start()
    assert begun.wait(LIMIT)
    try:
        with pytest.raises(
            fastdp.DeviceTimeoutError, match=r"Another model kept virtual:0 or virtual:1 busy for timeout=0\.1"
        ):
            engine.train(second)
    finally:
        over.set()
        other.join(LIMIT)
    assert engine.train(second).rows == len(second[1])
