"""Rows are staged while a step runs: in order, without allocation, and for nothing where the step fails."""

from __future__ import annotations

import gc
import importlib

import keras
import numpy as np
import pytest
from least_squares import WIDTH, line, rows

import fastdp
from fastdp.options import Options
from fastdp.runtime.host.device import HostDevice

LIMIT = 20.0


def run(engine, batches, *, staged, meanwhile=lambda i: None):
    """Train on all batches, each but the first staged in the step before; the outputs."""
    outputs = []
    for i, batch in enumerate(batches):

        def fetch(i=i):
            if staged and i + 1 < len(batches):
                engine.stage(batches[i + 1])
            meanwhile(i)

        outputs.append(np.array(engine.train(batch, while_running=fetch).outputs[0]))
    return outputs


def reference(batches):
    host = [HostDevice(i) for i in range(2)]
    outputs = run(fastdp.DataParallel(line(), host, timeout=LIMIT), batches, staged=False)
    for device in host:
        device.close()
    return outputs


def watch_pinned_memory(box, monkeypatch):
    """Let the race detector see that the host fills the buffers of the rings."""
    memory = importlib.import_module("fastdp.runtime.cuda.memory")
    take = memory.StagingRing.take

    def noted(ring, nbytes):
        room = take(ring, nbytes)
        box.sim.host_access(room.ctypes.data, room.nbytes, write=True)
        return room

    monkeypatch.setattr(memory.StagingRing, "take", noted)


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize(("count", "cards"), [(1, 1), (2, 2), (4, 1)])
def test_staged_steps_equal_the_others(gpus, monkeypatch, count, cards, seed):
    box = gpus(cards, seed=seed)
    watch_pinned_memory(box, monkeypatch)
    devices = box.devices(count, cards)
    batches = [rows(n, i) for i, n in enumerate([16, 16, 16, 13, 16, 1, 16, 16, 3])]
    engine = fastdp.DataParallel(line(), devices, timeout=LIMIT, check_replicas=True)
    found = []
    for device in devices:
        take, feed = device._feed.take, device._feed

        def noted(batch, rows, take=take, feed=feed):
            found.append(feed._staged is not None and feed._staged.holds(batch, rows))
            return take(batch, rows)

        feed.take = noted
    got = run(engine, batches, staged=True)
    for a, b in zip(got, reference(batches), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert not any(found[:count])
    assert all(found[count:])
    for device in devices:
        del device._feed.take
    del engine, feed, take, noted
    gc.collect()


def test_copies_of_the_next_batch_are_issued_before_the_step_is_waited_for(gpus):
    box = gpus(2)
    devices = box.devices(2)
    engine = fastdp.DataParallel(line(), devices, timeout=LIMIT)
    order, finish, copy = [], engine._recovery.finish, box.runtime.copy_async
    feeding = [device.copy_in.handle for device in devices]

    def noted_finish(step):
        order.append("wait")
        finish(step)
        order.append("over")

    def noted_copy(target, source, nbytes, stream):
        if stream in feeding:
            order.append("copy")
        copy(target, source, nbytes, stream)

    engine._recovery.finish, box.runtime.copy_async = noted_finish, noted_copy

    def issued(i):
        for device in devices:
            if device._feed._staged is not None:
                device._feed._staged.arrived.wait_issued(LIMIT)

    run(engine, [rows(16, i) for i in range(5)], staged=True, meanwhile=issued)
    box.runtime.copy_async = copy
    # Of the first batch, and one ahead in each step but the last.
    one_ahead = ["copy", "copy", "wait", "over"]
    assert order == ["copy", "copy", *(4 * one_ahead), "wait", "over"]
    del engine._recovery.finish, engine
    gc.collect()


def test_the_steady_state_allocates_nothing(gpus):
    box = gpus(2)
    engine = fastdp.DataParallel(line(), box.devices(2), timeout=LIMIT)
    run(engine, [rows(16, i) for i in range(4)], staged=True)
    before = dict(box.sim.calls)
    run(engine, [rows(16, i) for i in range(6)], staged=True)
    assert box.sim.calls["memcpyAsync"] > before["memcpyAsync"]
    for name in ("malloc", "free", "hostAlloc", "freeHost"):
        assert box.sim.calls[name] == before.get(name, 0), name


@pytest.mark.parametrize("wrong", ["buffer", "pinned"])
def test_memory_in_use_that_is_overwritten_is_found(gpus, monkeypatch, wrong):
    box = gpus(2)
    feed = importlib.import_module("fastdp.runtime.cuda.feed")
    memory = importlib.import_module("fastdp.runtime.cuda.memory")
    engine = fastdp.DataParallel(line(), box.devices(2), timeout=LIMIT)
    run(engine, [rows(16, i) for i in range(3)], staged=True)
    if wrong == "buffer":
        monkeypatch.setattr(feed.Feed, "_other", property(lambda self: self._turn))
        box.sim.synchronize = lambda handle: None  # the replicas' own work no longer joins the host
    else:
        watch_pinned_memory(box, monkeypatch)
        monkeypatch.setattr(memory.StagingRing, "_wait", lambda self, slot: None)
        box.sim.held = True  # nothing that is enqueued runs

    def go():
        if wrong == "buffer":
            run(engine, [rows(16, i) for i in range(3)], staged=True)
        else:
            for i in range(3):
                engine.stage(rows(16, i))
            for device in engine.devices:
                device.copy_in.record().finish(1.0)
                device.copy_in.record().synchronize(1.0)

    with pytest.raises((RuntimeError, AssertionError, TimeoutError)):
        go()
    box.sim.held = False
    assert any("nothing orders" in str(v) or "does not wait" in str(v) for v in box.sim.violations)
    box.sim.violations.clear()
    vars(box.sim).pop("synchronize", None)
    monkeypatch.undo()
    for device in engine.devices:
        device.synchronize(LIMIT)
        device.recover()
    engine = None
    gc.collect()


def test_a_failed_step_forgets_what_was_staged_and_the_next_ones_are_right(gpus):
    box = gpus(2)
    program = line()
    engine = fastdp.DataParallel(program, box.devices(2), timeout=LIMIT)
    batches = [rows(16, i) for i in range(6)]
    got = run(engine, batches[:3], staged=True)
    kept = program._train

    def fail(p, batch):
        raise FloatingPointError("no number")

    program._train = fail
    with pytest.raises(FloatingPointError, match="no number"):
        engine.train(rows(16, 9), while_running=lambda: engine.stage(batches[3]))
    program._train = kept
    assert all(device._feed._staged is None for device in engine.devices)
    got += run(engine, batches[3:], staged=True)
    for a, b in zip(got, reference(batches), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_another_batch_may_come_between_and_the_staged_rows_stay(gpus):
    box = gpus(2, seed=3)
    engine = fastdp.DataParallel(line(), box.devices(2), timeout=LIMIT)
    batches = [rows(16, i) for i in range(5)]
    outputs = []
    for i, batch in enumerate(batches):
        following = batches[(i + 1) % 5]
        outputs.append(np.array(engine.train(batch, while_running=lambda b=following: engine.stage(b)).outputs[0]))
        if i < 4:
            assert all(device._feed._staged is not None for device in engine.devices)
            for n in (16, 7, 40):  # one that fits, a short one, one that makes the buffer grow
                engine.predict(rows(n, n))
            assert all(device._feed._staged is not None for device in engine.devices)
    for a, b in zip(outputs, reference(batches), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    engine.forget_staged()


def test_what_the_hook_raises_ends_the_step_and_the_next_one_works(gpus):
    box = gpus(2)
    engine = fastdp.DataParallel(line(), box.devices(2), timeout=LIMIT, check_replicas=True)
    engine.train(rows(8, 0))
    with pytest.raises(IndexError):
        engine.train(rows(8, 1), while_running=[].pop)
    assert np.isfinite(engine.train(rows(8, 2)).sums[0])


def test_a_batch_that_cannot_be_dealt_out_is_not_staged(gpus):
    box = gpus(2)
    engine = fastdp.DataParallel(line(), box.devices(2), timeout=LIMIT)
    with pytest.raises(ValueError, match="same number of rows"):
        engine.stage([np.zeros((3, WIDTH)), np.zeros((2, 3))])


def test_a_keras_model_is_fitted_ahead_with_the_same_result(gpus):
    from fastdp.keras.parallel_model import ParallelModel

    box = gpus(2)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 6)).astype("float32"), rng.normal(size=(20, 2)).astype("float32")
    results, staged = [], []
    devices = box.devices(2)
    for ahead in (None, False):
        keras.utils.set_random_seed(3)
        inputs = keras.Input((6,))
        template = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Dense(4, activation="tanh")(inputs)))
        parallel = ParallelModel(template, devices, Options(timeout=LIMIT))
        assert parallel.fetch_ahead
        if ahead is not None:
            parallel.fetch_ahead = ahead
        parallel.compile(optimizer="adam", loss="mse", metrics=["mae"])
        before = box.sim.calls["hostAlloc"]
        stage = parallel.engine.stage
        parallel.engine.stage = lambda batch, stage=stage: staged.append(stage(batch))
        history = parallel.fit(x, y, batch_size=6, epochs=3, verbose=0, shuffle=True).history
        results.append((history, parallel.get_weights()))
        assert all(device._feed._staged is None for device in devices)
    assert results[0][0] == results[1][0]
    for a, b in zip(results[0][1], results[1][1], strict=True):
        np.testing.assert_array_equal(a, b)
    assert staged == [True] * 3 * 3  # one less than the steps of each of three epochs
    assert before > 0
    del parallel, template, stage, results, inputs
    keras.backend.clear_session()
    gc.collect()
