"""The ways to train that `fastdp bench` compares: one module per library, with `prepare(request) -> Prepared`."""

from __future__ import annotations

import importlib
import importlib.util
import os

from fastdp.benchmark.request import Prepared, Request

# The module of a library, or of a library and a framework where each framework has its own.
MODULES = {
    ("fastdp", "keras"): "fastdp_keras",
    ("fastdp", "torch"): "fastdp_torch",
    ("torch", "torch"): "torch_loop",
    ("ddp", "torch"): "torch_ddp",
    ("keras", "keras"): "keras_fit",
    ("keras-jax", "keras"): "keras_fit",
    ("keras-tensorflow", "keras"): "keras_fit",
}
# What must be installed, by library; besides that, what the model is made of.
NEEDS = {"keras-jax": ("jax",), "keras-tensorflow": ("tensorflow",)}
BACKENDS = {"keras-jax": "jax", "keras-tensorflow": "tensorflow"}


def missing(request: Request) -> str:
    """Why a way cannot run here, with the remedy; empty if it can. Imports nothing."""
    if (request.library, request.framework) not in MODULES:
        models = {"keras": "Keras models", "torch": "torch modules"}
        return f"{request.library} does not train {models[request.framework]}"
    needs = (*(("keras",) if request.framework == "keras" else ()), *NEEDS.get(request.library, ("torch",)))
    absent = [name for name in needs if importlib.util.find_spec(name) is None]
    return f"not installed here: pip install {' '.join(absent)}" if absent else ""


def environment(request: Request) -> dict[str, str]:
    """The variables that the worker process needs before it imports anything."""
    found = {"KERAS_BACKEND": BACKENDS.get(request.library, "torch"), "TF_CPP_MIN_LOG_LEVEL": "3"}
    if request.kind == "gpu":
        found["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the other ways need memory too
        if request.devices > 1:  # both take effect only before CUDA starts
            found |= {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "CUDA_MODULE_LOADING": "EAGER"}
    else:
        found["CUDA_VISIBLE_DEVICES"] = ""
        if request.library == "keras-jax":
            flags = os.environ.get("XLA_FLAGS", "")
            found["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={request.devices}".strip()
    return found


def prepare(request: Request) -> Prepared:
    """Build the model and train its first step.

    Raises:
        NotImplementedError: this library does not train such models.
    """
    module = MODULES.get((request.library, request.framework))
    if module is None:
        raise NotImplementedError(missing(request))
    prepared: Prepared = importlib.import_module(f"fastdp.benchmark.ways.{module}").prepare(request)
    return prepared
