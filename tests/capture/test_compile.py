"""Captured steps are compiled in the background: no step waits, results stay, and nothing is left behind."""

from __future__ import annotations

import ast
import os
import pickletools
import subprocess
import sys
import tempfile
import time
import types
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import fastdp
from fastdp.capture import patience, speed_trial
from fastdp.capture import steps as capture_steps
from fastdp.capture.compile import compiler as background
from fastdp.capture.compile import worker as compile_worker
from fastdp.capture.compile.compiler import BackgroundCompiler, CompileError, Job
from fastdp.capture.compile.niceness import SHARING, YIELDING
from fastdp.capture.graph.passes import optimized
from fastdp.capture.graph.serialize import from_bytes, to_bytes

L = keras.layers
WAIT = 240.0


@pytest.fixture(autouse=True)
def _devices(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fastdp.set_virtual_devices(2)
    yield
    fastdp.set_virtual_devices(0)
    assert not list(tmp_path.glob("fastdp-compile-*"))


def small():
    return [
        keras.Input((6,)),
        L.Reshape((6, 1)),
        L.Conv1D(4, 3, activation="relu"),
        L.Flatten(),
        L.Dropout(0.4, seed=1),
        L.Dense(3, "softmax", kernel_regularizer="l2"),
    ]


def wrapped(mode, layers=small, **options):
    keras.utils.set_random_seed(5)
    model = keras.Sequential(layers())
    parallel = fastdp.wrap(model, gpus=2, compile=mode, check_replicas=True)
    parallel.compile(keras.optimizers.Adam(0.01), "categorical_crossentropy", metrics=["accuracy"], **options)
    return parallel


def train(parallel, count, seed=0):
    generator = np.random.default_rng(seed)
    losses = []
    for _ in range(count):
        x = generator.normal(size=(8, 6)).astype("float32")
        y = np.eye(3, dtype="float32")[generator.integers(0, 3, 8)]
        losses.append(parallel.train_on_batch(x, y)[0])
    return losses


def hows(parallel):
    return {entry["how"] for entry in parallel.report()}


def graph_of(function, *arguments):
    return torch.fx.experimental.proxy_tensor.make_fx(function, tracing_mode="fake")(*arguments)


@pytest.mark.slow
def test_a_step_is_compiled_in_the_background_takes_over_and_equals_the_eager_one():
    eager = wrapped(None)
    expected = train(eager, 3) + train(eager, 4, seed=1)
    parallel = wrapped("inductor")
    losses = train(parallel, 3)
    assert hows(parallel) == {"traced"}
    assert parallel.compiling
    parallel.wait_compiled(WAIT)
    assert not parallel.compiling
    losses += train(parallel, 4, seed=1)
    assert hows(parallel) == {"compiled"}
    assert all(entry["compile_seconds"] > 0 and entry["load_seconds"] > 0 for entry in parallel.report())
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)
    for weight, other in zip(parallel.get_weights(), eager.get_weights(), strict=True):
        np.testing.assert_allclose(weight, other, rtol=1e-4, atol=1e-5)


def test_a_compiler_gets_the_cores_that_training_leaves_until_somebody_waits_for_it():
    """Linux may group processes by session: the compiler has one of its own, whose niceness counts."""
    parallel = wrapped("inductor")
    train(parallel, 2)
    (job,) = parallel._steps.captures._compiler._started
    group = Path(f"/proc/{job.process.pid}/autogroup")
    assert job.niceness == YIELDING
    assert not group.exists() or group.read_text().endswith("nice 19\n")
    seen = []

    def look(seconds):
        if group.exists():
            seen.append(group.read_text())
        time.sleep(seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture_steps, "time", types.SimpleNamespace(monotonic=time.monotonic, sleep=look))
        with pytest.raises(fastdp.DeviceTimeoutError):
            parallel.wait_compiled(0.5)
    assert all(text.endswith("nice 0\n") for text in seen[-1:])
    assert job.niceness == YIELDING
    assert not group.exists() or group.read_text().endswith("nice 19\n")
    parallel.compile("sgd", "mse")


