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

from fastdp._version import __version__
from fastdp.runtime import environment

if TYPE_CHECKING:
    from fastdp import backend as backend
    from fastdp import callbacks, data, replica, utils
    from fastdp.api import wrap
    from fastdp.checkpoint.run import Checkpoint
    from fastdp.data.hdf5 import HDF5Matrix
    from fastdp.engine.data_parallel import DataParallel
    from fastdp.engine.step import StepResult
    from fastdp.errors import DeviceTimeoutError, ReplicaError
    from fastdp.keras.install import install, uninstall
    from fastdp.keras.parallel_model import ParallelModel
    from fastdp.keras.wrap import multi_gpu_model
    from fastdp.monitoring.progress import progress
    from fastdp.placement import device
    from fastdp.program.functions import FunctionProgram
    from fastdp.runtime.select import devices, set_virtual_devices
    from fastdp.runtime.topology import DeviceInfo
    from fastdp.tensors.marks import mean_over, rows, same
    from fastdp.tracing.trace import trace

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

# All names are loaded on first use, so that `import fastdp` is fast and works without Keras and torch.
_LATE = {
    "Checkpoint": "fastdp.checkpoint.run",
    "DataParallel": "fastdp.engine.data_parallel",
    "DeviceInfo": "fastdp.runtime.topology",
    "DeviceTimeoutError": "fastdp.errors",
    "FunctionProgram": "fastdp.program.functions",
    "HDF5Matrix": "fastdp.data.hdf5",
    "ParallelModel": "fastdp.keras.parallel_model",
    "ReplicaError": "fastdp.errors",
    "StepResult": "fastdp.engine.step",
    "device": "fastdp.placement",
    "devices": "fastdp.runtime.select",
    "install": "fastdp.keras.install",
    "mean_over": "fastdp.tensors.marks",
    "multi_gpu_model": "fastdp.keras.wrap",
    "progress": "fastdp.monitoring.progress",
    "rows": "fastdp.tensors.marks",
    "same": "fastdp.tensors.marks",
    "set_virtual_devices": "fastdp.runtime.select",
    "trace": "fastdp.tracing.trace",
    "uninstall": "fastdp.keras.install",
    "wrap": "fastdp.api",
}
_LATE_MODULES = {name: f"fastdp.{name}" for name in ("backend", "callbacks", "data", "replica", "utils")}
_OF_TORCH = ("mean_over", "replica", "rows", "same")


def __getattr__(name: str) -> Any:
    """Load one of the names in `_LATE` and `_LATE_MODULES`, once.

    Raises:
        ImportError: Keras or torch is missing; the message says how to install them.
    """
    place = _LATE.get(name) or _LATE_MODULES.get(name)
    if place is None:
        raise AttributeError(f"module 'fastdp' has no attribute {name!r}")
    try:
        module = importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] in ("keras", "torch"):
            needs = "torch. Install it with: pip install torch"
            if name not in _OF_TORCH:
                needs = "Keras and torch. Install them with: pip install 'fastdp[keras]'"
            raise ImportError(f"fastdp.{name} needs {needs}") from error
        raise
    value = module if name in _LATE_MODULES else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """All names, loaded or not."""
    return sorted({*globals(), *_LATE, *_LATE_MODULES})


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
