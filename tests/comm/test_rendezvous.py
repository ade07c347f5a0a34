"""Threads that exchange values name the place, and none waits for one that will not come."""

from __future__ import annotations

import threading
import time

import pytest

from fastdp.comm.rendezvous import Rendezvous
from fastdp.errors import StepAborted

LIMIT = 20.0
NAMES = ["gpu:0", "gpu:1", "gpu:2"]


def results_of(work, count: int = 3) -> list[object]:
    """What `work(rank)` returns or raises on each of several threads."""
    found: list[object] = [None] * count

    def run(rank: int) -> None:
        try:
            found[rank] = work(rank)
        except Exception as error:  # noqa: BLE001
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT / 2)
        assert not thread.is_alive(), "a thread waits for one that does not come"
    return found


def wait_for(meeting: Rendezvous, count: int) -> None:
    while len(meeting._waiting) < count:
        time.sleep(0.001)


def test_threads_at_different_places_all_get_an_error_that_names_both_places_and_devices():
    meeting = Rendezvous(3, LIMIT, NAMES)

    def work(rank: int) -> object:
        if rank == 1:
            wait_for(meeting, 2)
        return meeting.exchange(rank, rank, ("the moments of", "right" if rank == 1 else "left"))

    for error in results_of(work):
        assert isinstance(error, RuntimeError)
        assert "gpu:0 and gpu:2 at the moments of left; gpu:1 at the moments of right" in str(error)
    with pytest.raises(RuntimeError, match="different paths"):
        meeting.exchange(0, 0, "a later place")


def test_those_who_wait_get_an_error_when_another_has_ended():
    meeting = Rendezvous(3, LIMIT, NAMES)

    def work(rank: int) -> object:
        if rank:
            return meeting.exchange(rank, rank, "a sum")
        wait_for(meeting, 2)
        return meeting.leave(0)

    nothing, *errors = results_of(work)
    assert nothing is None
    for error in errors:
        assert isinstance(error, RuntimeError)
        assert "gpu:1 and gpu:2 at a sum; gpu:0 past the end" in str(error)


def test_who_comes_after_another_has_ended_gets_the_error_too():
    meeting = Rendezvous(2, LIMIT)
    meeting.leave(1)
    with pytest.raises(RuntimeError, match="replica 0 at a sum; replica 1 past the end"):
        meeting.exchange(0, 0, "a sum")


def test_threads_that_leave_after_their_last_exchange_leave_nobody_behind():
    meeting = Rendezvous(3, LIMIT, NAMES)

    def work(rank: int) -> object:
        found = [meeting.exchange(rank, rank, ("round", turn)) for turn in range(20)]
        meeting.leave(rank)
        return found

    assert results_of(work) == [[[0, 1, 2]] * 20] * 3
    assert not meeting.aborted


def test_a_failure_stays_the_cause_when_a_thread_leaves_later():
    meeting, cause = Rendezvous(2, LIMIT, NAMES), ValueError("the cause")
    meeting.abort(cause)
    meeting.leave(1)
    with pytest.raises(StepAborted) as raised:
        meeting.exchange(0, 0, "a sum")
    assert raised.value.__cause__ is cause


def test_a_thread_that_runs_all_parts_does_not_wait_for_itself():
    meeting = Rendezvous(2, 60.0)
    meeting.one_thread = True
    with pytest.raises(RuntimeError, match="launched by one thread comes to a place"):
        meeting.exchange(0, None, "a place")
