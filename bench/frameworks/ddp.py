"""DistributedDataParallel in processes of its own over gloo: the started process is rank 0 and serves the driver."""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastdp.benchmark.request import Prepared, Round
from fastdp.benchmark.serve import serve

WARM_UP = 3
Train = Callable[[int], float]
MakeTrainer = Callable[[int, int, str, int], tuple[Train, int]]


def lead(size: int, name: str, steps: int, make_trainer: MakeTrainer) -> None:
    """Run rank 0: start the other ranks, which train whenever it does, and serve the driver.

    Args:
        size: the number of processes.
        name: the model.
        steps: steps of a round.
        make_trainer: `make_trainer(rank, size, name, steps)`, a function of a module, returns a function that trains a
            number of steps and returns their seconds, and the number of parameters.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/store"
        others = [
            mp.get_context("spawn").Process(
                target=_follow, args=(rank, size, store, name, steps, make_trainer), daemon=True
            )
            for rank in range(1, size)
        ]
        for other in others:
            other.start()
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=size)

        def prepare() -> Prepared:
            train, parameters = make_trainer(0, size, name, steps)
            train(_agreed(WARM_UP))
            return Prepared(lambda count: Round(count, train(_agreed(count))), {"parameters": parameters})

        serve(prepare)
        _agreed(0)
        for other in others:
            other.join(20)
        dist.destroy_process_group()


def _follow(rank: int, size: int, store: str, name: str, steps: int, make_trainer: MakeTrainer) -> None:
    """Run a rank other than 0: train as many steps as rank 0 announces, until it announces 0."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    train, _ = make_trainer(rank, size, name, steps)
    while count := _agreed(0):
        train(count)
    dist.destroy_process_group()


def _agreed(count: int) -> int:
    """Broadcast rank 0's `count` to every rank."""
    number = torch.tensor(count)
    dist.broadcast(number, 0)
    return int(number)
