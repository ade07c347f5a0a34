"""Trains torch modules by fastdp: their train steps, on GPUs or on virtual devices."""

from __future__ import annotations

import time
from typing import Any

import torch

from fastdp.api import wrap
from fastdp.benchmark.data import batches_of
from fastdp.benchmark.fastdp_report import report_of
from fastdp.benchmark.request import Prepared, Request, Round
from fastdp.benchmark.target import load
from fastdp.benchmark.ways.fastdp_form import (
    OPTIONS,
    AutoSettled,
    choose_devices,
    finish,
    free_devices,
    recorder,
    settle,
)
from fastdp.benchmark.ways.torch_training import (
    TensorBatches,
    arguments,
    autocast,
    choose_arithmetic,
    parameters_of,
    scaler_of,
)


def prepare(request: Request) -> Prepared:
    """Build and wrap the module, and train until steps run in the form asked for.

    Raises:
        NotImplementedError, RuntimeError: the mode cannot be had; the message says why.
    """
    choose_devices(request)
    choose_arithmetic(request)
    target = load(request)
    arrays = batches_of(target, request)
    parameters, batches = parameters_of(target.model), TensorBatches(arrays, request)
    target.model.train()
    began = time.perf_counter()
    parallel = wrap(target.model, gpus=request.devices, **OPTIONS[request.mode])
    step = parallel.train_step(
        target.loss,
        lambda every: target.optimizer([one for one in every if one.requires_grad]),
        reduction=target.reduction,
        scaler=scaler_of(request),
    )
    trained = 0
    loss: Any = torch.zeros(())

    def train(steps: int) -> Round:
        nonlocal trained, loss
        started = time.perf_counter()
        for number in range(trained, trained + steps):
            inputs, targets = batches(number)
            with autocast(request):  # one for each step: autocast keeps cast weights until it ends
                loss = step(inputs, *arguments(targets))
        float(loss)
        finish(parallel)
        trained += steps
        return Round(steps, time.perf_counter() - started)

    train(1)
    first = time.perf_counter() - began
    settle(request, parallel, train)

    def close() -> None:
        arrays.close()
        free_devices(request)

    return Prepared(
        train,
        {**report_of(parallel), **target.facts, "parameters": parameters, "first_step_seconds": first},
        report=lambda: {**report_of(parallel), "loss": float(loss), "trained": trained},
        settled=AutoSettled(request, parallel),
        trace=recorder(train),
        close=close,
    )
