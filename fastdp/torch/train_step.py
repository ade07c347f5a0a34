"""`TrainStep`: forward, loss, backward and update on one global batch per call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastdp.engine.data_parallel import DataParallel
from fastdp.program.torch.program import TorchProgram
from fastdp.program.torch.rows.declared import DeclaredRows


class TrainStep:
    """Trains on one global batch per call. Made by `TorchParallel.train_step`."""

    def __init__(self, engine: DataParallel[TorchProgram], scope: Callable[[], Any], declared: DeclaredRows) -> None:
        self._program = engine.program
        self._engine = engine
        self._scope = scope
        self._declared = declared

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """This step's optimizer, over the module's own parameters."""
        assert self._program.optimizers is not None
        return self._program.optimizers.first

    def __call__(self, inputs: Any, *targets: Any) -> torch.Tensor:
        """Run forward, loss, backward and update on one global batch.

        Args:
            inputs: the module's input: a tensor or array with rows first, a tuple or list of several arguments,
                or a dict of keyword arguments.
            targets: further arguments of `loss_fn` after the outputs; may be nested.

        Returns:
            The loss of the whole batch before the update, a zero-dim tensor without gradient.

        The module should be in training mode, as with plain torch. A step with random draws takes one number
        from torch's global generator, so `torch.manual_seed` makes a run repeatable.

        Raises:
            ReplicaError: a replica failed; the message names device and rows. Weights are unchanged, and the
                next call works.
            ValueError: no rows, or arrays of unequal length.
        """
        args, kwargs = _arguments(inputs)
        batch = self._program.batch(args, kwargs, targets, self._declared)
        with self._scope():
            with torch.enable_grad():
                batch = self._program.judge(batch, len(self._engine.devices))
            result = self._engine.train(batch, wants_outputs=False, reduce=self._program.reduces)
        self._program.calls += 1
        return self._program.loss(result)


def _arguments(inputs: Any) -> tuple[Sequence[Any], dict[str, Any]]:
    """Positional and keyword arguments of the module."""
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs, {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})
