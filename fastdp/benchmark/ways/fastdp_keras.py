"""Trains Keras models by fastdp: their `fit`, on GPUs or on virtual devices."""

from __future__ import annotations

import time

from fastdp.api import wrap
from fastdp.benchmark.data import batches_of
from fastdp.benchmark.fastdp_report import report_of
from fastdp.benchmark.request import Prepared, Request
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
from fastdp.benchmark.ways.keras_training import Fit, choose_arithmetic, facts_of


def prepare(request: Request) -> Prepared:
    """Build, wrap and compile the model, and train until steps run in the form asked for.

    Raises:
        NotImplementedError, RuntimeError: the mode cannot be had; the message says why.
    """
    choose_devices(request)
    choose_arithmetic(request)
    target = load(request)
    batches = batches_of(target, request)
    if not target.model.built:  # a subclassed model, which Keras builds on its first batch
        target.model(batches(0)[0])
    began = time.perf_counter()
    parallel = wrap(target.model, gpus=request.devices, **OPTIONS[request.mode])
    parallel.compile(target.optimizer, target.loss, loss_weights=target.loss_weights)
    fit = Fit(parallel, batches, lambda: finish(parallel))
    fit.train(1)
    first = time.perf_counter() - began
    settle(request, parallel, fit.train)

    def close() -> None:
        batches.close()
        free_devices(request)

    return Prepared(
        fit.train,
        {**report_of(parallel), **facts_of(target, first)},
        report=lambda: {**report_of(parallel), "loss": fit.loss, "trained": fit.trained},
        settled=AutoSettled(request, parallel),
        trace=recorder(fit.train),
        close=close,
    )
