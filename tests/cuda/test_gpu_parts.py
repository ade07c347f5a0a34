"""bench/gpu/parts.py runs to its end on the simulated CUDA: its calls are right; its figures mean nothing there."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.gpu import launches as gpu_launches
from bench.gpu import parts as gpu_parts
from bench.gpu.card import Card, WallClock


@pytest.fixture
def card(box):
    (device,) = box.devices(1)
    one = Card(device, WallClock, rounds=2)
    yield one
    one.close()


def by_name(lines):
    return {line["what"]: line for line in lines}


def test_kernels_transfers_and_launches(card, measured):
    gpu_parts.kernels(card, 12_288)
    gpu_parts.transfers(card, 12_288)
    gpu_launches.launches(card)
    found = by_name(measured())
    named = {
        "copy",
        "slice_rows shuffled",
        "concat_rows",
        "pinned to card",
        "take_rows (wall)",
        "host time: a kernel of fastdp",
    }
    assert named <= set(found)
    assert found["copy"]["of_copy"] == 1.0
    assert all(line["GBps"]["median"] > 0 for line in found.values() if "GBps" in line)


def test_graphs_are_launched_with_as_many_nodes_as_asked_for(card, measured, box, monkeypatch):
    monkeypatch.setattr(gpu_launches, "LAUNCHES", 3)
    replayed = []
    launch = box.sim.graph_launch
    monkeypatch.setattr(
        box.sim, "graph_launch", lambda graph, stream: (replayed.append((graph, stream)), launch(graph, stream))
    )
    gpu_launches.replays(card, 7)
    assert len(replayed) == 1 + 3 * 3  # one uploads it, the first of three rounds warms up
    assert len(set(replayed)) == 1
    replayed.clear()
    gpu_launches.launches_of_replicas(card, 8, nodes=3)
    assert len(set(replayed)) == 8
    assert len({stream for _, stream in replayed}) == 8
    one, eight = measured()
    assert (one["what"], one["nodes"]) == ("host time: replay", 7)
    assert (eight["replicas"], eight["nodes"]) == (8, 3)
    assert min(one["microseconds"]["median"], eight["microseconds"]["median"]) > 0


@pytest.mark.parametrize(("way", "factor"), [("two-shot", 3), ("one-shot", 7)])
def test_all_reduce_kernels_of_ranks_that_share_the_card(card, measured, way, factor):
    gpu_parts.bucket_kernels(card, 4, 64 << 10, way)
    (line,) = measured()
    assert line["what"] == f"all_reduce {way} of 4 ranks"
    moved = line["GBps"]["median"] * 1e9 * line["microseconds"]["median"] * 1e-6
    assert moved == pytest.approx(4 * factor * (64 << 10), rel=0.3)  # medians of rates and of times


def test_all_reduces_of_virtual_gpus(box, measured):
    gpu_parts.all_reduces(box.devices(4, 1), 64 << 10, 2)
    (line,) = measured()
    assert line["way"] == ["one-shot"]
    assert line["bus_GBps"]["median"] > 0


def test_what_fails_or_comes_too_late_is_left_out_with_its_reason(measured):
    def fails():
        raise MemoryError("no room")

    done = []
    jobs = [("first", fails), ("second", lambda: done.append(2))]
    assert gpu_parts.run(jobs, time.monotonic() + 60) == 1
    assert done == [2]
    assert gpu_parts.run(jobs, time.monotonic() - 1) == 0
    assert [(line["skipped"], line["reason"]) for line in measured()] == [
        ("first", "MemoryError: no room"),
        ("first", "no time was left for it"),
        ("second", "no time was left for it"),
    ]


def test_what_the_goals_are_about_comes_first(card):
    names = [name for name, _ in gpu_parts.jobs(card, [None] * 8)]
    assert names.index(f"kernels at {64 << 20}") < names.index(f"kernels at {64 << 10}")
    assert {"launches", "eight graphs", "replays of 5000 nodes", f"transfers at {256 << 20}"} <= set(names)