def test_a_compiler_that_training_leaves_nothing_gets_its_share_after_a_while(monkeypatch):
    set_to = []
    monkeypatch.setattr(background.niceness, "set_group", lambda process, value: not set_to.append(value))
    compiler = BackgroundCompiler()
    job = Job(b"", [], 1, process=types.SimpleNamespace(pid=0, poll=lambda: None), began=time.monotonic())
    job.niceness = YIELDING
    compiler._started.append(job)
    assert not compiler.done(job)
    assert job.niceness == YIELDING
    job.began -= background.niceness.YIELDING_SECONDS
    for _ in range(2):
        assert not compiler.done(job)
        assert job.niceness == SHARING
    assert set_to == [SHARING]
    compiler._started.clear()


def test_a_change_of_niceness_that_is_refused_for_now_is_tried_again(monkeypatch):
    """Without privileges Linux allows one in a tenth of a second."""
    answers = [False, True]
    monkeypatch.setattr(background.niceness, "set_group", lambda process, value: answers.pop(0))
    compiler = BackgroundCompiler()
    compiler._started.append(Job(b"", [], 1, process=types.SimpleNamespace(pid=0)))
    for now in (SHARING, SHARING, YIELDING):
        assert compiler._started[0].niceness == now
        compiler.set_niceness(YIELDING)
    assert answers == []
    compiler._started.clear()


def test_waiting_for_the_compiler_has_a_timeout_and_compiling_anew_ends_it():
    parallel = wrapped("inductor")
    train(parallel, 2)
    process = parallel._steps.captures._compiler._started[0].process
    with pytest.raises(fastdp.DeviceTimeoutError, match=r"timeout=0\.01"):
        parallel.wait_compiled(0.01)
    assert process.poll() is None
    parallel.compile("sgd", "mse")
    assert process.poll() is not None
    assert not parallel.compiling


def test_a_compiler_that_dies_is_told_once_and_steps_go_on_traced():
    parallel = wrapped("inductor")
    train(parallel, 2)
    process = parallel._steps.captures._compiler._started[0].process
    process.kill()
    process.wait()
    background._readying().join(WAIT)  # a job is done once its artifact could be loaded
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(parallel, 4)
    (said,) = [str(w.message) for w in caught if "not compiled" in str(w.message)]
    assert "ended with status -9" in said
    assert hows(parallel) == {"traced"}
    assert not parallel.compiling
    assert any("status -9" in entry["why"] for entry in parallel.report())


