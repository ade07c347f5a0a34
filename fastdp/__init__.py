"""Data-parallel training on all GPUs of a box, from one process, with one line.

    import fastdp
    parallel = fastdp.wrap(model, gpus=8)

Keras models run on Keras's torch backend. Importing fastdp selects it unless a backend is already selected
(by KERAS_BACKEND, by an installed backend named in keras.json, or because Keras is already imported).
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdp import backend as backend
from fastdp import data
from fastdp._version import __version__
from fastdp.api import wrap
from fastdp.checkpoint.run import Checkpoint
from fastdp.engine.data_parallel import DataParallel
from fastdp.engine.step import StepResult
from fastdp.errors import DeviceTimeoutError, ReplicaError
from fastdp.placement import device
from fastdp.program.functions import FunctionProgram
from fastdp.runtime import environment
from fastdp.runtime.select import devices, set_virtual_devices
from fastdp.runtime.topology import DeviceInfo
from fastdp.tracing.trace import trace

if TYPE_CHECKING:
    from fastdp import callbacks, replica, utils
    from fastdp.data.hdf5 import HDF5Matrix
    from fastdp.keras.install import install, uninstall
    from fastdp.keras.parallel_model import ParallelModel
    from fastdp.keras.wrap import multi_gpu_model
    from fastdp.monitoring.progress import progress
    from fastdp.tensors.marks import mean_over, rows, same

__all__ = [
    "Checkpoint",
    "DataParallel",
    "DeviceInfo",
    "DeviceTimeoutError",
    "FunctionProgram",
    "HDF5Matrix",
    "ParallelModel",
    "ReplicaError",
    "StepResult",
    "__version__",
    "callbacks",
    "data",
    "device",
    "devices",
    "install",
    "mean_over",
    "multi_gpu_model",
    "progress",
    "replica",
    "rows",
    "same",
    "set_virtual_devices",
    "trace",
    "uninstall",
    "utils",
    "wrap",
]

# Loaded on first use, so that `import fastdp` is fast and works without Keras and torch.
_LATE = {
    "HDF5Matrix": "fastdp.data.hdf5",
    "ParallelModel": "fastdp.keras.parallel_model",
    "callbacks": "fastdp.callbacks",
    "install": "fastdp.keras.install",
    "multi_gpu_model": "fastdp.keras.wrap",
    "mean_over": "fastdp.tensors.marks",
    "progress": "fastdp.monitoring.progress",
    "replica": "fastdp.replica",
    "rows": "fastdp.tensors.marks",
    "same": "fastdp.tensors.marks",
    "uninstall": "fastdp.keras.install",
    "utils": "fastdp.utils",
}
_OF_TORCH = ("mean_over", "replica", "rows", "same")


def __getattr__(name: str) -> Any:
    """Load one of the names in `_LATE`.

    Raises:
        ImportError: Keras or torch is missing; the message says how to install them.
    """
    if name not in _LATE:
        raise AttributeError(f"module 'fastdp' has no attribute {name!r}")
    try:
        module = importlib.import_module(_LATE[name])
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] in ("keras", "torch"):
            needs = "torch. Install it with: pip install torch"
            if name not in _OF_TORCH:
                needs = "Keras and torch. Install them with: pip install 'fastdp[keras]'"
            raise ImportError(f"fastdp.{name} needs {needs}") from error
        raise
    return module if name in ("callbacks", "replica", "utils") else getattr(module, name)


def _choose_backend() -> None:
    """Make torch Keras's backend unless the user has chosen one.

    On its first import Keras writes a keras.json that names TensorFlow. A backend that is named there but not
    installed therefore does not count as chosen.
    """
    if "KERAS_BACKEND" in os.environ or "keras" in sys.modules:
        return
    home = os.path.expanduser("~")  # unlike Path.home(), no error where there is none; Keras then takes /tmp
    folder = os.environ.get("KERAS_HOME", os.path.join(home if os.access(home, os.W_OK) else "/tmp", ".keras"))
    file = Path(folder) / "keras.json"
    try:
        settings = json.loads(file.read_text())
    except (OSError, ValueError):
        settings = {}
    named = settings.get("backend") if isinstance(settings, dict) else None
    if not isinstance(named, str) or not named.isidentifier() or importlib.util.find_spec(named) is None:
        os.environ["KERAS_BACKEND"] = "torch"


_choose_backend()
environment.set_early()
