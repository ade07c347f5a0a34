"""Buckets are reduced while backward goes on: with the same bits, and nothing of it outlives a failure."""

from __future__ import annotations

import random
import threading
import time

import numpy as np
import pytest

import fastdp
from fastdp.buffers import FlatBuffers
from fastdp.comm.host import communicator
from fastdp.comm.host.reduction import HostReduction
from fastdp.comm.ready_buckets import ReadyBuckets
from fastdp.engine import step_scope
from fastdp.program.base import Result
from fastdp.program.functions import FunctionProgram
from fastdp.runtime.select import resolve

LIMIT = 20.0
NAMES = ["first", "second", "third", "last"]


@pytest.fixture(autouse=True)
def devices():
    fastdp.set_virtual_devices(8)
    yield resolve(8)
    for device in resolve(8):
        device.delay = None
    fastdp.set_virtual_devices(0)


@pytest.fixture(autouse=True)
def _cores_to_spare(monkeypatch):
    """The calling thread does no worker's part, and sums during backward."""
    monkeypatch.setattr(step_scope, "CORES", 64)
    monkeypatch.setattr(communicator, "CORES", 64)


@pytest.fixture(autouse=True)
def _small_buckets(monkeypatch):
    """One array per bucket: the first bucket has the last array."""
    monkeypatch.setattr(FlatBuffers.buckets, "__defaults__", (4, 4))


class Reduced:
    """Knows which elements have been summed, and by whom; tests wait for them."""

    def __init__(self, monkeypatch):
        self.spans, self.threads, self.trouble = [], [], None
        self._changed = threading.Condition()
        kept = HostReduction._sum

        def summed(reduction, dtype, span, owner):
            if self.trouble is not None:
                self.trouble()
            kept(reduction, dtype, span, owner)
            with self._changed:
                self.spans.append((span.start, span.stop))
                self.threads.append(threading.current_thread().name)
                self._changed.notify_all()

        monkeypatch.setattr(HostReduction, "_sum", summed)

    def wait_for(self, bucket):
        with self._changed:
            wanted = (bucket.start, bucket.stop)
            assert self._changed.wait_for(lambda: wanted in self.spans, LIMIT), "it was not reduced meanwhile"


@pytest.fixture
def reduced(monkeypatch):
    return Reduced(monkeypatch)


class Announcing(FunctionProgram):
    """Writes the gradient of one array after the other, the last one first, as backward does, and announces each."""

    announces = True
    between = staticmethod(lambda rank, bucket, context: None)

    def train(self, state, batch, context):
        loss, gradients, outputs = self._train(state.parameters, batch)
        for bucket, name in enumerate(reversed(NAMES)):
            np.multiply(gradients[name], np.float32(context.rows.share), out=state.gradients[name])
            if self.announces:
                context.ready(bucket)
            self.between(context.rank, bucket, context)
        return Result(outputs, np.array([float(loss) * context.rows.share]))


def train(parameters, batch):
    """Four linear models with squared errors."""
    x = batch[0]
    errors = {name: x @ parameters[name] - 1 for name in NAMES}
    loss = sum((error**2).mean() for error in errors.values())
    return loss, {name: 2 * x.T @ error / len(x) for name, error in errors.items()}, [errors["last"]]


def update(parameters, slots, gradients):
    return {name: parameters[name] - 0.05 * gradients[name] for name in NAMES}, {}


def program(announces=True):
    start = {name: np.linspace(-1, 1, 16, dtype=np.float32) * (i + 1) for i, name in enumerate(NAMES)}
    made = Announcing(start, train, update, lambda p, batch: [batch[0] @ p["last"]])
    made.announces = announces
    return made


def parallel(count, announces=True, **options):
    return fastdp.DataParallel(program(announces), resolve(count), **{"timeout": LIMIT, **options})


def batch(rows, seed=0):
    return [np.random.default_rng(seed).normal(size=(rows, 16)).astype("f4")]


def weights(engine):
    return [replica.memory.variables.buffers["float32"].tobytes() for replica in engine.replicas]


def latest(engine):
    return engine.times._watches[-1]


