"""Work issued on a lent virtual device runs on the thread that has it, in the order of the queue."""

from __future__ import annotations

import threading

import pytest

from fastdp.runtime.host.device import HostDevice
from fastdp.runtime.lending import lent

LIMIT = 10.0


@pytest.fixture
def device():
    made = HostDevice(0)
    yield made
    made.close(LIMIT)


def test_issued_work_runs_at_once_and_what_it_enqueues_runs_behind_it(device):
    ran = []

    def work(name):
        device.compute.enqueue(lambda: ran.append("enqueued by it"))
        ran.append(name)

    with lent([device]) as mine:
        assert mine
        assert device.compute.issue_here(work, "issued") is None
        assert ran == ["issued", "enqueued by it"]
        assert device.compute.record().done
    assert device._thread is None, "no worker was needed"


def test_issued_work_waits_behind_what_is_enqueued(device):
    other, gate, ran = HostDevice(1), threading.Event(), []
    other.compute.enqueue(lambda: gate.wait(LIMIT))
    with lent([device]):
        device.compute.wait(other.compute.record())
        device.compute.issue_here(ran.append, "issued")
        assert not ran
    gate.set()
    device.synchronize(LIMIT)
    assert ran == ["issued"]
    other.close(LIMIT)


def test_work_of_another_thread_that_comes_meanwhile_runs_behind_it(device):
    ran = []

    def work():
        thread = threading.Thread(target=lambda: device.compute.enqueue(lambda: ran.append("the other thread's")))
        thread.start()
        thread.join(LIMIT)
        ran.append("issued")

    with lent([device]):
        device.compute.issue_here(work)
        assert ran == ["issued", "the other thread's"]


def test_a_failure_is_the_streams_and_skips_later_work(device):
    ran = []
    with lent([device]):
        failure = device.compute.issue_here(lambda: 1 / 0)
        assert isinstance(failure, ZeroDivisionError)
        assert device.compute.issue_here(ran.append, 1) is failure
        assert device.compute.record().error is failure
        device.recover()
        assert device.compute.issue_here(ran.append, 2) is None
    assert ran == [2]


def test_an_interrupt_is_raised_at_once_and_the_device_is_given_back(device):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), lent([device]):
        device.compute.issue_here(interrupt)
    device.recover()
    ran = []
    device.compute.enqueue(lambda: ran.append(threading.current_thread().name))
    device.synchronize(LIMIT)
    assert ran == [f"fastdp-{device.name}"]
