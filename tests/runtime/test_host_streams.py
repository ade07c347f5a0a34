"""The ordering rules of streams and events on virtual devices, and what becomes of failures."""

from __future__ import annotations

import itertools
import random
import threading
import time

import pytest

from fastdp.errors import DeviceTimeoutError
from fastdp.runtime.host.device import HostDevice
from fastdp.runtime.queue import QueueEvent, joined

LIMIT = 10.0


@pytest.fixture
def devices():
    made = [HostDevice(index) for index in range(4)]
    yield made
    for device in made:
        device.delay = None
        device.close(LIMIT)
    names = {f"fastdp-{device.name}" for device in made}
    assert not [thread.name for thread in threading.enumerate() if thread.name in names]


def random_delay(seed, most=0.001):
    """A delay that varies from item to item."""
    draw = random.Random(seed)
    return lambda: time.sleep(draw.random() * most)


class Failure(ValueError):
    """What failing work raises here."""


def fail():
    raise Failure("planned")


@pytest.mark.parametrize("seed", range(3))
def test_work_on_one_stream_runs_in_order(devices, seed):
    seen = []
    devices[0].delay = random_delay(seed)
    for number in range(50):
        devices[0].compute.enqueue(lambda n=number: seen.append(n))
    devices[0].compute.record().synchronize(LIMIT)
    assert seen == list(range(50))


def race(first, second, ordered):
    """What a store on `first` and a later load on `second` see, with the store held back until the load ran.

    With a wait between them the load cannot run first, so the store goes on after a moment.
    """
    value, loaded, stored = ["before"], threading.Event(), threading.Event()

    def store():
        loaded.wait(0.2 if ordered else LIMIT)
        value[0] = "after"
        stored.set()

    seen = []
    first.enqueue(store)
    if ordered:
        second.wait(first.record())
    second.enqueue(lambda: (seen.append(value[0]), loaded.set()))
    second.record().synchronize(LIMIT)
    assert stored.wait(LIMIT)
    return seen


def test_without_a_wait_streams_of_two_devices_overtake_each_other(devices):
    assert race(devices[0].compute, devices[1].compute, ordered=False) == ["before"]


def test_with_a_wait_streams_of_two_devices_never_overtake_each_other(devices):
    assert race(devices[0].compute, devices[1].compute, ordered=True) == ["after"]


def overtaking(device, ordered):
    """Work on `compute`, then on `communication`, both enqueued before the worker, held up, may choose."""
    gate, seen = threading.Event(), []
    device.copy_in.enqueue(lambda: gate.wait(LIMIT))
    device.compute.enqueue(lambda: seen.append("compute"))
    if ordered:
        device.communication.wait(device.compute.record())
    device.communication.enqueue(lambda: seen.append("communication"))
    gate.set()
    device.synchronize(LIMIT)
    return seen


def test_without_a_wait_two_streams_of_one_device_overtake_each_other(devices):
    assert overtaking(devices[0], ordered=False) == ["communication", "compute"]


@pytest.mark.parametrize("seed", range(5))
def test_with_a_wait_two_streams_of_one_device_never_overtake_each_other(devices, seed):
    devices[0].delay = random_delay(seed)
    assert overtaking(devices[0], ordered=True) == ["compute", "communication"]


@pytest.mark.parametrize("seed", range(6))
def test_a_random_graph_of_waits_is_kept_whatever_the_delays(devices, seed):
    draw = random.Random(seed)
    streams = [stream for device in devices for stream in device._streams]
    for number, device in enumerate(devices):
        device.delay = random_delay(seed * 10 + number, 0.0003)
    finished, edges, events = [], [], []
    for number in range(150):
        stream = draw.choice(streams)
        for earlier in draw.sample(range(number), min(number, draw.randrange(3))):
            stream.wait(events[earlier])
            edges.append((earlier, number))
        stream.enqueue(lambda n=number: finished.append(n))
        events.append(stream.record())
    joined(events).synchronize(LIMIT)
    place = {number: position for position, number in enumerate(finished)}
    assert sorted(place) == list(range(150))
    assert all(place[earlier] < place[later] for earlier, later in edges)


def test_a_wait_holds_for_an_event_that_is_recorded_only_later(devices):
    later, seen = QueueEvent(), []
    devices[0].compute.wait(later)
    devices[0].compute.enqueue(lambda: seen.append("compute"))
    done = devices[0].compute.record()
    devices[0].copy_in.enqueue(lambda: seen.append("copy_in"))
    devices[0].copy_in.record().synchronize(LIMIT)
    assert (seen, done.done) == (["copy_in"], False)  # its own stream only is held back
    devices[1].compute.enqueue(later.complete)
    done.synchronize(LIMIT)
    assert seen == ["copy_in", "compute"]


