"""What a type checker knows of `fastdp.wrap`: the class of what it returns, and its arguments."""

from __future__ import annotations

import subprocess
import sys
import typing
from inspect import signature
from pathlib import Path

import pytest

import fastdp
from fastdp.api import wrap

ROOT = Path(__file__).parents[1]

# Keras and torch as type checkers see them: small, since reading the whole of torch takes mypy half a minute.
STUBS = {
    "torch/__init__.pyi": "from torch import nn as nn\nclass Tensor: ...\n",
    "torch/nn/__init__.pyi": (
        "from typing import Any, Callable\n"
        "from torch import Tensor\n"
        "class Module:\n"
        "    __call__: Callable[..., Any]\n"
        "    def __getattr__(self, name: str) -> Tensor | Module: ...\n"
        "class Linear(Module): ...\n"
    ),
    "keras/__init__.pyi": (
        "from typing import Any\n"
        "class Model:\n"
        "    def get_compile_config(self): ...\n"
        "    def compile_from_config(self, config): ...\n"
        "class Sequential(Model): ...\n"
    ),
}

# Of fastdp only what `wrap` is about, and of libraries the stubs: the rest takes time, and has its own check.
CONFIG = f"""
[mypy]
mypy_path = {ROOT}:$MYPY_CONFIG_FILE_DIR/stubs
python_version = {sys.version_info.major}.{sys.version_info.minor}
follow_imports = skip
ignore_missing_imports = true
[mypy-fastdp,fastdp.api,fastdp.options,fastdp.keras.parallel_model,fastdp.torch.parallel_module]
follow_imports = silent
"""

SCRIPT = """
import keras
import torch
import fastdp

def use(model: keras.Model, sequential: keras.Sequential, module: torch.nn.Module, linear: torch.nn.Linear) -> None:
    reveal_type(fastdp.wrap(model, gpus=2, rows="merge"))
    reveal_type(fastdp.wrap(sequential))
    reveal_type(fastdp.wrap(module, gpus=2))
    reveal_type(fastdp.wrap(linear, [0, 1], sync_batch_norm=True))
    fastdp.wrap(linear, rows="merge")
    fastdp.wrap(model, gpu=2)
    fastdp.wrap(3)
"""

KERAS, TORCH = "fastdp.keras.parallel_model.ParallelModel", "fastdp.torch.parallel_module.TorchParallel"


def said(folder, stubs):
    """What mypy says of the script: the types that it reveals, and the lines with errors."""
    pytest.importorskip("mypy")
    for name, text in stubs.items():
        path = folder / "stubs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "mypy.ini").write_text(CONFIG)
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "cache", "script.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    revealed = [line.split('"')[1] for line in lines if "Revealed type" in line]
    wrong = [SCRIPT.splitlines()[int(line.split(":")[1]) - 1].strip() for line in lines if ": error: " in line]
    return revealed, list(dict.fromkeys(wrong))


def test_a_type_checker_knows_what_wrap_returns_and_takes(tmp_path):
    revealed, wrong = said(tmp_path, STUBS)
    assert revealed == [KERAS, KERAS, TORCH, TORCH]
    assert wrong == ['fastdp.wrap(linear, rows="merge")', "fastdp.wrap(model, gpu=2)", "fastdp.wrap(3)"]


def test_a_module_of_torch_is_none_of_keras_where_keras_has_no_types(tmp_path):
    revealed, _ = said(tmp_path, {name: text for name, text in STUBS.items() if name.startswith("torch/")})
    assert revealed == [KERAS, "Any", TORCH, TORCH]  # the first by its `rows`


@pytest.mark.skipif(sys.version_info < (3, 11), reason="typing.get_overloads")
def test_the_overloads_have_the_arguments_and_defaults_of_wrap():
    expected = {name: (p.kind, p.default) for name, p in signature(fastdp.wrap).parameters.items()}
    overloads = typing.get_overloads(wrap)
    assert len(overloads) == 2
    for one in overloads:
        assert {name: (p.kind, p.default) for name, p in signature(one).parameters.items()} == expected
