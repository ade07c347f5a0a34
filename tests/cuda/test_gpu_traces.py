"""Traces of simulated GPUs: their lanes have CUDA events' times, none of which is recorded into a capture."""

from __future__ import annotations

import importlib

import keras
import numpy as np
import pytest
from graph_models import batches, dense, hows, normalized, train, wrapped
from small_buckets import make_buckets_small
from trace_files import TraceFile, inside

import fastdp
import fastdp.comm.algorithm
from fastdp.errors import ReplicaError

pytestmark = pytest.mark.usefixtures("few_arrays_in_a_bucket", "shared_traces")


@pytest.fixture
def few_arrays_in_a_bucket(monkeypatch):
    """Each model has several buckets."""
    make_buckets_small(monkeypatch)


def traced(path, parallel, count=6, sizes=(8,)):
    with fastdp.trace(path):
        train(parallel, count, sizes)
    return TraceFile(path).check()


@pytest.mark.parametrize(
    ("graph", "count", "seed", "nccl", "by_host"),
    [
        (None, 1, None, False, False),
        (None, 2, 0, True, True),
        ("auto", 3, 1, True, True),
        ("auto", 2, None, False, False),
        ("step", 2, 2, True, True),
        ("step", 2, None, False, False),
    ],
)
def test_spans_of_gpus_nest_and_lie_in_order(gpus, monkeypatch, tmp_path, graph, count, seed, nccl, by_host):
    """From the first eager step to recorded ones: what is captured meanwhile has no events of a trace in it."""
    if nccl:
        monkeypatch.setattr(fastdp.comm.algorithm, "ONE_SHOT_NBYTES", -1)
        monkeypatch.setattr(fastdp.comm.algorithm, "TWO_SHOT_NBYTES", -1)
    box = gpus(count, seed=seed)
    parallel = wrapped(normalized, box.devices(count), graph=graph)
    parallel.engine.host_launch.enabled = by_host
    found = traced(tmp_path / "t.json", parallel)
    assert found.facts["notes"] == []
    steps = found.named("train step", found.host)
    assert len(steps) == 6
    for device in range(count):
        compute, copies = f"gpu:{device} compute", f"gpu:{device} copy in"
        runs = found.named("run", compute)
        assert {span["args"]["step"] for span in runs} == {span["args"]["step"] for span in steps}
        assert len(found.named("update", compute)) == 6
        assert found.names(copies).count("scatter") == 6
        for name in ("run", "update"):  # one step after the other, on the GPU as well
            order = [span["args"]["step"] for span in found.named(name, compute)]
            assert order == sorted(order)
        parts = found.named("step graph" if graph == "step" and count > 1 else "graph", compute)
        parts = [part for part in parts if "step" in part["args"]]  # graphs are launched once before, between steps
        assert bool(parts) == (graph is not None)
        assert all(any(inside(run, part) for run in runs) for part in parts)
        reduced = found.named("reduce", f"gpu:{device} communication")
        assert bool(reduced) == (count > 1)
        sums = found.named("all-reduce", f"gpu:{device} communication")
        assert all(any(inside(outer, span) for outer in reduced) for span in sums)
        assert {span["args"]["way"] for span in sums} == ({"nccl" if nccl else "one-shot"} if count > 1 else set())
        assert found.facts["clocks"][f"gpu:{device}"].startswith("CUDA events, on the host's clock within")
        # The work of a step follows its launch, and is over when the host says that the step is.
        for step in steps:
            mine = [span for span in found.lanes[compute] if span["args"].get("step") == step["args"]["step"]]
            uncertain = found.uncertain(f"gpu:{device}") + 100.0
            assert mine[0]["ts"] > step["ts"] - uncertain
            assert mine[-1]["ts"] + mine[-1]["dur"] < step["ts"] + step["dur"] + uncertain
    if graph is not None:
        assert {"graph", "step graph"} & hows(parallel)
    launches = [span for span in found.lanes[found.host] if span["args"].get("device") == "gpu:0"]
    workers = [span for span in found.lanes.get("host: worker of gpu:0", []) if span["name"] == "run"]
    assert bool(launches) == (by_host and graph is not None)
    assert workers  # the first steps are theirs


