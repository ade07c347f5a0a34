"""The ways to train: each trains each model, all compute the same losses, and what one cannot do is a clear error."""

from __future__ import annotations

import math
import os
import textwrap
import time
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import torch
from small_targets import SMALL

from fastdp.benchmark.process import Process, WayError
from fastdp.benchmark.request import Request
from fastdp.benchmark.target import load
from fastdp.benchmark.ways import (
    environment,
    fastdp_form,
    keras_fit,
    keras_training,
    missing,
    prepare,
    torch_loop,
    torch_training,
)
from fastdp.benchmark.worker import command

STEPS = 14  # more than any way trains before it is ready


@pytest.fixture(autouse=True)
def settings_of_libraries():
    """A way sets up its whole process: put back what it leaves."""
    policy, threads = keras.config.dtype_policy(), torch.get_num_threads()
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
    keras.config.set_dtype_policy(policy)
    torch.set_num_threads(threads)


def request(target: str, **how) -> Request:
    return Request(**{"target": SMALL.get(target, target), "framework": "torch", "batch": 6, **how})


def losses(asked: Request) -> list[float]:
    """The losses of two more rounds, the second of which ends with step STEPS."""
    way = prepare(asked)
    try:
        assert way.facts["parameters"] > 0
        assert way.facts["first_step_seconds"] > 0
        left = STEPS - way.report()["trained"] - 1
        found = []
        for steps in (left, 1):
            done = way.round(steps)
            assert done.steps == steps
            assert done.seconds > 0
            found.append(way.report()["loss"])
        assert way.report()["trained"] == STEPS
        return found
    finally:
        way.close()


@pytest.mark.parametrize("name", ["mlp", "lstm", "bert-base", "gpt2-small"])
def test_fastdp_over_torch_has_the_losses_of_plain_torch(name):
    plain = losses(request(name, library="torch"))
    assert all(map(math.isfinite, plain))
    found = losses(request(name, devices=2, kind="virtual", mode="eager"))
    assert found[-1] == pytest.approx(plain[-1], rel=1e-5)


@pytest.mark.parametrize("name", ["mlp", "bert-base"])
def test_fastdp_over_keras_has_the_losses_of_keras(name):
    plain = losses(request(name, library="keras", framework="keras"))
    assert all(map(math.isfinite, plain))
    found = losses(request(name, framework="keras", devices=2, kind="virtual", mode="eager"))
    assert found[-1] == pytest.approx(plain[-1], rel=1e-5)


@pytest.mark.parametrize("framework", ["keras", "torch"])
def test_traced_and_automatic_steps_have_the_losses_of_plain_ones(framework):
    library = "keras" if framework == "keras" else "torch"
    plain = losses(request("mlp", framework=framework, library=library))[-1]
    for devices, mode in ((1, "auto"), (2, "traced")):
        found = losses(request("mlp", framework=framework, devices=devices, kind="virtual", mode=mode))
        assert found[-1] == pytest.approx(plain, rel=1e-5)


def test_a_keras_model_trains_as_a_torch_module_with_its_weights(monkeypatch):
    """The loss, the optimizer and the data of the two libraries are the same."""
    expected = losses(request("mlp", framework="keras", library="keras"))[-1]
    model = load(request("mlp", framework="keras")).model

    def with_its_weights(asked: Request):
        target = load(asked)
        with torch.no_grad():
            for parameter, weight in zip(target.model.parameters(), model.get_weights(), strict=True):
                parameter.copy_(torch.from_numpy(weight.T))
        return target

    monkeypatch.setattr(torch_loop, "load", with_its_weights)
    assert losses(request("mlp", library="torch"))[-1] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_is_that_of_the_framework(precision):
    plain = losses(request("mlp", library="torch", precision=precision))[-1]
    assert plain != losses(request("mlp", library="torch"))[-1]
    assert losses(request("mlp", mode="eager", precision=precision))[-1] == plain
    on_two = losses(request("mlp", devices=2, kind="virtual", mode="eager", precision=precision))[-1]
    assert on_two == pytest.approx(plain, rel=1e-4)
    in_keras = losses(request("mlp", framework="keras", library="keras", precision=precision))[-1]
    assert keras.config.dtype_policy().compute_dtype == {"bf16": "bfloat16", "fp16": "float16"}[precision]
    on_two = losses(request("mlp", framework="keras", devices=2, kind="virtual", mode="eager", precision=precision))[-1]
    assert on_two == pytest.approx(in_keras, rel=2e-4)


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        ({"library": "torch", "mode": "traced"}, NotImplementedError, "torch has no traced training steps"),
        ({"library": "torch", "mode": "graph"}, NotImplementedError, "CUDA graphs need a GPU"),
        ({"library": "torch", "devices": 2}, NotImplementedError, "--compare ddp"),
        ({"library": "ddp", "devices": 4}, ValueError, "`batch` must be a multiple of the 4 processes"),
        ({"library": "ddp", "mode": "graph"}, NotImplementedError, "all-reduces are hooks"),
        ({"mode": "graph", "kind": "virtual"}, NotImplementedError, "CUDA graphs need GPUs"),
        ({"library": "keras", "framework": "keras", "mode": "traced"}, NotImplementedError, "no 'traced' steps"),
        (
            {"library": "keras", "framework": "keras", "devices": 2},
            NotImplementedError,
            "trains on one device, not on 2",
        ),
        ({"library": "ddp", "framework": "keras"}, NotImplementedError, "ddp does not train Keras models"),
        ({"library": "keras", "framework": "torch"}, NotImplementedError, "keras does not train torch modules"),
    ],
)
def test_what_a_way_cannot_do_is_an_error_with_the_remedy(how, error, said):
    with pytest.raises(error, match=said):
        prepare(request("mlp", **how))