@pytest.mark.parametrize("update", ["first", "each"])
@pytest.mark.parametrize("gated", [[2], [0, 1, 2]])
def test_a_bucket_is_reduced_while_the_backward_of_some_or_all_replicas_goes_on(reduced, gated, update):
    engine, plain = parallel(3, update=update), parallel(3, announces=False, update=update)
    first = engine.group.buckets[0]

    def wait(rank, bucket, context):
        if bucket == 0 and rank in gated:
            reduced.wait_for(first)

    engine.program.between = wait
    got, want = engine.train(batch(7)), plain.train(batch(7))
    assert reduced.spans.count((first.start, first.stop)) == 2  # once by each engine
    assert latest(engine).early >= 1
    assert weights(engine) == weights(plain)
    assert got.sums.tobytes() == want.sums.tobytes()
    if gated == [0, 1, 2]:  # no worker was free: the thread that waits for the step did it
        assert reduced.threads[0] == threading.current_thread().name


def test_a_bucket_of_which_one_gradient_is_missing_is_not_reduced(reduced):
    engine = parallel(3)
    seen, gate = [], threading.Event()

    def wait(rank, bucket, context):
        if rank == 1 and bucket == 0:
            return
        if rank == 2 and bucket == 0:
            reduced.wait_for(engine.group.buckets[0])
            seen.append(list(reduced.spans))
            gate.set()
        if rank == 1:
            assert gate.wait(LIMIT)

    engine.program.between = wait
    kept = engine.program.train

    def train_first_only(state, rows, context):
        ready = context.ready
        if context.rank == 0:
            context.ready = lambda bucket: ready(bucket) if bucket == 0 else None
        result = kept(state, rows, context)
        if context.rank == 0:
            assert gate.wait(LIMIT)
        return result

    engine.program.train = train_first_only
    engine.train(batch(6))
    assert seen == [[(engine.group.buckets[0].start, engine.group.buckets[0].stop)]]
    assert sorted(set(reduced.spans)) == sorted((b.start, b.stop) for b in engine.group.buckets)


def delays(devices):
    for number, device in enumerate(devices):
        draw = random.Random(number)
        device.delay = lambda draw=draw: time.sleep(draw.random() * 0.001)


@pytest.mark.parametrize("update", ["first", "each"])
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_announced_or_not_a_run_has_the_same_bits_whatever_the_delays(devices, count, update):
    engines = [parallel(count, announces, update=update, check_replicas=True) for announces in (True, False)]
    draw = random.Random(5)
    engines[0].program.between = lambda *_: time.sleep(draw.random() * 0.0005)
    delays(devices[:count])
    sizes = [3, 40, 1, 8, 17, 5, 33, 2, 64, 9]
    for number, rows in enumerate(sizes):
        results = [engine.train(batch(rows, number)) for engine in engines]
        assert len({result.sums.tobytes() for result in results}) == 1
    assert len({one for engine in engines for one in weights(engine)}) == 1


@pytest.mark.parametrize("failing", [0, 2])
def test_a_failure_after_a_bucket_was_reduced_changes_no_weight_and_the_next_step_works(reduced, failing):
    engine, plain = parallel(3), parallel(3, announces=False)
    for one in (engine, plain):
        one.train(batch(9))
    before = weights(engine)

    def fail(rank, bucket, context):
        if bucket == 0:
            reduced.wait_for(engine.group.buckets[0])
        if bucket == 2 and rank == failing:
            raise FloatingPointError("planned")

    reduced.spans.clear()
    engine.program.between = fail
    began = time.monotonic()
    with pytest.raises(FloatingPointError, match=rf"virtual:{failing}.*planned"):
        engine.train(batch(9, 1))
    assert time.monotonic() - began < LIMIT / 2
    assert weights(engine) == before
    engine.program.between = lambda *_: None
    for one in (engine, plain):
        one.train(batch(9, 2))
    assert weights(engine) == weights(plain)


def test_a_replica_that_hangs_after_a_bucket_was_reduced_is_given_up_in_time(reduced, devices):
    gate = threading.Event()
    engine, plain = parallel(3, timeout=0.3), parallel(3, announces=False)

    def hang(rank, bucket, context):
        if rank == 1 and bucket == 0:
            assert gate.wait(LIMIT)

    engine.program.between = hang
    before = weights(engine)
    with pytest.raises(fastdp.DeviceTimeoutError, match=r"on \['virtual:1'\] took longer than timeout=0\.3"):
        engine.train(batch(6))
    gate.set()
    devices[1].synchronize(LIMIT)
    assert weights(engine)[0] == before[0]
    engine.timeout = LIMIT
    for one in (engine, plain):
        one.train(batch(6, 1))
    assert weights(engine) == weights(plain)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError])
