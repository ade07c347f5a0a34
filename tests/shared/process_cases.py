"""What a script trains under torchrun in the tests of several processes, and alone for comparison.

    torchrun --nproc-per-node 2 process_cases.py DEVICES FOLDER

writes what each process has found to FOLDER/RANK.pickle.
"""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import fastdp

RANK = int(os.environ.get("RANK", "0"))
BATCHES = (13, 12, 3, 12, 1)  # fewer rows than devices too


def torch_data(rows: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch, the same in every process."""
    draw = np.random.default_rng(number)
    return torch.tensor(draw.normal(size=(rows, 6))), torch.tensor(draw.integers(0, 3, rows))


def net() -> nn.Sequential:
    """A module whose first weights differ from process to process: those of process 0 count."""
    torch.manual_seed(RANK)
    layers = nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.3), nn.BatchNorm1d(8, momentum=0.2), nn.Linear(8, 3)
    return nn.Sequential(*layers).double()


def found_in(module: nn.Module, **values: Any) -> dict[str, Any]:
    """Weights and other values as arrays."""
    state = {name: tensor.detach().numpy().copy() for name, tensor in module.state_dict().items()}
    return {**state, **{name: np.asarray(value, np.float64) for name, value in values.items()}}


def train_step(devices: int) -> dict[str, Any]:
    """Torch's train step: accumulation, a merged loss that is no sum over rows, several numbers."""
    module = net()
    parallel = fastdp.wrap(module, gpus=devices, sync_batch_norm=True)

    def contrast(outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        pairs = torch.logsumexp(outputs @ outputs.T, 1).mean()
        return {"loss": F.cross_entropy(outputs, targets) + 0.1 * pairs, "pairs": pairs}

    step = parallel.train_step(
        contrast, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), accumulate=2, grad_norm=True, outputs=True
    )
    torch.manual_seed(5)
    losses, outputs = [], []
    for number, rows in enumerate(BATCHES):
        if rows > 1:  # torch's batch normalization refuses one row
            losses.append(float(step(*torch_data(rows, number))))
            losses.append(float(step.result.losses["pairs"]))
            outputs.append(step.result.outputs.numpy())
    step.flush()
    after = float(torch.rand(()))  # the generator goes on alike
    return found_in(module, losses=losses, outputs=np.concatenate(outputs), after=after)


def loop(devices: int) -> dict[str, Any]:
    """A loop of torch's own, with an embedding of sparse gradients."""
    torch.manual_seed(RANK)
    module = nn.Sequential(nn.Embedding(7, 5, sparse=True), nn.Flatten(), nn.Linear(15, 2)).double()
    parallel = fastdp.wrap(module, gpus=devices)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    draw, losses = np.random.default_rng(1), []
    for rows in BATCHES:
        x, y = torch.tensor(draw.integers(0, 7, (rows, 3))), torch.tensor(draw.normal(size=(rows, 2)))
        optimizer.zero_grad()
        loss = F.mse_loss(parallel(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return found_in(module, losses=losses, end=parallel(x).detach().numpy())


def keras_fit(devices: int) -> dict[str, Any]:
    """Keras's fit, evaluate and predict: shuffled, weighted, with validation data, several metrics and a ragged end."""
    keras.utils.set_random_seed(RANK)
    L = keras.layers
    model = keras.Sequential(
        [
            keras.Input((6,)),
            L.Dense(8, "tanh"),
            L.BatchNormalization(),
            L.Dropout(0.3),
            L.Dense(3, "softmax", kernel_regularizer="l2"),
        ]
    )
    parallel = fastdp.wrap(model, gpus=devices, sync_batch_norm=True)
    top = keras.metrics.SparseTopKCategoricalAccuracy(2, name="top")
    parallel.compile(
        keras.optimizers.SGD(0.125, momentum=0.875),
        "sparse_categorical_crossentropy",
        metrics=["accuracy", top],
        weighted_metrics=["accuracy"],
    )
    draw = np.random.default_rng(0)
    x, y, weights = draw.normal(size=(51, 6)), draw.integers(0, 3, 51), draw.random(51)
    keras.utils.set_random_seed(3)
    history = parallel.fit(x, y, 16, 3, 0, sample_weight=weights, validation_split=0.2).history
    scores = parallel.evaluate(x, y, 20, 0)
    outputs = parallel.predict(x, 50, 0)  # the last batch has one row
    found = {f"weight {i}": value for i, value in enumerate(model.get_weights())}
    return {**found, "scores": np.array(scores), "outputs": outputs, **{k: np.array(v) for k, v in history.items()}}


class OwnStep(keras.Model):
    """A model with a training step of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = keras.layers.Dense(5, "tanh"), keras.layers.Dense(2)

    def call(self, x: Any) -> Any:
        return self.last(self.first(x))

    def train_step(self, data: Any) -> dict[str, Any]:
        x, y = data
        loss = keras.ops.mean((self(x, training=True) - y) ** 2)
        self.zero_grad()
        loss.backward()
        with torch.no_grad():
            weights = self.trainable_weights
            self.optimizer.apply([w.value.grad for w in weights], weights)
        return {"loss": loss}


def own_step(devices: int) -> dict[str, Any]:
    """A Keras model's own training step, whose layers' calls are split."""
    keras.utils.set_random_seed(RANK)
    model = OwnStep()
    model(np.zeros((1, 4)))
    parallel = fastdp.wrap(model, gpus=devices)
    parallel.compile(keras.optimizers.SGD(0.125))
    draw = np.random.default_rng(2)
    x, y = draw.normal(size=(22, 4)), draw.normal(size=(22, 2))
    history = parallel.fit(x, y, 10, 2, 0, shuffle=False).history
    return {**{f"weight {i}": v for i, v in enumerate(model.get_weights())}, "loss": np.array(history["loss"])}


def halves(devices: int) -> dict[str, Any]:
    """One step with gradients that travel as bfloat16, in fp32 and several buckets' worth of numbers."""
    torch.manual_seed(RANK)
    module = nn.Linear(700, 500)
    several = {"grad_dtype": "bfloat16"} if "RANK" in os.environ else {}
    parallel = fastdp.wrap(module, gpus=devices, check_replicas=True, **several)
    step = parallel.train_step(F.mse_loss, lambda p: torch.optim.SGD(p, lr=1.0))
    before = found_in(module)  # by now those of process 0
    draw = torch.Generator().manual_seed(1)
    step(torch.randn(9, 700, generator=draw), torch.randn(9, 500, generator=draw))
    return {name: before[name] - value for name, value in found_in(module).items()}


def shards(devices: int) -> dict[str, Any]:
    """Steps of six shards in float32: of all rows, of fewer rows than shards, and of rows that one process runs."""
    torch.set_num_threads(1)
    module = net().float()
    parallel = fastdp.wrap(module, gpus=devices, shards=6, check_replicas=True, sync_batch_norm=True)
    step = parallel.train_step(F.cross_entropy, lambda p: torch.optim.Adam(p, lr=0.05), reduction="mean")
    torch.manual_seed(5)
    losses = []
    for number, rows in enumerate((13, 5, 2, 12)):
        x, y = torch_data(rows, number)
        losses.append(float(step(x.float(), y)))
    return {**found_in(module), "losses": np.array(losses)}


CASES = {
    "train_step": train_step,
    "loop": loop,
    "keras_fit": keras_fit,
    "own_step": own_step,
    "halves": halves,
    "shards": shards,
}


def run(devices: int, names: list[str]) -> dict[str, dict[str, Any]]:
    """What the cases find on so many devices of this process."""
    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        return {name: CASES[name](devices) for name in names}
    finally:
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(policy)


if __name__ == "__main__":
    count, folder = int(sys.argv[1]), Path(sys.argv[2])
    fastdp.set_virtual_devices(count)
    (folder / f"{RANK}.pickle").write_bytes(pickle.dumps(run(count, sys.argv[3:] or list(CASES))))