def test_steps_that_are_not_in_the_form_asked_for_are_not_measured(tmp_path):
    asked = request(own_file(tmp_path, "make", READS), devices=2, kind="virtual", mode="traced")
    with (
        pytest.warns(UserWarning, match="eager"),
        pytest.raises(RuntimeError, match=r"asked for traced steps, but they run as eager ones: .*values on the host"),
    ):
        prepare(asked)
    fastdp_form.free_devices(asked)


# What strangers bring.

OWN = """
import torch
from torch import nn
from torch.nn import functional


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.numbers = nn.Embedding(9, 4), nn.Linear(2, 4)

    def forward(self, words, numbers, scale=1.0):
        hidden = self.words(words).mean(1) + self.numbers(numbers)
        return scale * hidden, hidden.square().mean(1)


def tuple_loss(outputs, labels):
    logits, penalty = outputs
    return functional.cross_entropy(logits, labels) + penalty.mean()


def make_several():
    return Several(), tuple_loss


def make_batch(rows):
    draw = torch.Generator().manual_seed(rows)
    words = torch.randint(0, 9, (rows, 5), generator=draw)
    return {"words": words, "numbers": torch.randn(rows, 2, generator=draw)}, torch.arange(rows) % 4
"""

READS = """
from torch import nn


class Reads(nn.Linear):
    '''Reads a value on the host in forward: it cannot be traced.'''

    def forward(self, x):
        return super().forward(x) * (2.0 if self.bias.sum().item() > 0 else 1.0)


def make():
    return Reads(4, 3)
"""

INSIDE = """
import torch
from torch import nn
from torch.nn import functional


class WithLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, labels):
        logits = self.layer(x)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def make():
    return WithLoss(), lambda outputs: outputs["loss"]


def make_broken():
    raise RuntimeError("no weights for you")


def make_large():
    class Large(nn.Linear):
        def forward(self, *inputs):
            raise torch.OutOfMemoryError("tried to allocate 900 GiB")
    return Large(4, 3), lambda outputs: outputs.sum()


def make_failing():
    class Failing(WithLoss):
        def forward(self, x, labels):
            if torch.distributed.get_rank() == 1:
                raise ValueError("only here")
            return super().forward(x, labels)
    return Failing(), lambda outputs: outputs["loss"]


def make_batch(rows):
    draw = torch.Generator().manual_seed(rows)
    return (torch.randn(rows, 4, generator=draw), torch.arange(rows) % 3), ()
"""


def own_file(folder, function: str, text: str = OWN) -> str:
    """A user's file, as a target."""
    path = folder / "own.py"
    path.write_text(textwrap.dedent(text))
    return f"{path}:{function}"


def test_several_inputs_in_a_dict_and_outputs_in_a_tuple(tmp_path):
    target = own_file(tmp_path, "make_several")
    plain = losses(request(target, library="torch"))[-1]
    assert losses(request(target, devices=2, kind="virtual", mode="eager"))[-1] == pytest.approx(plain, rel=1e-5)


def test_processes_of_ddp_have_the_losses_of_one_and_end_with_it(tmp_path):
    target, before = own_file(tmp_path, "make_several"), set(torch.multiprocessing.active_children())
    plain = losses(request(target, library="torch"))[-1]
    assert losses(request(target, library="ddp", devices=2, kind="cpu"))[-1] == pytest.approx(plain, rel=1e-5)
    assert set(torch.multiprocessing.active_children()) == before
    assert not torch.distributed.is_initialized()


def test_a_loss_that_the_module_computes_itself(tmp_path):
    target = own_file(tmp_path, "make", INSIDE)
    plain = losses(request(target, library="torch"))[-1]
    assert losses(request(target, devices=2, kind="virtual", mode="eager"))[-1] == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(
    ("function", "library", "said"),
    [
        ("make_failing", "ddp", "RuntimeError: rank 1 of 2: ValueError: only here"),
        ("make_broken", "torch", "RuntimeError: no weights for you"),
        ("make_large", "torch", r"OutOfMemoryError: .*900 GiB"),
    ],
)
def test_a_failing_way_tells_its_reason_and_leaves_no_process(tmp_path, function, library, said):
    asked = request(own_file(tmp_path, function, INSIDE), library=library, devices=1 + (library == "ddp"), kind="cpu")
    began = time.monotonic()
    with pytest.raises(WayError, match=said):
        Process(command(asked), environment(asked), 60)
    assert time.monotonic() - began < 50
    assert not [line for line in processes() if str(tmp_path) in line]


