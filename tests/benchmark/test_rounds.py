"""Rounds that take turns, their spread, and the end of warm-up."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdp.benchmark.rounds import WINDOW, alternate, ratio, spread, steps_in, turns, warm_up


def test_ways_take_turns_and_every_second_round_runs_backwards():
    assert list(turns(["a", "b"], 3)) == [(1, "a"), (1, "b"), (2, "b"), (2, "a"), (3, "a"), (3, "b")]


def test_a_way_that_is_taken_out_gets_no_further_turn():
    ways = {"a": 0, "b": 0, "c": 0}
    seen = []
    for number, way in turns(ways, 2):
        seen.append((number, way))
        ways.pop("b", None)
    assert seen == [(1, "a"), (1, "c"), (2, "c"), (2, "a")]


def test_quartiles_of_one_value_are_the_value():
    assert spread([2.0]) == {"min": 2.0, "q1": 2.0, "median": 2.0, "q3": 2.0, "max": 2.0}
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0])["q3"] == 4.0


def test_a_ratio_pairs_the_values_of_a_round():
    assert ratio([2.0, 30.0, 4.0], [1.0, 10.0, 2.0]) == 2.0


def test_alternating_steps_drop_their_first_round():
    calls = []
    times = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, seconds=0.0)
    assert calls == ["a", "b"] * 3
    assert [len(values) for values in times.values()] == [2, 2]


class Machine:
    """Steps that take these seconds each, and the last of them for ever."""

    def __init__(self, *seconds: float) -> None:
        self.seconds, self.asked = itertools.chain(seconds, itertools.repeat(seconds[-1])), []

    def __call__(self, steps: int) -> float:
        self.asked.append(steps)
        return steps * next(self.seconds)


def test_warm_up_ends_when_steps_no_longer_get_faster():
    machine = Machine(1.0, 0.5, 0.3, 0.2, 0.15, 0.12, 0.1, 0.1, 0.1, 0.1, 0.1)
    found = warm_up(machine, seconds=0.1, limit=1e9)
    assert found.steady
    assert found.step_seconds == 0.1
    assert found.steps == sum(machine.asked)
    assert 9 <= len(machine.asked) <= 13


def test_warm_up_of_steady_steps_is_six_rounds():
    machine = Machine(0.01)
    assert warm_up(machine, seconds=0.1, limit=1e9).steady
    assert machine.asked == [1] + [10] * (2 * WINDOW - 1)


def test_warm_up_waits_for_the_compiler_beyond_its_limit():
    waits = iter([*[False] * 20, True])
    machine = Machine(0.01)
    assert warm_up(machine, seconds=0.1, limit=1.0, settled=lambda: next(waits), patience=60.0).steady
    assert len(machine.asked) == 21


def test_warm_up_does_not_wait_for_ever():
    found = warm_up(Machine(0.01), seconds=0.1, limit=1.0, settled=lambda: False, patience=5.0)
    assert not found.steady
    assert 5.0 <= found.seconds < 5.2


def test_warm_up_ends_with_the_time_and_says_that_it_was_not_steady():
    found = warm_up(Machine(*(1.0 / number for number in range(1, 100))), seconds=0.001, limit=2.0)
    assert not found.steady
    assert found.seconds >= 2.0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.009, 0.011), min_size=1, max_size=30), st.integers(0, 2**31))
def test_warm_up_always_ends(times, seed):
    assert warm_up(Machine(*times), seconds=0.02, limit=10.0).seconds < 11.0


@pytest.mark.parametrize(("step", "count"), [(0.5, 2), (3.0, 1), (0.0, 10**9)])
def test_a_round_has_one_step_at_least(step, count):
    assert steps_in(1.0, step) == count
