"""Plain torch on one device: its usual loop, eager, compiled by torch.compile, or with CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastdp.benchmark.data import batches_of
from fastdp.benchmark.request import Prepared, Request
from fastdp.benchmark.target import load
from fastdp.benchmark.ways.first_step import compile_seconds, host_peak_nbytes
from fastdp.benchmark.ways.torch_training import Loop, TensorBatches, device_type, memory_of, parameters_of


def changed_by(request: Request) -> Callable[[nn.Module], Any]:
    """What the mode does to a module.

    Raises:
        NotImplementedError: torch has no such mode, or not on these devices.
    """
    if request.mode == "traced":
        raise NotImplementedError("torch has no traced training steps. Use --mode eager, compiled or graph for it.")
    if request.mode == "graph":
        if request.kind != "gpu":
            raise NotImplementedError("CUDA graphs need a GPU. Use --mode eager or compiled for torch.")
        return lambda module: torch.compile(module, mode="reduce-overhead")
    return torch.compile if request.mode == "compiled" else lambda module: module


def prepare(request: Request) -> Prepared:
    """Build the module and train its first steps.

    Raises:
        NotImplementedError: several devices, or a mode that torch does not have.
        RuntimeError: CUDA graphs were asked for, and torch.compile uses none.
    """
    if request.devices > 1:
        raise NotImplementedError(f"torch's loop trains on one device, not on {request.devices}: --compare ddp")
    change = changed_by(request)
    target = load(request)
    batches = batches_of(target, request)
    parameters = parameters_of(target.model)
    began = time.perf_counter()
    loop = Loop(request, target, TensorBatches(batches, request), change)
    loop.train(1)
    first = time.perf_counter() - began
    loop.train(2)
    facts = {**target.facts, "parameters": parameters, "first_step_seconds": first, **how(request)}
    if request.mode in ("compiled", "graph"):
        facts["compile_seconds"] = compile_seconds(first, loop.step_seconds)
    device = torch.device(device_type(request))
    return Prepared(
        loop.train,
        facts,
        report=lambda: {
            "loss": loop.loss,
            "trained": loop.trained,
            "verbs": memory_of(device, request.batch),
            "peak_host_nbytes": host_peak_nbytes(),
        },
        close=batches.close,
    )


def how(request: Request) -> dict[str, Any]:
    """How steps run, with what torch.compile left out.

    Raises:
        RuntimeError: CUDA graphs were asked for, and torch.compile uses none.
    """
    if request.mode not in ("compiled", "graph"):
        return {"how": "eager"}
    counters = torch._dynamo.utils.counters
    skipped = sum(counters["inductor"].get(key, 0) for key in ("cudagraph_skips",))
    if request.mode == "graph" and skipped:
        raise RuntimeError(f"torch.compile(mode='reduce-overhead') left out {skipped} CUDA graphs of this model")
    breaks = sum(counters["graph_break"].values())
    return {"how": request.mode, "why": f"{breaks} graph breaks" if breaks else ""}
