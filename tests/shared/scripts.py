"""Runs scripts in processes of their own, by plain Python and by `fastdp run`.

`loaded_python` and `loaded_run` spare a script torch's import, most of the time that a small one takes: it runs in a
copy of a process that has it. Tests of what comes before that import, and of tracebacks, take the others.
"""

from __future__ import annotations

import atexit
import functools
import os
import subprocess
import sys
from pathlib import Path

from warm_python import WarmPython

ROOT = Path(__file__).parents[2]
SECONDS = 120.0
# What Keras and fastdp import with torch, and neither of themselves: both look at the environment.
LOADED = ("torch", "torch._dynamo", "torch.utils.data", "optree", "h5py", "rich.console", "ml_dtypes")


def environment_of(**more: str) -> dict[str, str]:
    """The environment of a script, with the tests' paths and without the tests' devices."""
    kept = {k: v for k, v in os.environ.items() if k != "FASTDP_VIRTUAL_DEVICES"}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]]),
        "KERAS_BACKEND": "torch",
        "CUDA_VISIBLE_DEVICES": "",
        **more,
    }


def python(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What a process prints, from `folder`."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment_of(**environment),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def fastdp_run(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What a process of `fastdp run` prints."""
    return python("-m", "fastdp", "run", *arguments, folder=folder, **environment)


@functools.cache
def _loaded() -> WarmPython:
    warm = WarmPython(LOADED, environment_of(), ROOT)
    atexit.register(warm.close)
    return warm


def loaded_python(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What a process prints that has torch loaded before it begins."""
    return _loaded().run(arguments, environment_of(**environment), SECONDS, folder=folder)


def loaded_run(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What such a process of `fastdp run` prints."""
    return loaded_python("-m", "fastdp", "run", *arguments, folder=folder, **environment)
