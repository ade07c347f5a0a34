"""One way to train one of the seven models: `torch_models_worker.py WAY MODEL STEPS`, driven by `torch_models.py`.

The loops and train steps are those of the examples, so that what is measured is what is shown. A round is the time of
STEPS steps.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import fastdp
from bench.torch_model_cases import CASES, build, example
from fastdp.benchmark.request import Prepared, Round
from fastdp.benchmark.serve import serve
from fastdp.benchmark.ways.process_group import ProcessGroup

WARM_UP, PROCESSES = 3, 2
PATIENCE = 150.0  # seconds for compiled steps to be ready


def modules_of(name: str) -> tuple[nn.Module, ...]:
    """A new model's modules."""
    made = build(name)
    return made if isinstance(made, tuple) else (made,)


def loop(name: str, change: Callable[[nn.Module], Any], rows: slice = slice(None)) -> Iterator[torch.Tensor]:
    """The example's loop, on modules that `change` has wrapped, over the given rows of each batch."""
    models = tuple(change(module) for module in modules_of(name))
    batches = itertools.cycle([tuple(tensor[rows] for tensor in batch) for batch in CASES[name].batches()])
    return example(name).loop(models if len(models) > 1 else models[0], batches)


def wrapped_loop(name: str, **how: Any) -> Iterator[torch.Tensor]:
    """The example's loop on wrapped modules."""
    return loop(name, lambda module: fastdp.wrap(module, **how))


def train_steps(name: str, **how: Any) -> Iterator[torch.Tensor]:
    """The example's train steps."""
    return example(name).train_step(build(name), itertools.cycle(CASES[name].batches()), **how)


def seconds(steps: Iterator[torch.Tensor], count: int) -> float:
    """The time of `count` steps, with each loss read by the end of them."""
    began = time.perf_counter()
    losses = [next(steps) for _ in range(count)]
    float(losses[-1])
    return time.perf_counter() - began


def captured(name: str, devices: int, how: Callable[..., Iterator[torch.Tensor]]) -> Iterator[torch.Tensor]:
    """Steps of `how`, compiled by TorchInductor. Trains until every batch shape is compiled."""
    made: list[Any] = []
    wrap = fastdp.wrap

    def keep(*arguments: Any, **options: Any) -> Any:
        made.append(wrap(*arguments, **options))
        return made[-1]

    fastdp.wrap = keep
    steps = how(name, gpus=devices, compile="inductor")
    began = time.perf_counter()
    while time.perf_counter() - began < PATIENCE:
        for _ in range(8):
            next(steps)
        for parallel in made:
            parallel.wait_compiled()
        reports = [parallel.report() for parallel in made]
        if all(entry["how"] != "traced" for report in reports for entry in [*report.steps, *report.passes]):
            break
    return steps


class Rank:
    """A process of DistributedDataParallel: the example's loop on its own rows."""

    def __init__(self, name: str, rank: int) -> None:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // PROCESSES))
        own = CASES[name].rows // PROCESSES
        self._steps = loop(name, nn.parallel.DistributedDataParallel, slice(rank * own, (rank + 1) * own))

    def train(self, count: int) -> None:
        """Train so many steps, together with the other processes."""
        seconds(self._steps, count)

    def close(self) -> None:
        """Do nothing."""


def ddp(name: str) -> Prepared:
    """The example's loop under DistributedDataParallel."""
    group = ProcessGroup(PROCESSES, "gloo", functools.partial(Rank, name))
    group.train(WARM_UP)

    def train(count: int) -> Round:
        began = time.perf_counter()
        group.train(count)
        return Round(count, time.perf_counter() - began)

    return Prepared(train, {"parameters": count_parameters(name)}, close=group.close)


def count_parameters(name: str) -> int:
    """Parameters of a model."""
    return sum(parameter.numel() for module in modules_of(name) for parameter in module.parameters())


WAYS: dict[str, Callable[[str], Iterator[torch.Tensor]]] = {
    "torch": lambda name: loop(name, lambda module: module),
    "torch-compile": lambda name: loop(name, torch.compile),
    "fastdp-1-step": lambda name: train_steps(name, gpus=1, compile=None),
    "fastdp-1-loop": lambda name: wrapped_loop(name, gpus=1, compile=None),
    "fastdp-1-captured": lambda name: captured(name, 1, train_steps),
    "fastdp-1-captured-loop": lambda name: captured(name, 1, wrapped_loop),
    "fastdp-2-step": lambda name: train_steps(name, gpus=2, compile=None),
    "fastdp-2-loop": lambda name: wrapped_loop(name, gpus=2, compile=None),
    "fastdp-2-captured": lambda name: captured(name, 2, train_steps),
    "fastdp-2-captured-loop": lambda name: captured(name, 2, wrapped_loop),
}


def main(way: str, name: str, steps: int) -> None:
    """Prepare, and serve rounds."""
    if way == "ddp-2":
        serve(lambda: ddp(name))
        return
    fastdp.set_virtual_devices(2)

    def prepare() -> Prepared:
        made = WAYS[way](name)
        seconds(made, WARM_UP * len(CASES[name].batches()))  # each batch may have shapes of its own
        return Prepared(lambda count: Round(count, seconds(made, count)), {"parameters": count_parameters(name)})

    serve(prepare)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
