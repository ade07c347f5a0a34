"""Tests of exactness that know nothing of GPUs, run again on the simulated CUDA in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_n_simulated_gpus_equal_one_device():
    files = [f"tests/exactness/{name}.py" for name in ("test_side_effects", "test_batch_norm")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "simulated_gpus", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "cuda")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
