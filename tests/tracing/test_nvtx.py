"""NVTX ranges have the names of spans, are nested on each thread, and are asked for by an argument or a variable."""

from __future__ import annotations

import sys
import threading
import types

import numpy as np
import pytest
from least_squares import WIDTH, predict, train

import fastdp
from fastdp.engine import step_scope
from fastdp.tracing import nvtx, spans
from fastdp.tracing.protocols import VERBS


@pytest.fixture(autouse=True)
def two_devices(monkeypatch):
    fastdp.set_virtual_devices(2)
    monkeypatch.delenv("FASTDP_NVTX", raising=False)
    forget()
    yield
    for ranges in getattr(spans.now.recorder, "ranges", ()):
        spans.stop(ranges=ranges)
    forget()
    fastdp.set_virtual_devices(0)
    assert spans.now.recorder is None


def forget():
    nvtx.ranges.cache_clear()
    nvtx._always.cache_clear()


class Domain:
    """What NVTX is told, by thread: ranges that are open, and all that there were."""

    def __init__(self):
        self.open: dict[str, list[str]] = {}
        self.seen: dict[str, list[str]] = {}

    def get_event_attributes(self, message):
        return types.SimpleNamespace(message=message)

    def push_range(self, attributes):
        name = threading.current_thread().name
        self.open.setdefault(name, []).append(attributes.message)
        self.seen.setdefault(name, []).append(attributes.message)

    def pop_range(self):
        self.open[threading.current_thread().name].pop()  # raises where none is open


@pytest.fixture
def domain(monkeypatch):
    made = Domain()
    names = []
    module = types.SimpleNamespace(get_domain=lambda name: names.append(name) or made)
    monkeypatch.setitem(sys.modules, "nvtx", module)
    yield made
    assert set(names) <= {"fastdp"}
    assert not any(made.open.values())


def engine(count=2):
    start = {"w": np.linspace(-1, 1, WIDTH, dtype=np.float32), "b": np.float32(0.5)}
    update = lambda p, slots, g: ({name: p[name] - 0.1 * g[name] for name in p}, {})  # noqa: E731
    return fastdp.DataParallel(fastdp.FunctionProgram(start, train, update, predict), count, timeout=20.0)


def batch():
    return [np.ones((6, WIDTH), "f4"), np.ones(6, "f4")]


def test_ranges_are_those_of_the_spans(domain, tmp_path, monkeypatch):
    monkeypatch.setattr(step_scope, "CORES", 64)  # cores to spare: the calling thread does no worker's part
    one = engine()
    with fastdp.trace(tmp_path / "t.json", nvtx=True):
        one.train(batch())
    main = domain.seen["MainThread"]
    assert main[0] == "train step 0"
    verbs = [name for name in main if name in VERBS]
    assert verbs == ["scatter", "scatter", "scatter", "run", "reduce", "update", "merge"]  # two for the devices
    assert domain.seen["fastdp-virtual:0"][:2] == ["run", "merge"]
    assert "update" in domain.seen["fastdp-virtual:0"]
    assert domain.seen["fastdp-virtual:1"][:2] == ["run", "merge"]
    before = {name: len(ranges) for name, ranges in domain.seen.items()}
    one.train(batch())
    assert {name: len(ranges) for name, ranges in domain.seen.items()} == before


def test_the_variable_marks_ranges_without_a_trace(domain, monkeypatch):
    monkeypatch.setenv("FASTDP_NVTX", "1")
    one = engine()
    one.train(batch())
    with pytest.raises(fastdp.ReplicaError):
        one.train([np.ones((6, WIDTH + 1), "f4"), np.ones(6, "f4")])
    one.predict(batch())
    assert [name for name in domain.seen["MainThread"] if "step" in name] == [
        "train step 0",
        "train step 1",
        "predict step 2",
    ]


def test_a_trace_that_ends_leaves_the_ranges_of_the_variable_and_of_other_traces(domain, monkeypatch, tmp_path):
    one = engine()
    with fastdp.trace(tmp_path / "t.json", nvtx=True):
        with fastdp.trace(tmp_path / "u.json", nvtx=True):
            one.train(batch())
        one.train(batch())
    one.train(batch())
    monkeypatch.setenv("FASTDP_NVTX", "1")
    engine()
    with fastdp.trace(tmp_path / "v.json", nvtx=True):
        one.train(batch())
    one.train(batch())
    steps = [name for name in domain.seen["MainThread"] if name.startswith("train step")]
    assert steps == [f"train step {i}" for i in (0, 1, 3, 4)]  # each once


def test_a_missing_package_is_an_error_that_names_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "nvtx", None)
    message = r"NVTX ranges need the package `nvtx`. Install it with: pip install 'fastdp\[nvtx\]'"
    with pytest.raises(ImportError, match=message):
        fastdp.trace(tmp_path / "t.json", nvtx=True)
    assert not (tmp_path / "t.json").exists()
    monkeypatch.setenv("FASTDP_NVTX", "1")
    with pytest.raises(ImportError, match=message):
        engine()
    monkeypatch.setenv("FASTDP_NVTX", "0")
    engine().train(batch())


def test_a_variable_that_says_neither_is_refused(monkeypatch):
    monkeypatch.setenv("FASTDP_NVTX", "yes")
    with pytest.raises(ValueError, match=r"FASTDP_NVTX must be 0 or 1\. Received: 'yes'"):
        engine()


def test_the_real_package_takes_them(tmp_path):
    pytest.importorskip("nvtx")
    one = engine()
    with fastdp.trace(tmp_path / "t.json", nvtx=True):
        one.train(batch())