def test_without_a_compiler_steps_are_traced_and_a_warning_says_so(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    parallel = wrapped("inductor")
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler \(no-such-compiler\)"):
        train(parallel, 3)
    assert hows(parallel) == {"traced"}


def test_a_compiler_that_takes_too_long_is_given_up():
    compiler = BackgroundCompiler(timeout=0.0)
    job = compiler.submit(graph_of(lambda a: [a + 1.0], torch.ones(3)), 1)
    time.sleep(0.01)
    assert compiler.done(job)
    with pytest.raises(CompileError, match="longer than"):
        compiler.result(job)
    assert job.process.poll() is not None
    assert not compiler.busy


def test_the_worker_ends_with_the_process_that_started_it(tmp_path):
    code = (
        "import os, torch, sys\n"
        "from torch.fx.experimental.proxy_tensor import make_fx\n"
        "from fastdp.capture.compile.compiler import BackgroundCompiler\n"
        "c = BackgroundCompiler()\n"
        "j = c.submit(make_fx(lambda a: [a + 1.0], tracing_mode='fake')(torch.ones(3)), 1)\n"
        "print(j.process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9) if sys.argv[1] == 'killed' else None\n"
    )
    for how in ("killed", "ended"):
        folder = tmp_path / how
        folder.mkdir()
        environment = os.environ | {"TMPDIR": str(folder)}
        done = subprocess.run(
            [sys.executable, "-c", code, how], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        pid = int(done.stdout)
        deadline = time.monotonic() + 60
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
                break
            time.sleep(0.05)
        assert time.monotonic() < deadline
        assert not list(folder.glob("fastdp-compile-*"))


def test_auto_runs_eagerly_then_traced_once_a_shape_has_been_trained_for_long(monkeypatch):
    parallel = wrapped("auto")
    train(parallel, 4)
    assert hows(parallel) == {"eager"}
    assert "not trained for long" in parallel.report()[0]["why"]
    monkeypatch.setattr(patience, "TRACE_SECONDS", 0.0)
    monkeypatch.setattr(patience, "TRACE_STEPS", 0)
    train(parallel, 1)
    assert hows(parallel) == {"traced"}
    assert not parallel.compiling
    monkeypatch.setattr(patience, "COMPILE_PATIENCE", 0.0)
    train(parallel, 1)
    assert parallel.compiling
    parallel._steps.forget_engine()


@pytest.mark.parametrize(
    ("mode", "options", "expected"),
    [
        ("trace", {"jit_compile": False}, {"eager"}),
        ("trace", {"jit_compile": "auto"}, {"traced"}),
        (None, {"jit_compile": "auto"}, {"eager"}),
        (None, {"jit_compile": True}, {"traced"}),
        ("trace", {"run_eagerly": True}, {"eager"}),
    ],
)
def test_keras_own_settings_choose_too(mode, options, expected, monkeypatch):
    monkeypatch.setattr(background, "missing_compiler", lambda: None)
    parallel = wrapped(mode, **options)
    train(parallel, 2)
    assert hows(parallel) == expected
    parallel._steps.forget_engine()


def test_a_graph_survives_being_bytes():
    table = torch.arange(6.0)

    def function(a, b):
        first, second = torch.split(a * table + torch.zeros(()), 3, dim=-1)
        return [first @ b, second.sum().to(torch.float64), torch.full((2,), 3.0)]

    arguments = torch.randn(4, 6), torch.randn(3, 2)
    module = optimized(
        torch.fx.experimental.proxy_tensor.make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(
            *arguments
        )
    )
    data, constants = to_bytes(module)
    loaded, fakes, _ = from_bytes(data)
    assert [tuple(fake.shape) for fake in fakes] == [(4, 6), (3, 2), *(tuple(c.shape) for c in constants)]
    for value, other in zip(loaded(*arguments, *constants), function(*arguments), strict=True):
        assert value.dtype == other.dtype
        torch.testing.assert_close(value, other)


def test_layout_changes_around_convolutions_are_taken_out_and_the_numbers_stay():
    def network(x, w, v):
        y = torch.conv2d(x.permute(0, 3, 1, 2), w.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last))
        y = y.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2).contiguous()
        y = y.contiguous(memory_format=torch.channels_last)
        y = torch.conv2d(y, v.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last))
        return [y.permute(0, 2, 3, 1).reshape(2, -1)]

    arguments = torch.randn(2, 8, 8, 3), torch.randn(3, 3, 3, 4), torch.randn(3, 3, 4, 5)
    traced = graph_of(network, *arguments)
    clone = torch.ops.aten.clone.default
    before = len(traced.graph.find_nodes(op="call_function", target=clone))
    expected = traced(*arguments)
    module = optimized(traced)
    after = len(module.graph.find_nodes(op="call_function", target=clone))
    assert before == 4
    assert after == 2  # the kernels'
    torch.testing.assert_close(module(*arguments), expected)


def test_random_ops_that_are_not_keras_own_are_not_captured():
    with pytest.raises(capture_steps.NotCapturable, match="rand"):
        optimized(graph_of(lambda a: [a + torch.rand(3)], torch.ones(3)))


