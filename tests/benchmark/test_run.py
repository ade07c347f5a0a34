"""Ways that take turns in processes of their own: what is kept of them, how failures go, and that none stays behind."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastdp.benchmark import batch_trials, run
from fastdp.benchmark.request import Request
from fastdp.benchmark.result import check
from fastdp.benchmark.settings import Settings

STUB = Path(__file__).with_name("stub_worker.py")


def request(devices: int = 1, how: str = "steady", **fields) -> Request:
    return Request(target="mlp", framework="torch", devices=devices, kind="virtual", optimizer=how, **fields)


@pytest.fixture
def measure(monkeypatch, tmp_path):
    """Measure stub ways; the result, the events, and the turns as (devices, batch, steps)."""
    turns = tmp_path / "turns"
    monkeypatch.setenv("TURNS", str(turns))
    command = lambda request: [sys.executable, str(STUB), request.to_json()]  # noqa: E731
    monkeypatch.setattr(run, "command", command)
    monkeypatch.setattr(batch_trials, "command", command)
    monkeypatch.setattr(run, "missing", lambda request: "not here" if request.mode == "graph" else "")

    def run_ways(*ways: Request, **fields):
        events = []
        asked = {"rounds": 2, "seconds": 0.2, "timeout": 30.0, **fields}
        settings = Settings(target="mlp", name="mlp", framework="torch", ways=ways, batch=ways[0].batch, **asked)
        result = run.run(settings, events.append)
        check(result, "the result")
        json.dumps(result)
        took = turns.read_text("utf-8").splitlines() if turns.exists() else []
        return result, events, [tuple(map(int, line.split())) for line in took]

    return run_ways


def test_ways_take_turns_and_medians_are_kept(measure):
    result, events, turns = measure(request(1), request(2))
    assert [devices for devices, _, _ in turns[-4:]] == [1, 2, 2, 1]  # the second round runs backwards
    assert [steps for _, _, steps in turns[-4:]] == [20, 33, 33, 20]  # 0.2 seconds each
    one, two = result["entries"]
    assert one["samples_per_second"] == {"median": 3200.0, "q1": 3200.0, "q3": 3200.0, "rounds": [3200.0, 3200.0]}
    assert one["efficiency"] == 1.0
    assert two["efficiency"] == pytest.approx(10 / 6 / 2, rel=1e-3)
    assert one["warm_up"]["steady"]
    assert one["how"] == "stubbed"
    assert one["between_seconds"] == pytest.approx(0.008)  # of the last round
    assert result["target"]["title"] == "a stub"
    kinds = [event["event"] for event in events]
    assert kinds[:3] == ["started", "starting", "ready"]
    assert kinds[-1] == "ended"
    assert kinds.count("warm") == 2
    assert [(event["way"], event["number"], event["of"]) for event in events if event["event"] == "round"] == [
        ("fastdp torch, 1 device", 1, 2),
        ("fastdp torch, 2 devices", 1, 2),
        ("fastdp torch, 2 devices", 2, 2),
        ("fastdp torch, 1 device", 2, 2),
    ]


def test_steps_of_a_round_may_be_given(measure):
    _, _, turns = measure(request(1), steps=3, rounds=1)
    assert turns[-1] == (1, 32, 3)


def test_ways_that_fail_are_left_out_with_their_reason_and_the_others_go_on(measure):
    ways = [request(1), request(2, "broken"), request(3, "dies"), request(4, mode="graph")]
    result, events, _ = measure(*ways, rounds=3)
    assert [entry["devices"] for entry in result["entries"]] == [1]
    assert len(result["entries"][0]["samples_per_second"]["rounds"]) == 3
    reasons = {one["name"]: one["reason"] for one in result["failed"]}
    assert reasons["fastdp torch, 2 devices"] == "ended with status 1: ValueError: cannot build"
    assert reasons["fastdp torch, 3 devices"] == "ended with status 1: MemoryError: no room"
    assert reasons["fastdp torch, 4 devices, graph"] == "not here"
    assert {event["reason"] for event in events if event["event"] == "failed"} == set(reasons.values())


def test_a_way_without_memory_beside_others_is_measured_when_they_are_over(measure, monkeypatch):
    result, events, turns = measure(request(1), request(2, "full", batch=128), request(3))
    assert [entry["devices"] for entry in result["entries"]] == [1, 3]
    assert result["failed"] == [
        {"name": "fastdp torch, 2 devices", "reason": "ended with status 1: MemoryError: CUDA out of memory"}
    ]
    started = [event["way"][14] for event in events if event["event"] == "starting"]
    assert started == ["1", "2", "3", "2"]
    assert len(turns)


def test_a_late_way_is_ended_with_all_that_it_started(measure):
    began = time.monotonic()
    result, _, _ = measure(request(1, "hangs"), rounds=3, timeout=3.0, seconds=0.01)
    assert time.monotonic() - began < 60  # it would sleep for ten minutes
    assert result["entries"] == []
    assert "a round took longer than" in result["failed"][0]["reason"]


def test_what_a_model_prints_asks_closes_or_replaces_does_not_disturb_the_talk(measure):
    result, _, _ = measure(request(1, "rude"), rounds=1)
    assert result["failed"] == []
    assert len(result["entries"]) == 1


def test_a_dead_process_is_noticed_though_its_child_lives_on(measure):
    began = time.monotonic()
    result, _, _ = measure(request(1, "orphans"))
    assert time.monotonic() - began < 25  # of 30 seconds until it would be late
    assert "ended with status 3" in result["failed"][0]["reason"]


def test_the_batch_of_the_best_throughput_is_measured_with(measure):
    result, events, turns = measure(request(1), request(2), find_batch=True, rounds=1)
    assert result["batches"]["way"] == "fastdp torch, 2 devices"
    assert result["batches"]["best"] == 64  # from there on a step takes as much longer as it has more rows
    assert {entry["batch"] for entry in result["entries"]} == {64}
    assert result["settings"]["batch"] == 64
    assert {batch for _, batch, _ in turns[-2:]} == {64}
    tried = [event["batch"] for event in events if event["event"] == "batch"]
    assert tried[:3] == [32, 64, 128]


def test_a_search_in_which_nothing_fits_leaves_the_batch_as_it_is(measure):
    result, _, _ = measure(request(2, "broken"), find_batch=True)
    assert result["batches"]["best"] is None
    assert result["batches"]["ended"] == "ended with status 1: ValueError: cannot build"
    assert result["entries"] == []


def test_traces_are_written_where_a_library_has_them(measure, tmp_path):
    result, _, _ = measure(request(1, "traces"), request(2), traces=tmp_path / "out", rounds=1)
    first, second = result["entries"]
    assert first["trace"] == "trace-fastdp-torch-1-device.json"
    assert (tmp_path / "out" / first["trace"]).read_text("utf-8") == "{}"
    assert second["trace"] is None


@pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="Keras is not installed")
@pytest.mark.parametrize(("sent", "status", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "")])
def test_an_interrupt_ends_all_processes(tmp_path, sent, status, said):
    turns = tmp_path / "turns"
    program = f"""
import sys
from fastdp.benchmark import run
from fastdp.cli import main
run.command = lambda request: [sys.executable, {str(STUB)!r}, request.to_json()]
sys.exit(main(["bench", "mlp", "--virtual", "1,2", "--rounds", "100000", "--seconds", "0.01"]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, "TURNS": str(turns)}, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (turns.exists() and turns.read_text("utf-8").count("\n") > 16):
            time.sleep(0.1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text("utf-8").split()
        assert len(children) == 2
    finally:
        process.send_signal(sent)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert said in errors
    assert "Traceback" not in errors
    assert not [child for child in children if Path(f"/proc/{child}").exists()]
