"""A wait for data that does not end is an error on the main thread, and a report on others."""

from __future__ import annotations

import contextlib
import math
import os
import queue
import signal
import threading
import time
import types

import pytest

import fastdp
from fastdp.data import watch_data
from fastdp.runtime import watchdog

LIMIT = 30.0


def stalls(how):
    yield 1
    how()
    yield 2


def forever():
    while True:
        pass


@pytest.mark.parametrize(
    "how",
    [lambda: time.sleep(LIMIT), lambda: queue.Queue().get(timeout=LIMIT), forever],
    ids=["sleep", "queue", "loop"],
)
def test_a_stalled_data_set_is_an_error_that_says_where_every_thread_is(how):
    gate, got, began = threading.Event(), [], time.monotonic()
    other = threading.Thread(target=gate.wait, args=(LIMIT,), name="somebody-else")
    other.start()
    late = r"next batch of the data set took longer than timeout=0\.2"
    with pytest.raises(fastdp.DeviceTimeoutError, match=late) as caught:
        got.extend(watch_data(stalls(how), timeout=0.2))
    gate.set()
    other.join(LIMIT)
    assert time.monotonic() - began < LIMIT / 2
    assert got == [1]
    assert "thread MainThread" in str(caught.value)
    assert "thread somebody-else" in str(caught.value)
    assert "in stalls" in str(caught.value)
    assert list(watch_data(iter([3]), timeout=0.2)) == [3]


def test_on_another_thread_the_report_comes_first_and_the_error_when_the_wait_ends(monkeypatch, capfd):
    monkeypatch.setattr(watchdog, "_GRACE", 0.1)
    gate, errors = threading.Event(), []

    def work():
        try:
            list(watch_data(stalls(lambda: gate.wait(LIMIT)), timeout=0.1))
        except fastdp.DeviceTimeoutError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    deadline, told = time.monotonic() + LIMIT, ""
    while "cannot be interrupted" not in told:
        assert time.monotonic() < deadline
        time.sleep(0.01)
        told += capfd.readouterr().err
    assert "in stalls" in told
    gate.set()
    thread.join(LIMIT)
    assert len(errors) == 1


def test_the_same_signal_of_somebody_else_is_passed_on():
    came = []
    before = signal.signal(signal.SIGURG, lambda number, frame: came.append(number))
    watchdog._leaving._installed = False
    try:
        with watchdog.Watched("nothing", LIMIT):
            os.kill(os.getpid(), signal.SIGURG)
            time.sleep(0.01)
        assert came == [signal.SIGURG]
    finally:
        signal.signal(signal.SIGURG, before)
        watchdog._leaving._installed = False


class Moment(BaseException):
    pass


def test_interrupts_at_any_moment_leave_the_watchdog_at_work():
    """A lock that an interrupt leaves taken would stop the watchdog for good."""

    def came(number, frame):
        raise Moment

    before = signal.signal(signal.SIGALRM, came)
    try:
        for i in range(3000):
            with contextlib.suppress(Moment):
                signal.setitimer(signal.ITIMER_REAL, 20e-6 + i % 100 * 1e-6)
                while True:
                    watchdog._watchdog._wakes = math.inf  # so that the thread is woken each time
                    with watchdog.Watched("nothing", LIMIT):
                        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    watchdog._watchdog._watches.clear()  # a block that an interrupt kept from ending
    with pytest.raises(fastdp.DeviceTimeoutError):
        list(watch_data(stalls(lambda: time.sleep(5.0)), timeout=0.2))


def test_a_signal_that_comes_as_the_block_has_just_ended_raises_nothing():
    watch = watchdog.Watched("nothing", LIMIT)
    with watch:
        watch.found = "all threads"  # the watchdog has decided, and its signal is on the way
        leaving = types.SimpleNamespace(f_code=watchdog.Watched.__exit__.__code__)
        watchdog._leaving._came(signal.SIGURG, leaving)
        with pytest.raises(watchdog._Late):
            watchdog._leaving._came(signal.SIGURG, types.SimpleNamespace(f_code=stalls.__code__))


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), "60", True])
def test_a_timeout_of_no_use_is_refused(timeout):
    with pytest.raises(ValueError, match="`timeout` must be a number of seconds above 0"):
        watch_data([], timeout)
