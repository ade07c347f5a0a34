"""bench/gpu/steps.py compares ways of training on virtual devices in host memory, with tiny models."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.gpu import keras_ways as gpu_keras_ways
from bench.gpu import steps as gpu_steps
from bench.gpu.cases import CASES
from fastdp.benchmark.process import WayError
from fastdp.benchmark.request import Round

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(autouse=True)
def _on_the_host(monkeypatch):
    monkeypatch.setenv("FASTDP_BENCH_DEVICE", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def ways(case, *titles):
    found = {way.title: way for way in gpu_steps.ways_of(case)}
    return [found[title] for title in titles]


@pytest.mark.slow
def test_ways_that_work_take_turns_and_the_others_are_left_out_with_a_reason(measured):
    wanted = (
        "torch eager",
        "Keras torch",
        "Keras JAX",
        "fastdp 1 traced, resident",
        "torch DDP, 1 process",
        "torch graph",
    )
    gpu_steps.measure("tiny-mlp", ways("tiny-mlp", *wanted), 240.0)
    steps = {line["way"]: line for line in measured() if line.get("what") == "step"}
    left_out = {line["skipped"]: line["reason"] for line in measured() if "skipped" in line}
    assert left_out.pop("tiny-mlp: Keras JAX") == "jax not installed"
    assert "ended with status 1" in left_out.pop("tiny-mlp: torch graph")  # it needs a card
    assert not left_out
    assert set(steps) == set(wanted) - {"Keras JAX", "torch graph"}
    for line in steps.values():
        assert line["rounds"] == CASES["tiny-mlp"].rounds
        assert line["milliseconds"]["median"] > 0
        assert line["of_torch_eager"] > 0
    assert steps["torch eager"]["of_torch_eager"] == 1.0
    ready = {line["way"]: line for line in measured() if line.get("what") == "ready"}
    assert len({line["parameters"] for line in ready.values()}) == 1  # the same model everywhere
    assert ready["fastdp 1 traced, resident"]["capture_seconds"] > 0


@pytest.mark.slow
def test_parts_of_a_batch_and_several_devices_of_the_encoder_in_mixed_precision(measured):
    gpu_steps.measure("tiny-encoder", ways("tiny-encoder", "fastdp 2 traced", "fastdp 1 traced, rows/2"), 240.0)
    steps = {line["way"]: line for line in measured() if line.get("what") == "step"}
    assert {way: (line["devices"], line["rows"], line["of"]) for way, line in steps.items()} == {
        "fastdp 2 traced": (2, 8, 8),
        "fastdp 1 traced, rows/2": (1, 4, 8),
    }
    reports = [line["report"]["steps"] for line in measured() if line.get("what") == "ready"]
    assert {entry["how"] for entries in reports for entry in entries} == {"traced"}


@pytest.mark.slow
def test_a_run_that_is_ended_leaves_no_process_behind_and_keeps_what_it_found(tmp_path):
    log, found = tmp_path / "log", []
    # Rounds without end, so that it is ended in the middle of them.
    program = f"""
