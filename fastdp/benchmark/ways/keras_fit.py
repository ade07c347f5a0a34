"""Keras's own `fit` on torch, JAX or TensorFlow, on one device or by the backend's own data parallelism."""

from __future__ import annotations

import contextlib
import importlib
import time
from typing import Any

import keras
import numpy as np

from fastdp.benchmark.data import batches_of
from fastdp.benchmark.request import Prepared, Request
from fastdp.benchmark.target import load
from fastdp.benchmark.ways.first_step import compile_seconds, host_peak_nbytes
from fastdp.benchmark.ways.keras_training import Fit, choose_arithmetic, facts_of

# The arguments of Keras's `compile` for each mode, by backend, and how steps then run.
MODES: dict[str, dict[str, tuple[dict[str, Any], str]]] = {
    "torch": {
        "auto": ({}, "eager"),
        "eager": ({"jit_compile": False}, "eager"),
        "compiled": ({"jit_compile": True}, "compiled by torch.compile"),
    },
    "jax": {
        "auto": ({}, "compiled by jax.jit"),
        "eager": ({"run_eagerly": True}, "eager"),
        "compiled": ({"jit_compile": True}, "compiled by jax.jit"),
    },
    "tensorflow": {
        "auto": ({}, "a tf.function, compiled by XLA where the model allows"),
        "eager": ({"run_eagerly": True}, "eager"),
        "traced": ({"jit_compile": False}, "a tf.function"),
        "compiled": ({"jit_compile": True}, "a tf.function, compiled by XLA"),
    },
}


def prepare(request: Request) -> Prepared:
    """Build and compile the model, and train its first steps.

    Raises:
        NotImplementedError: the backend has no such mode, or does not train on so many devices.
        ValueError: there are fewer devices.
    """
    backend = keras.backend.backend()
    how = _mode(request, backend)
    choose_arithmetic(request)
    with _devices(request, backend):
        target = load(request)
        began = time.perf_counter()
        target.model.compile(target.optimizer, target.loss, loss_weights=target.loss_weights, **how[0])
    batches = batches_of(target, request)
    fit = Fit(target.model, batches)
    fit.train(1)
    first = time.perf_counter() - began
    fit.train(2)
    facts = {**facts_of(target, first), "how": how[1]}
    if how[1] != "eager":
        facts["compile_seconds"] = compile_seconds(first, fit.step_seconds)
    return Prepared(fit.train, facts, report=lambda: _report(request, fit), close=batches.close)


def _mode(request: Request, backend: str) -> tuple[dict[str, Any], str]:
    """The arguments of `compile` for the mode, and how steps run."""
    modes = MODES[backend]
    if request.mode not in modes:
        raise NotImplementedError(
            f"Keras on {backend} has no {request.mode!r} steps. Use --mode {' or '.join(modes)} for it."
        )
    if request.library == "keras" and request.devices > 1:
        raise NotImplementedError(
            f"Keras's fit on torch trains on one device, not on {request.devices}. Compare with --compare ddp, "
            "keras-jax or keras-tensorflow, or with one device."
        )
    return modes[request.mode]


def _devices(request: Request, backend: str) -> contextlib.AbstractContextManager[Any]:
    """The context in which a model for these devices is built.

    JAX gets host devices by XLA_FLAGS, which `environment` in `fastdp.benchmark.ways` sets.
    """
    if request.devices == 1:
        return contextlib.nullcontext()
    if backend == "jax":
        found = keras.distribution.list_devices("gpu" if request.kind == "gpu" else "cpu")
        _enough(request, len(found))
        chosen = found[: request.devices]
        keras.distribution.set_distribution(keras.distribution.DataParallel(devices=chosen, auto_shard_dataset=False))
        return contextlib.nullcontext()
    tensorflow: Any = importlib.import_module("tensorflow")
    if request.kind == "gpu":
        _enough(request, len(tensorflow.config.list_physical_devices("GPU")))
        names = [f"GPU:{number}" for number in range(request.devices)]
    else:
        cpu = tensorflow.config.list_physical_devices("CPU")[0]
        parts = [tensorflow.config.LogicalDeviceConfiguration()] * request.devices
        tensorflow.config.set_logical_device_configuration(cpu, parts)
        names = [f"CPU:{number}" for number in range(request.devices)]
    scope: contextlib.AbstractContextManager[Any] = tensorflow.distribute.MirroredStrategy(names).scope()
    return scope


def _enough(request: Request, found: int) -> None:
    if found < request.devices:
        raise ValueError(f"`devices`: {request.library} finds {found} devices here. Received: {request.devices}")


def _report(request: Request, fit: Fit) -> dict[str, Any]:
    """What `Prepared.report` tells."""
    told = {"loss": fit.loss, "trained": fit.trained, "peak_host_nbytes": host_peak_nbytes()}
    return {**told, "verbs": _memory(request) if request.kind == "gpu" else []}


def _memory(request: Request) -> list[dict[str, Any]]:
    """Each GPU with its peak memory, as far as the backend tells. No backend times verbs."""
    backend = keras.backend.backend()
    library: Any = importlib.import_module(backend)
    count = request.devices
    if backend == "jax":
        stats = [device.memory_stats() for device in library.local_devices()[:count]]  # None where it does not tell
        peaks = [one and one.get("peak_bytes_in_use") for one in stats]
    elif backend == "tensorflow":
        peaks = [library.config.experimental.get_memory_info(f"GPU:{gpu}")["peak"] for gpu in range(count)]
    else:
        peaks = [library.cuda.max_memory_allocated(gpu) for gpu in range(count)]
    rows = [len(part) for part in np.array_split(range(request.batch), count)]
    return [
        {"device": f"gpu:{gpu}", "rows": own, "seconds": {}, "nbytes": {}, "peak_nbytes": peak}
        for gpu, (own, peak) in enumerate(zip(rows, peaks, strict=True))
    ]
