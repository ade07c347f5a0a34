"""What a run has found out about a step serves the next one: it starts with that form, and loads the compiled code."""

from __future__ import annotations

import json
import os
import time

import keras
import numpy as np
import pytest
import torch
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import fastdp
from fastdp.capture import decisions, patience, speed_trial
from fastdp.capture import steps as capture_steps
from fastdp.capture.compile import compiler as background
from fastdp.capture.compile import kept_code
from fastdp.capture.compile.compiler import BackgroundCompiler, Job
from fastdp.capture.graph.common_subexpressions import merge_equal
from fastdp.capture.graph.passes import optimized
from fastdp.capture.graph.serialize import from_bytes, to_bytes

L = keras.layers


class Interpreter(BackgroundCompiler):
    """In place of TorchInductor: runs the graph as it was handed over."""

    submitted = 0
    fails = False

    def submit(self, module, threads):
        Interpreter.submitted += 1
        data, constants = to_bytes(module)
        job = Job(data, constants, threads)
        job.run = self.run_of(from_bytes(data)[0], constants)
        return job

    def run_of(self, graph, constants):
        def run(*arguments):
            if self.fails:
                raise RuntimeError("illegal instruction")
            return graph(*arguments, *constants)

        return run


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("FASTDP_REMEMBER", "on")
    monkeypatch.setattr(Interpreter, "submitted", 0)
    monkeypatch.setattr(Interpreter, "fails", False)


@pytest.fixture
def quick(monkeypatch):
    """A new shape is traced and compiled at once where it was trained long enough; a trial takes two steps of each."""
    monkeypatch.setattr(capture_steps, "BackgroundCompiler", Interpreter)
    monkeypatch.setattr(capture_steps, "missing_compiler", lambda: None)
    monkeypatch.setattr(speed_trial, "STEPS", 2)
    monkeypatch.setattr(patience, "TRACE_SECONDS", 0.0)
    monkeypatch.setattr(patience, "TRACE_STEPS", 0)
    monkeypatch.setattr(patience, "COMPILE_PATIENCE", 0.0)


