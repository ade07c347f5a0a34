"""Shards of a step: where they run, in turns on their device, with errors that name them, added up in a tree."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from least_squares import line, rows

import fastdp
from fastdp.comm import turns
from fastdp.comm.tree import branches, join_branches, sum_in_tree
from fastdp.comm.turns import turns_of
from fastdp.errors import ReplicaError
from fastdp.options import Options
from fastdp.runtime.select import resolve
from fastdp.runtime.shards import on_shards

LIMIT = 20.0


@pytest.fixture(autouse=True)
def five_devices():
    fastdp.set_virtual_devices(5)
    yield
    fastdp.set_virtual_devices(0)


def parts_of(count: int, shards: int = 8) -> list:
    return on_shards(resolve(count), Options(shards=shards))[0]


def test_devices_get_neighbouring_shards():
    owners = [part.part_of.name for part in parts_of(3)]
    assert owners == ["virtual:0"] * 3 + ["virtual:1"] * 3 + ["virtual:2"] * 2
    assert parts_of(3)[4].name == "virtual:1 (part 1)"
    assert parts_of(3) == parts_of(3)  # the same objects, with the same threads


def test_the_device_that_merges_is_found_among_the_parts():
    parts, options = on_shards(resolve(3), Options(shards=8, merge_device=1))
    assert parts[options.merge_device].part_of.name == "virtual:1"


def test_parts_close_with_their_device():
    part = parts_of(1)[7]
    part.compute.record().finish(LIMIT)
    fastdp.set_virtual_devices(0)
    with pytest.raises(RuntimeError, match=r"virtual:0 \(part 7\) is closed"):
        part.compute.record()


@pytest.mark.parametrize("shards", [0, -1, 1025, 2.0, True, "8"])
def test_shards_that_are_no_number_of_parts_are_an_error(shards):
    with pytest.raises(ValueError, match="`shards` must be None or a whole number from 1 to 1024"):
        fastdp.DataParallel(line(), 2, shards=shards)


def test_a_device_without_a_shard_is_an_error():
    with pytest.raises(ValueError, match=r"`shards` must be at least the number of devices.*shards=3 for 5 devices"):
        fastdp.DataParallel(line(), 5, shards=3)


def test_shards_make_every_decision_without_the_clock():
    assert Options(shards=8).deterministic
    assert not Options().deterministic


class Watched:
    """How many shards of each device run at once."""

    def __init__(self) -> None:
        self.lock, self.now, self.most = threading.Lock(), {}, {}

    def __call__(self, state, batch, context, train):
        owner = context.device.part_of.name
        with self.lock:
            self.now[owner] = self.now.get(owner, 0) + 1
            self.most[owner] = max(self.most.get(owner, 0), self.now[owner])
        time.sleep(0.1)  # until all that may run have begun, on a busy machine too
        with self.lock:
            self.now[owner] -= 1
        return train(state, batch, context)


@pytest.mark.parametrize(("cores", "count", "at_once"), [(1, 2, 1), (4, 2, 2), (64, 1, 8), (2, 5, 1)])
def test_a_device_runs_as_many_shards_at_once_as_it_has_cores_for(monkeypatch, cores, count, at_once):
    monkeypatch.setattr(turns, "CORES", cores)
    program, watched = line(), Watched()
    train = program.train
    program.train = lambda state, batch, context: watched(state, batch, context, train)
    engine = fastdp.DataParallel(program, count, shards=8, timeout=LIMIT)
    engine.train(rows(32))
    assert max(watched.most.values()) == at_once
    assert len(watched.most) == count


@pytest.mark.parametrize("count", [1, 3])
def test_a_shard_that_waits_for_the_others_lets_the_next_one_run(monkeypatch, count):
    monkeypatch.setattr(turns, "CORES", 1)
    program = line()
    train, seen = program.train, []

    def exchanging(state, batch, context):
        seen.append([context.exchange(context.rank, "a test") for _ in range(3)])
        return train(state, batch, context)

    program.train = exchanging
    fastdp.DataParallel(program, count, shards=8, timeout=LIMIT).train(rows(32))
    assert seen == [[list(range(8))] * 3] * 8


def test_a_shard_that_fails_ends_the_step_and_the_turn_of_those_behind_it(monkeypatch):
    monkeypatch.setattr(turns, "CORES", 1)
    program, ran = line(), []
    train = program.train

    def failing(state, batch, context):
        ran.append(context.rank)
        if context.rows.start == 8:
            raise ArithmeticError("of shard 2")
        return train(state, batch, context)

    engine = fastdp.DataParallel(program, 1, shards=8, timeout=LIMIT)
    before = program.parameters["w"].copy()
    program.train = failing
    with pytest.raises(ReplicaError, match=r"virtual:0 \(part 2\) \(rows 8 to 12 of the batch's 32\) failed"):
        engine.train(rows(32))
    np.testing.assert_array_equal(program.parameters["w"], before)
    program.train = train
    engine.train(rows(32))
    assert (program.parameters["w"] != before).any()


def test_a_shard_that_does_not_end_is_named_when_the_time_is_over():
    turn, waits = turns_of(parts_of(1)[:1], 0.05), turns_of(parts_of(1), 0.05)
    assert turn == [None]  # it has the device to itself
    if waits[0] is None:
        pytest.skip("as many cores as shards")
    *first, late = [one for one in waits if one is not None][: turns.CORES + 1]
    for one in first:
        one.take()
    with pytest.raises(fastdp.DeviceTimeoutError, match=r"kept virtual:0 \(part \d\) busy for timeout=0.05 seconds"):
        late.take()


@pytest.mark.parametrize("count", range(1, 12))
def test_the_tree_adds_neighbours_first(count):
    values = [np.float32(10.0) ** np.arange(-3, 5, dtype=np.float32) * (i + 1) for i in range(count)]
    level = list(values)
    while len(level) > 1:
        level = [level[i] + level[i + 1] if i + 1 < len(level) else level[i] for i in range(0, len(level), 2)]
    kept = [value.copy() for value in values]
    assert sum_in_tree(values).tobytes() == level[0].tobytes()
    assert sum_in_tree(values, values[0] if count > 1 else None).tobytes() == level[0].tobytes()
    for value, before in zip(values[1:], kept[1:], strict=True):
        assert value.tobytes() == before.tobytes()  # only the first one is overwritten


@pytest.mark.parametrize("count", [1, 3, 6, 8, 13])
def test_branches_of_any_split_add_up_to_the_same_bits(count):
    values = [np.float32(np.random.default_rng(i).normal(size=50) * 10.0**i) for i in range(count)]
    for first in range(count):
        for second in range(first, count + 1):
            places = [branches(count, *pair) for pair in ((0, first), (first, second), (second, count))]
            sums = {(a, b): sum_in_tree(values[a:b]) for part in places for a, b in part}
            np.testing.assert_array_equal(join_branches(sums, count), sum_in_tree(values))


def test_processes_share_the_shards_of_all_their_devices():
    names = [[part.name for part in on_shards(resolve(2), Options(shards=6), (rank, 2))[0]] for rank in range(2)]
    assert [len(one) for one in names] == [4, 2]
    with pytest.raises(ValueError, match=r"shards=3 for 2 devices in each of 2 processes.*gpus=1"):
        on_shards(resolve(2), Options(shards=3), (0, 2))
