"""Decides which Keras optimizers may act on flat buffers, and lays their slots out for it.

An elementwise optimizer treats every element of every variable alike, so it can be applied to all variables of a dtype
as one buffer. Its slots are then laid out kind by kind (all momentums, then all velocities), each kind in the layout of
the variables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import torch

from fastdp.program.keras.foreign import Assigned

optimizers = keras.optimizers
ELEMENTWISE = (
    optimizers.SGD,
    optimizers.Adam,
    optimizers.RMSprop,
    optimizers.Adagrad,
    optimizers.Adadelta,
    optimizers.Adamax,
    optimizers.Nadam,
    optimizers.Lion,
    optimizers.Ftrl,
)
# Lists of variables in every optimizer that are not slots.
_LISTS = ("_variables", "_trainable_variables")


@dataclass(frozen=True, slots=True)
class Slot:
    """An attribute of an optimizer that holds one variable (a scalar) or one per trainable variable (a kind)."""

    owner: Any
    attribute: str
    variables: tuple[keras.Variable, ...]


@dataclass(frozen=True, slots=True)
class Slots:
    """The variables of an optimizer and of the optimizers inside it.

    `how` is "flat", or "per variable: " and the reason. `order` lists all variables as they lie in memory: kind by
    kind, then the scalars, if flat; else in the optimizer's own order.
    """

    how: str
    order: list[keras.Variable]
    kinds: list[Slot]
    scalars: list[Slot]


def optimizer_of(trainer: Any) -> Any:
    """The optimizer of a compiled model; None if it is not built yet, so that nothing can be trained."""
    optimizer = trainer.optimizer if trainer.compiled else None
    return optimizer if optimizer is not None and optimizer.built else None


def slots_of(optimizer: Any, trainable: Sequence[keras.Variable]) -> Slots:
    """How to apply a built optimizer (or None) to these variables."""
    if optimizer is None:
        return Slots("per variable: there is no optimizer", [], [], [])
    variables = list(optimizer.variables)
    why = _not_elementwise(optimizer, trainable) or why_not_now(optimizer)
    kinds: list[Slot] = []
    scalars: list[Slot] = []
    if not why:
        for owner in chain(optimizer):
            kinds += _kinds(owner, trainable)
            scalars += [Slot(owner, name, (v,)) for name, v in vars(owner).items() if isinstance(v, keras.Variable)]
        order = list({id(v): v for slot in (*kinds, *scalars) for v in slot.variables}.values())
        if sorted(map(id, order)) == sorted(map(id, variables)):
            return Slots("flat", order, kinds, scalars)
        why = f"{type(optimizer).__name__} has variables that are neither scalars nor one for each weight"
    return Slots(f"per variable: {why}", variables, [], [])


def apply_by_variable(
    optimizer: Any,
    gradients: Sequence[torch.Tensor | None],
    trainable: Sequence[keras.Variable],
    mapping: Sequence[tuple[keras.Variable, torch.Tensor]],
) -> Assigned:
    """Run Keras's own `apply` on tensors instead of variables. The tensors are updated in place.

    Returns the values of other variables that it assigns: those of optimizers inside the user's, seeds, counters.

    Args:
        gradients: gradients of the trainable variables; None for a variable without one.
        mapping: the trainable variables, then the optimizer's variables, each with its tensor.
    """
    with _UpdateScope(mapping) as scope:
        optimizer.apply(list(gradients), trainable)
    for variable, tensor in mapping:
        value = scope.get_current_value(variable)
        if value is not tensor:
            tensor.copy_(value)
    return scope.assigned()


class _UpdateScope(keras.StatelessScope):
    """A stateless scope that lends copies of all other variables, since Keras's optimizers write to values in place."""

    def __init__(self, mapping: Sequence[tuple[keras.Variable, torch.Tensor]]) -> None:
        super().__init__(state_mapping=mapping)
        self._device = next((tensor.device for _, tensor in mapping), None)
        self._lent: dict[int, tuple[keras.Variable, torch.Tensor]] = {}

    def get_current_value(self, variable: keras.Variable) -> Any:
        """Called by Keras to read a variable. The first read of one that is not in the mapping copies it."""
        value = super().get_current_value(variable)
        if value is not None or variable._value is None:
            return value
        before = variable._value.detach()
        self._lent[id(variable)] = variable, before
        self.state_mapping[id(variable)] = before.to(self._device, copy=True)
        return self.state_mapping[id(variable)]

    def add_update(self, update: tuple[keras.Variable, torch.Tensor]) -> None:
        """Called by Keras to assign a variable, which nobody may have read."""
        self.get_current_value(update[0])
        super().add_update(update)

    def assigned(self) -> Assigned:
        """The variables that were not in the mapping and have other values now, with these."""
        found = [(v, self.state_mapping[number].to(old.device), old) for number, (v, old) in self._lent.items()]
        return [(variable, value) for variable, value, old in found if not torch.equal(value, old)]


