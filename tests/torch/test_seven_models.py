"""The seven models of the examples: any number of devices gives plain torch's numbers.

Both ways, the loop and `train_step`, in float64: losses, weights and buffers after a few steps of eleven rows, with an
optimizer and a loss of the example's own.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import fastdp

EXAMPLES = Path(__file__).parents[2] / "examples" / "pytorch"
STEPS, ROWS, DEVICES = 4, 11, (1, 2, 3, 8)
TOLERANCE = 1e-9
NAMES = ("gpt", "resnet", "unet", "vae", "lstm", "graph_net", "gan")
# Dropout in every place.
DROPOUT = {"gpt": {"dropout": 0.2}}


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch):
    """An example's script as a module, found as when it runs as a script."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module
    for name in [*NAMES, "comparison", "data", "models"]:
        sys.modules.pop(name, None)


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(5))


def batches_of(name: str) -> list[tuple[torch.Tensor, ...]]:
    """Batches of a few rows in the form of the example's own."""
    data, comparison = importlib.import_module("data"), importlib.import_module("comparison")
    rows = STEPS * ROWS
    numbers = torch.randint(10, (rows,), generator=torch.Generator().manual_seed(6))
    tensors = {
        "gpt": lambda: data.characters(rows, 12)[:2],
        "resnet": lambda: (images(rows, 1, 8, 8), numbers),
        "unet": lambda: data.shapes(rows, 8),
        "vae": lambda: (images(rows, 64),),
        "lstm": lambda: data.brackets(rows, 9),
        "graph_net": lambda: data.graphs(rows, 6),
        "gan": lambda: (images(rows, 64), images(rows, 16)),
    }[name]()
    return comparison.batches_of(tensors, ROWS, STEPS)


def tensors_of(modules: nn.Module | tuple[nn.Module, ...]) -> list[torch.Tensor]:
    """Parameters and buffers."""
    each = modules if isinstance(modules, tuple) else (modules,)
    return [tensor.clone() for module in each for tensor in module.state_dict().values()]


def train(
    example: ModuleType, name: str, way: str, devices: int, mode: str | None = "auto", **sizes: Any
) -> list[torch.Tensor]:
    """Losses, parameters and buffers after training; 0 devices are plain torch. `mode` is how steps are captured."""
    modules, batches = example.build(**sizes), batches_of(name)
    torch.manual_seed(3)
    if way == "train_step":
        losses = list(example.train_step(modules, batches, gpus=devices, sync_batch_norm=True, compile=mode))
    else:
        models: Any = modules
        if devices:
            each = modules if isinstance(modules, tuple) else (modules,)
            wrapped = [fastdp.wrap(module, gpus=devices, sync_batch_norm=True) for module in each]
            models = wrapped if isinstance(modules, tuple) else wrapped[0]
        losses = list(example.loop(models, batches))
    return [*losses, *tensors_of(modules)]


def assert_same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_the_loop_on_several_devices_trains_as_plain_torch(example, name):
    wanted = train(example(name), name, "loop", 0)
    assert wanted[STEPS - 1] < wanted[0] or name == "gan"
    for devices in DEVICES:
        assert_same(train(example(name), name, "loop", devices), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_train_steps_on_several_devices_train_as_plain_torch(example, name):
    wanted = train(example(name), name, "loop", 0)
    one = train(example(name), name, "train_step", 1)
    for devices in DEVICES[1:]:
        assert_same(train(example(name), name, "train_step", devices), one)
    if name == "gan":  # its train steps run the generator twice, so that its running statistics move twice
        one, wanted = one[:STEPS], wanted[:STEPS]
    assert_same(one, wanted)


@pytest.mark.parametrize(("name", "devices"), [*((name, 1) for name in NAMES), ("gpt", 3), ("vae", 2)])
def test_captured_train_steps_train_as_eager_ones(example, name, devices, monkeypatch):
    made, wrap = [], fastdp.wrap
    monkeypatch.setattr(fastdp, "wrap", lambda *args, **how: made.append(wrap(*args, **how)) or made[-1])
    sizes = DROPOUT.get(name, {})
    wanted = train(example(name), name, "train_step", devices, mode=None, **sizes)
    made.clear()
    with warnings.catch_warnings():
        if name == "lstm":  # packs its sequences by their lengths
            warnings.filterwarnings("ignore", message=".*_pack_padded_sequence.*needs values on the host")
        assert_same(train(example(name), name, "train_step", devices, mode="trace", **sizes), wanted)
    hows = {entry["how"] for parallel in made for entry in parallel.report() if "no train_step" not in str(entry)}
    assert hows == {"eager" if name == "lstm" else "traced"}


@pytest.mark.parametrize("name", DROPOUT)
def test_models_with_dropout_train_as_plain_torch(example, name):
    wanted = train(example(name), name, "loop", 0, **DROPOUT[name])
    for way in ("loop", "train_step"):
        for devices in (2, 3):
            assert_same(train(example(name), name, way, devices, **DROPOUT[name]), wanted)