def test_whatever_ends_a_sum_ends_the_step_alone(reduced, kind):
    engine, plain = parallel(2), parallel(2, announces=False)
    main = threading.current_thread()
    hit = threading.Event()

    def trouble():
        if threading.current_thread() is main:
            hit.set()
            raise kind("planned")

    def wait(rank, bucket, context):
        if bucket == 0:
            assert hit.wait(LIMIT)

    engine.program.between, reduced.trouble = wait, trouble
    before = weights(engine)
    with pytest.raises(kind, match="planned"):
        engine.train(batch(6))
    reduced.trouble = None
    assert weights(engine)[0] == before[0]
    for one in (engine, plain):
        one.train(batch(6, 1))
    assert weights(engine) == weights(plain)


def test_no_update_begins_before_the_last_piece_is_summed(reduced):
    engine, plain = parallel(2), parallel(2, announces=False)
    main, inside, updating = threading.current_thread(), threading.Event(), threading.Event()
    kept = engine.program._update

    def update(*arguments):
        updating.set()
        return kept(*arguments)

    def trouble():
        if threading.current_thread() is main:
            inside.set()
            assert not updating.wait(0.3)

    def wait(rank, bucket, context):
        assert bucket or inside.wait(LIMIT)

    engine.program._update, engine.program.between, reduced.trouble = update, wait, trouble
    engine.train(batch(6))
    assert updating.is_set()
    reduced.trouble = None
    plain.train(batch(6))
    assert weights(engine) == weights(plain)


def test_an_interrupt_between_a_sum_and_the_note_of_it_leaves_the_engine_usable(monkeypatch):
    engine, plain = parallel(2), parallel(2, announces=False)
    main, kept, hit = threading.current_thread(), HostReduction._put_back, threading.Event()

    def interrupted(reduction, error):
        if threading.current_thread() is main and not hit.is_set():
            hit.set()
            raise KeyboardInterrupt
        kept(reduction, error)

    def wait(rank, bucket, context):
        assert bucket or hit.wait(LIMIT)

    monkeypatch.setattr(HostReduction, "_put_back", interrupted)
    engine.program.between, before = wait, weights(engine)
    with pytest.raises(KeyboardInterrupt):
        engine.train(batch(6))
    began = time.monotonic()
    for one in (engine, plain):
        one.train(batch(6, 1))
    assert time.monotonic() - began < LIMIT / 2
    assert weights(engine) == weights(plain) != before


def test_replicas_that_meet_in_the_middle_of_backward_do_not_wait_for_a_reduction(reduced):
    engine, plain = parallel(4), parallel(4, announces=False)

    def meet(rank, bucket, context):
        assert context.exchange(rank, "in the middle") == [0, 1, 2, 3]

    engine.program.between = meet
    for number in range(20):
        for one in (engine, plain):
            one.train(batch(8, number))
    assert weights(engine) == weights(plain)


def test_with_gradients_held_back_everything_is_reduced_at_the_end():
    engine, plain = parallel(3), parallel(3, announces=False)
    for one in (engine, plain):
        one.train(batch(9))
        one.train(batch(9, 1), reduce=False)
        assert one.holds_gradients
        one.train(batch(6, 2))
        assert latest(one).early == 0
    assert weights(engine) == weights(plain)


def test_a_closed_device_fails_the_step_and_hangs_nobody(reduced, devices):
    engine = parallel(4)
    engine.train(batch(8))
    devices[2].close(LIMIT)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="virtual:2 is closed"):
        engine.train(batch(8))
    assert time.monotonic() - began < LIMIT / 2


def test_a_bucket_is_complete_when_all_have_announced_it_and_once():
    announced = ReadyBuckets(2, 3)
    assert not announced.say(0, 1)
    assert not announced.say(0, 1)
    assert announced.say(1, 1)
    assert not announced.say(1, 1)
    assert not announced.say(1, 0)
    assert announced.end(0) == [0]
    assert announced.early == 2
    assert announced.end(1) == []  # the last one: nothing is early any more
    assert announced.early == 2