def chain(optimizer: Any) -> list[Any]:
    """The optimizer and the optimizers inside it, outermost first."""
    inner = getattr(optimizer, "inner_optimizer", None)
    return [optimizer] if inner is None else [optimizer, *chain(inner)]


def within(optimizer: Any) -> list[Any]:
    """The optimizer and all that it holds, as attributes or in lists: also those that `chain` does not go through."""
    held = [
        one for value in vars(optimizer).values() for one in (value if isinstance(value, list | tuple) else [value])
    ]
    return [optimizer, *(one for inner in held if isinstance(inner, optimizers.Optimizer) for one in within(inner))]


def why_not_now(optimizer: Any) -> str:
    """Why the current settings need an update per variable; empty if they do not. Settings may change at any time."""
    innermost = chain(optimizer)[-1]
    if innermost.clipnorm:
        return "clipnorm is a norm of each variable"
    rate = innermost._learning_rate
    if not isinstance(rate, keras.Variable | optimizers.schedules.LearningRateSchedule):
        return "the learning rate is a function of your own"
    return ""


def needs_whole(optimizer: Any) -> bool:
    """Whether an update of some elements depends on the gradients of all others: on their norm, or an infinite one."""
    wrappers = chain(optimizer)
    return len(wrappers) > 1 or bool(wrappers[-1].global_clipnorm)


def why_not_in_parts(optimizer: Any, layout: Slots) -> str:
    """Why an optimizer cannot update a part of the variables on each device, and what to do; empty if it can."""
    name = type(optimizer).__name__
    why = layout.how.partition(": ")[2] or why_not_now(optimizer)
    if why:
        return f"{name} updates variable by variable: {why}. Use {', '.join(one.__name__ for one in ELEMENTWISE)}"
    innermost = chain(optimizer)[-1]
    if innermost.global_clipnorm and innermost.gradient_accumulation_steps:
        return f"{name} clips accumulated gradients by their global norm. Leave one of the two out, or use `clipvalue`"
    return ""


def _not_elementwise(optimizer: Any, trainable: Sequence[keras.Variable]) -> str:
    """Why elements cannot all be treated alike, for reasons that cannot change later; empty if they can."""
    *wrappers, innermost = chain(optimizer)
    for one in (*wrappers, innermost):
        known = ELEMENTWISE if one is innermost else (optimizers.LossScaleOptimizer,)
        if not isinstance(one, known) or type(one).__module__.split(".")[0] != "keras":
            return f"{type(one).__name__} is not known to be elementwise"
    if any(v.constraint is not None for v in trainable):
        return "variables have constraints"
    if any(v.overwrite_with_gradient for v in trainable):
        return "variables are overwritten with their gradients"
    return ""


def _kinds(owner: Any, trainable: Sequence[keras.Variable]) -> list[Slot]:
    """The attributes that hold one variable per trainable variable, of the same shape and dtype."""

    def fits(slots: Any) -> bool:
        return len(slots) == len(trainable) > 0 and all(
            isinstance(slot, keras.Variable) and slot.shape == v.shape and slot.dtype == v.dtype
            for slot, v in zip(slots, trainable, strict=True)
        )

    lists = {k: v for k, v in vars(owner).items() if isinstance(v, list | tuple) and k not in _LISTS}
    return [Slot(owner, name, tuple(value)) for name, value in lists.items() if fits(value)]
