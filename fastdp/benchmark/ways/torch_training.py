"""The training loop of torch as a measured way: precision, data, loss, update, and waiting until all is done."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fastdp.benchmark.data import Batches
from fastdp.benchmark.request import Request, Round
from fastdp.benchmark.target import Target

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_arithmetic(request: Request) -> None:
    """Let float32 be float32 on GPUs: torch's convolutions use TF32 unless told otherwise."""
    if request.precision == "float32" and request.kind == "gpu":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def autocast(request: Request) -> contextlib.AbstractContextManager[Any]:
    """The context of forward and loss: mixed precision, where it is asked for."""
    if request.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device_type(request), dtype=DTYPES[request.precision])


def device_type(request: Request) -> str:
    """torch's word for the devices of a request."""
    return "cuda" if request.kind == "gpu" else "cpu"


def scaler_of(request: Request) -> torch.amp.GradScaler | None:
    """A scaler of losses for float16, whose gradients would underflow; None for other precisions."""
    return torch.amp.GradScaler(device_type(request)) if request.precision == "fp16" else None


class TensorBatches:
    """Global batches as tensors in host memory. Each array is converted once, and pinned where there is a GPU.

    Args:
        batches: the arrays.
        request: what they are for.
    """

    def __init__(self, batches: Batches, request: Request) -> None:
        self._batches, self._pins = batches, request.kind == "gpu"
        self._known: dict[int, tuple[Any, Any]] = {}  # by the identity of the batch, which is kept

    def __call__(self, number: int) -> Any:
        """The batch of a number: (inputs, targets)."""
        batch = self._batches(number)
        known = self._known.get(id(batch))
        if known is not None and known[0] is batch:
            return known[1]
        made = pytree.tree_map(self._tensor, batch)
        if len(self._known) < MOST_KEPT:
            self._known[id(batch)] = batch, made
        return made

    def _tensor(self, value: Any) -> Any:
        """An array as a tensor."""
        if not hasattr(value, "shape"):
            return value
        tensor = torch.as_tensor(value)
        return tensor.pin_memory() if self._pins and tensor.device.type == "cpu" else tensor


MOST_KEPT = 8


def call(module: Callable[..., Any], inputs: Any) -> Any:
    """Call a module with its inputs: a tuple or list of arguments, a dict of arguments by name, or one argument."""
    if isinstance(inputs, dict):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, (tuple, list)) else module(inputs)


def losses_of(loss: Callable[..., Any], outputs: Any, targets: Any) -> torch.Tensor:
    """The loss to train on: what the function returns for outputs and targets, or the first or "loss" of several."""
    found = loss(outputs, *arguments(targets))
    if isinstance(found, dict):
        found = found["loss"]
    return found[0] if isinstance(found, (tuple, list)) else found


def arguments(targets: Any) -> tuple[Any, ...]:
    """The arguments of a loss after the outputs."""
    if targets is None:
        return ()
    return tuple(targets) if isinstance(targets, (tuple, list)) else (targets,)


class Loop:
    """torch's usual loop on one device.

    Args:
        request: precision, device and data.
        target: the model with its loss and optimizer. Its module moves to the device.
        batches: the global batches in host memory, or this process's rows of them.
        change: turns the module into the one that is called: compiled, or in DistributedDataParallel.

    Attributes:
        loss: the latest loss.
        trained: steps so far.
        step_seconds: the time per step of each round.
    """

    def __init__(
        self,
        request: Request,
        target: Target,
        batches: TensorBatches,
        change: Callable[[nn.Module], Any] = lambda module: module,
        device: torch.device | None = None,
    ) -> None:
        choose_arithmetic(request)
        self._request, self._target, self._batches = request, target, batches
        self._device = device or torch.device(device_type(request))
        self._plain = target.model.to(self._device).train()
        self._module = change(self._plain)
        self._optimizer = target.optimizer([one for one in self._plain.parameters() if one.requires_grad])
        self._scaler = scaler_of(request)
        self.trained, self._loss = 0, torch.zeros(())
        self.step_seconds: list[float] = []

    @property
    def loss(self) -> float:
        """The latest loss."""
        return float(self._loss)

    def train(self, steps: int) -> Round:
        """Train `steps` steps, and wait until all are done."""
        began = time.perf_counter()
        for number in range(self.trained, self.trained + steps):
            self._loss = self._step(*self._batches(number))
        float(self._loss)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the update comes after the loss
        seconds = time.perf_counter() - began
        self.trained += steps
        self.step_seconds.append(seconds / steps)
        return Round(steps, seconds)

    def _step(self, inputs: Any, targets: Any) -> torch.Tensor:
        """Forward, backward and update."""
        inputs, targets = pytree.tree_map_only(
            torch.Tensor, lambda tensor: tensor.to(self._device, non_blocking=True), (inputs, targets)
        )
        self._optimizer.zero_grad(set_to_none=True)
        with autocast(self._request):
            loss = losses_of(self._target.loss, call(self._module, inputs), targets)
        if self._scaler is None:
            loss.backward()
            self._optimizer.step()
        else:
            self._scaler.scale(loss).backward()
            self._scaler.step(self._optimizer)
            self._scaler.update()
        return loss.detach()


def parameters_of(module: nn.Module) -> int:
    """How many numbers of a module are trained."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def memory_of(device: torch.device, rows: int) -> list[dict[str, Any]]:
    """The device with its peak memory, as `Prepared.report` tells of devices. torch does not time verbs."""
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return [{"device": str(device), "rows": rows, "seconds": {}, "nbytes": {}, "peak_nbytes": peak}]