def test_a_sleeping_worker_is_woken_by_the_last_of_many_waits(devices):
    gates = [QueueEvent() for _ in range(5)]
    for gate in gates:
        devices[0].compute.wait(gate)
    done = devices[0].compute.record()
    for gate in reversed(gates):
        assert not done.done
        time.sleep(0.002)
        gate.complete()
    done.synchronize(2.0)


def test_no_wake_up_is_lost_in_many_hand_offs(devices):
    event = devices[0].compute.record()
    for turn in range(400):
        stream = devices[(turn + 1) % 4].compute if turn % 3 else devices[turn % 4].copy_out
        stream.wait(event)
        event = stream.record()
    event.synchronize(LIMIT)
    for turn in range(300):  # one at a time: the worker is asleep each time
        devices[turn % 2].compute.record().synchronize(2.0)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_joint_event_is_done_when_all_are_and_carries_the_first_error_in_their_order(count):
    events = [QueueEvent() for _ in range(count)]
    joint = joined(events)
    errors = [Failure(str(number)) for number in range(count)]
    for event, error in reversed(list(zip(events, errors, strict=True))):
        assert not joint.done
        event.complete(error)
    assert joint.done
    assert joint.error is (errors[0] if errors else None)


@pytest.mark.parametrize("error", [None, Failure("planned")])
def test_an_event_recorded_while_the_last_work_runs_waits_for_its_end_and_its_error(devices, error):
    running, gate = threading.Event(), threading.Event()

    def work():
        running.set()
        assert gate.wait(LIMIT)
        if error is not None:
            raise error

    devices[0].compute.enqueue(work)
    assert running.wait(LIMIT)
    event = devices[0].compute.record()  # nothing is queued any more
    assert not event.done
    gate.set()
    event.finish(LIMIT)
    assert event.error is error
    assert devices[0].compute.record().error is error


def test_waits_and_events_of_sleeping_devices_wake_no_worker_but_that_of_the_work_behind(devices, monkeypatch):
    for device in devices:
        device.synchronize(LIMIT)
    woken, kept, gate = [], type(devices[0])._rouse, threading.Event()

    def rouse(device):
        if device._asleep:
            woken.append(device.name)
        kept(device)

    seen, event = [], None
    monkeypatch.setattr(type(devices[0]), "_rouse", rouse)
    devices[0].compute.enqueue(lambda: gate.wait(LIMIT))
    event = devices[0].compute.record()
    for device in devices[1:3] * 3:
        device.compute.wait(event)
        event = device.compute.record()
    devices[3].compute.wait(event)
    devices[3].compute.enqueue(lambda: seen.append("ran"))
    done = devices[3].compute.record()
    wait_until_asleep(devices[1:])
    woken.clear()
    gate.set()
    done.synchronize(LIMIT)
    assert seen == ["ran"]
    assert woken == [devices[3].name]


def wait_until_asleep(devices):
    deadline = time.monotonic() + LIMIT
    while not all(device.idle for device in devices):
        assert time.monotonic() < deadline, "a worker does not go to sleep"
        time.sleep(0.001)


def test_a_chain_of_waits_of_any_length_is_passed_at_once(devices):
    gate = threading.Event()
    devices[0].compute.enqueue(lambda: gate.wait(LIMIT))
    event = devices[0].compute.record()
    for turn in range(3000):
        stream = devices[1 + turn % 3].compute
        stream.wait(event)
        event = stream.record()
    gate.set()
    event.synchronize(LIMIT)


def test_work_behind_a_failure_is_skipped_and_its_event_raises_it(devices):
    seen, stream = [], devices[0].compute
    stream.enqueue(lambda: seen.append("before"))
    before = stream.record()
    stream.enqueue(fail)
    stream.enqueue(lambda: seen.append("behind"))
    with pytest.raises(Failure, match="planned"):
        stream.record().synchronize(LIMIT)
    before.synchronize(LIMIT)
    assert seen == ["before"]


