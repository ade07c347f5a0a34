"""Traces on the rig, by the real CuPy: spans of graphs and collectives nest, and times are those of the streams."""

from __future__ import annotations

import importlib
import time

import pytest
import torch
from small_buckets import make_buckets_small
from torch import nn
from torch.nn import functional as F
from trace_files import TraceFile, inside

import fastdp
from fastdp.options import Options
from fastdp.torch.parallel_module import TorchParallel


def trained(monkeypatch, path, devices, steps: int = 6, **options) -> TraceFile:
    torch.manual_seed(1)
    make_buckets_small(monkeypatch)
    module = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    parallel = TorchParallel(module, devices, Options(timeout=20.0, **options))
    step = parallel.train_step(F.cross_entropy, lambda parameters: torch.optim.Adam(parameters, lr=0.01), outputs=True)
    with fastdp.trace(path):
        for _ in range(steps):
            step(torch.randn(6, 6), torch.randint(4, (6,)))
    return TraceFile(path).check()


@pytest.mark.parametrize(("compile", "graph"), [(None, None), ("trace", "auto"), ("trace", "step")])
@pytest.mark.parametrize("count", [1, 3])
def test_spans_of_cards_nest_and_lie_in_order(cards, monkeypatch, tmp_path, count, compile, graph):
    found = trained(monkeypatch, tmp_path / "t.json", cards.devices(count), compile=compile, graph=graph)
    assert found.facts["notes"] == []
    steps = found.named("train step")
    for device in range(count):
        compute = f"gpu:{device} compute"
        for name in ("run", "merge", "update"):
            order = [span["args"]["step"] for span in found.named(name, compute)]
            # The first replica updates a torch module for all.
            assert sorted(set(order)) == (list(range(6)) if name != "update" or device == 0 else [])
            assert order == sorted(order)
        kind = "step graph" if graph == "step" and count > 1 else "graph"
        graphs = [span for span in found.named(kind, compute) if "step" in span["args"]]
        assert bool(graphs) == (compile is not None)
        assert all(any(inside(run, span) for run in found.named("run", compute)) for span in graphs)
        communication = f"gpu:{device} communication"
        assert bool(found.named("all-reduce", communication)) == (count > 1)
        for span in found.named("all-reduce", communication):
            assert any(inside(outer, span) for outer in found.named("reduce", communication))
    for step in steps:
        for span in found.named("update", "gpu"):
            if span["args"]["step"] == step["args"]["step"]:
                end, uncertain = span["ts"] + span["dur"], max(map(found.uncertain, found.facts["clocks"])) + 100.0
                assert step["ts"] < end + uncertain
                assert end < step["ts"] + step["dur"] + uncertain


def test_a_span_is_timed_by_the_stream_and_not_by_the_thread_that_issues_its_work(cards, tmp_path):
    (device,) = cards.devices(1)
    spans = importlib.import_module("fastdp.tracing.spans")

    def work() -> None:
        with spans.span("held", device.compute):
            pass

    with fastdp.trace(tmp_path / "t.json"):
        device.compute.enqueue(work)  # finds the base first
        device.synchronize(20.0)
        cards.hold(True)
        began = time.perf_counter()
        device.compute.enqueue(work)
        device.compute.mark().finish(20.0)
        issued = time.perf_counter() - began
        time.sleep(0.2)
        cards.hold(False)
    found = TraceFile(tmp_path / "t.json").check()
    on_card, by_worker = found.named("held", "gpu:0 compute")[1], found.named("held", "host: worker of gpu:0")[1]
    assert issued < 0.2
    assert on_card["ts"] - by_worker["ts"] - by_worker["dur"] > 1.5e5


def test_no_event_is_recorded_into_a_capture(cards, tmp_path, runtime):
    (device,) = cards.devices(1)
    spans = importlib.import_module("fastdp.tracing.spans")
    graphs = []

    def work() -> None:
        runtime.capture_begin(device.compute.handle)
        with spans.span("captured", device.compute):
            pass
        graphs.append(runtime.capture_end(device.compute.handle))

    with fastdp.trace(tmp_path / "t.json"):
        device.compute.enqueue(work)
        device.synchronize(20.0)
    with runtime.on(0):
        runtime.graph_destroy(graphs[0])
    found = TraceFile(tmp_path / "t.json").check()
    assert "gpu:0 compute" not in found.lanes
    assert found.names("host: worker of gpu:0") == ["captured"]
    assert found.facts["notes"] == []
