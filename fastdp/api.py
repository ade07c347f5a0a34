"""`fastdp.wrap`: runs any Keras model or torch module on several devices."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Protocol, overload

from fastdp.options import Options

if TYPE_CHECKING:
    import torch

    from fastdp.keras.parallel_model import ParallelModel
    from fastdp.torch.parallel_module import TorchParallel

# The library that a model's class comes from, and the function that wraps such models. Keras's layers are
# torch modules too on the torch backend, and are looked for first.
_WRAPPERS = {"keras": ("fastdp.keras.wrap", "wrap_keras"), "torch": ("fastdp.torch.wrap", "wrap_torch")}


class _KerasModel(Protocol):
    """A `keras.Model`, for type checkers, by methods that a torch.nn.Module lacks.

    Not by its name. Keras ships no types for mypy, which takes every module of torch for a `keras.Model` then. Pyright
    in turn takes a `keras.Model` for a module of torch, since its base class depends on the backend.
    """

    def get_compile_config(self) -> Any: ...

    def compile_from_config(self, config: Any, /) -> Any: ...


@overload
def wrap(
    model: _KerasModel,
    gpus: Any = None,
    *,
    cpu_merge: bool = True,
    cpu_relocation: bool = False,
    merge_device: int = 0,
    sync_batch_norm: bool = False,
    compile: str | None = "auto",
    graph: str | None = "auto",
    update: str | None = None,
    deterministic: bool = False,
    timeout: float = 1800.0,
    check_replicas: bool = False,
    rows: str | None = None,
) -> ParallelModel: ...
@overload
def wrap(
    model: torch.nn.Module,
    gpus: Any = None,
    *,
    cpu_merge: bool = True,
    cpu_relocation: bool = False,
    merge_device: int = 0,
    sync_batch_norm: bool = False,
    compile: str | None = "auto",
    graph: str | None = "auto",
    update: str | None = None,
    deterministic: bool = False,
    timeout: float = 1800.0,
    check_replicas: bool = False,
    rows: None = None,
) -> TorchParallel: ...
def wrap(
    model: Any,
    gpus: Any = None,
    *,
    cpu_merge: bool = True,
    cpu_relocation: bool = False,
    merge_device: int = 0,
    sync_batch_norm: bool = False,
    compile: str | None = "auto",
    graph: str | None = "auto",
    update: str | None = None,
    deterministic: bool = False,
    timeout: float = 1800.0,
    check_replicas: bool = False,
    rows: str | None = None,
) -> ParallelModel | TorchParallel:
    """Run a model on several devices as if on one.

    Args:
        model: a built `keras.Model` (on the torch backend) or a `torch.nn.Module`.
        gpus: how many devices, a list of their ordinals, or None for all. One device is fine. The order of a
            list is the order of the rows. With `fastdp.set_virtual_devices(n)` these are virtual devices.
        cpu_merge: merge outputs in host memory (default), or merge them on a GPU and leave them there.
        cpu_relocation: keep a Keras model's own weights in host memory: on GPUs they follow after each update, by a
            copy of all of them, and the first GPU has a replica like the others. On virtual devices they are there
            anyway. A torch module's stay with the first GPU, which a warning says.
        merge_device: the place in `gpus` of the device that merges with `cpu_merge=False`.
        sync_batch_norm: normalize by the global batch instead of each replica's rows.
        compile: how the steps of a Keras model run. None: eagerly. "trace": captured once per batch shape, and
            run without Keras's Python; captured anew when something that it has read in Python changes. What code of
            yours gets from files, the clock or objects of C libraries is fixed until `compile`. "inductor": that, and
            compiled by TorchInductor (needs a C++ compiler) in a process of its own; traced steps go on until the
            compiled one is there. "auto": traced and compiled once a batch shape has been trained for about as long
            as each takes, and compiled steps are kept where they are faster; a model with layers or losses of your own
            runs eagerly. Keras's `compile(jit_compile=...)` overrides it.
        graph: whether captured steps of a Keras model become CUDA graphs. "auto": on GPUs the forward and backward pass
            is recorded once per batch shape (of four shapes at most) and replica, cut where a bucket of gradients is
            complete, with the all-reduces between the graphs and the update after them; elsewhere there is nothing to
            record. None: no graphs. A step that cannot be recorded runs as it is captured, and a warning says why.
            "step": as "auto", and the all-reduces are in the graphs too: each GPU's whole forward and backward pass
            and its collectives are one graph, which its worker launches once. Steps that the graphs are not for
            (accumulated gradients, fewer rows than devices, a loss of the merged outputs) run as with "auto";
            `report()` says so. It takes more memory, for NCCL's communicators of the graphs. Virtual GPUs that share a
            card want CUDA_DEVICE_MAX_CONNECTIONS set to four for each. "bucket" is another name of "auto"; under it a
            warning says where there is nothing to record.
        update: "first" applies the optimizer on the first device and copies the new weights to the others: faster
            where devices outnumber the cores that they share. "each" applies it on every device. The results are
            the same. None: "each" on GPUs, "first" elsewhere.
        deterministic: results repeat bit for bit, from run to run on one machine with the same devices and cores.
            Torch's deterministic algorithms are used while a step runs; an operation that has none is an error.
            Nothing goes by the clock: "auto" traces the second step of a batch shape and compiles none, and with
            "inductor" that step waits for the compiler. Slower. On GPUs the environment variable
            CUBLAS_WORKSPACE_CONFIG has to be set, which is done here if torch has not used a GPU yet.
        timeout: seconds that one step may take before it is given up. On one virtual device a step runs on the
            thread that asks for it, and nobody is left to give it up.
        check_replicas: verify after each step that all replicas are bitwise equal (slow; for debugging).
        rows: what to do about layers of a Keras model that mix the rows of a batch (a mean over the batch, averages
            that a layer keeps of it), where each device has its own rows only. fastdp tries the model on some rows
            before its first step, and finds them. "merge": such a layer runs on the rows of all devices, on each of
            them, and gives what one device gives; where the model's own `call` mixes, the model runs on one device, and
            a warning says so. "replica": each device goes by its own rows, as in Keras 2, which a warning says. None:
            an error that names the layer; but a model whose outputs could not be put together otherwise (logits of
            shape (batch, batch)) is merged, with a warning.

    Returns:
        For a Keras model a `keras.Model` that shares its weights; for a module a `fastdp.torch.TorchParallel`.

    Raises:
        ValueError: anything wrong with `gpus`, or a model that cannot be replicated; the message has the remedy.
        TypeError: `model` is of another kind.
        ImportError: the model's library is missing.

    Example:
        >>> fastdp.set_virtual_devices(8)  # doctest: +SKIP
        >>> parallel = fastdp.wrap(model, gpus=8)  # doctest: +SKIP
        >>> parallel.compile("adam", "mse")  # doctest: +SKIP
        >>> parallel.fit(x, y, batch_size=256)  # doctest: +SKIP
    """
    options = Options(
        cpu_merge=cpu_merge,
        cpu_relocation=cpu_relocation,
        merge_device=merge_device,
        sync_batch_norm=sync_batch_norm,
        compile=compile,
        graph=graph,
        update=update,
        deterministic=deterministic,
        timeout=timeout,
        check_replicas=check_replicas,
        rows=rows,
    )
    libraries = {cls.__module__.split(".")[0] for cls in type(model).__mro__}
    for library, (module, function) in _WRAPPERS.items():
        if library in libraries:
            return getattr(importlib.import_module(module), function)(model, gpus, options)
    raise TypeError(
        "`model` must be a keras.Model or a torch.nn.Module. "
        f"Received: {model!r} (of type {type(model).__name__}). For a program of NumPy or CuPy functions, make a "
        "fastdp.FunctionProgram and run it by fastdp.DataParallel."
    )
