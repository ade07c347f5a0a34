"""Traces of function programs on virtual devices: files load, spans nest, and every way to end one leaves a file."""

from __future__ import annotations

import errno
import os
import statistics
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from least_squares import WIDTH, predict, train
from trace_files import VERBS, TraceFile, inside

import fastdp
from fastdp.errors import ReplicaError
from fastdp.tracing import spans

ROWS = 16


@pytest.fixture(autouse=True)
def eight_devices():
    fastdp.set_virtual_devices(8)
    yield
    fastdp.set_virtual_devices(0)
    assert spans.now.recorder is None  # nothing is recorded any more


def update(parameters, slots, gradients):
    return {name: parameters[name] - 0.05 * gradients[name] for name in gradients}, {}


def engine(devices, train=train, updating=None):
    start = {"w": np.linspace(-1, 1, WIDTH, dtype=np.float32), "b": np.float32(0.5)}
    program = fastdp.FunctionProgram(start, train, update, predict)
    return fastdp.DataParallel(program, devices, timeout=20.0, update=updating)


def batch(rows=ROWS):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(rows, WIDTH)).astype("f4"), rng.normal(size=rows).astype("f4")]


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("each", ["first", "each"])
def test_verbs_of_each_device_are_in_a_trace(tmp_path, count, each):
    one = engine(count, updating=each)
    one.train(batch())
    with fastdp.trace(tmp_path / "t.json") as trace:
        for _ in range(3):
            one.train(batch())
        one.predict(batch())
    assert trace.steps == 4
    found = TraceFile(tmp_path / "t.json").check()
    for step in found.named("train step"):
        verbs = [span["name"] for span in found.lanes[found.host] if inside(step, span) and span["name"] in VERBS]
        assert verbs == ["scatter", "run", "reduce", "update", "merge"]
    assert [span["args"]["step"] for span in found.named("train step")] == [1, 2, 3]
    for device in range(count):
        lane = f"virtual:{device}"
        assert [span["args"]["step"] for span in found.named("scatter", f"{lane} copy in")] == [1, 2, 3, 4]
        assert found.names(f"{lane} compute").count("run") == found.names(f"{lane} compute").count("merge") == 4
        assert len(found.named("update", f"{lane} compute")) == (3 if device == 0 or each == "each" else 0)
    for step in range(1, 5):
        runs = [span for span in found.named("run", "virtual") if span["args"]["step"] == step]
        assert sum(span["args"]["rows"] for span in runs) == ROWS
    reduced = found.named("reduce", "virtual")
    assert {span["args"]["step"] for span in reduced} == ({1, 2, 3} if count > 1 else set())
    sums = found.named("all-reduce")
    assert all(any(inside(outer, span) for outer in reduced + found.named("wait for devices")) for span in sums)
    assert sum(span["args"]["nbytes"] for span in sums) >= (3 * 4 * (WIDTH + 1) if count > 1 else 0)
    assert [name for name in found.order if "compute" in name] == [f"virtual:{i} compute" for i in range(count)]
    assert found.order[0] == found.host


def test_what_lies_between_steps_and_the_waits_of_the_host_are_spans(tmp_path):
    one = engine(2)
    one.train(batch())
    with fastdp.trace(tmp_path / "t.json"):
        for _ in range(3):
            one.train(batch())
            time.sleep(0.02)
    found = TraceFile(tmp_path / "t.json").check()
    between = found.named("between steps")
    assert len(between) == 2
    assert all(span["dur"] > 2e4 for span in between)
    assert len(found.named("wait for devices", found.host)) == 3
    tops = [name for name in found.names(found.host) if name in ("train step", "between steps")]
    assert tops == ["train step", "between steps", "train step", "between steps", "train step"]


def test_spans_of_computing_agree_with_the_report(tmp_path):
    def slow(parameters, rows):
        time.sleep(0.004)
        return train(parameters, rows)

    one = engine(2, slow)
    with fastdp.trace(tmp_path / "t.json"):
        for _ in range(9):
            one.train(batch())
    found = TraceFile(tmp_path / "t.json").check()
    for device in range(2):
        measured = [span["dur"] / 1e6 for span in found.named("run", f"virtual:{device} compute")]
        assert min(measured) >= 0.004
        # The engine's watch also has what comes right after the run.
        assert statistics.median(measured) == pytest.approx(
            one.times.device(device).seconds["compute"], rel=0.1, abs=1e-3
        )
        updates = sum(span["dur"] / 1e6 for span in found.named("update", f"virtual:{device} compute"))
        assert (updates > 0) == (one.times.device(device).seconds["update"] > 0)


