"""The units of a model's forward pass (calls of layers and operations), as they are tried and merged.

A unit is one call, identified by its operation and the number of earlier calls of that operation in the same pass. A
trial records the inputs and outputs of each unit (`Recorder`). A unit that mixes the rows of the batch runs on merged
inputs (`Merged`): each replica gathers the rows of all replicas, runs the unit as one device would, and keeps its own
rows of each output that has rows. The gather is differentiable: its backward sums the gradients of a row from all
replicas' losses. So weights, draws, losses and variables inside are those of one device, and each device computes the
unit for the whole batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import keras
import torch

from fastdp.comm.context import Context
from fastdp.errors import NotCapturable
from fastdp.program.keras.batch import pack_like
from fastdp.program.keras.replica import ReplicaContext, running
from fastdp.shard import Rows
from fastdp.tensors import collectives
from fastdp.tensors.row_effects import Layout, NotByRowsError

# An operation's id, and the number of its call in a forward pass.
Unit = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Plan:
    """How to run a unit on merged inputs.

    Args:
        operation: the operation that is called.
        name: its title in messages.
        inputs: layouts of its input tensors, in the order of `keras.tree.flatten`.
        outputs: layouts of its output tensors, likewise. A replica keeps its rows of an output with a row axis, and the
            whole of any other output.
    """

    operation: Any
    name: str
    inputs: tuple[Layout, ...]
    outputs: tuple[Layout, ...]


@dataclass(slots=True)
class Call:
    """A unit as a trial saw it. `written` are the variables that it assigns, `losses` the terms that it adds."""

    unit: Unit
    operation: Any
    args: Any
    kwargs: Any
    outputs: Any = None
    written: set[int] = field(default_factory=set)
    losses: set[int] = field(default_factory=set)

    @property
    def given(self) -> list[torch.Tensor]:
        """The tensors among its arguments."""
        return tensors_in((self.args, self.kwargs))

    @property
    def made(self) -> list[torch.Tensor]:
        """The tensors among its outputs."""
        return tensors_in(self.outputs)


class Recorder:
    """Records the units of one trial.

    Args:
        plans: the plans of the units that run on merged inputs.
        whole: the calls of the trial with all rows, whose inputs are the merged inputs; None in that trial itself.
    """

    def __init__(self, plans: dict[Unit, Plan] | None = None, whole: dict[Unit, Call] | None = None) -> None:
        self.calls: dict[Unit, Call] = {}  # in the order in which they ended: inner calls first
        self.losses: list[Any] = []  # the layer of each loss
        self.failed: Call | None = None  # the innermost call that failed
        self._plans, self._whole = plans or {}, whole
        self._met: Counter[int] = Counter()
        self._open: list[Call] = []
        self._inside = False

    def call(self, run: Callable[..., Any], operation: Any, args: Any, kwargs: Any, state: ReplicaContext) -> Any:
        """Run a unit and record it."""
        unit = _next_unit(self._met, operation)
        if self._inside:
            return run(operation, *args, **kwargs)
        call = Call(unit, operation, args, kwargs)
        plan = self._plans.get(unit) if self._whole is not None else None
        self._open.append(call)
        try:
            if plan is None:
                call.outputs = run(operation, *args, **kwargs)
            else:
                call.outputs = self._merged(plan, run, call, state)
        except BaseException:
            self.failed = self.failed or call
            raise
        finally:
            self._open.pop()
        self.calls[unit] = call
        return call.outputs

    def _merged(self, plan: Plan, run: Callable[..., Any], call: Call, state: ReplicaContext) -> Any:
        """Run a unit on the inputs that it had in the trial with all rows."""
        assert self._whole is not None
        whole, rows = self._whole[call.unit], state.context.rows
        self._inside = True
        try:
            with as_one_device(state):
                return own_rows(run(call.operation, *whole.args, **whole.kwargs), plan, rows)
        finally:
            self._inside = False

    def added(self, layer: Any) -> None:
        """Record which layer added a loss. An activity regularizer adds its loss after the layer's unit has ended."""
        if any(call.operation is layer for call in self._open):
            self._open[-1].losses.add(len(self.losses))
        self.losses.append(layer)

    def wrote(self, variable: int) -> None:
        """Record that the current unit assigns a variable."""
        if self._open:
            self._open[-1].written.add(variable)


