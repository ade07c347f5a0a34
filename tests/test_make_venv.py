"""`make venv` asks pip for what goes with the driver's CUDA; nothing is installed, pip's arguments are looked at."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Stands in for each Python: makes itself the environment's, and notes what pip is asked for.
PYTHON = """#!/bin/sh
case "$*" in
    "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python;;
    "-m pip"*) echo "$*" > asked;;
esac
"""
SMI = "#!/bin/sh\necho '| NVIDIA-SMI 575.1   Driver Version: 575.1   CUDA Version: {}     |'\n"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("cuda", "extras", "index"),
    [("12.9", ",cuda12", True), ("13.1", ",cuda13", False), ("11.8", "", False), (None, "", False)],
)
def test_torch_and_cupy_are_those_of_the_driver(tmp_path, cuda, extras, index):
    for name in ("Makefile", "setup.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    programs = {"python": PYTHON, "nvidia-smi": "#!/bin/sh\nexit 9\n" if cuda is None else SMI.format(cuda)}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = ["make", "venv", f"PYTHON={tmp_path / 'python'}", "TORCH_OF_CUDA12=https://torch.invalid/whl"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=60)
    asked = (tmp_path / "asked").read_text().split()
    assert asked[-1] == f".[keras,demo,dev{extras}]"
    assert ("--extra-index-url" in asked) == index
