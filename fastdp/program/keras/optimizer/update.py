"""The update of a replica: Keras's optimizer on flat buffers or variable by variable, as its settings allow."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from operator import attrgetter
from typing import Any

import keras

from fastdp.buffers import Memory
from fastdp.program.base import Totals
from fastdp.program.keras.foreign import Assigned
from fastdp.program.keras.optimizer.flat import FlatUpdate
from fastdp.program.keras.optimizer.sharded import SlotParts, release
from fastdp.program.keras.optimizer.slots import (
    apply_by_variable,
    needs_whole,
    slots_of,
    why_not_in_parts,
    why_not_now,
    within,
)
from fastdp.program.keras.random.step_draws import StepDraws
from fastdp.program.keras.variables import ReplicaState
from fastdp.program.keras.weight_hooks import has_hooks
from fastdp.runtime.queue import QueueDevice

_CONSTRAINT = attrgetter("_constraint")


class OptimizerUpdate:
    """Applies an optimizer to replicas.

    Args:
        optimizer: the user's optimizer, built for `trainable`, or None.
        trainable: the variables that it trains, the first ones of a replica.
        draws: the random generators of a step. An optimizer of the user's may draw.
        in_parts: each device keeps the slots of its part of the variables, and updates these.

    Attributes:
        slots: the optimizer's variables, in the order in which they lie in memory. In parts, the scalars alone.
        in_parts: whether each device updates a part.

    Raises:
        ValueError: the optimizer cannot update parts.
    """

    def __init__(
        self, optimizer: Any, trainable: Sequence[keras.Variable], draws: StepDraws, *, in_parts: bool = False
    ) -> None:
        self._optimizer = optimizer
        self._trainable = list(trainable)
        self._draws = draws
        self._layout = slots_of(optimizer, trainable)
        self._optimizers = [] if optimizer is None else within(optimizer)
        self.in_parts = in_parts and optimizer is not None and bool(trainable)
        self._parts: SlotParts | None = None
        self.slots = self._layout.order
        if self.in_parts:
            self.check()
            self.slots = [v for slot in self._layout.scalars for v in slot.variables]
        else:
            release(self.slots)

    def check(self) -> None:
        """Check that the optimizer can update parts, as its settings are now, if it has to.

        Raises:
            ValueError: it cannot.
        """
        why = why_not_in_parts(self._optimizer, self._layout) if self.in_parts else ""
        if self.in_parts and has_hooks(self._trainable):
            why = "weights have hooks (register_hook), which see whole gradients"
        if self.in_parts and self._is_constrained:
            why = why or "variables have constraints"
        if why:
            raise ValueError(
                "`shard_optimizer` needs an optimizer that treats all elements of all variables alike, and "
                f"{why}; or leave `shard_optimizer` out."
            )

    @property
    def needs_whole(self) -> bool:
        """Whether each device needs the gradients of all variables, though it updates a part of them."""
        return self.in_parts and needs_whole(self._optimizer)

    def claim(self) -> None:
        """Take the values of slots back that somebody has read since the last step. Between steps."""
        if self._parts is not None:
            self._parts.claim()

    @property
    def how(self) -> str:
        """How the optimizer is applied: "flat", to all variables as one, or "per variable: " and the reason."""
        why = why_not_now(self._optimizer) if self._layout.how == "flat" else ""
        why = why or ("variables have constraints" if self._is_constrained and self._layout.how == "flat" else "")
        if self.in_parts:
            return "flat, in parts: each device its own"
        return f"per variable: {why}" if why else self._layout.how

    @property
    def is_flat(self) -> bool:
        """Whether the optimizer is applied to all variables as one."""
        if self._layout.how != "flat":
            return False
        return self.in_parts or not (why_not_now(self._optimizer) or self._is_constrained)

    @property
    def _is_constrained(self) -> bool:
        """Whether variables have constraints now: a script may set them at any time."""
        return any(map(_CONSTRAINT, self._trainable))

    @property
    def is_reliable(self) -> bool:
        """Whether all optimizers, learning rates and constraints are Keras's own."""
        rates = (getattr(one, "_learning_rate", None) for one in self._optimizers)
        parts = [*self._optimizers, *rates, *(v.constraint for v in self._trainable)]
        return all(part is None or type(part).__module__.startswith("keras.") for part in parts)

    def flat(self, memory: Memory, device: QueueDevice, rank: int) -> FlatUpdate | None:
        """The update of a replica's flat buffers; None if the optimizer acts on each variable.

        A replica without slots gets its variables from another one.
        """
        if self.in_parts:
            if rank == 0:
                self._parts = SlotParts(self._layout.kinds, memory.gradients, memory.ranks)
            assert self._parts is not None
            memory.parts = self._parts.make(rank, device)
            return FlatUpdate(self._optimizer, self._layout, self._trainable, memory, self._parts, rank)
        is_flat = bool(memory.slots.specs) and self._layout.how == "flat"
        return FlatUpdate(self._optimizer, self._layout, self._trainable, memory) if is_flat else None

    def rehearse(self, state: ReplicaState) -> bool:
        """Try the optimizer on copies, if it acts on flat buffers; whether it does."""
        if state.flat_update is None or not self.is_flat:
            return False
        state.flat_update.rehearse()
        return True

    def apply(self, state: ReplicaState, unused: frozenset[int], totals: Totals) -> Assigned:
        """Update a replica's variables and slots from its gradients, in place. Under `torch.no_grad`.

        Returns the values of variables that the optimizer has assigned beside them.

        Args:
            unused: numbers of the variables without a gradient.
            totals: of the step.
        """
        if state.flat_update is not None and self.is_flat:
            state.flat_update.apply(unused, totals.reduced, totals.work_stealing)
            return ()
        # Before the last step of a cycle Keras gets zeros, so that gradients accumulated on the replicas do not count
        # twice.
        given = state.gradients if totals.reduced else [g.new_zeros(()).expand_as(g) for g in state.gradients]
        gradients = [None if i in unused else g for i, g in enumerate(given)]
        values = state.variables[: len(self._trainable)]
        mapping = [*zip(self._trainable, values, strict=True), *zip(self.slots, state.slots, strict=True)]
        with nullcontext() if self.is_reliable else self._draws.during_update():
            return apply_by_variable(self._optimizer, gradients, self._trainable, mapping)
