"""A ring gives the items of an iterator in order, ahead of time, bounded, with the iterator's own errors."""

import gc
import os
import threading
import time
import traceback
import weakref

import pytest
from ahead_threads import LIMIT, alive, wait_until

import fastdp
from fastdp.data import ring as rings
from fastdp.data.ring import NAME, Ring


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    gc.collect()
    wait_until(lambda: not alive())


def made(items, count=2, timeout=LIMIT):
    return Ring(iter(items), count, "the data set (numbers)", timeout)


def test_items_come_in_order_and_the_thread_ends_where_the_caller_ends_the_epoch():
    seen, taken = [], []

    def numbers():
        for i in range(9):
            seen.append((i, threading.current_thread().name == NAME))
            yield i

    ring = made(numbers())
    for epoch in range(3):
        for left in (2, 1, 0):
            taken.append(ring.take(lambda left=left: left))
        wait_until(lambda: not alive())
        assert len(seen) == 3 * epoch + 3  # nothing beyond the epoch
    assert taken == list(range(9))
    assert [ahead for _, ahead in seen] == [False, True, True] * 3
    assert (ring.taken, ring.read_ahead) == (9, 6)


def test_no_more_items_are_alive_than_the_count_and_the_callers():
    class Item:
        pass

    living = weakref.WeakSet()

    def items():
        for _ in range(40):
            item = Item()
            living.add(item)
            yield item
            del item

    ring, most = made(items(), count=3), 0
    for _ in range(30):
        item = ring.take(lambda: 9)
        time.sleep(0.001)
        most = max(most, len(living))
    del item
    ring.close()
    assert 2 <= most <= 3 + 1


def test_an_error_of_the_iterator_comes_in_place_of_its_item_with_its_own_traceback():
    def fails():
        yield from range(2)
        raise LookupError("no third one")

    ring = made(fails())
    assert [ring.take(lambda: 2), ring.take(lambda: 2)] == [0, 1]
    with pytest.raises(LookupError, match="no third one") as caught:
        ring.take(lambda: 2)
    assert "fails" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    with pytest.raises(StopIteration):
        ring.take(lambda: 2)


def test_a_hung_producer_is_named_with_the_place_where_it_hangs():
    gate = threading.Event()

    def hangs():
        yield 0
        gate.wait(LIMIT)

    ring = made(hangs(), timeout=0.2)
    ring.take(lambda: 2)
    with pytest.raises(
        fastdp.DeviceTimeoutError, match=r"data set \(numbers\) took longer than timeout=0\.2"
    ) as caught:
        ring.take(lambda: 2)
    assert "hangs" in str(caught.value)  # the stack of the thread
    gate.set()
    ring.close()


def test_a_slow_producer_is_told_of_once(monkeypatch):
    monkeypatch.setattr(rings, "SLOW_SECONDS", 0.02)
    gates = [threading.Event() for _ in range(3)]

    def slow():
        for i, gate in enumerate(gates):
            gate.wait(LIMIT)
            yield i

    gates[0].set()
    ring = made(slow())
    assert ring.take(lambda: 2) == 0
    for i in (1, 2):
        threading.Timer(0.1, gates[i].set).start()
    with pytest.warns(UserWarning, match=r"next batch of the data set \(numbers\) has been made for") as told:
        assert [ring.take(lambda: 1), ring.take(lambda: 0)] == [1, 2]
    assert len(told) == 1


def test_a_dead_thread_is_named(monkeypatch):
    ring = made(range(9))
    ring.take(lambda: 0)
    monkeypatch.setattr(rings, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(rings._Line, "_run", lambda *args: None)
    ring._order(2)
    with pytest.raises(RuntimeError, match=r"reads the data set \(numbers\) ahead is dead"):
        ring.take(lambda: 2)


def test_what_was_read_and_not_used_is_left_to_the_caller():
    source = iter(range(10))
    ring = made(source)
    ring.take(lambda: 9)
    wait_until(lambda: ring._line.ready.qsize() == 2)
    assert [*ring.leave(), *source] == list(range(1, 10))
    assert made(source).leave() is None


def test_a_ring_that_is_dropped_ends_its_thread():
    ring = made(range(9))
    ring.take(lambda: 2)
    (thread,) = alive()
    del ring
    thread.join(LIMIT)
    assert not thread.is_alive()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_child_says_that_it_has_no_such_thread():
    ring = made(range(9))
    ring.take(lambda: 2)
    ring.after_fork()
    with pytest.raises(RuntimeError, match="forked while a thread read the data set"):
        ring.take(lambda: 2)
