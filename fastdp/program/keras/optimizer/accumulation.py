"""Keras's gradient accumulation without an all-reduce in the inner steps of a cycle.

Keras adds each step's gradient to the optimizer's accumulators, which are slots that files hold. Here the gradients
of inner steps wait on their replicas instead, and are reduced once, with those of the cycle's last step. Whoever
looks at an accumulator meanwhile (a file that is written, Keras's own `apply`, a test) first gets what waits folded
into it: the accumulators' `value` sees to that. So nobody can tell the difference, but by the time it takes.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import keras
import torch

from fastdp.program.keras.optimizer.slots import chain


class Waiting:
    """The engine whose replicas hold gradients of an unfinished cycle.

    It belongs to the optimizer, as an attribute, and lives as long: the optimizer's accumulators, which are kept
    where their memory is noted (`keras_memory`), know it weakly.
    """

    def __init__(self) -> None:
        self.engine: Any = None

    def __reduce__(self) -> Any:
        """On copies of the optimizer nothing waits."""
        return Waiting, ()

    def settle(self) -> None:
        """Let the accumulators have the gradients that wait.

        Raises:
            RuntimeError: the devices are closed; the gradients are lost, and not asked for again.
        """
        engine = self.engine
        if engine is not None and engine.holds_gradients:
            try:
                engine.fold()
            except BaseException:
                self.engine = None
                raise


class Accumulator(keras.Variable):
    """One of Keras's accumulated gradients: to look at it is to get what waits on the replicas into it."""

    _waiting: weakref.ref[Waiting] | None = None

    @property
    def value(self) -> torch.Tensor:
        """The accumulated gradient, as Keras has it on one device."""
        waiting = self._waiting() if self._waiting is not None else None
        if waiting is not None and not keras.src.backend.in_stateless_scope():
            waiting.settle()
        value: torch.Tensor = super().value
        return value

    def __getstate__(self) -> dict[str, Any]:
        """A copy has the value, and nothing to do with engines."""
        return {**vars(self), "_value": self.value.detach().clone(), "_waiting": None}


class Accumulation:
    """The accumulated gradients of an optimizer, or of None.

    Args:
        optimizer: built for `trainable`. Its accumulators become `Accumulator`s: the same objects of a subclass.
    """

    def __init__(self, optimizer: Any, trainable: Sequence[keras.Variable]) -> None:
        self._optimizer = optimizer
        self._trainable = list(trainable)
        self._accumulators: list[Any] = []
        self._waiting = Waiting()
        if not self.how.startswith("on the replicas"):
            return
        self._accumulators = [optimizer._accumulated_gradients[optimizer._get_variable_index(v)] for v in trainable]
        self._waiting = vars(optimizer).setdefault("_fastdp_waiting", self._waiting)  # past Keras's tracking
        for accumulator in self._accumulators:
            accumulator.__class__ = Accumulator
            accumulator._waiting = weakref.ref(self._waiting)

    @property
    def how(self) -> str:
        """Where gradients are accumulated: "on the replicas", "all-reduced in each step: " and the reason, or ""."""
        if not getattr(self._optimizer, "gradient_accumulation_steps", None):
            return ""
        why = self._why_not()
        return f"all-reduced in each step: {why}" if why else "on the replicas, all-reduced once in a cycle"

    def _why_not(self) -> str:
        """Why each step has to hand its gradient to Keras; empty where it need not."""
        optimizer = self._optimizer
        name = type(optimizer).__name__
        if len(chain(optimizer)) > 1 or type(optimizer).__module__.split(".")[0] != "keras":
            return f"what {name} does with the gradient of an inner step is not known"
        if any(v.overwrite_with_gradient for v in self._trainable):
            return "variables are overwritten with their gradients"
        # These change the variables in inner steps too, on all replicas by the one that has the optimizer.
        if any(v.constraint is not None for v in self._trainable):
            return "variables have constraints, which hold in inner steps too"
        if optimizer.use_ema and optimizer.ema_overwrite_frequency:
            return "averages overwrite the variables in inner steps too"
        if not all(type(v) in (keras.Variable, Accumulator) for v in getattr(optimizer, "_accumulated_gradients", [])):
            return f"{name} has accumulators of its own"
        return ""

    def reduces(self, engine: Any) -> bool:
        """Whether the next step of `engine` has to reduce its gradients. On the host thread, before the step."""
        if not self._accumulators:
            return True
        if self._waiting.engine is not engine:
            self._waiting.settle()
        self._waiting.engine = engine  # before the step: whatever becomes of it, what it leaves is found
        steps = self._optimizer.gradient_accumulation_steps
        if not self.defers(engine):
            return True
        return (int(self._optimizer._iterations.value) + 1) % int(steps) == 0

    def defers(self, engine: Any) -> bool:
        """Whether gradients of `engine` stay on its replicas for the length of a cycle."""
        return bool(self._accumulators) and len(engine.devices) > 1 and self.how.startswith("on the replicas")

    def stepped(self) -> None:
        """A step has succeeded: an engine on which nothing waits is not kept alive."""
        engine = self._waiting.engine
        if engine is not None and not engine.holds_gradients:
            self._waiting.engine = None

    def settle(self) -> None:
        """Let the accumulators have what waits; the engine is not needed any more."""
        self._waiting.settle()
        self._waiting.engine = None

    def fold(self, slots: dict[int, torch.Tensor], gradients: Sequence[torch.Tensor]) -> None:
        """Add reduced gradients to a replica's accumulators, its slots by the identity of the variable."""
        scale = self._optimizer.loss_scale_factor
        with torch.no_grad():
            for accumulator, gradient in zip(self._accumulators, gradients, strict=True):
                slots[id(accumulator)].add_(gradient if scale is None else gradient / scale)
