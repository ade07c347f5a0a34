"""One torch peer: `torch_worker.py PROCESSES MODEL STEPS`, DistributedDataParallel over gloo where PROCESSES > 1.

The started process is rank 0. It starts the other ranks, which train whenever it does. Each rank has its rows
of every batch and its share of the cores. A round is the time of STEPS training steps.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from torch import nn

from bench.frameworks.cases import CASES
from bench.frameworks.ddp import WARM_UP, lead
from bench.frameworks.torch_models import BUILDERS


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


if __name__ == "__main__":
    lead(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), trainer)