def test_steps_are_the_same_with_a_trace(gpus, tmp_path):
    box = gpus(2, seed=3)
    expected = train(wrapped(dense, box.devices(2), graph="auto"), 8)
    with fastdp.trace(tmp_path / "t.json"):
        found = train(wrapped(dense, box.devices(2), graph="auto"), 8)
    assert found[0] == expected[0]
    for ours, theirs in zip(found[1], expected[1], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_events_are_used_again(gpus, monkeypatch, tmp_path):
    """A long trace needs no more events than are under way."""
    box = gpus(1)
    timeline = importlib.import_module("fastdp.runtime.cuda.timeline")
    monkeypatch.setattr(timeline, "MOST_WAITING", 16)
    monkeypatch.setattr(timeline, "BASE_NANOSECONDS", 1_000_000)
    parallel = wrapped(dense, box.devices(1), graph=None)
    found = traced(tmp_path / "t.json", parallel, 3)
    events = len(box.sim.events)
    longer = traced(tmp_path / "u.json", parallel, 12)
    assert len(longer.lanes["gpu:0 compute"]) > 3 * len(found.lanes["gpu:0 compute"])
    assert len(box.sim.events) <= events + 3  # bases


def test_a_step_that_fails_on_a_gpu_leaves_a_file_that_loads(gpus, tmp_path):
    box = gpus(2)
    parallel = wrapped(normalized, box.devices(2), graph="auto")
    train(parallel, 5, (8,))
    x, y = next(batches(1))
    box.sim.failures["memcpyAsync"] = 719
    with pytest.raises(ReplicaError), fastdp.trace(tmp_path / "t.json"):
        parallel.train_on_batch(x, y)
    found = TraceFile(tmp_path / "t.json").check()
    assert [span["args"]["error"] for span in found.named("train step")] == ["ReplicaError"]
    found = traced(tmp_path / "u.json", parallel, 2)
    assert len({span["args"]["step"] for span in found.named("run", "gpu:1 compute")}) == 2


def test_a_gpu_that_is_not_done_is_left_out_with_a_note(gpus, monkeypatch, tmp_path):
    box = gpus(2)
    trace_module = importlib.import_module("fastdp.tracing.trace")
    monkeypatch.setattr(trace_module, "SECONDS", 0.05)
    parallel = wrapped(dense, box.devices(2), graph=None)
    train(parallel, 2, (8,))
    with fastdp.trace(tmp_path / "t.json"):
        train(parallel, 1, (8,))
        monkeypatch.setattr(box.runtime, "event_done", lambda event: False)
    found = TraceFile(tmp_path / "t.json").check()
    monkeypatch.undo()
    assert set(found.facts["clocks"].values()) == {"the GPU was not done with its work in time"}
    assert "spans of GPUs are missing" in found.facts["notes"][0]
    assert "gpu:0 compute" not in found.lanes
    assert found.named("train step")


def test_rows_that_are_staged_ahead_are_copied_while_a_step_runs(gpus, tmp_path):
    box = gpus(2)
    parallel = wrapped(dense, box.devices(2), graph=None)
    x, y = (np.concatenate(parts) for parts in zip(*batches(4, (8,)), strict=True))
    parallel.fit(x, y, batch_size=8, epochs=1, verbose=0)
    with parallel.trace(tmp_path / "t.json", steps=8):
        parallel.fit(x, y, batch_size=8, epochs=2, verbose=0)
    found = TraceFile(tmp_path / "t.json").check()
    staged = found.named("stage", "gpu:0 copy in")
    assert staged
    assert len(staged) + len(found.named("scatter", "gpu:0 copy in")) == 8
    assert keras.backend.backend() == "torch"
