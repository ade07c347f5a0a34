"""`fastdp.wrap`: runs any Keras model or torch module on several devices."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any, Protocol, overload

from fastdp.options import Options

if TYPE_CHECKING:
    import torch

    from fastdp.keras.parallel_model import ParallelModel
    from fastdp.torch.parallel_module import TorchParallel

# By library of the model's class: the function that wraps such models. Keras comes first, since on the torch backend
# its layers are torch modules too.
_WRAPPERS = {"keras": ("fastdp.keras.wrap", "wrap_keras"), "torch": ("fastdp.torch.wrap", "wrap_torch")}


class _KerasModel(Protocol):
    """A `keras.Model` as type checkers recognize it: by methods that a torch.nn.Module lacks.

    The class's name does not work. Keras ships no types for mypy, which would accept every torch module as a
    `keras.Model`. Pyright would accept a `keras.Model` as a torch module, since its base class depends on the backend.
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
    shards: int | None = None,
    on_nonfinite: str | None = None,
    fingerprint: str | os.PathLike[str] | None = None,
    grad_dtype: str | None = None,
    shard_optimizer: bool = False,
    augment: Any = None,
    on_oom: str = "raise",
    on_device_loss: str = "raise",
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
    rows: dict[str, Any] | None = None,
    shards: int | None = None,
    on_nonfinite: str | None = None,
    fingerprint: str | os.PathLike[str] | None = None,
    grad_dtype: str | None = None,
    shard_optimizer: bool = False,
    augment: Any = None,
    on_oom: str = "raise",
    on_device_loss: str = "raise",
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
    rows: str | dict[str, Any] | None = None,
    shards: int | None = None,
    on_nonfinite: str | None = None,
    fingerprint: str | os.PathLike[str] | None = None,
    grad_dtype: str | None = None,
    shard_optimizer: bool = False,
    augment: Any = None,
    on_oom: str = "raise",
    on_device_loss: str = "raise",
) -> ParallelModel | TorchParallel:
    """Run a model on several devices as if on one.

    Each device gets a replica of the model. A training step splits the batch by rows, runs the replicas in parallel,
    all-reduces their gradients, applies the same update to all replicas, and merges the outputs in row order.

    Args:
        model: a built `keras.Model` (on the torch backend) or a `torch.nn.Module`.
        gpus: the number of devices, a list of their ordinals, or None for all. One device is allowed. The first
            device in the list gets the first rows of a batch, and so on. After `fastdp.set_virtual_devices(n)` the
            devices are virtual ones. "auto" means all, and without a GPU one device on the CPU, so that one script runs
            on any machine; a line on the error stream says so once.
        cpu_merge: True merges outputs in host memory. False merges them on a GPU and leaves them there.
        cpu_relocation: keep a Keras model's own weights in host memory. On GPUs, every weight is copied there after
            each update, and the first GPU gets a replica like the others. On virtual devices the weights are in host
            memory in any case. The weights of a torch module stay on the first GPU, with a warning.
        merge_device: the index in `gpus` of the device that merges outputs when `cpu_merge=False`.
        sync_batch_norm: compute batch statistics over the global batch instead of over each replica's rows.
        compile: how training steps run: those of a Keras model, whose own `compile(jit_compile=...)` overrides it, and
            those of `train_step` of a torch module, and its calls without gradients. Others run eagerly.

            - None: eagerly.
            - "trace": traced once per batch shape, then run without the model's Python code. A step is traced again
              when something that it read in Python changes. Values that your code gets from files, the clock or objects
              of C libraries stay fixed until the next call of `compile`, or the next `train_step` of a torch module.
            - "inductor": traced, and compiled by TorchInductor in a separate process (needs a C++ compiler). Traced
              steps run until the compiled step is ready.
            - "auto": traced, and later compiled, after a batch shape has been trained for about as long as each of
              these takes. Compiled steps are kept only where they are faster. A Keras model with custom layers or
              losses runs eagerly, and so does a torch module whose code prints, writes files or reads a clock.

            The first steps of a torch module's captured form also run eagerly; if the numbers differ, steps go on
            eagerly. `report()` says how each batch shape runs, and why.
        graph: whether captured steps become CUDA graphs. A step that cannot be recorded runs as it was captured, with a
            warning that says why.

            - None: no graphs.
            - "auto": on GPUs, each replica records its forward and backward pass once per batch shape (four shapes at
              most). The recording is cut where a bucket of gradients is complete. All-reduces run between the graphs,
              and the update after them. Elsewhere nothing is recorded.
            - "step": as "auto", with the all-reduces inside. Each GPU's forward and backward pass and its collectives
              form one graph, which its worker launches once. Steps with accumulated gradients, with fewer rows than
              devices or with a loss of the merged outputs run as under "auto"; `report()` says so. NCCL's
              communicators for the graphs take extra memory. Where virtual GPUs share a card, set
              CUDA_DEVICE_MAX_CONNECTIONS to four times their number.
            - "bucket": same as "auto", but also warns where there is nothing to record.
        update: where the optimizer runs. "each" runs it on every device. "first" runs it on the first device and copies
            the new weights to the others, which is faster where devices outnumber the cores that they share. Results
            are the same, unless an optimizer of your own keeps something in Python, such as a count of its calls, since
            "each" calls it once per device. None means "each" on GPUs for Keras's own optimizers, schedules and
            constraints, and "first" for yours and elsewhere. The optimizer of a torch module always runs on the first
            device.
        deterministic: make results repeat bit for bit between runs on one machine with the same devices and cores.
            Steps are slower. They use torch's deterministic algorithms; an operation without one is an error. No
            decision depends on timing: "auto" traces the second step of a batch shape and compiles none, and under
            "inductor" that step waits for the compiler. Gradients are reduced by algorithms that depend on sizes alone;
            otherwise the choice is measured once for the GPUs of a machine and kept (`fastdp devices --measure`), and
            results repeat for as long as it is. GPUs need the environment variable CUBLAS_WORKSPACE_CONFIG,
            which is set here if torch has not used a GPU yet.
        timeout: seconds before a step is given up. It does not apply to one virtual device: its steps run on the
            calling thread, so no thread is left to give them up.
        check_replicas: verify after each step that all replicas are bitwise equal. Slow; for debugging. Replicas of a
            torch module get the weights anew in each step: there is nothing to verify.
        rows: what to do about layers of a Keras model that mix the rows of a batch, such as a mean over the batch or a
            running average of it. A device sees only its own rows. fastdp detects such layers by running the model on
            a few rows before the first step.

            - None: raise an error that names the layer. A model whose outputs could not be merged by rows (logits of
              shape (batch, batch)) runs as under "merge", with a warning.
            - "merge": every device runs such a layer on the rows of all devices, which gives the result of one device.
              If the model's own `call` mixes rows, the model runs on one device, with a warning.
            - "replica": each device uses its own rows only, as in Keras 2, with a warning.

            For a torch module, a dict that says where rows are, by the names of forward's parameters, of outputs and of
            targets: `{"hx": 1, "mask": "same", "output[1]": 1}`. Values are the number of an axis, "same" for what all
            rows share, and for outputs also "sum", "mean" or `fastdp.mean_over`; `{"buffer:peak": "max"}` is for a
            buffer. By default rows are along the first axis of inputs, or where a trial on a few rows finds them, and
            the trial tells what outputs are. `fastdp.rows(tensor, axis)` and `fastdp.same(tensor)` mark single tensors.
        shards: cut every global batch into this many parts, whatever the number of devices, and make everything that
            is summed, drawn or normalized depend on them instead of on the devices. Then 1, 2, 3 or 8 devices of one
            kind give the same weights, losses and metrics to the last bit, and a run may go on from its checkpoint on
            fewer or more devices. At least the number of devices; at most 8 on GPUs. A device runs its shards one
            after the other. Gradients are added in one fixed binary tree over the shards. It includes
            `deterministic=True`, and each shard has its own weights and gradients: a device needs the memory of as
            many replicas as it has shards. A batch of fewer rows than shards has a shard for each row. None: one
            replica for each device.
        on_nonfinite: what to do when the loss or the gradient of the global batch has a NaN or an infinite number.

            - None: nothing, as in plain Keras and torch.
            - "raise": the step is an error (a `ReplicaError` that is also a FloatingPointError). It names the device,
              its rows, and the parameters; weights, optimizer and statistics are as before the step.
            - "skip": the step changes nothing, as if its batch had not come, and training goes on. The first one is a
              warning; `step.result.skipped` tells of each, and Keras's metrics leave it out. In a loop of your own,
              `loss.backward()` leaves no gradient, so torch's optimizers leave the parameters as they are; running
              statistics have moved, as in plain torch.

            Each update then waits for its gradient, also on GPUs. With loss scaling (a `scaler`, or Keras's
            `LossScaleOptimizer`) it does nothing: infinite gradients are a part of it, and the scaler skips them.
        fingerprint: append hashes of the batch, losses, gradients and weights of each training step to this file, by
            which `fastdp verify A B` finds the first step where two runs part. A run that goes on from a checkpoint
            goes on in its file. The environment variable FASTDP_FINGERPRINT does the same for a whole process. Hashing
            takes about a second per GB.
        grad_dtype: how gradients of float32 and float64 travel between devices (virtual ones, so far) and between the
            processes of torchrun: None, as they are; "bfloat16" or "float16", half as many bytes for float32. Each
            gradient is rounded once, they are added in float32 in the order of the devices (with `shards`, in their
            tree), and the sum is rounded once: a number is wrong by at most 1/127 ("float16": 1/1023, and 3e-8 for each
            device) of the sum of the devices' magnitudes. With several processes that is so for the sum of each process
            and again for that of all. Beyond 65504 "float16" is an error, or infinite under loss scaling.
        shard_optimizer: let each device update its part of the weights, and keep the optimizer's slots of that part
            alone: their memory is divided by the number of devices. Gradients are reduced and scattered, and the new
            weights gathered. Weights, losses and files are to the last bit those of one optimizer (weights of 16 bits
            may be rounded otherwise where a part ends), so a run may go on from its file on another number of devices,
            or without this. For Keras models with SGD, Adam, AdamW, RMSprop, Adagrad, Adadelta, Adamax, Nadam, Lion or
            Ftrl; others, `clipnorm` and constraints are an error. Not for a `train_step` of the model's own.
            `v.value.grad` is not left behind. Whoever reads a slot has it whole on the first
            device until the next step.

            For the train steps of torch modules each parameter belongs to one device, which steps it and has the
            optimizer's state of it; a device is given parameters until all have about as many elements. `state_dict()`
            is whole at any time. For torch.optim's optimizers without a closure; others, and hooks on their steps, are
            an error, as is `loss.backward()` of a loop of your own.
        augment: what stands between the data and the model, and runs on each device on its rows, with draws by the row
            of the global batch: 1, 2, 3 and 8 devices get the same augmented batch. Images stay uint8 until they are
            there.

            - For a Keras model a layer, a list of layers, a `keras.layers.Pipeline`, a `keras.Sequential`, or a
              `fastdp.data.Augment`, which also says which targets move along. `fit` and `train_on_batch` augment;
              `evaluate`, `predict` and a call of the model run the same layers with `training=False`, so they take
              the same data. The model's files have none of these layers.
            - For a torch module an nn.Module (such as torchvision's transforms) or a function of the module's first
              argument, run in training mode alone: as a forward pre-hook of the module, which each `wrap` sets anew.
        on_oom: what to do when a device runs out of memory in a forward or backward pass.

            - "raise": the step is an error (a `ReplicaError`), and nothing has changed.
            - "split": the step is repeated with the rows of that device in two parts, four, and so on down to one row.
              They run one after the other. Gradients, losses, draws and outputs are those of the global batch as
              before, up to rounding. The parts stay for later steps; a warning and `report()` tell. Each part has
              weights and gradients of its own, so memory is saved where activations take more. In a loop of your own
              backward computes the parts of such a device again; where backward itself runs out of memory, the forward
              pass is repeated, if that is exact. What is computed from all rows of a device (batch
              normalization without `sync_batch_norm`) cannot be split, and the error says so; nor can the memory of
              `scatter`, `reduce` and `update`, which does not depend on the rows. With `shards` the shard of the device
              is cut, and its sum is rounded in another way: the bits are those of a run with the same cut at that step.
        on_device_loss: what to do when a device is lost.

            - "raise": the step is an error (a `ReplicaError`), and nothing has changed.
            - "continue": the other devices take its rows, and the step is repeated from the state before it. With
              `shards` not even the bits change; otherwise results are those of the remaining devices, up to rounding.
              The device is closed, and a warning and `report()` tell. If it answers again, it joins at the next epoch
              of `fit`, or when you call `rejoin_devices()`. This works for virtual devices. An error that costs a GPU
              costs its process: `fastdp run --restarts` starts that again, on the GPUs that are left.
            - "continue_stalled": the same, and a virtual device that does not end a step within `timeout` counts as
              lost, unless it is the first one.

            With `shard_optimizer` the others take over the slots of a lost virtual device, whose memory is the
            process's. A Keras model then copies weights and slots before each update.

    Returns:
        For a Keras model a `fastdp.ParallelModel`, a `keras.Model` that shares the model's weights. For a torch module
        a `fastdp.torch.TorchParallel`.

    Raises:
        ValueError: `gpus` is invalid, or the model cannot be replicated. The message says what to do.
        TypeError: `model` is neither a `keras.Model` nor a `torch.nn.Module`, or `augment` is of no known kind.
        ImportError: the model's library is not installed.

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
        shards=shards,
        on_nonfinite=on_nonfinite,
        fingerprint=fingerprint,
        grad_dtype=grad_dtype,
        shard_optimizer=shard_optimizer,
        augment=augment,
        on_oom=on_oom,
        on_device_loss=on_device_loss,
    )
    libraries = {cls.__module__.split(".")[0] for cls in type(model).__mro__}
    for library, (module, function) in _WRAPPERS.items():
        if library in libraries:
            return getattr(importlib.import_module(module), function)(model, gpus, options)
    if type(model).__module__.split(".")[0] == "fastdp" and hasattr(model, "module"):
        raise ValueError("`model` is parallel already. Wrap its module: model.module")
    raise TypeError(
        "`model` must be a keras.Model or a torch.nn.Module. "
        f"Received: {model!r} (of type {type(model).__name__}). For a program of NumPy or CuPy functions, make a "
        "fastdp.FunctionProgram and run it by fastdp.DataParallel."
    )
