"""With deterministic=True a run repeats bit for bit, in another process, under load, and nothing goes by the clock."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import torch

import fastdp
from fastdp.tensors import deterministic

L = keras.layers
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _devices():
    fastdp.set_virtual_devices(2)
    yield
    fastdp.set_virtual_devices(0)


def bits_of(runs, seed):
    """What a process of its own has learned in each of these runs; `seed` for hashes and delays."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]]),
        "PYTHONHASHSEED": str(seed),
    }
    command = [sys.executable, str(ROOT / "tests" / "shared" / "repeated.py"), str(seed), *runs]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return dict(line.split() for line in done.stdout.splitlines())


def test_two_processes_learn_the_same_bits():
    counts = {"convolutional": (2, 3), "recurrent": (1, 3), "embedded": (2, 8), "torch": (1, 3, 8)}
    runs = [f"{name},auto,{n}" for name in counts for n in counts[name]]
    runs += ["convolutional,None,3", "words,inductor,2"]
    first, second = (bits_of(runs, seed) for seed in (1, 2))
    assert list(first) == runs
    assert first == second


def model():
    keras.utils.set_random_seed(3)
    return keras.Sequential([keras.Input((6,)), L.Dense(8, "relu"), L.Dense(3)])


def data(rows=8):
    generator = np.random.default_rng(0)
    return generator.normal(size=(rows, 6)).astype("float32"), generator.normal(size=(rows, 3)).astype("float32")


def test_auto_traces_the_second_step_and_compiles_none():
    parallel = fastdp.wrap(model(), gpus=2, deterministic=True)
    parallel.compile("sgd", "mse")
    hows = []
    for _ in range(4):
        parallel.train_on_batch(*data())
        hows += [entry["how"] for entry in parallel.report()]
    assert hows == ["eager", "traced", "traced", "traced"]
    assert "compiled with" in parallel.report()[0]["why"]
    assert not parallel.compiling


def test_the_results_are_those_of_other_steps():
    weights = []
    for options in ({}, {"deterministic": True}):
        template = model()
        parallel = fastdp.wrap(template, gpus=2, compile=None, **options)
        parallel.compile("sgd", "mse")
        for _ in range(3):
            parallel.train_on_batch(*data())
        weights.append(template.get_weights())
    for one, other in zip(*weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


class Settings(L.Layer):
    """Notes torch's settings while it runs."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def call(self, x):
        if not x.is_meta:  # then it is asked for shapes
            self.seen.add(torch.are_deterministic_algorithms_enabled())
        return x


def test_torchs_settings_are_the_steps_alone():
    layer = Settings()
    template = keras.Sequential([keras.Input((6,)), layer, L.Dense(3)])
    parallel = fastdp.wrap(template, gpus=2, deterministic=True)
    parallel.compile("sgd", "mse")
    layer.seen.clear()
    parallel.fit(*data(), verbose=0)
    parallel.evaluate(*data(), verbose=0)
    parallel.predict(data()[0], verbose=0)
    assert layer.seen == {True}
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic


class Putting(L.Layer):
    """Uses an operation that torch has no deterministic form of."""

    def call(self, x):
        return torch.zeros_like(x).put(torch.arange(x.numel()), x.reshape(-1), accumulate=False)


@pytest.mark.parametrize("gpus", [1, 2])
def test_an_operation_without_a_deterministic_form_is_torchs_error_with_layer_and_remedy(gpus):
    template = keras.Sequential([keras.Input((6,)), L.Dense(4), Putting(name="puts"), L.Dense(3)])
    parallel = fastdp.wrap(template, gpus=gpus, deterministic=True)
    parallel.compile("sgd", "mse")
    with pytest.raises(RuntimeError, match=r"put_? does not have a deterministic implementation") as caught:
        parallel.train_on_batch(*data())
    notes = " ".join(caught.value.__notes__)
    assert "puts" in notes
    assert "without deterministic=True" in notes
    assert not torch.are_deterministic_algorithms_enabled()


def test_under_install_and_for_models_that_run_on_one_device():
    layer = Settings()
    template = keras.Sequential([keras.Input((6,)), layer, L.Dense(3)])
    fastdp.install(gpus=2, deterministic=True)
    try:
        template.compile("sgd", "mse")
        template.fit(*data(), verbose=0)
        with pytest.warns(UserWarning, match="unequal numbers of rows"):
            template.train_on_batch(data(8)[0], data(8)[1], sample_weight=np.ones(1, "float32"))
    finally:
        fastdp.uninstall()
    assert layer.seen >= {True}


class Card:
    """Stands for a GPU."""

    on_gpu = True


def test_on_gpus_cublas_is_told_before_torch_uses_one_and_later_it_is_an_error(monkeypatch):
    name = "CUBLAS_WORKSPACE_CONFIG"
    monkeypatch.setenv(name, "")
    deterministic.check_deterministic([Card()])
    assert os.environ[name] == ":4096:8"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    deterministic.check_deterministic([Card()])
    monkeypatch.setenv(name, "")
    with pytest.raises(RuntimeError, match=f"{name}=:4096:8 in the environment before torch"):
        deterministic.check_deterministic([Card()])