@pytest.mark.slow
def test_pooling_with_same_padding_behind_a_convolution_is_compiled():
    """torch 2.13 is wrong about the memory layout of the padding's gradient, and the compiled step would fail."""

    def pooled():
        return [
            keras.Input((12, 12, 3)),
            L.Conv2D(8, 3, padding="same"),
            L.BatchNormalization(),
            L.MaxPooling2D(3, strides=2, padding="same"),
            L.SeparableConv2D(8, 3, padding="same", use_bias=False),
            L.GlobalAveragePooling2D(),
            L.Dense(3, "softmax"),
        ]

    generator = np.random.default_rng(0)
    x = generator.normal(size=(8, 12, 12, 3)).astype("float32")
    y = np.eye(3, dtype="float32")[generator.integers(0, 3, 8)]
    eager, parallel = wrapped(None, pooled), wrapped("inductor", pooled)
    expected = [eager.train_on_batch(x, y)[0] for _ in range(6)]
    losses = [parallel.train_on_batch(x, y)[0] for _ in range(3)]
    parallel.wait_compiled(WAIT)
    losses += [parallel.train_on_batch(x, y)[0] for _ in range(3)]
    assert hows(parallel) == {"compiled"}
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)


def test_the_compiler_is_asked_by_arguments_that_torch_2_11_has():
    """`fake_mode=` and `donate_graph_module=` are newer; a call that torch refuses would leave every step traced."""
    tree = ast.parse(Path(compile_worker.__file__).read_text(encoding="utf-8"))
    (call,) = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "standalone_compile"]
    assert len(call.args) == 2
    assert {keyword.arg for keyword in call.keywords} <= {"dynamic_shapes", "options", "aot"}


def test_a_graph_as_bytes_names_no_module_but_those_that_its_reader_has():
    def step(x):
        return [torch.zeros(3, dtype=torch.float64) + x.to(torch.float16, memory_format=torch.contiguous_format)]

    module = make_fx(step, tracing_mode="fake")(torch.ones(3))
    data, _ = to_bytes(module)
    strings = {text for _, text, _ in pickletools.genops(data) if isinstance(text, str)}
    assert {"float64", "float16"} <= strings  # made again by name: pickle would find any module that imported torch
    modules = {text for text in strings if text in sys.modules}
    assert modules <= {"fastdp.capture.graph.serialize", "torch"}


# "auto": what pays, and nothing that could be wrong.


def quick(monkeypatch):
    """Shapes are traced at their second step."""
    monkeypatch.setattr(patience, "TRACE_SECONDS", 0.0)
    monkeypatch.setattr(patience, "TRACE_STEPS", 0)


@pytest.mark.parametrize(("compiled", "how"), [(0.001, "compiled"), (0.5, "traced")])
def test_auto_keeps_the_faster_of_the_compiled_and_the_traced_step(compiled, how):
    class Replaced:
        """A captured step, of which the trial needs two calls."""

        now = "traced"

        def use(self, run):
            self.now = run

        def use_traced(self):
            self.now = "traced"

    captured = Replaced()
    trial = speed_trial.SpeedTrial(captured, "compiled")
    seen = []
    for _ in range(2 * speed_trial.STEPS + 3):
        seen.append(captured.now)
        trial.note(compiled if captured.now == "compiled" else 0.1)
    assert seen[: 2 * speed_trial.STEPS] == ["compiled"] * speed_trial.STEPS + ["traced"] * speed_trial.STEPS
    assert captured.now == how
    assert trial.why == ("" if how == "compiled" else "a step takes 500.00 ms compiled and 100.00 traced")


def test_a_step_that_was_replaced_replays_as_traced_again():
    parallel = wrapped("trace")
    train(parallel, 2)
    shape, _ = parallel._steps.captures._shapes.values()  # the first replica counts the regularizer
    step, run = dict(shape.captured._steps), shape.captured.run
    calls = []
    shape.captured.use(lambda *arguments: calls.append(1) or run(*arguments))
    train(parallel, 1)
    assert calls == [1]
    shape.captured.use_traced()
    assert shape.captured.run is run
    assert shape.captured._steps["cpu"] is step["cpu"]
    train(parallel, 1)
    assert calls == [1]