def test_a_failing_step_is_in_a_file_that_loads(tmp_path):
    broken = threading.Event()

    def failing(parameters, rows):
        if broken.is_set():
            raise ValueError("broken on purpose")
        return train(parameters, rows)

    one = engine(3, failing)
    with pytest.raises(ReplicaError, match="broken on purpose"), fastdp.trace(tmp_path / "t.json"):  # noqa: PT012
        one.train(batch())
        broken.set()
        one.train(batch())
    found = TraceFile(tmp_path / "t.json").check()
    assert [span["args"].get("error") for span in found.named("train step")] == [None, "ReplicaValueError"]
    assert found.names("virtual:2 compute").count("run") == 2
    broken.clear()
    with fastdp.trace(tmp_path / "next.json"):
        one.train(batch())
    assert [span["args"]["step"] for span in TraceFile(tmp_path / "next.json").check().named("train step")] == [2]


def test_a_path_that_cannot_be_written_fails_before_anything_runs(tmp_path):
    one = engine(2)
    for path in (tmp_path / "no such folder" / "t.json", tmp_path):
        refused = pytest.raises(OSError, match=r"The trace cannot be written.*Pass a path to a file")
        with refused as caught, fastdp.trace(path):
            one.train(batch())
        assert caught.value.errno in (errno.ENOENT, errno.EISDIR)
        with pytest.raises(OSError, match="cannot be written"):
            one.trace(path)
    assert one.steps == 0


def test_traces_inside_traces_have_all_that_happens_while_they_are_open(tmp_path):
    one, other = engine(2), engine(3)
    with fastdp.trace(tmp_path / "outer.json"):
        one.train(batch())
        with fastdp.trace(tmp_path / "inner.json"):
            other.train(batch())
        one.train(batch())
    outer, inner = (TraceFile(tmp_path / f"{name}.json").check() for name in ("outer", "inner"))
    assert [span["args"]["step"] for span in outer.named("train step")] == [0, 0, 1]
    assert len(inner.named("train step")) == 1
    assert len(outer.named("run", "virtual")) == 2 + 3 + 2
    assert len(inner.named("run", "virtual")) == 3


def test_traces_that_overlap_on_several_threads(tmp_path):
    def work(name):
        one = engine(2)
        for part in range(3):
            with fastdp.trace(tmp_path / f"{name}{part}.json"):
                for _ in range(4):
                    one.train(batch())

    threads = [threading.Thread(target=work, args=(name,), name=f"trainer {name}") for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for name in "ab":
        for part in range(3):
            found = TraceFile(tmp_path / f"{name}{part}.json").check()
            assert len(found.named("train step", f"host: trainer {name}")) == 4


def test_a_trace_of_some_steps_ends_by_itself_and_says_so(tmp_path, capsys):
    one, other = engine(2), engine(2)
    trace = one.trace(tmp_path / "t.json", steps=2)
    other.train(batch())
    for _ in range(4):
        assert trace.recording == (trace.steps < 2)
        one.train(batch())
    assert not trace.recording
    assert capsys.readouterr().err == (
        f"fastdp: {tmp_path / 't.json'} has the trace of 2 steps. Open it on https://ui.perfetto.dev\n"
    )
    found = TraceFile(tmp_path / "t.json").check()
    assert len(found.named("train step")) == 3
    assert found.facts["steps"] == 2
    assert not trace.close()


def test_a_trace_of_some_steps_ends_with_its_block(tmp_path, capsys):
    one = engine(2)
    with one.trace(tmp_path / "t.json", steps=None) as trace:
        for _ in range(3):
            one.train(batch())
    assert trace.steps == 3
    assert capsys.readouterr().err == ""
    with one.trace(tmp_path / "u.json", steps=1) as trace:
        one.predict(batch())
        assert not trace.recording
    assert len(TraceFile(tmp_path / "u.json").check().named("predict step")) == 1
    with pytest.raises(RuntimeError, match="recorded already"):
        trace.start()


def test_a_file_is_written_when_the_process_ends_before(tmp_path):
    script = """
import sys; sys.path[:0] = ["tests/shared"]
import numpy as np, fastdp, os
from least_squares import WIDTH, predict, train
fastdp.set_virtual_devices(2)
start = {"w": np.zeros(WIDTH, "f4"), "b": np.float32(0)}
program = fastdp.FunctionProgram(start, train, lambda p, s, g: ({n: p[n] - g[n] for n in p}, {}), predict)
one = fastdp.DataParallel(program, 2)
one.trace(sys.argv[1], steps=100)
one.train([np.zeros((4, WIDTH), "f4"), np.zeros(4, "f4")])
"""
    path = tmp_path / "t.json.gz"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(path)],
        cwd=Path(__file__).parents[2], env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "has the trace of 1 step." in done.stderr
    assert len(TraceFile(path).check().named("train step")) == 1


