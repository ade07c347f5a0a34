"""Starts scripts by torchrun, in processes on this machine that talk over localhost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def torchrun(
    script: Path, *arguments: object, processes: int, restarts: int = 0, seconds: float = 150, **environment: str
) -> subprocess.CompletedProcess[str]:
    """What a script's processes print until all have ended."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FASTDP_", "PYTEST_"))}
    kept |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]]),
        "OMP_NUM_THREADS": "1",
        "KERAS_BACKEND": "torch",
        **environment,
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [f"--max-restarts={restarts}", "--monitor-interval=0.1", str(script), *map(str, arguments)]
    return subprocess.run(command, env=kept, capture_output=True, text=True, timeout=seconds, check=False)
