"""Trains Keras models by fastdp: the steps of `fit`, on GPUs or virtual devices."""

from __future__ import annotations

import math
import time
from typing import Any

from fastdp.api import wrap
from fastdp.benchmark.data import batches_of
from fastdp.benchmark.fastdp_report import report_of
from fastdp.benchmark.request import Prepared, Request, Round
from fastdp.benchmark.target import load
from fastdp.runtime.select import set_virtual_devices

# The arguments of `fastdp.wrap` for each mode.
OPTIONS: dict[str, dict[str, Any]] = {
    "auto": {"compile": "auto", "graph": "auto"},
    "eager": {"compile": None, "graph": None},
    "traced": {"compile": "trace", "graph": None},
    "compiled": {"compile": "inductor", "graph": None},
    "graph": {"compile": "inductor", "graph": "auto"},
}
COMPILE_SECONDS = 600.0


def prepare(request: Request) -> Prepared:
    """Build and wrap the model, train the first step, and wait for the compiler."""
    target = load(request)
    batches = batches_of(target, request)
    if request.kind != "gpu":
        set_virtual_devices(request.devices, kind="host")
    parallel = wrap(target.model, gpus=request.devices, **OPTIONS[request.mode])
    parallel.compile(target.optimizer, target.loss)
    trained = 0

    def train(steps: int) -> Round:
        nonlocal trained
        began = time.perf_counter()
        for number in range(trained, trained + steps):
            loss = parallel.train_on_batch(*batches(number))
        float(loss)
        trained += steps
        return Round(steps, time.perf_counter() - began)

    first = train(1).seconds
    train(2)
    parallel.wait_compiled(COMPILE_SECONDS)
    facts = {
        **target.facts,
        "parameters": sum(math.prod(variable.shape) for variable in target.model.trainable_variables),
        "first_step_seconds": first,
    }
    return Prepared(
        train,
        {**report_of(parallel), **facts},
        report=lambda: report_of(parallel),
        settled=lambda: not parallel.compiling,
        close=batches.close,
    )
