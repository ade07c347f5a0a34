"""One small model of each kind that fastdp trains, all used alike: train on the batch of a step, look at all state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

import fastdp

WIDTH, ROWS = 6, 12
OPTIONS: dict[str, Any] = {"on_nonfinite": "raise", "timeout": 900.0}


class Kind(ABC):
    """A model on several devices.

    Args:
        devices: how many.
        normalizes: with batch normalization, where the kind has any.
        dtype: of weights and batches.
        options: of the model.
    """

    verbs: tuple[str, ...] = ("scatter", "run", "reduce", "update", "merge")
    corruptible: tuple[str, ...] = ("scatter", "run", "reduce")

    @abstractmethod
    def __init__(self, devices: int, *, normalizes: bool = True, dtype: str = "float32", **options: Any) -> None: ...

    @abstractmethod
    def step(self, number: int) -> None:
        """Train on the batch of a step."""

    def rows(self, number: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
        """The batch of a step. A test may replace it on an object."""
        return rows_of(number, dtype)

    @abstractmethod
    def state(self) -> list[np.ndarray]:
        """Copies of weights, buffers and the optimizer's state."""

    def parts(self) -> dict[str, Any]:
        """The parts that `fastdp.Checkpoint` saves."""
        raise NotImplementedError

    @abstractmethod
    def load(self, state: list[np.ndarray]) -> None:
        """Set them to what `state` has returned."""


def rows_of(number: int, dtype: str = "float32") -> tuple[np.ndarray, np.ndarray]:
    """The batch of a step, of its own number of rows."""
    rng = np.random.default_rng(number)
    rows = ROWS - number % 3
    return rng.normal(size=(rows, WIDTH)).astype(dtype), rng.normal(size=(rows, 1)).astype(dtype)


class FunctionKind(Kind):
    """Functions of NumPy, with momentum."""

    def __init__(self, devices: int, *, normalizes: bool = True, dtype: str = "float32", **options: Any) -> None:
        from fastdp.program.functions import FunctionProgram

        def forward(parameters: Any, batch: Any) -> list[np.ndarray]:
            return [np.tanh(batch[0] @ parameters["w"]) @ parameters["v"]]

        def train(parameters: Any, batch: Any) -> tuple[float, dict[str, Any], list[np.ndarray]]:
            x, y = batch
            hidden = np.tanh(x @ parameters["w"])
            error = hidden @ parameters["v"] - y
            inner = error @ parameters["v"].T * (1 - hidden**2)
            scale = 2 / len(x)
            return float((error**2).mean()), {"w": scale * x.T @ inner, "v": scale * hidden.T @ error}, [error]

        def update(parameters: Any, slots: Any, gradients: Any) -> tuple[dict[str, Any], dict[str, Any]]:
            slots = {name: 0.9 * slots[name] + gradients[name] for name in slots}
            return {name: parameters[name] - 0.01 * slots[name] for name in slots}, slots

        rng = np.random.default_rng(0)
        start = {"w": rng.normal(size=(WIDTH, 5)).astype(dtype), "v": rng.normal(size=(5, 1)).astype(dtype)}
        self.program = FunctionProgram(start, train, update, forward, {k: np.zeros_like(v) for k, v in start.items()})
        self._dtype = dtype
        self.engine = fastdp.DataParallel(self.program, devices, **{**OPTIONS, **options})

    def step(self, number: int) -> None:
        self.engine.train(list(self.rows(number, self._dtype)))

    def state(self) -> list[np.ndarray]:
        parts = self.program.state_dict()
        return [values[name].copy() for values in parts.values() for name in sorted(values)]

    def parts(self) -> dict[str, Any]:
        return {"model": self.program}

    def load(self, state: list[np.ndarray]) -> None:
        parts, given = self.program.state_dict(), iter(state)
        self.program.load_state_dict({part: {k: next(given) for k in sorted(v)} for part, v in parts.items()})