@pytest.mark.parametrize("own", ["layer", "lambda", "activation", "regularizer", "loss", "loss class"])
def test_auto_leaves_steps_with_the_users_code_eager(own, monkeypatch):
    quick(monkeypatch)

    class Own(keras.layers.Layer):
        def call(self, x):
            return x * 2

    class OwnLoss(keras.losses.Loss):
        def call(self, y, y_pred):
            return keras.ops.mean((y - y_pred) ** 2, axis=-1)

    class OwnRegularizer(keras.regularizers.Regularizer):
        def __call__(self, x):
            return keras.ops.sum(x * x)

    def function(*values):
        return keras.ops.mean((values[0] - values[-1]) ** 2, axis=-1) if len(values) > 1 else keras.ops.relu(values[0])

    extra = {"layer": Own(), "lambda": keras.layers.Lambda(lambda x: x + 1)}.get(own, keras.layers.ReLU())
    dense = keras.layers.Dense(
        2,
        activation=function if own == "activation" else "tanh",
        kernel_regularizer=OwnRegularizer() if own == "regularizer" else None,
    )
    model = keras.Sequential([keras.Input((3,)), dense, extra])
    fastdp.set_virtual_devices(2)
    parallel = fastdp.wrap(model, gpus=2)
    parallel.compile("sgd", {"loss": function, "loss class": OwnLoss()}.get(own, "mse"))
    x, y = np.ones((4, 3), np.float32), np.ones((4, 2), np.float32)
    for _ in range(4):
        parallel.train_on_batch(x, y)
    (entry,) = parallel.report()
    assert entry["how"] == "eager"
    assert "your own code" in entry["why"]
    fastdp.set_virtual_devices(0)


def test_keras_own_layers_are_traced_by_default(monkeypatch):
    quick(monkeypatch)
    fastdp.set_virtual_devices(2)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, activation="relu", kernel_regularizer="l2")])
    parallel = fastdp.wrap(model, gpus=2)
    parallel.compile("sgd", keras.losses.MeanSquaredError(), metrics=["mae"])
    x, y = np.ones((4, 3), np.float32), np.ones((4, 2), np.float32)
    for _ in range(4):
        parallel.train_on_batch(x, y)
    assert hows(parallel) == {"traced"}
    fastdp.set_virtual_devices(0)


def test_a_changed_attribute_is_seen_by_the_next_step():
    """A callback that turns dropout off, as it would see it in plain Keras."""
    fastdp.set_virtual_devices(2)
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dropout(0.5, seed=1), keras.layers.Dense(1, kernel_initializer="ones")]
    model = keras.Sequential([keras.Input((64,)), *layers])
    parallel = fastdp.wrap(model, gpus=2, compile="trace")
    parallel.compile(keras.optimizers.SGD(0.0), "mse")
    x, y = np.ones((4, 64), np.float32), np.full((4, 1), 64, np.float32)
    losses = [parallel.train_on_batch(x, y) for _ in range(3)]
    assert hows(parallel) == {"traced"}
    parallel.reset_metrics()
    model.layers[0].rate = 0.0
    off = [parallel.train_on_batch(x, y) for _ in range(3)]
    assert min(losses) > 0.5
    assert off == [0.0] * 3
    assert hows(parallel) == {"traced"}, "captured anew"
    fastdp.set_virtual_devices(0)


def test_a_layer_that_changes_its_own_attributes_runs_eagerly():
    @keras.saving.register_keras_serializable(package="capture_compile")
    class Counting(keras.layers.Layer):
        count = 0

        def call(self, x):
            self.count = self.count + 1
            return x

    fastdp.set_virtual_devices(1)
    model = keras.Sequential([keras.Input((3,)), Counting(), keras.layers.Dense(1)])
    parallel = fastdp.wrap(model, gpus=1, compile="trace")
    parallel.compile("sgd", "mse")
    x, y = np.ones((4, 3), np.float32), np.ones((4, 1), np.float32)

    def steps():
        for _ in range(12):
            parallel.train_on_batch(x, y)

    with pytest.warns(UserWarning, match="count, which changes while the model trains"):
        steps()
    assert hows(parallel) == {"eager"}
    fastdp.set_virtual_devices(0)
