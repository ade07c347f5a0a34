"""Steps that leave their gradients on the replicas: the sum is reduced once, and failures leave no half sums."""

from __future__ import annotations

import random
import threading
import time

import least_squares
import numpy as np
import pytest
from least_squares import WIDTH

import fastdp
from fastdp.comm.host.communicator import HostCommunicator
from fastdp.program.base import Totals
from fastdp.program.functions import FunctionProgram
from fastdp.runtime.select import resolve

RATE = 0.05


@pytest.fixture(autouse=True)
def eight_devices():
    fastdp.set_virtual_devices(8)
    yield resolve(8)
    for device in resolve(8):
        device.delay = None
    fastdp.set_virtual_devices(0)


def train(parameters, batch):
    """The line's gradient, unless something is not a number."""
    if np.isnan(batch[0]).any():
        raise ArithmeticError("not a number")
    return least_squares.train(parameters, batch)


def update(parameters, slots, gradients):
    return {"w": parameters["w"] - RATE * gradients["w"]}, {"steps": slots["steps"] + 1}


def start():
    return np.linspace(-1, 1, WIDTH)


def parallel(count, how, train=train, **options):
    program = FunctionProgram({"w": start()}, train, update, least_squares.predict, {"steps": np.zeros(1)})
    return fastdp.DataParallel(program, resolve(count), update=how, check_replicas=True, **options)


def batches(sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [[rng.normal(size=(n, WIDTH)), rng.normal(size=n)] for n in sizes]


def by_one(data, cycle):
    """The weights after the data, updated once in `cycle` batches by the sum of their gradients."""
    w, held = start(), 0.0
    for i, batch in enumerate(data):
        held = held + train({"w": w}, batch)[1]["w"]
        if (i + 1) % cycle == 0:
            w, held = w - RATE * held, 0.0
    return w


def run(engine, data, cycle):
    for i, batch in enumerate(data):
        engine.train(batch, reduce=(i + 1) % cycle == 0)


def weight(engine):
    return engine.program.parameters["w"].copy()


@pytest.mark.parametrize("how", ["first", "each"])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_the_sums_of_uneven_batches_are_reduced_once(count, how, monkeypatch):
    calls = []
    original = HostCommunicator.begin
    monkeypatch.setattr(HostCommunicator, "begin", lambda *a, **k: (calls.append(1), original(*a, **k))[1])
    data = batches([9, 2, 1, 17, 3, 8, 1, 1, 30, 2, 5, 1])
    engine = parallel(count, how)
    run(engine, data, 4)
    np.testing.assert_allclose(weight(engine), by_one(data, 4), rtol=1e-12)
    assert len(calls) == 3
    assert engine.replicas[0].memory.slots.views[0][0] == 3, "no update in the steps between"
    assert not engine.holds_gradients


@pytest.mark.parametrize("how", ["first", "each"])
def test_no_order_of_the_devices_work_changes_a_bit(how, eight_devices):
    data, found = batches([20, 7, 3, 16] * 4), []
    for slow in (False, True, True):
        for number, device in enumerate(eight_devices):
            draw = random.Random(number + 17 * len(found))
            device.delay = (lambda draw=draw: time.sleep(draw.random() * 0.001)) if slow else None
        engine = parallel(5, how)
        run(engine, data, 4)
        found.append(weight(engine))
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])


@pytest.mark.parametrize("how", ["first", "each"])
@pytest.mark.parametrize("reduce", [False, True])
def test_a_failed_step_adds_nothing_and_takes_nothing_away(how, reduce):
    data = batches([12] * 8)
    engine = parallel(4, how)
    bad = [data[0][0].copy(), data[0][1]]
    bad[0][4] = np.nan
    for i, batch in enumerate(data):
        if i % 4 == 2:
            with pytest.raises(fastdp.ReplicaError, match="not a number"):
                engine.train(bad, reduce=reduce)
        engine.train(batch, reduce=(i + 1) % 4 == 0)
    np.testing.assert_allclose(weight(engine), by_one(data, 4), rtol=1e-12)


@pytest.mark.parametrize("how", ["first", "each"])
def test_a_step_that_was_given_up_adds_nothing(how):
    go_on = threading.Event()

    def slow(parameters, batch):
        if np.isinf(batch[0]).any():
            go_on.wait(20)
            batch = [np.ones_like(batch[0]), batch[1]]
        return train(parameters, batch)

    engine = parallel(3, how, slow, timeout=0.5)
    data = batches([12] * 4)
    late = [data[0][0].copy(), data[0][1]]
    late[0][4] = np.inf
    engine.train(data[0], reduce=False)
    with pytest.raises(fastdp.errors.DeviceTimeoutError):
        engine.train(late, reduce=False)
    assert engine.holds_gradients
    go_on.set()
    engine.timeout = 20.0
    run(engine, data[1:], 3)
    np.testing.assert_allclose(weight(engine), by_one(data, 4), rtol=1e-12)


def test_a_prediction_in_the_middle_leaves_the_sums_alone():
    data = batches([12] * 4)
    engine = parallel(3, "first")
    for i, batch in enumerate(data):
        engine.predict(batch)
        engine.train(batch, reduce=i == 3)
    np.testing.assert_allclose(weight(engine), by_one(data, 4), rtol=1e-12)


@pytest.mark.parametrize("how", ["first", "each"])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_a_window_that_ends_without_another_batch_updates_by_the_sums_so_far(count, how):
    data, nothing_new = batches([9, 2, 17, 1, 8]), Totals(np.zeros(1), None, [])
    engine = parallel(count, how)
    assert not engine.end_window(nothing_new)
    for batch in data[:3]:
        engine.train(batch, reduce=False)
    assert engine.end_window(nothing_new)
    assert not engine.holds_gradients
    assert not engine.end_window(nothing_new)
    np.testing.assert_allclose(weight(engine), by_one(data[:3], 3), rtol=1e-12)
    engine.train(data[3], reduce=False)
    engine.train(data[4])
    expected = by_one(data[:3], 3)
    expected = expected - RATE * (train({"w": expected}, data[3])[1]["w"] + train({"w": expected}, data[4])[1]["w"])
    np.testing.assert_allclose(weight(engine), expected, rtol=1e-12)
    assert engine.replicas[0].memory.slots.views[0][0] == 2
    assert engine.steps == 5


def test_sums_cannot_be_folded_into_slots_that_only_the_functions_know():
    engine = parallel(2, "first")
    engine.fold()  # nothing waits
    engine.train(batches([8])[0], reduce=False)
    with pytest.raises(fastdp.ReplicaError, match="no slots for gradients"):
        engine.fold()
    assert engine.holds_gradients
    assert engine.steps == 1
