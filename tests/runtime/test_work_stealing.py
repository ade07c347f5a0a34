"""Work of one worker that others take part in: every part runs once, and failures come back."""

from __future__ import annotations

import threading

import pytest

from fastdp.errors import DeviceTimeoutError
from fastdp.runtime.host.device import HostDevice
from fastdp.runtime.work_stealing import shared_with

LIMIT = 10.0


@pytest.fixture
def helpers():
    devices = [HostDevice(index) for index in range(2)]
    yield devices
    for device in devices:
        device.close(LIMIT)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_part_runs_once(helpers, count):
    ran: list[int] = []
    shared_with(helpers, LIMIT)([lambda i=i: ran.append(i) for i in range(count)])
    assert sorted(ran) == list(range(count))


def test_workers_that_are_free_take_part(helpers):
    """Three parts that wait for each other can only end if three threads run them."""
    together = threading.Barrier(3, timeout=LIMIT)
    shared_with(helpers, LIMIT)([together.wait] * 3)


def test_a_worker_that_is_busy_holds_up_nobody(helpers):
    busy = threading.Event()
    for device in helpers:
        device.copy_out.enqueue(lambda: busy.wait(LIMIT))
    ran: list[int] = []
    try:
        shared_with(helpers, LIMIT)([lambda i=i: ran.append(i) for i in range(5)])
        assert sorted(ran) == list(range(5))
    finally:
        busy.set()
    for device in helpers:
        device.synchronize(LIMIT)
    assert len(ran) == 5, "late helpers find nothing left"


def test_a_failure_on_a_helper_is_raised_here_and_its_device_goes_on(helpers):
    """Each thread takes one part, and the last of them fails."""
    together = threading.Barrier(3, timeout=LIMIT)
    main = threading.get_ident()

    def part() -> None:
        together.wait()
        if threading.get_ident() != main:
            raise ArithmeticError("a part failed")

    with pytest.raises(ArithmeticError, match="a part failed"):
        shared_with(helpers, LIMIT)([part] * 3)
    for device in helpers:
        event = device.copy_out.record()
        event.synchronize(LIMIT)  # raises if the stream carried the failure


def test_parts_that_nobody_has_taken_are_left_out_after_a_failure():
    ran: list[int] = []

    def fail() -> None:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        shared_with([], LIMIT)([fail, lambda: ran.append(1)])
    assert ran == []


def test_a_helper_that_hangs_is_given_up(helpers):
    hang, taken = threading.Event(), threading.Event()
    main = threading.get_ident()

    def part() -> None:
        if threading.get_ident() == main:
            assert taken.wait(LIMIT)
        else:
            taken.set()
            hang.wait(LIMIT)

    try:
        with pytest.raises(DeviceTimeoutError, match=r"timeout=0\.2"):
            shared_with(helpers[:1], 0.2)([part] * 2)
    finally:
        hang.set()
