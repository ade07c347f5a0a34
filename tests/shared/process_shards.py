"""What a script trains with `shards=` under torchrun, each model on one and on two devices of a process.

    torchrun --nproc-per-node 3 process_shards.py FOLDER

writes what each process has found to FOLDER/RANK.pickle.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import fastdp

RANK, PROCESSES = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
ROWS = (13, 7, 5, 1, 11)  # fewer than shards too, and as few as one process runs whole


def rows_of(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch of a step."""
    draw = np.random.default_rng(number)
    x, y = draw.normal(size=(ROWS[number], 5)).astype("f4"), draw.integers(0, 3, ROWS[number])
    return torch.from_numpy(x), torch.from_numpy(y)


def net() -> nn.Module:
    """A module with normalization by shard, and dropout by the row of the global batch."""
    torch.manual_seed(RANK)  # the values of process 0 count
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Tanh(), nn.Dropout(0.3), nn.Linear(7, 3))


def train_step(gpus: int, shards: int) -> list[np.ndarray]:
    """Torch's train step."""
    module = net()
    parallel = fastdp.wrap(module, gpus=gpus, shards=shards, check_replicas=True)
    step = parallel.train_step(F.cross_entropy, lambda p: torch.optim.Adam(p, lr=0.05), grad_norm=True)
    torch.manual_seed(5)
    losses = [float(step(*rows_of(number))) for number in range(len(ROWS))]
    return [*(one.detach().numpy().copy() for one in module.state_dict().values()), np.array(losses)]


def loop(gpus: int, shards: int) -> list[np.ndarray]:
    """A loop of torch's own."""
    module = net()
    parallel = fastdp.wrap(module, gpus=gpus, shards=shards)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(6)
    for number in range(len(ROWS)):
        x, y = rows_of(number)
        optimizer.zero_grad()
        F.cross_entropy(parallel(x), y).backward()
        optimizer.step()
    return [one.detach().numpy().copy() for one in module.state_dict().values()]


def fit(gpus: int, shards: int) -> list[np.ndarray]:
    """Keras's `fit`, shuffled, with a ragged last batch."""
    keras.utils.set_random_seed(RANK)
    layers = keras.layers.Dense(6, "relu"), keras.layers.Dropout(0.3), keras.layers.Dense(2)
    model = keras.Sequential([keras.Input((5,)), *layers])
    parallel = fastdp.wrap(model, gpus=gpus, shards=shards)
    parallel.compile(keras.optimizers.Adam(0.05), "mse", metrics=["mae"])
    draw = np.random.default_rng(1)
    x, y = draw.normal(size=(30, 5)).astype("f4"), draw.normal(size=(30, 2)).astype("f4")
    keras.utils.set_random_seed(3)
    history = parallel.fit(x, y, 12, 2, 0).history  # the last batch has six rows
    return [*model.get_weights(), np.array([history["loss"], history["mae"]])]


def told(wrong: Callable[[], Any]) -> str:
    """How a call is refused."""
    try:
        wrong()
    except (ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing is refused"


def step_of(**options: Any) -> Any:
    """A train step, which connects the processes."""
    return fastdp.wrap(net(), **options).train_step(F.cross_entropy, lambda p: torch.optim.SGD(p, lr=0.1))


def too_few_rows() -> None:
    """Two rows: one process runs a shard, and there are three."""
    step = step_of(gpus=1, shards=3)
    x, y = rows_of(0)
    step(x[:2], y[:2])


CASES = {"train_step": train_step, "loop": loop, "fit": fit}
SHARDS = (6, 7)  # as many on each device, and one more on the first


def run(devices: tuple[int, ...]) -> dict[tuple[str, int, int], list[np.ndarray]]:
    """What each case finds, by case, devices of a process and shards."""
    torch.set_num_threads(1)
    return {
        (name, gpus, shards): case(gpus, shards)
        for name, case in CASES.items()
        for gpus in devices
        for shards in SHARDS
    }


if __name__ == "__main__":
    fastdp.set_virtual_devices(2)
    found = run((1, 2))
    refused = {
        "too few rows": told(too_few_rows),
        "too many devices": told(lambda: step_of(gpus=2, shards=5)),
        "devices that differ": told(lambda: step_of(gpus=1 + (RANK == 0), shards=8)),
    }
    (Path(sys.argv[1]) / f"{RANK}.pickle").write_bytes(pickle.dumps((found, refused)))
