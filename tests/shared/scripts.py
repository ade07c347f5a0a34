"""Runs scripts in processes of their own, by plain Python and by `fastdp run`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def python(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What a process prints, from `folder`."""
    kept = {k: v for k, v in os.environ.items() if k != "FASTDP_VIRTUAL_DEVICES"}
    kept |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]]),
        "KERAS_BACKEND": "torch",
        "CUDA_VISIBLE_DEVICES": "",
        **environment,
    }
    return subprocess.run(
        [sys.executable, *arguments], env=kept, cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )


def fastdp_run(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What a process of `fastdp run` prints."""
    return python("-m", "fastdp", "run", *arguments, folder=folder, **environment)
