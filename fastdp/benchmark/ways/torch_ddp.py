"""DistributedDataParallel of torch: one process per device, over NCCL on GPUs and over gloo on the CPU."""

from __future__ import annotations

import functools
import os
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fastdp.benchmark.data import batches_of
from fastdp.benchmark.request import Prepared, Request, Round
from fastdp.benchmark.target import load
from fastdp.benchmark.ways.first_step import compile_seconds, host_peak_nbytes
from fastdp.benchmark.ways.process_group import ProcessGroup
from fastdp.benchmark.ways.torch_loop import changed_by, how
from fastdp.benchmark.ways.torch_training import Loop, TensorBatches, memory_of, parameters_of


def prepare(request: Request) -> Prepared:
    """Start the processes, build the module in each, and train its first steps. This process is rank 0.

    Raises:
        NotImplementedError: a mode that DistributedDataParallel does not have.
        ValueError: rows that cannot be dealt evenly, or fewer GPUs.
    """
    _check(request)
    backend = "nccl" if request.kind == "gpu" else "gloo"
    group = ProcessGroup(request.devices, backend, functools.partial(Rank, request))
    step_seconds: list[float] = []

    def train(steps: int) -> Round:
        began = time.perf_counter()
        group.train(steps)
        seconds = time.perf_counter() - began
        step_seconds.append(seconds / steps)
        return Round(steps, seconds)

    try:
        train(1)
        first = time.perf_counter() - group.own.began
        train(2)
        facts = {**group.own.facts, "first_step_seconds": first, **how(request)}
    except BaseException:
        group.close()
        raise
    if request.mode == "compiled":
        facts["compile_seconds"] = compile_seconds(first, step_seconds)
    return Prepared(train, facts, report=group.own.report, close=group.close)


def _check(request: Request) -> None:
    """Refuse what DistributedDataParallel cannot do."""
    if request.mode == "graph":
        raise NotImplementedError(
            "CUDA graphs of a module in DistributedDataParallel: its all-reduces are hooks outside of them. Use --mode "
            "eager or compiled for ddp."
        )
    changed_by(request)
    if request.batch % request.devices:
        raise ValueError(
            f"`batch` must be a multiple of the {request.devices} processes of DistributedDataParallel: only then is "
            f"the mean of their means that of the batch. Received: batch={request.batch}"
        )
    if request.kind == "gpu" and torch.cuda.device_count() < request.devices:
        raise ValueError(f"`devices`: torch finds {torch.cuda.device_count()} GPUs. Received: {request.devices}")


class Rank:
    """One process of the group: its rows of each batch, on its own device.

    Attributes:
        facts: of the model.
        began: when the module was built.
    """

    def __init__(self, request: Request, rank: int) -> None:
        on_gpu = request.kind == "gpu"
        self._request, self._rows, self._loss = request, request.batch // request.devices, 0.0
        self._device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
        if not on_gpu:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // request.devices))
        target = load(request)
        self._arrays = batches_of(target, request, part=slice(rank * self._rows, (rank + 1) * self._rows))
        self.facts = {**target.facts, "parameters": parameters_of(target.model)}
        self.began = time.perf_counter()
        change = changed_by(request)

        def wrapped(module: nn.Module) -> Any:
            return change(nn.parallel.DistributedDataParallel(module, device_ids=[rank] if on_gpu else None))

        self._loop = Loop(request, target, TensorBatches(self._arrays, request), wrapped, self._device)

    def train(self, steps: int) -> None:
        """Train so many steps, together with the other processes."""
        self._loop.train(steps)
        loss = torch.tensor(self._loop.loss, device=self._device) / self._request.devices
        dist.all_reduce(loss)
        self._loss = float(loss)

    def report(self) -> dict[str, Any]:
        """What `Prepared.report` tells: the loss of the whole batch, and the memory of this process alone."""
        told = {"loss": self._loss, "trained": self._loop.trained, "peak_host_nbytes": host_peak_nbytes()}
        return {**told, "verbs": memory_of(self._device, self._rows)}

    def close(self) -> None:
        """Release the data."""
        self._arrays.close()
