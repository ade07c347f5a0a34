"""One torch peer: `torch_worker.py PROCESSES MODEL STEPS`, DistributedDataParallel over gloo where PROCESSES > 1.

The started process is rank 0. It starts the other ranks, which train whenever it does. Each rank has its rows
of every batch and its share of the cores. A round is the time of STEPS training steps.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parents[2]))

from torch import nn

from bench.frameworks.cases import CASES
from bench.frameworks.protocol import serve
from bench.frameworks.torch_models import BUILDERS

WARM_UP = 3


def trainer(rank: int, size: int, name: str, steps: int) -> tuple[Callable[[int], float], int]:
    """A function that trains a number of steps and returns their seconds, and the number of parameters."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    torch.manual_seed(0)
    case = CASES[name]
    module = BUILDERS[name]()
    parameters = sum(parameter.numel() for parameter in module.parameters())
    model = nn.parallel.DistributedDataParallel(module) if size > 1 else module
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loss_function = nn.CrossEntropyLoss()
    x, y = (torch.from_numpy(array) for array in case.data(max(steps, WARM_UP)))
    if x.ndim == 4:
        x = x.permute(0, 3, 1, 2).contiguous()
    own = case.rows // size

    def train(count: int) -> float:
        if size > 1:
            dist.barrier()
        began = time.perf_counter()
        total = torch.zeros(())
        for step in range(count):
            start = step * case.rows + rank * own
            optimizer.zero_grad()
            loss = loss_function(model(x[start : start + own]), y[start : start + own].long())
            loss.backward()
            optimizer.step()
            total += loss.detach()
        float(total)
        return time.perf_counter() - began

    return train, parameters


def follow(rank: int, size: int, store: str, name: str, steps: int) -> None:
    """Run a rank other than 0: train as many steps as rank 0 announces, until it announces 0."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    train, _ = trainer(rank, size, name, steps)
    while count := _agreed(0):
        train(count)
    dist.destroy_process_group()


def lead(size: int, name: str, steps: int) -> None:
    """Run rank 0: start the other ranks and serve the driver."""
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/store"
        others = [
            mp.get_context("spawn").Process(target=follow, args=(rank, size, store, name, steps), daemon=True)
            for rank in range(1, size)
        ]
        for other in others:
            other.start()
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=size)

        def prepare() -> tuple[Callable[[], float], dict[str, Any]]:
            train, parameters = trainer(0, size, name, steps)
            train(_agreed(WARM_UP))
            return (lambda: train(_agreed(steps))), {"parameters": parameters}

        serve(prepare)
        _agreed(0)
        for other in others:
            other.join(20)
        dist.destroy_process_group()


def _agreed(count: int) -> int:
    """Broadcast rank 0's `count` to every rank."""
    number = torch.tensor(count)
    dist.broadcast(number, 0)
    return int(number)


if __name__ == "__main__":
    lead(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
