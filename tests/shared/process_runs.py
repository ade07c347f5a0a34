"""Scripts for torchrun: runs that go on after a process was killed, and processes that fail, differ or hang.

torchrun --nproc-per-node 3 process_runs.py NAME FOLDER
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import fastdp

RANK = int(os.environ.get("RANK", "0"))
FIRST = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
KILLED_AT = 5


def _die_at(step: int) -> None:
    """In the first start, the last process is killed."""
    if FIRST and step == KILLED_AT and int(os.environ.get("WORLD_SIZE", "0")) - 1 == RANK:
        os.kill(os.getpid(), signal.SIGKILL)


def torch_run(folder: Path, devices: int) -> dict[str, np.ndarray]:
    """A train step with dropout, in a checkpointed loop over a shuffling loader. One device per process."""
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 2)).double()
    torch.manual_seed(3)
    for tensor in module.parameters():
        nn.init.normal_(tensor)
    parallel = fastdp.wrap(module, gpus=devices, compile=None)
    step = parallel.train_step(F.mse_loss, lambda p: torch.optim.Adam(p, lr=0.01))
    draw = np.random.default_rng(0)
    rows = [(torch.tensor(draw.normal(size=4)), torch.tensor(draw.normal(size=2))) for _ in range(22)]
    loader = torch.utils.data.DataLoader(rows, batch_size=6, shuffle=True)
    with fastdp.Checkpoint(folder / "torch", model=parallel, step=step, every_steps=2) as checkpoint:
        checkpoint.restore()
        for _ in checkpoint.epochs(3):
            for x, y in checkpoint.batches(loader):
                step(x, y)
                _die_at(checkpoint.position.step)
                checkpoint.step()
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def keras_run(folder: Path, devices: int) -> dict[str, np.ndarray]:
    """A fit with callbacks that write files, and one that stops alike in all processes."""
    import keras

    from fastdp.callbacks import Checkpoint

    class Kill(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            _die_at(int(self.model.optimizer.iterations.value))

    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(6, "tanh"), keras.layers.Dropout(0.4)])
    model.add(keras.layers.Dense(2))
    parallel = fastdp.wrap(model, gpus=devices, compile=None)
    parallel.compile("adam", "mse")
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(22, 4)).astype("float32"), draw.normal(size=(22, 2)).astype("float32")
    written = folder / "keras"
    parallel.fit(
        x,
        y,
        6,
        3,
        verbose=1,
        callbacks=[
            Kill(),
            keras.callbacks.ModelCheckpoint(written / "{epoch}.keras"),
            keras.callbacks.EarlyStopping("loss", patience=5),
            Checkpoint(folder / "fit", every_steps=2),
        ],
    )
    model.save(written / "end.keras")
    return {f"weight {i}": value for i, value in enumerate(model.get_weights())}


def faults(folder: Path, devices: int) -> dict[str, Any]:
    """What processes are told when one of three fails, has another batch, or does not come."""
    module = nn.Linear(3, 1).double()
    parallel = fastdp.wrap(module, gpus=devices, timeout=2)
    wrong = False

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if wrong:
            raise KeyError("the label 7")
        return ((outputs - targets) ** 2).mean()

    step = parallel.train_step(loss, lambda p: torch.optim.SGD(p, lr=0.1), reduction="mean")
    x, y = torch.ones(7, 3).double(), torch.ones(7, 1).double()
    step(x, y)
    before = module.weight.detach().clone()
    found: dict[str, Any] = {}

    def told(name: str, x: torch.Tensor) -> None:
        began = time.monotonic()
        try:
            step(x, y)
        except (RuntimeError, ValueError) as error:
            found[name] = [type(error).__name__, str(error), time.monotonic() - began]
        assert torch.equal(module.weight, before), name

    wrong = RANK == 1
    told("failed", x)
    wrong = False
    told("other batch", x + (RANK == 2))
    found["after"] = float(step(x, y))
    if RANK == 1:
        time.sleep(9)
    else:
        before = module.weight.detach().clone()
        told("hangs", x)
    return found


if __name__ == "__main__":
    name, place, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    fastdp.set_virtual_devices(count)
    result = {"torch": torch_run, "keras": keras_run, "faults": faults}[name](place, count)
    told_all = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in result.items()}
    (place / f"{name}-{RANK}.json").write_text(json.dumps(told_all))
