"""Forked children: they train with workers of their own, or are told at once what they cannot do."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest
from forked_child import in_child

from fastdp.engine.state import EngineState
from fastdp.runtime.forks import LongLock
from fastdp.runtime.host.device import HostDevice

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
    # Python warns of every fork in a process with threads.
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]


@pytest.fixture
def device():
    made = HostDevice(0)
    yield made
    made.close(10.0)


def work_on(device: HostDevice) -> Callable[[], list[int]]:
    seen: list[int] = []

    def work() -> list[int]:
        device.compute.enqueue(lambda: seen.append(threading.get_ident()))
        device.compute.record().synchronize(30.0)
        return seen

    return work


def test_a_child_goes_on_with_a_worker_of_its_own(device):
    here = work_on(device)()
    there = in_child(work_on(device))
    assert len(there) == 1
    assert threading.get_ident() not in (*here, *there)
    assert len(work_on(device)()) == 1, "the parent's worker still works"


def test_a_lock_that_another_thread_held_does_not_stop_the_child(device):
    with device._lock:
        assert len(in_child(work_on(device))) == 1


def test_a_child_that_was_forked_in_the_middle_of_work_is_told_so_at_once(device):
    goes_on, began = threading.Event(), threading.Event()
    device.compute.enqueue(lambda: (began.set(), goes_on.wait(60)))
    try:
        assert began.wait(10)
        found = in_child(work_on(device))
    finally:
        goes_on.set()
    assert found.startswith("RuntimeError: Device")
    assert "forked while another thread ran a step" in found


def held_by_another_thread(take: Callable[[], object]) -> Callable[[], None]:
    """Take something on a thread that goes on having it. Returns what ends that thread."""
    taken, over = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: (take(), taken.set(), over.wait(60)))
    thread.start()
    assert taken.wait(10)
    return lambda: (over.set(), thread.join(10))


@pytest.mark.parametrize("trains", [True, False])
def test_a_child_that_was_forked_in_a_step_of_another_thread_between_its_works_is_told_so_at_once(trains):
    state = EngineState(timeout=90.0)
    end = held_by_another_thread(lambda: state.take(trains=False))
    try:
        found = in_child(lambda: state.take(trains=trains))
    finally:
        end()
    assert found.startswith("RuntimeError: This model cannot be used in this process, which was forked while another")


def test_a_child_finds_locks_free_that_another_thread_had_and_keeps_its_own():
    lock, own = LongLock(), LongLock()
    end = held_by_another_thread(lock.acquire)
    try:
        with own:
            found = in_child(lambda: [lock.acquire(blocking=False), own.acquire(blocking=False), own.release()])
    finally:
        end()
    assert found == [True, True, None]