def processes() -> list[str]:
    """The command lines of all processes."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/cmdline", encoding="utf-8", errors="replace") as file:
                    found.append(file.read())
            except OSError:  # it has ended
                continue
    return found


KERAS = """
import keras
import numpy as np
from keras import layers


def make_two():
    words, numbers = keras.Input((5,), dtype="int32", name="words"), keras.Input((3,), name="numbers")
    x = layers.Concatenate()([layers.GlobalAveragePooling1D()(layers.Embedding(11, 4)(words)), numbers])
    outputs = {"kind": layers.Dense(3, activation="softmax", name="kind")(x), "size": layers.Dense(1, name="size")(x)}
    model = keras.Model({"words": words, "numbers": numbers}, outputs)
    losses = {"kind": "sparse_categorical_crossentropy", "size": "mse"}
    model.compile(keras.optimizers.SGD(0.1), losses, loss_weights={"kind": 1.0, "size": 0.5})
    return model
"""

INSIDE_KERAS = """
import keras
import numpy as np


class Inside(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(3)

    def call(self, x):
        y = self.dense(x)
        self.add_loss(keras.ops.mean(keras.ops.square(y)))
        return y


def make():
    return Inside()


def make_batch(rows):
    return np.random.default_rng(rows).standard_normal((rows, 4), np.float32), None
"""


@pytest.mark.parametrize(("function", "text"), [("make_two", KERAS), ("make", INSIDE_KERAS)])
def test_keras_models_with_several_inputs_and_outputs_or_a_loss_of_their_own(tmp_path, function, text):
    target = own_file(tmp_path, function, text)
    plain = losses(request(target, framework="keras", library="keras"))[-1]
    found = losses(request(target, framework="keras", devices=2, kind="virtual", mode="eager"))[-1]
    assert found == pytest.approx(plain, rel=1e-5)


def test_float32_is_no_tf32_on_gpus():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch_training.choose_arithmetic(request("mlp", kind="gpu", precision="bf16"))
    assert torch.backends.cudnn.allow_tf32
    torch_training.choose_arithmetic(request("mlp", kind="gpu"))
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    keras_training.choose_arithmetic(request("mlp", framework="keras", kind="gpu"))
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(("library", "backend"), [("keras-jax", "jax"), ("keras-tensorflow", "tensorflow")])
def test_peak_memory_of_gpus_is_what_the_backend_tells(library, backend, monkeypatch):
    devices = [
        SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 7}),
        SimpleNamespace(memory_stats=lambda: None),
    ]
    told = SimpleNamespace(get_memory_info=lambda name: {"peak": {"GPU:0": 7, "GPU:1": None}[name]})
    fakes = {
        "jax": SimpleNamespace(local_devices=lambda: devices),
        "tensorflow": SimpleNamespace(config=SimpleNamespace(experimental=told)),
    }
    monkeypatch.setattr(keras.backend, "backend", lambda: backend)
    monkeypatch.setattr(keras_fit.importlib, "import_module", fakes.__getitem__)
    found = keras_fit._memory(request("mlp", library=library, framework="keras", kind="gpu", devices=2, batch=5))
    assert [(one["device"], one["rows"], one["peak_nbytes"]) for one in found] == [("gpu:0", 3, 7), ("gpu:1", 2, None)]


def test_graphs_that_torch_leaves_out_are_an_error(monkeypatch):
    counters = {"inductor": {"cudagraph_skips": 2}, "graph_break": {"a print": 1}}
    monkeypatch.setattr(torch._dynamo.utils, "counters", counters)
    with pytest.raises(RuntimeError, match="left out 2 CUDA graphs"):
        torch_loop.how(request("mlp", library="torch", mode="graph", kind="gpu"))
    told = torch_loop.how(request("mlp", library="torch", mode="compiled"))
    assert told == {"how": "compiled", "why": "1 graph breaks"}


def test_a_library_that_is_not_installed_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "jax" else object())
    assert missing(request("mlp", library="keras-jax", framework="keras")) == "not installed here: pip install jax"
    assert missing(request("mlp", library="torch")) == ""


def test_jax_gets_as_many_host_devices_as_replicas(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    asked = request("mlp", library="keras-jax", framework="keras", devices=2)
    flags = environment(asked)["XLA_FLAGS"]
    assert flags == "--xla_cpu_enable_fast_math=false --xla_force_host_platform_device_count=2"
    assert environment(asked)["KERAS_BACKEND"] == "jax"


def test_tensors_of_a_batch_are_made_once():
    pool = [((np.arange(8.0), {"y": np.arange(4)}, 0.5), None), ((np.zeros(8), {"y": np.zeros(4)}, 0.5), None)]
    batches = torch_training.TensorBatches(lambda number: pool[number % 2], request("mlp"))
    first = batches(0)
    assert batches(2) is first
    assert batches(1) is not first
    (x, named, scale), targets = first
    assert x.tolist() == list(range(8))
    assert named["y"].tolist() == [0, 1, 2, 3]
    assert scale == 0.5
    assert targets is None