def test_events_carry_a_failure_downstream_across_devices_and_nowhere_else(devices):
    seen = []
    devices[0].compute.enqueue(fail)
    for left, right in itertools.pairwise(devices[:3]):
        right.compute.wait(left.compute.record())
        right.compute.enqueue(lambda: seen.append("downstream"))
    with pytest.raises(Failure):
        devices[2].compute.record().synchronize(LIMIT)
    devices[2].copy_in.enqueue(lambda: seen.append("other stream"))
    devices[3].compute.enqueue(lambda: seen.append("other device"))
    devices[2].copy_in.record().synchronize(LIMIT)
    devices[3].compute.record().synchronize(LIMIT)
    assert sorted(seen) == ["other device", "other stream"]


def test_the_first_failure_is_kept_when_a_second_one_arrives(devices):
    stream = devices[0].compute
    stream.enqueue(fail)
    other = QueueEvent()
    other.complete(KeyError("second"))
    stream.wait(other)
    with pytest.raises(Failure, match="planned"):
        stream.record().synchronize(LIMIT)


def test_recover_clears_a_failure_and_finish_leaves_it_with_the_event(devices):
    device = devices[0]
    device.compute.enqueue(fail)
    event = device.compute.record()
    event.finish(LIMIT)
    assert isinstance(event.error, Failure)
    device.synchronize(LIMIT)
    device.recover()
    device.compute.record().synchronize(LIMIT)


class FalsyError(Exception):
    """An error that is false, as one with a length of 0 is."""

    def __len__(self):
        return 0


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit, FalsyError])
def test_any_exception_travels_to_the_waiter_and_the_worker_lives_on(devices, kind):
    def work():
        raise kind("from the worker")

    devices[0].compute.enqueue(work)
    devices[1].compute.wait(devices[0].compute.record())
    with pytest.raises(kind, match="from the worker"):
        devices[1].compute.record().synchronize(LIMIT)
    worker = devices[0]._thread
    devices[0].recover()
    devices[0].compute.record().synchronize(LIMIT)
    assert devices[0]._thread is worker
    assert worker.is_alive()


@pytest.mark.parametrize("timeout", [0.05, 0, -1.0])
def test_waiting_for_work_that_takes_too_long_raises_and_waiting_again_succeeds(devices, timeout):
    gate = threading.Event()
    devices[0].compute.enqueue(lambda: gate.wait(LIMIT))
    event = devices[0].compute.record()
    for wait in (event.finish, event.synchronize, devices[0].synchronize):
        with pytest.raises(DeviceTimeoutError, match=f"timeout={timeout} seconds"):
            wait(timeout)
    gate.set()
    event.synchronize(LIMIT)
    devices[0].synchronize(LIMIT)


def test_the_timeout_of_a_device_is_for_all_its_streams_together(devices):
    gates = [QueueEvent() for _ in devices[0]._streams]
    for gate, stream in zip(gates, devices[0]._streams, strict=True):
        stream.wait(gate)
    timers = [threading.Timer(0.15 * (n + 1), gate.complete) for n, gate in enumerate(gates)]
    for timer in timers:
        timer.start()
    with pytest.raises(DeviceTimeoutError):
        devices[0].synchronize(0.3)  # each stream on its own would be in time
    for timer in timers:
        timer.join(LIMIT)


def test_an_infinite_timeout_is_allowed(devices):
    devices[0].compute.record().finish(float("inf"))


def test_close_runs_what_can_run_ends_the_thread_and_refuses_more(devices):
    device, seen = devices[0], []
    device.delay = random_delay(1)
    for number in range(10):
        device.compute.enqueue(lambda n=number: seen.append(n))
    thread = device._thread
    for _ in range(3):
        device.close(LIMIT)
    assert seen == list(range(10))
    assert not thread.is_alive()
    for refused in (device.compute.record, lambda: device.compute.enqueue(print), device.synchronize):
        with pytest.raises(RuntimeError, match=r"virtual:0 is closed.*Wrap the model again"):
            refused()


def test_close_of_a_device_that_never_worked_is_fine(devices):
    devices[0].close()
    assert devices[0]._thread is None


def test_events_left_on_a_closed_device_carry_an_error_so_that_nobody_waits_for_ever(devices):
    seen = []
    devices[0].compute.wait(QueueEvent())
    devices[0].compute.enqueue(lambda: seen.append("never"))
    left = devices[0].compute.record()
    devices[1].compute.wait(left)
    downstream = devices[1].compute.record()
    devices[0].close(LIMIT)
    for event in (left, downstream):
        with pytest.raises(RuntimeError, match="virtual:0 is closed"):
            event.synchronize(LIMIT)
    assert seen == []