class TorchStepKind(Kind):
    """A torch module by `train_step`, with batch normalization, dropout and Adam."""

    def __init__(self, devices: int, *, normalizes: bool = True, dtype: str = "float32", **options: Any) -> None:
        import torch
        from torch import nn

        torch.manual_seed(0)
        norm = [nn.BatchNorm1d(5)] if normalizes else []
        self.module = nn.Sequential(nn.Linear(WIDTH, 5), *norm, nn.ReLU(), nn.Dropout(0.2), nn.Linear(5, 1))
        self.module.to(getattr(torch, dtype))
        self._dtype = dtype
        self._make(devices, {**OPTIONS, "compile": None, **options})

    def _make(self, devices: int, options: dict[str, Any]) -> None:
        import torch
        from torch import nn

        self.parallel = fastdp.wrap(self.module, devices, **options)
        self.train_step = self.parallel.train_step(nn.MSELoss(), lambda p: torch.optim.Adam(p, 0.01), outputs=True)
        self.optimizer = self.train_step.optimizer

    def step(self, number: int) -> None:
        import torch

        torch.manual_seed(number)
        x, y = map(torch.from_numpy, self.rows(number, self._dtype))
        self.train_step(x, y)

    def parts(self) -> dict[str, Any]:
        return {"model": self.parallel, "step": self.train_step}

    def _tensors(self) -> list[Any]:
        slots = [value for p in self.module.parameters() for _, value in sorted(self.optimizer.state[p].items())]
        return [*self.module.state_dict().values(), *slots]

    def state(self) -> list[np.ndarray]:
        return [tensor.detach().numpy().copy() for tensor in self._tensors()]

    def load(self, state: list[np.ndarray]) -> None:
        import torch

        if len(self._tensors()) < len(state):  # Adam makes its state in the first step
            self.step(0)
        with torch.no_grad():
            for tensor, value in zip(self._tensors(), state, strict=True):
                tensor.copy_(torch.from_numpy(value))


class TorchLoopKind(TorchStepKind):
    """The same module in a loop of one's own, whose optimizer steps on the host."""

    verbs = ("scatter", "run", "reduce", "merge")
    corruptible = ("run", "reduce")  # in host memory replicas read the caller's own tensors, not what was scattered

    def _make(self, devices: int, options: dict[str, Any]) -> None:
        import torch

        self.parallel = fastdp.wrap(self.module, devices, **options)
        self.optimizer = torch.optim.Adam(self.module.parameters(), 0.01)

    def parts(self) -> dict[str, Any]:
        return {"model": self.parallel, "optimizer": self.optimizer}

    def step(self, number: int) -> None:
        import torch

        torch.manual_seed(number)
        x, y = map(torch.from_numpy, self.rows(number, self._dtype))
        self.optimizer.zero_grad()
        before = [buffer.clone() for buffer in self.module.buffers()]
        try:
            torch.nn.functional.mse_loss(self.parallel(x), y).backward()
        except (
            RuntimeError,
            SystemExit,
        ):  # a forward pass that was whole has moved the running statistics, as in plain torch
            for buffer, value in zip(self.module.buffers(), before, strict=True):
                buffer.copy_(value)
            raise
        self.optimizer.step()


class KerasKind(Kind):
    """A Keras model with batch normalization, dropout and Adam."""

    def __init__(self, devices: int, *, normalizes: bool = True, dtype: str = "float32", **options: Any) -> None:
        import keras

        keras.utils.set_random_seed(0)
        layers = keras.layers
        self.model = keras.Sequential(
            [
                keras.Input((WIDTH,), dtype=dtype),
                layers.Dense(5, dtype=dtype),
                *([layers.BatchNormalization(dtype=dtype)] if normalizes else []),
                layers.Dropout(0.2, seed=1, dtype=dtype),
                layers.Dense(1, dtype=dtype),
            ]
        )
        self.parallel = fastdp.wrap(self.model, devices, **{**OPTIONS, "compile": None, **options})
        self._dtype = dtype
        self.parallel.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])

    def step(self, number: int) -> None:
        self.parallel.train_on_batch(*self.rows(number, self._dtype))

    def _variables(self) -> list[Any]:
        return [*self.model.variables, *self.parallel.optimizer.variables]

    def state(self) -> list[np.ndarray]:
        return [variable.numpy().copy() for variable in self._variables()]

    def load(self, state: list[np.ndarray]) -> None:
        if len(self._variables()) < len(state):
            self.step(0)
        for variable, value in zip(self._variables(), state, strict=True):
            variable.assign(value)


KINDS: dict[str, type[Kind]] = {
    "functions": FunctionKind,
    "torch step": TorchStepKind,
    "torch loop": TorchLoopKind,
    "keras": KerasKind,
}
