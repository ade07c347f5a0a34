"""Keras's gradient accumulation without an all-reduce in the inner steps of a cycle.

Keras adds each step's gradient to the optimizer's accumulators, which are slots that are saved to files. Here the
gradients of inner steps stay on their replicas and are reduced once, together with those of the cycle's last step.
Reading an accumulator in between (to write a file, in Keras's own `apply`, in a test) first folds the pending gradients
into it; its property `value` does that. So only the time taken differs from Keras.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import keras
import torch

from fastdp.program.keras.optimizer.slots import chain
from fastdp.program.keras.weight_hooks import has_hooks
from fastdp.runtime.queue import QueueDevice


class Engine(Protocol):
    """An engine, as far as gradients on its replicas go (`fastdp.engine.data_parallel.DataParallel`)."""

    devices: list[QueueDevice]

    @property
    def holds_gradients(self) -> bool:
        """Whether gradients of earlier steps wait on the replicas."""

    def fold(self) -> None:
        """Reduce them, and let the program take them over into its slots."""


class Waiting:
    """The engine whose replicas hold gradients of an unfinished cycle.

    It is an attribute of the optimizer and lives as long. The optimizer's accumulators, which are kept alive by the
    record of their memory (`AdoptedVariables`), have only a weak reference to it.
    """

    def __init__(self) -> None:
        self.engine: Engine | None = None

    def __reduce__(self) -> Any:
        """Copies of the optimizer have no pending gradients."""
        return Waiting, ()

    def settle(self) -> None:
        """Fold the pending gradients into the accumulators.

        Raises:
            RuntimeError: the devices are closed. The gradients are lost, and later calls do not raise again.
        """
        engine = self.engine
        if engine is not None and engine.holds_gradients:
            try:
                engine.fold()
            except BaseException:
                self.engine = None
                raise


class Accumulator(keras.Variable):
    """One of Keras's accumulated gradients. Reading it first folds in the gradients pending on the replicas."""

    _waiting: weakref.ref[Waiting] | None = None

    @property
    def value(self) -> torch.Tensor:
        """The accumulated gradient, equal to Keras's on one device."""
        waiting = self._waiting() if self._waiting is not None else None
        if waiting is not None and not keras.src.backend.in_stateless_scope():
            waiting.settle()
        value: torch.Tensor = super().value
        return value

    def __getstate__(self) -> dict[str, Any]:
        """A copy holds the value and no reference to an engine."""
        return {**vars(self), "_value": self.value.detach().clone(), "_waiting": None}


class Accumulation:
    """The accumulated gradients of an optimizer.

    Args:
        optimizer: built for `trainable`, or None. Its accumulators become `Accumulator`s: the objects stay the same,
            their class changes.
    """

    def __init__(self, optimizer: Any, trainable: Sequence[keras.Variable]) -> None:
        self._optimizer = optimizer
        self._trainable = list(trainable)
        self._accumulators: list[Any] = []
        self._waiting = Waiting()
        if not self.how.startswith("on the replicas"):
            return
        self._accumulators = [optimizer._accumulated_gradients[optimizer._get_variable_index(v)] for v in trainable]
        self._waiting = vars(optimizer).setdefault("_fastdp_waiting", self._waiting)  # bypasses Keras's tracking
        for accumulator in self._accumulators:
            if not isinstance(accumulator, Accumulator):
                accumulator.__class__ = Accumulator
            accumulator._waiting = weakref.ref(self._waiting)

    @property
    def how(self) -> str:
        """Where gradients accumulate: "on the replicas", "all-reduced in each step: " and the reason, or "" (none)."""
        if not getattr(self._optimizer, "gradient_accumulation_steps", None):
            return ""
        why = self._why_not()
        return f"all-reduced in each step: {why}" if why else "on the replicas, all-reduced once in a cycle"

    def _why_not(self) -> str:
        """Why each step must pass its gradient to Keras; empty if it need not."""
        optimizer = self._optimizer
        name = type(optimizer).__name__
        if len(chain(optimizer)) > 1 or type(optimizer).__module__.split(".")[0] != "keras":
            return f"what {name} does with the gradient of an inner step is not known"
        if any(v.overwrite_with_gradient for v in self._trainable):
            return "variables are overwritten with their gradients"
        if has_hooks(self._trainable):
            return "weights have hooks, which run in inner steps too"
        # Constraints and EMA change the variables in inner steps too, on all replicas from the one with the optimizer.
        if any(v.constraint is not None for v in self._trainable):
            return "variables have constraints, which hold in inner steps too"
        if optimizer.use_ema and optimizer.ema_overwrite_frequency:
            return "averages overwrite the variables in inner steps too"
        accumulators = getattr(optimizer, "_accumulated_gradients", [])
        if not all(type(v) is keras.Variable or isinstance(v, Accumulator) for v in accumulators):
            return f"{name} has accumulators of its own"
        return ""

    def reduces(self, engine: Engine) -> bool:
        """Whether the next step of `engine` must reduce its gradients. Called on the host thread, before the step."""
        if not self._accumulators:
            return True
        if self._waiting.engine is not engine:
            self._waiting.settle()
        self._waiting.engine = engine  # set before the step, so that its gradients are found even if it fails
        steps = self._optimizer.gradient_accumulation_steps
        if not self.defers(engine):
            return True
        return (int(self._optimizer._iterations.value) + 1) % int(steps) == 0

    def defers(self, engine: Engine) -> bool:
        """Whether gradients of `engine` stay on its replicas during a cycle."""
        return bool(self._accumulators) and len(engine.devices) > 1 and self.how.startswith("on the replicas")

    def stepped(self) -> None:
        """Called after a successful step: releases an engine without pending gradients."""
        engine = self._waiting.engine
        if engine is not None and not engine.holds_gradients:
            self._waiting.engine = None

    def settle(self) -> None:
        """Fold the pending gradients into the accumulators, and release the engine."""
        self._waiting.settle()
        self._waiting.engine = None

    def fold(self, slots: dict[int, torch.Tensor], gradients: Sequence[torch.Tensor]) -> None:
        """Add reduced gradients to a replica's accumulators. `slots` maps ids of variables to the replica's slots."""
        scale = self._optimizer.loss_scale_factor
        with torch.no_grad():
            for accumulator, gradient in zip(self._accumulators, gradients, strict=True):
                slots[id(accumulator)].add_(gradient if scale is None else gradient / scale)