def test_close_says_when_the_worker_is_still_busy_and_can_be_called_again(devices):
    gate = threading.Event()
    devices[0].compute.enqueue(lambda: gate.wait(LIMIT))
    for _ in range(2):
        with pytest.raises(DeviceTimeoutError, match=r"virtual:0 was still busy after timeout=0\.05"):
            devices[0].close(0.05)
    gate.set()
    devices[0].close(LIMIT)


def test_an_event_is_done_once_and_keeps_its_first_error():
    event, calls = QueueEvent(), []
    assert event.notify(lambda: calls.append("woken"))
    event.complete(Failure("first"))
    event.complete()
    assert calls == ["woken"]
    assert isinstance(event.error, Failure)
    assert not event.notify(lambda: calls.append("too late"))
    assert calls == ["woken"]


def test_a_mark_inside_of_work_lets_another_stream_go_on_before_the_work_is_over(devices):
    first, second = devices[:2]
    marked, seen, go_on = [], [], threading.Event()

    def work():
        seen.append("before the mark")
        marked.append(first.compute.now())
        assert go_on.wait(LIMIT)
        seen.append("after it")

    first.compute.enqueue(work)
    over = first.compute.record()
    until = time.monotonic() + LIMIT
    while not marked:
        assert time.monotonic() < until
        time.sleep(0.001)
    second.compute.wait(marked[0])
    second.compute.enqueue(lambda: seen.append("the other"))
    second.compute.record().synchronize(LIMIT)
    go_on.set()
    over.synchronize(LIMIT)
    assert seen == ["before the mark", "the other", "after it"]


def test_following_inside_of_work_waits_for_the_other_stream_within_a_time_limit(devices):
    first, second = devices[:2]
    seen, go_on = [], threading.Event()
    second.compute.enqueue(lambda: go_on.wait(LIMIT) and seen.append("the other"))
    event = second.compute.record()

    def work():
        with pytest.raises(DeviceTimeoutError):
            first.compute.follow(event, 0.01)
        go_on.set()
        first.compute.follow(event, LIMIT)
        seen.append("behind it")

    first.compute.enqueue(work)
    first.compute.record().synchronize(LIMIT)
    assert seen == ["the other", "behind it"]


# A device that is lent: the thread that would wait does the work.


def test_a_lent_device_runs_work_on_the_thread_that_has_it():
    device, ran = HostDevice(0), []
    with device.lend():
        device.compute.enqueue(lambda: ran.append(threading.get_ident()))
        assert ran == [threading.get_ident()], "at once"
        event = device.compute.record()
        assert event.done
        device.communication.wait(event)
        device.communication.enqueue(lambda: ran.append(threading.get_ident()))
    assert ran == [threading.get_ident()] * 2
    assert device._thread is None, "no worker was needed"
    device.compute.enqueue(lambda: ran.append(threading.get_ident()))
    device.synchronize(LIMIT)
    assert ran[2] != threading.get_ident(), "given back"
    device.close(LIMIT)


def test_work_of_a_lent_device_that_waits_for_others_goes_to_the_worker_in_the_end():
    device, other, ran = HostDevice(0), HostDevice(1), []
    gate = threading.Event()
    other.compute.enqueue(lambda: gate.wait(LIMIT))
    with device.lend():
        device.compute.wait(other.compute.record())
        device.compute.enqueue(lambda: ran.append(1))
        done = device.compute.record()
        assert not ran
    gate.set()
    done.synchronize(LIMIT)
    assert ran == [1]
    for one in (device, other):
        one.close(LIMIT)


def test_a_device_with_work_is_not_lent():
    device, ran = HostDevice(0), []
    gate = threading.Event()
    device.compute.enqueue(lambda: gate.wait(LIMIT))
    with device.lend():
        device.compute.enqueue(lambda: ran.append(threading.get_ident()))
        assert not ran
        gate.set()
    device.synchronize(LIMIT)
    assert ran != [threading.get_ident()]
    device.close(LIMIT)


def test_failures_on_a_lent_device_go_with_its_events_and_an_interrupt_ends_the_work_at_once():
    device = HostDevice(0)

    def fail() -> None:
        raise ArithmeticError("work failed")

    def interrupt() -> None:
        raise KeyboardInterrupt

    with device.lend():
        device.compute.enqueue(fail)
        assert isinstance(device.compute.record().error, ArithmeticError)
        device.recover()
        with pytest.raises(KeyboardInterrupt):
            device.compute.enqueue(interrupt)
    device.recover()
    ran: list[int] = []
    device.compute.enqueue(lambda: ran.append(1))
    device.synchronize(LIMIT)
    assert ran == [1]
    device.close(LIMIT)
