"""A least-squares line as a function program, and batches for it: the small model that tests of the engine train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastdp.program.functions import FunctionProgram

# Not 5: OpenBLAS's float32 product of five columns and a vector computes on what lies on the stack (docs/log.md).
WIDTH = 6

Arrays = dict[str, Any]


def forward(parameters: Arrays, batch: list[Any]) -> np.ndarray:
    """The line at each row of the first array; on the simulated CUDA too a plain array of the host's."""
    x = batch[0].reshape(len(batch[0]), -1)
    return np.array(x @ parameters["w"] + parameters.get("b", 0), subok=False)


def train(parameters: Arrays, batch: list[Any]) -> tuple[float, Arrays, list[np.ndarray]]:
    """The mean squared error, its gradient, and the errors as outputs."""
    x = batch[0].reshape(len(batch[0]), -1)
    error = np.array(forward(parameters, batch) - batch[1], subok=False)
    gradients = {"w": 2 * x.T @ error / error.size, "b": 2 * error.sum(axis=0) / error.size}
    return float((error * error).mean()), {name: gradients[name] for name in parameters}, [error]


def predict(parameters: Arrays, batch: list[Any]) -> list[np.ndarray]:
    """The line."""
    return [forward(parameters, batch)]


def sgd(rate: float = 0.1) -> Callable[..., tuple[Arrays, Arrays]]:
    """An update without slots."""

    def update(parameters: Arrays, slots: Arrays, gradients: Arrays) -> tuple[Arrays, Arrays]:
        return {name: parameters[name] - rate * gradients[name] for name in parameters}, {}

    return update


def line(columns: int | None = 3, *, bias: bool = False, seed: int = 0) -> FunctionProgram:
    """The program: `columns` targets for each row, None for one without an axis of its own."""
    targets = () if columns is None else (columns,)
    start = {"w": np.random.default_rng(seed).normal(size=(WIDTH, *targets)).astype("float32")}
    if bias:
        start["b"] = np.zeros(targets, "float32")
    return FunctionProgram(start, train, sgd(), predict)


def rows(n: int, seed: int = 1, columns: int | None = 3) -> list[np.ndarray]:
    """A batch of `n` rows for it."""
    rng = np.random.default_rng(seed)
    targets = () if columns is None else (columns,)
    return [rng.normal(size=(n, *shape)).astype("float32") for shape in ((WIDTH,), targets)]