class Merged:
    """Runs some units of one forward pass of a replica on merged inputs.

    Args:
        plans: the plans of these units.
        calls: the number of calls of each operation in a pass, by the operation's id.
    """

    def __init__(self, plans: dict[Unit, Plan], calls: dict[int, int]) -> None:
        self._plans, self._calls = plans, calls
        self._met: Counter[int] = Counter()
        self._inside = False

    def call(self, run: Callable[..., Any], operation: Any, args: Any, kwargs: Any, state: ReplicaContext) -> Any:
        """Run a unit, on merged inputs if it has a plan."""
        if id(operation) not in self._calls:
            return run(operation, *args, **kwargs)
        unit = _next_unit(self._met, operation)
        if unit[1] >= self._calls[unit[0]]:
            raise NotByRowsError(
                f"{operation.name!r} mixes the rows of the batch, and is called more often in a step than when fastdp "
                "tried the model: in compute_loss, or again in backward (RematScope). Such a call cannot be merged. "
                "Use gpus=[0]."
            )
        plan = self._plans.get(unit)
        if plan is None or self._inside or state.context.size == 1:
            return run(operation, *args, **kwargs)
        if state.draws is not None:
            raise NotCapturable(f"{plan.name}, which runs on the merged inputs of all replicas")
        context = state.context
        args, kwargs = gathered((args, kwargs), plan, context)
        self._inside = True
        try:
            with as_one_device(state):
                return own_rows(run(operation, *args, **kwargs), plan, context.rows)
        finally:
            self._inside = False

    def added(self, layer: Any) -> None:
        """Do nothing."""


def _next_unit(met: Counter[int], operation: Any) -> Unit:
    """The unit of this call of the operation; counts the call."""
    met[id(operation)] += 1
    return id(operation), met[id(operation)] - 1


def tensors_in(nest: Any) -> list[torch.Tensor]:
    """The tensors of a nest."""
    return [leaf for leaf in keras.tree.flatten(nest) if isinstance(leaf, torch.Tensor)]


def with_tensors(nest: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """The nest with its tensors replaced by `tensors`."""
    rest = iter(tensors)
    leaves = [next(rest) if isinstance(leaf, torch.Tensor) else leaf for leaf in keras.tree.flatten(nest)]
    return pack_like(nest, leaves)


@contextmanager
def as_one_device(state: ReplicaContext) -> Iterator[None]:
    """Inside this context the replica has all rows and is the only one."""
    context = state.context
    total = context.rows.total
    state.context = replace(context, rows=Rows(0, total, total), size=1)
    try:
        yield
    finally:
        state.context = context


# Gathering rows, and taking a replica's rows.


def gathered(nest: Any, plan: Plan, context: Context) -> Any:
    """Arguments with the rows of all replicas."""
    given = zip(tensors_in(nest), plan.inputs, strict=True)
    whole = [x if layout.axis is None else _gather(x, layout, context, plan.name) for x, layout in given]
    return with_tensors(nest, whole)


def _gather(tensor: torch.Tensor, layout: Layout, context: Context, name: str) -> torch.Tensor:
    """A tensor with the rows of all replicas, and with its Keras mask. `name` is that of the layer that gets it."""
    assert layout.axis is not None
    whole = collectives.gathered(tensor, layout.axis, context, f"the inputs of {name}")
    mask = getattr(tensor, "_keras_mask", None)
    if mask is not None:
        whole._keras_mask = torch.cat(
            context.exchange(mask, ("the masks of the inputs of", name)), min(layout.axis, mask.ndim - 1)
        )
    return whole


def own_rows(outputs: Any, plan: Plan, rows: Rows) -> Any:
    """From outputs for all rows, take the replica's rows of those that have rows and the whole of the others.

    Raises:
        NotByRowsError: the number or the shape of the outputs differs from the trial.
    """
    made = tensors_in(outputs)
    if len(made) != len(plan.outputs):
        raise NotByRowsError(
            f"{plan.name} returns a different number of outputs than when fastdp tried it. Use gpus=[0]."
        )
    kept = []
    for tensor, layout in zip(made, plan.outputs, strict=True):
        axis = layout.axis
        if axis is None:
            kept.append(tensor)
            continue
        if tensor.ndim <= axis or tensor.shape[axis] % rows.total or not tensor.shape[axis]:
            raise NotByRowsError(
                f"{plan.name} returns shape {tuple(tensor.shape)} for {rows.total} rows, but fastdp expected the rows "
                f"on axis {axis}: the shape depends on values. Use gpus=[0]."
            )
        own = own_part(tensor, axis, rows)
        mask = getattr(tensor, "_keras_mask", None)
        if mask is not None:
            own._keras_mask = own_part(mask, min(axis, mask.ndim - 1), rows)
        kept.append(own)
    return with_tensors(outputs, kept)


def own_part(tensor: torch.Tensor, axis: int, rows: Rows) -> torch.Tensor:
    """The replica's rows of a tensor for all rows. A row may have several entries along the axis."""
    per_row = tensor.shape[axis] // rows.total
    return tensor.narrow(axis, per_row * rows.start, per_row * rows.count)


# Patches of Keras's functions.


def call_of_unit(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Operation.__call__`, which calls layers and single operations, so that the replica's units control it."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = running()
        if state is None or state.units is None:
            return original(self, *args, **kwargs)
        return state.units.call(original, self, args, kwargs, state)

    return __call__


def loss_of_unit(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Layer.add_loss` to record which layer added the loss, also for the replica's units."""

    def add_loss(self: Any, loss: Any) -> None:
        state = running()
        if state is not None:
            for term in keras.tree.flatten(loss):
                state.added_by[id(term)] = self
                if state.units is not None:
                    state.units.added(self)
        original(self, loss)

    return add_loss
