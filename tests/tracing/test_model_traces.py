"""Traces of Keras models and torch modules: eager and captured steps, calls with backward passes, `fastdp run`."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import torch
from scripts import loaded_run
from torch import nn
from torch.nn import functional as F
from trace_files import TraceFile, inside

import fastdp
from fastdp.tracing import spans


@pytest.fixture(autouse=True)
def devices():
    fastdp.set_virtual_devices(3)
    yield
    fastdp.set_virtual_devices(0)
    assert spans.now.recorder is None


def keras_model(gpus, **options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(5, "relu"), keras.layers.Dense(3, "softmax")])
    parallel = fastdp.wrap(model, gpus=gpus, **options)
    parallel.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return parallel


X, Y = np.random.default_rng(0).normal(size=(18, 4)).astype("f4"), np.arange(18) % 3


@pytest.mark.parametrize("compile", [None, "trace"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_fit_of_a_keras_model(tmp_path, count, compile):
    parallel = keras_model(count, compile=compile)
    parallel.fit(X, Y, batch_size=6, epochs=1, verbose=0)
    with fastdp.trace(tmp_path / "t.json"):
        parallel.fit(X, Y, batch_size=6, epochs=2, verbose=0, shuffle=False)
        parallel.predict(X, batch_size=9, verbose=0)
    found = TraceFile(tmp_path / "t.json").check()
    assert [len(found.named(f"{kind} step")) for kind in ("train", "predict")] == [6, 2]
    assert {span["args"]["program"] for span in found.named("train step")} == {"CallProgram"}
    for device in range(count):
        runs = found.named("run", f"virtual:{device} compute")
        segments = found.named("segment", f"virtual:{device} compute")
        assert len(runs) == 8
        assert len(segments) >= (6 if compile else 0)
        assert bool(segments) == bool(compile)
        assert all(any(inside(run, segment) for run in runs) for segment in segments)
        assert len(found.named("merge", f"virtual:{device} compute")) == 8  # metrics read the outputs
    between = found.named("between steps")
    assert len(between) == 7
    inputs = found.named("input", found.host)
    assert all(any(inside(gap, span) for span in inputs) for gap in between[:5])
    assert found.named("update", "virtual:0 compute")


def test_the_next_steps_of_a_keras_model(tmp_path, capsys):
    parallel, other = keras_model(2), keras_model(3)
    trace = parallel.trace(tmp_path / "t.json", steps=4)
    other.train_on_batch(X, Y)
    parallel.fit(X, Y, batch_size=6, epochs=2, verbose=0)
    assert not trace.recording
    assert "has the trace of 4 steps" in capsys.readouterr().err
    found = TraceFile(tmp_path / "t.json").check()
    assert len(found.named("train step")) == 5


@pytest.mark.parametrize("compile", [None, "trace"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_train_step_of_a_torch_module(tmp_path, count, compile):
    torch.manual_seed(0)
    dp = fastdp.wrap(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), gpus=count, compile=compile)
    step = dp.train_step(F.cross_entropy, lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    x, y = torch.as_tensor(X), torch.as_tensor(Y)
    for _ in range(3):
        step(x, y)
    with dp.trace(tmp_path / "t.json", steps=3) as trace:
        for _ in range(4):
            step(x, y)
        assert not trace.recording
    found = TraceFile(tmp_path / "t.json").check()
    assert len(found.named("train step")) == 3
    for device in range(count):
        assert len(found.named("run", f"virtual:{device} compute")) == 3
        assert bool(found.named("segment", f"virtual:{device} compute")) == bool(compile)


def test_calls_of_a_torch_module_with_their_backward_passes(tmp_path):
    dp = fastdp.wrap(nn.Linear(4, 3), gpus=3)
    x, y = torch.as_tensor(X), torch.as_tensor(Y)

    def loop(steps):
        for _ in range(steps):
            F.cross_entropy(dp(x), y).backward()

    loop(2)
    trace = dp.trace(tmp_path / "t.json", steps=2)
    loop(3)
    assert not trace.recording
    found = TraceFile(tmp_path / "t.json").check()
    steps = [name for name in found.names(found.host) if name.endswith(" step")]
    assert steps == ["call step", "backward step"] * 2
    with torch.no_grad():
        trace = dp.trace(tmp_path / "u.json", steps=2)
        for _ in range(3):
            dp(x)
    assert trace.steps == 2
    assert not trace.recording
    assert len(TraceFile(tmp_path / "u.json").check().named("call step")) == 2


SCRIPT = """
import sys
import numpy as np
import torch
from torch import nn
module = nn.Linear(4, 3)
optimizer = torch.optim.SGD(module.parameters(), 0.1)
for _ in range(3):
    module(torch.ones(6, 4)).sum().backward()
    optimizer.step()
sys.exit(int(sys.argv[1]))
"""


def test_the_command_traces_a_script(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    ran = loaded_run("--virtual", "2", "--trace", "t.json.gz", "train.py", "3", folder=tmp_path)
    assert ran.returncode == 3, ran.stderr
    found = TraceFile(tmp_path / "t.json.gz").check()
    assert len(found.named("backward step")) == len(found.named("call step")) > 0
    ran = loaded_run("--virtual", "2", "--trace", "none/t.json", "train.py", "0", folder=tmp_path)
    assert ran.returncode == 2
    assert ran.stderr.startswith("fastdp run: ")
    assert "The trace cannot be written: No such file or directory" in ran.stderr
    assert "Traceback" not in ran.stderr
