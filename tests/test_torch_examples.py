"""The examples with torch modules run as scripts, in float64: losses fall, and several devices have plain torch's."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sklearn  # noqa: F401  digits; names the need, so that this file is left out without it
import torch

import fastdp

EXAMPLES = Path(__file__).parents[1] / "examples" / "pytorch"
SHARED = ("comparison", "data", "models")
# Rows of a batch and steps: enough for the loss to fall.
SIZES = {
    "gpt": (9, 8),
    "resnet": (17, 8),
    "unet": (5, 8),
    "vae": (16, 12),
    "lstm": (11, 12),
    "graph_net": (11, 8),
    "gan": (13, 8),
    "diffusion": (64, 40),
}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)
    fastdp.set_virtual_devices(0)
    for name in SHARED:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", SIZES)
def test_an_example_trains_and_has_the_losses_of_plain_torch(name, monkeypatch, capsys):
    rows, steps = SIZES[name]
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [name, "--double", "--devices", "3", "--rows", str(rows), "--steps", str(steps)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    plain, *others = capsys.readouterr().out.splitlines()
    first, last = map(float, re.findall(r"\d+\.\d+", plain))
    assert last < first or name == "gan"
    assert [line.split(":")[0] for line in others] == ["loop on 3 devices", "train_step on 3 devices"]
    assert all(float(line.split()[-1]) < 1e-9 for line in others)


def test_the_familiar_loop_learns_and_its_file_loads_into_a_plain_module(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["torch_loop", "--devices", "2", "--epochs", "2"])
    runpy.run_path(str(EXAMPLES.parent / "torch_loop.py"), run_name="__main__")
    printed = capsys.readouterr().out
    first, last = map(float, re.findall(r"loss (\S+)", printed))
    assert last < first
    assert float(re.search(r"not trained on: (\S+)", printed).group(1)) > 0.6
    assert set(torch.load(tmp_path / "digits.pt")) == {"0.weight", "0.bias", "5.weight", "5.bias"}


def test_every_example_with_torch_is_run_here():
    assert set(SIZES) == {path.stem for path in EXAMPLES.glob("*.py")} - set(SHARED)