def test_spans_beyond_the_limit_are_left_out_and_the_trace_says_so(tmp_path):
    one = engine(2)
    with fastdp.trace(tmp_path / "t.json", max_spans=30):
        for _ in range(10):
            one.train(batch())
    found = TraceFile(tmp_path / "t.json").check()
    assert sum(map(len, found.lanes.values())) == 30
    (mark,) = [event for event in found.events if event["ph"] == "i"]
    assert mark["name"].startswith("The trace ends here: max_spans=30, and ")
    assert found.facts["notes"] == [mark["name"]]


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "5"])
def test_numbers_that_are_none_are_refused(tmp_path, value):
    with pytest.raises(ValueError, match=f"`max_spans` must be a positive number of spans. Received: .*{value}"):
        fastdp.trace(tmp_path / "t.json", max_spans=value)
    with pytest.raises(ValueError, match=f"`steps` must be a positive number of steps, or None. Received: .*{value}"):
        engine(1).trace(tmp_path / "t.json", steps=value)
    assert not (tmp_path / "t.json").exists()


def test_a_full_disk_is_an_error_of_a_block_and_a_warning_of_some_steps(tmp_path):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("there is no /dev/full here")
    one = engine(1)
    with pytest.raises(OSError, match="No space left"), fastdp.trace(full):
        one.train(batch())
    one.trace(full, steps=1)
    with pytest.warns(UserWarning, match="could not write the trace to /dev/full: .*No space left"):
        one.train(batch())
    with pytest.warns(UserWarning, match="No space left"), pytest.raises(ZeroDivisionError), fastdp.trace(full):
        raise ZeroDivisionError  # what counts
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one.train(batch())


def test_a_batch_that_is_staged_while_a_step_runs_is_in_it(tmp_path):
    one, following = engine(2), batch()
    with fastdp.trace(tmp_path / "t.json"):
        one.train(batch(), while_running=lambda: one.stage(following))
        one.train(following, while_running=lambda: one.predict(batch(4)))  # ends the step in its middle
        one.train(batch())
    found = TraceFile(tmp_path / "t.json").check()
    outside = found.named("while running")
    assert any(inside(outside[0], span) for span in found.named("stage"))
    steps = [name for name in found.names(found.host) if name.endswith(" step")]
    assert steps == ["train step", "train step", "predict step", "train step"]


def test_a_step_inside_a_step_of_one_device_lies_inside_it(tmp_path):
    inner = engine([1])
    inner.predict(batch(4))
    inner.predict(batch(4))

    def calling(parameters, rows):
        inner.predict(batch(4))
        return train(parameters, rows)

    one = engine(1, calling)
    one.train(batch())
    with fastdp.trace(tmp_path / "t.json"):
        one.train(batch())
        one.train(batch())
    found = TraceFile(tmp_path / "t.json").check()
    for outer, predicted in zip(found.named("train step"), found.named("predict step"), strict=True):
        assert inside(outer, predicted)
    assert [span["args"]["step"] for span in found.named("update", "virtual:0")] == [1, 2]  # and not the inner step's
    assert len(found.named("between steps")) == 1