def compiled_takes(monkeypatch, seconds):
    """Let the trial see these seconds for compiled steps, and 0.1 for traced ones."""

    def note(self, _, original=speed_trial.SpeedTrial.note):
        form = self._forms[len(self._seconds) // 2] if not self.is_over else ""
        original(self, seconds if form == "compiled" else 0.1)

    monkeypatch.setattr(speed_trial.SpeedTrial, "note", note)


def run(steps, **options):
    """Train a new model in a new engine, as another process would."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), L.Dense(4, "relu"), L.Dropout(0.5, seed=3), L.Dense(2)])
    parallel = fastdp.wrap(model, gpus="auto", **options)
    parallel.compile("sgd", "mse")
    generator = np.random.default_rng(0)
    x, y = (generator.normal(size=(8, size)).astype("float32") for size in (6, 2))
    hows = []
    for _ in range(steps):
        parallel.train_on_batch(x, y)
        hows.append(parallel.report()[0]["how"])
    return parallel, hows


def files(folder):
    try:
        return [os.path.join(kept_code._path(folder), name) for name in os.listdir(kept_code._path(folder))]
    except FileNotFoundError:
        return []


def test_the_next_run_starts_with_the_form_that_was_faster(quick, monkeypatch):
    compiled_takes(monkeypatch, 0.001)
    _, hows = run(8)
    assert hows[:2] == ["eager", "eager"]  # a median step takes longer than no time at all
    (kept,) = files(decisions.FOLDER)
    with open(kept) as file:
        assert json.load(file)["form"] == "compiled"
    monkeypatch.setattr(patience, "TRACE_SECONDS", 1e9)  # only what is remembered makes a step traced now
    parallel, hows = run(8)
    assert hows == ["eager", *["traced"], *["compiled"] * 6]
    assert parallel.report()[0]["remembered"] == "compiled"


def test_a_step_that_was_faster_traced_is_not_compiled_again(quick, monkeypatch):
    compiled_takes(monkeypatch, 0.5)
    run(8)
    run(8)
    assert Interpreter.submitted == 2  # one run alone may have been timed on a busy machine
    parallel, hows = run(4)
    assert hows == ["eager", *["traced"] * 3]
    assert Interpreter.submitted == 2
    assert parallel.report()[0]["why"].startswith("in an earlier run a step takes 500.00 ms compiled")
    (kept,) = files(decisions.FOLDER)
    with open(kept) as file:
        found = json.load(file)
    with open(kept, "w") as file:  # the decision is a month old
        json.dump(found | {"time": time.time() - 30 * 24 * 3600}, file)
    run(8)
    assert Interpreter.submitted == 3


def test_runs_that_do_not_agree_decide_nothing(quick, monkeypatch):
    with monkeypatch.context() as busy:
        compiled_takes(busy, 0.5)
        run(8)
    with monkeypatch.context() as quiet:
        compiled_takes(quiet, 0.001)
        run(8)
    (kept,) = files(decisions.FOLDER)
    with open(kept) as file:
        assert json.load(file)["form"] == "compiled"


def test_a_decision_that_no_longer_holds_is_dropped(quick, monkeypatch):
    with monkeypatch.context() as fast:
        compiled_takes(fast, 0.001)
        run(8)
    with monkeypatch.context() as slow:
        compiled_takes(slow, 0.5)
        assert run(8)[1][-1] == "traced"
    assert files(decisions.FOLDER) == []


@pytest.mark.filterwarnings("ignore:fastdp runs 'sequential.*traced and not compiled")
def test_a_decision_for_code_that_fails_is_dropped(quick, monkeypatch):
    compiled_takes(monkeypatch, 0.001)
    run(8)
    monkeypatch.setattr(Interpreter, "fails", True)
    assert run(8)[1][-1] == "traced"
    assert files(decisions.FOLDER) == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[" * 4000,
        b"[]",
        b'{"form": "fast"}',
        b'{"form": "compiled"}',
        b'{"form": 1, "time": {}}',
        b'{"form": "traced", "time": 1, "runs": "2"}',
    ],
)
def test_a_damaged_decision_counts_as_none(content, quick, monkeypatch):
    compiled_takes(monkeypatch, 0.001)
    run(8)
    (kept,) = files(decisions.FOLDER)
    with open(kept, "wb") as file:
        file.write(content)
    monkeypatch.setattr(patience, "TRACE_SECONDS", 1e9)
    assert run(4)[1] == ["eager"] * 4


def test_nothing_is_remembered_where_steps_repeat_bit_for_bit_or_the_user_says_so(quick, monkeypatch):
    compiled_takes(monkeypatch, 0.001)
    run(6, deterministic=True)
    assert files(decisions.FOLDER) == []
    run(8)
    assert len(files(decisions.FOLDER)) == 1
    assert run(4, deterministic=True)[1] == ["eager", *["traced"] * 3]
    monkeypatch.setenv("FASTDP_REMEMBER", "off")
    monkeypatch.setattr(patience, "TRACE_SECONDS", 1e9)
    assert run(4)[1] == ["eager"] * 4


# The code.


def graph():
    return optimized(make_fx(lambda x, y: [x @ y + 1.0], tracing_mode="fake")(torch.ones(2, 2), torch.ones(2, 2)))


def test_the_name_of_code_goes_by_graph_and_cores():
    one, _ = to_bytes(graph())
    again, _ = to_bytes(graph())
    other, _ = to_bytes(optimized(make_fx(lambda x: [x + 2.0], tracing_mode="fake")(torch.ones(2, 2))))
    assert kept_code.name_of(one, 1) == kept_code.name_of(again, 1)
    assert len({kept_code.name_of(one, 1), kept_code.name_of(one, 2), kept_code.name_of(other, 1)}) == 3


def test_code_that_is_not_whole_counts_as_none(monkeypatch):
    kept_code.keep("name", b"code")
    assert kept_code.find("name") == b"code"
    (path,) = files(kept_code.FOLDER)
    with open(path, "rb") as file:
        content = file.read()
    for damaged in (b"", content[:20], content[:-1], content[:-1] + b"E"):
        with open(path, "wb") as file:
            file.write(damaged)
        assert kept_code.find("name") is None
    kept_code.keep("name", b"code")
    os.chmod(path, 0o666)  # somebody else may have written it
    assert kept_code.find("name") is None
    monkeypatch.setenv("FASTDP_REMEMBER", "off")
    kept_code.keep("other", b"code")
    assert len(files(kept_code.FOLDER)) == 1


def test_the_oldest_code_goes_where_there_is_too_much(monkeypatch):
    monkeypatch.setattr(kept_code, "MOST_FILES", 2)
    for i, name in enumerate("abcd"):
        kept_code.keep(name, b"code")
        path = os.path.join(kept_code._path(kept_code.FOLDER), name)
        os.utime(path, (time.time() - 7200 + i,) * 2)
    kept_code.keep("e", b"code")
    assert sorted(map(os.path.basename, files(kept_code.FOLDER))) == ["d", "e"]


def test_kept_code_that_cannot_be_loaded_is_removed_and_compiled_anew(monkeypatch):
    started = []
    monkeypatch.setattr(background, "_start", started.append)
    compiler = BackgroundCompiler()
    module = graph()
    name = kept_code.name_of(to_bytes(module)[0], 1)
    kept_code.keep(name, b"no code")
    job = compiler.submit(module, 1)
    assert compiler.busy
    assert not started
    background._readying().join(240.0)
    assert not compiler.done(job)
    assert kept_code.find(name) is None
    assert started == [job]
    compiler._started.clear()  # no process to end


# Equal expressions.


def test_equal_expressions_are_computed_once_and_results_keep_memory_of_their_own():
    def function(x):
        one, other = (x + 1).exp(), (x + 1).exp()
        return [one * other, x * 2, x * 2, x * 2.0 + x * True]

    module = make_fx(function, tracing_mode="fake")(torch.ones(3))
    merge_equal(module.graph)
    module.recompile()
    targets = [node.target for node in module.graph.nodes if node.op == "call_function"]
    aten = torch.ops.aten
    assert targets.count(aten.exp.default) == 1
    assert targets.count(aten.mul.Tensor) == 1 + 2 + 2  # x * 2, x * 2.0 and x * True are three expressions
    found, expected = module(torch.arange(3.0)), function(torch.arange(3.0))
    assert all(map(torch.equal, found, expected))
    assert found[1].data_ptr() != found[2].data_ptr()


def test_memory_that_is_not_filled_is_not_shared():
    graph = Graph()
    x = graph.placeholder("x")
    ones = [graph.call_function(torch.ops.aten.empty_like.default, (x,)) for _ in range(2)]
    graph.output([*ones])
    merge_equal(graph)
    assert len(GraphModule(torch.nn.Module(), graph).graph.find_nodes(op="call_function", target=ones[0].target)) == 2
