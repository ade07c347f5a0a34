"""The example in CuPy alone: it runs without CuPy, torch and Keras, and mixes no arrays of a device with NumPy's."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastdp

EXAMPLE = Path(__file__).parents[1] / "examples" / "cupy_language_model.py"
SMALL = ["--epochs", "2", "--sentences", "60", "--batch-size", "71", "--dtype", "float64"]


class OnDevice(np.ndarray):
    """An array that, like CuPy's, is not computed with arrays in host memory: those must be copied first."""

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        return computed(getattr(ufunc, method), inputs, options)

    def __array_function__(self, function: Any, kinds: Any, inputs: Any, options: Any) -> Any:
        return computed(function, inputs, options)

    def __getitem__(self, key: Any) -> Any:
        return computed(lambda array, at: array[at], (self, key), {})

    def __setitem__(self, key: Any, value: Any) -> None:
        self.view(np.ndarray)[plain(key)] = plain(value)


def plain(value: Any) -> Any:
    """The array of the host's behind one on the device. TypeError for others, as CuPy says it; numbers are fine."""
    if isinstance(value, tuple | list):
        return type(value)(plain(one) for one in value)
    if isinstance(value, np.ndarray) and not isinstance(value, OnDevice):
        raise TypeError(f"Unsupported type {type(value)}")
    return value.view(np.ndarray) if isinstance(value, OnDevice) else value


def on_device(value: Any) -> Any:
    return np.asarray(value).view(OnDevice)


def computed(function: Any, inputs: Any, options: dict[str, Any]) -> Any:
    options = {name: plain(value) for name, value in options.items()}
    return on_device(function(*(plain(value) for value in inputs), **options))


def stand_in() -> types.ModuleType:
    """CuPy as far as the example knows it: what it makes is on the device."""
    module = types.ModuleType("cupy")
    for function in (np.arange, np.tanh, np.exp, np.log, np.cos, np.sqrt, np.minimum):
        setattr(module, function.__name__, lambda *given, function=function: computed(function, given, {}))
    module.get_array_module = lambda array: module if isinstance(array, OnDevice) else np
    return module


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setitem(sys.modules, "cupy", stand_in())
    return runpy.run_path(str(EXAMPLE))


def on(kind: Any, values: dict[str, Any]) -> dict[str, Any]:
    return {name: kind(value) for name, value in values.items()}


def test_no_function_of_it_mixes_arrays_of_a_device_with_those_of_the_host(example):
    contexts, targets = example["examples"](example["text"](3, np.random.default_rng(0)))
    program = example["make_program"](4, "float64")
    state = program.state_dict()
    found = []
    for kind in (np.asarray, on_device):
        parameters, slots = on(kind, state["parameters"]), on(kind, state["slots"])
        batch = [kind(contexts), kind(targets)]
        loss, gradients, _ = example["train"](parameters, batch)
        new, kept = example["adamw"](4)(parameters, slots, gradients)
        (logs,) = example["predict"](new, batch)
        made = [loss, logs, *gradients.values(), *new.values(), *kept.values()]
        assert {isinstance(one, OnDevice) for one in made} == {kind is on_device}
        found.append([np.asarray(one) for one in made])
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(TypeError, match="Unsupported type"):
        example["train"](on(on_device, state["parameters"]), [contexts, targets])


def test_its_gradient_is_the_slope_of_its_loss(example):
    batch = list(example["examples"](example["text"](4, np.random.default_rng(0))))
    parameters = example["make_program"](4, "float64").state_dict()["parameters"]
    _, gradients, _ = example["train"](parameters, batch)
    assert set(gradients) == set(parameters)
    for name, gradient in gradients.items():
        way = np.random.default_rng(1).normal(size=gradient.shape)
        above, below = (
            example["train"]({**parameters, name: parameters[name] + sign * way}, batch)[0] for sign in (1e-5, -1e-5)
        )
        assert (above - below) / 2e-5 == pytest.approx((gradient * way).sum(), rel=1e-6)


def test_it_has_the_losses_of_one_device_on_three_and_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    printed = {}
    for count in ("1", "3", "3"):
        monkeypatch.setattr(sys, "argv", [EXAMPLE.name, *SMALL, "--devices", count, "--folder", str(tmp_path / count)])
        runpy.run_path(str(EXAMPLE), run_name="__main__")
        fastdp.set_virtual_devices(0)
        first, *lines = capsys.readouterr().out.splitlines()
        assert first.count("virtual:") == int(count)
        if count in printed:
            assert lines == []  # both epochs are done
        else:
            printed[count] = np.array([re.findall(r"\d+\.\d+", line) for line in lines], float)
    assert printed["1"].shape == (2, 2)
    np.testing.assert_allclose(printed["3"], printed["1"], rtol=0, atol=2e-9)
    assert printed["1"][1, 0] < printed["1"][0, 0] - 0.2


def test_it_brings_in_neither_torch_nor_keras_and_says_nothing_else(tmp_path):
    code = (
        "import runpy, sys; runpy.run_path({!r}, run_name='__main__'); "
        "print({{'torch', 'keras', 'rich'}} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code.format(str(EXAMPLE)), "--epochs", "1", "--sentences", "20"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(EXAMPLE.parents[1]), "FASTDP_VIRTUAL_DEVICES": "2"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    first, loss, heavy = done.stdout.splitlines()
    assert (first, loss[:5], heavy) == ("on virtual:0, virtual:1", "loss ", "set()")