import dataclasses, sys
sys.path.insert(0, {str(BENCH.parent)!r})
from bench.gpu import cases as gpu_cases, steps as gpu_steps
gpu_cases.CASES["tiny-mlp"] = dataclasses.replace(gpu_cases.CASES["tiny-mlp"], rounds=10**6)
sys.argv = ["steps.py", "--seconds", "300", "tiny-mlp", "--ways", "torch eager"]
sys.exit(gpu_steps.main())
"""
    environment = {**os.environ, "FASTDP_GPU_LOG": str(log)}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not any(line.get("what") == "step" for line in found):
            time.sleep(0.1)
            found = [json.loads(line) for line in log.read_text().splitlines()[:-1]] if log.exists() else []
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert children
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    assert [line["way"] for line in found if line.get("what") == "step"]
    assert not [child for child in children if Path(f"/proc/{child}").exists()]


def test_what_a_case_is_measured_with(monkeypatch):
    monkeypatch.setattr(gpu_steps, "best_how", lambda: "graph")
    titles = [way.title for way in gpu_steps.ways_of("mlp")]
    assert len(set(titles)) == len(titles)
    both = {"torch eager", "torch compiled", "torch DDP, 1 process", "Keras torch", "Keras JAX", "fastdp torch 8"}
    ours = {f"fastdp {n} graph" for n in (1, 2, 4, 8)} | {f"fastdp 1 graph, rows/{n}" for n in (2, 4, 8)}
    assert both | ours | {"fastdp 1 graph, fed", "fastdp 1 graph, resident", "fastdp 1 traced"} <= set(titles)
    # One process for each would not fit on the card.
    assert len(gpu_steps.ways_of("resnet50-bf16-256")) == 5
    assert "torch DDP, 1 process" not in [way.title for way in gpu_steps.ways_of("resnet50-tf32-32")]


@pytest.mark.parametrize("best", ["graph", "traced"])
def test_no_case_is_left_without_the_ways_that_its_goals_need(monkeypatch, best):
    monkeypatch.setattr(gpu_steps, "best_how", lambda: best)
    for name in CASES:
        titles = {way.title for way in gpu_steps.ways_of(name)}
        assert {"torch eager", "Keras torch", f"fastdp 1 {best}"} <= titles, name
        if name != "resnet50-bf16-256":
            alone = {f"fastdp 1 {best}, {rest}" for rest in ("fed", "resident", "bare", "rows/8", "1 row")}
            assert alone - titles <= {f"fastdp 1 {best}, 1 row"}
            assert {"Keras JAX", f"fastdp 8 {best}"} <= titles


def test_ways_that_do_not_fit_on_the_card_together_come_in_groups_with_the_base_in_each():
    assert gpu_steps.waves("abcdefg", 7) == [list("abcdefg")]
    assert gpu_steps.waves("abcdefg", 4) == [list("abcd"), list("aefg")]
    assert gpu_steps.waves("abcdef", 4) == [list("abcd"), list("aef")]
    for name, case in CASES.items():
        groups = gpu_steps.waves(gpu_steps.ways_of(name), case.at_once)
        assert {group[0].title for group in groups} == {"torch eager"}
        assert max(map(len, groups)) <= case.at_once
        if name == "resnet50-bf16-256":
            continue
        # What is held to a few percent of each other takes turns.
        best = gpu_steps.best_how()
        for pair in (("fed", "resident", "bare"), (f"fastdp 8 {best}", "rows/8")):
            titles = [[way.title for way in group if way.title.endswith(pair)] for group in groups]
            assert len(pair) in map(len, titles), (name, titles)


def test_steps_are_graphs_where_there_is_a_card(monkeypatch):
    assert gpu_steps.best_how() == "traced"
    monkeypatch.setenv("FASTDP_BENCH_DEVICE", "cuda")
    assert gpu_keras_ways.wrap_options("graph") == {"compile": "trace", "graph": "auto"}
    assert gpu_keras_ways.wrap_options("compiled graph") == {"compile": "inductor", "graph": "auto"}
    assert gpu_keras_ways.wrap_options("traced") == {"compile": "trace", "graph": None}  # "auto" would record
    assert gpu_steps.best_how() == "graph"


class Late:
    """A process that is never in time."""

    def __init__(self):
        self.closed = False

    def round(self, steps, timeout):
        raise WayError("a round took longer")

    def close(self, patience=0.0):
        self.closed = True


class Steady(Late):
    """A process that takes as long each time."""

    def round(self, steps, timeout):
        return Round(steps, 0.5)


def test_a_way_that_fails_in_a_round_leaves_the_others_their_turns(measured):
    good, bad = ways("tiny-mlp", "torch eager", "Keras torch")
    running = {good: Steady(), bad: (late := Late())}
    times = gpu_steps.take_turns("tiny-mlp", running, time.monotonic() + 60)
    assert times[good] == [0.25, 0.25]  # of two steps each; the first round warms up
    assert late.closed
    assert {"skipped": "tiny-mlp: Keras torch", "reason": "a round took longer"} in measured()


def test_rounds_end_with_the_time_and_what_was_found_stays(measured):
    (good,) = ways("tiny-mlp", "torch eager")
    gpu_steps.take_turns("tiny-mlp", {good: Steady()}, time.monotonic() - 1)
    assert measured() == [{"skipped": "tiny-mlp: round 0 of 2", "reason": "its time is over"}]


def test_a_way_for_which_no_time_is_left_is_not_started(measured):
    (way,) = ways("tiny-mlp", "torch eager")
    assert gpu_steps.start("tiny-mlp", [way], 0.0) == {}
    assert measured() == [{"skipped": "tiny-mlp: torch eager", "reason": "no time was left to start it"}]
