"""`FunctionProgram`: a model written as NumPy or CuPy functions with gradients of one's own.

The functions take and return plain arrays. They must be pure: they only read their arguments, and the engine
copies their results into the replica's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdp.buffers import Allocator, ArraySpec, FlatBuffers, Home, Memory
from fastdp.comm.context import Context
from fastdp.program.base import Program, Result, Totals
from fastdp.runtime.queue import QueueDevice

Arrays = dict[str, np.ndarray]


@dataclass(slots=True)
class _State:
    parameters: Arrays
    slots: Arrays
    gradients: Arrays


class FunctionProgram(Program):
    """A model as three functions over named arrays.

    Args:
        parameters: initial values by name, NumPy's or CuPy's arrays; copied. `program.parameters` holds the trained
            values.
        train: `train(parameters, batch) -> (loss, gradients, outputs)`: the **mean** loss over the rows of
            `batch` (a list of arrays), its gradients by parameter name, and a list of output arrays with
            the batch's rows.
        update: `update(parameters, slots, gradients) -> (parameters, slots)`, from the gradient of the
            global batch's mean loss; returns new values by name (omitted ones keep their value).
        predict: `predict(parameters, batch) -> outputs`.
        slots: initial values of the optimizer's state by name; copied.

    Replicas weight their loss and gradient by their share of the rows, so the sum over replicas is the
    mean over the global batch for any split. This requires that the loss is a sum of one term per row,
    divided by the number of rows.

    Example:
        >>> program = FunctionProgram({"w": np.zeros(3)}, train, update, predict)  # doctest: +SKIP
        >>> engine = DataParallel(program, devices)  # doctest: +SKIP
    """

    def __init__(
        self,
        parameters: Mapping[str, np.ndarray],
        train: Callable[..., Any],
        update: Callable[..., Any],
        predict: Callable[..., Any],
        slots: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self._train, self._update, self._predict = train, update, predict
        self._initial = {name: _on_host(value) for name, value in parameters.items()}
        self._initial_slots = {name: _on_host(value) for name, value in (slots or {}).items()}
        self.gradients: Sequence[ArraySpec] = _specs(self._initial)
        self.slots: Sequence[ArraySpec] = _specs(self._initial_slots)
        self.parameters: Arrays = dict(self._initial)
        self._device: Allocator | None = None
        self._home: Home | None = None
        self._home_slots: FlatBuffers | None = None
        self._changed = False

    def set_parameters(self, values: Mapping[str, np.ndarray]) -> None:
        """Overwrite parameters by name, from NumPy's or CuPy's arrays; all replicas follow at the next step.

        Raises:
            KeyError: an unknown name.
            ValueError: a shape that cannot be broadcast to the parameter's.
        """
        unknown = sorted(set(values) - set(self.parameters))
        if unknown:
            raise KeyError(f"`values` has unknown parameters {unknown}. Expected: {sorted(self.parameters)}")
        for name, value in values.items():
            old = self.parameters[name]
            new = np.empty(old.shape, old.dtype)
            new[...] = _on_host(value)
            if self._device is None:
                old[...] = new
            else:
                self._device.copy(old, new)
        self._changed = True

    def state_dict(self) -> dict[str, Arrays]:
        """Copies of the parameters and slots by name, in host memory: `{"parameters": ..., "slots": ...}`."""
        slots = self._initial_slots if self._home_slots is None else _named(self._home_slots)
        parts = {"parameters": self.parameters, "slots": slots}
        return {part: {name: np.array(_on_host(one)) for name, one in values.items()} for part, values in parts.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Overwrite parameters and slots by what `state_dict` has returned; all replicas follow at the next step.

        Raises:
            KeyError: it has other names than this program. Nothing has changed.
            ValueError: a shape that cannot be broadcast to the own one.
        """
        own = self.state_dict()
        for part, values in own.items():
            if set(state[part]) != set(values):
                raise KeyError(f"`state` has the {part} {sorted(state[part])}. Expected: {sorted(values)}")
        for name, value in state["slots"].items():
            old = own["slots"][name]
            old[...] = value
            if self._home_slots is None or self._device is None:
                self._initial_slots[name] = old
            else:
                self._device.copy(_named(self._home_slots)[name], old)
        self.set_parameters(state["parameters"])

    # Members of Program.

    def home(self, device: Allocator) -> Home:
        """The first replica's memory; `parameters` become views of it."""
        if self._home is None:
            self._home = Home(self.gradients, device)
            self._device = device
            for view, (name, value) in zip(self._home.variables.views, self._initial.items(), strict=True):
                device.copy(view, value)
                self.parameters[name] = view
        return self._home

    def home_slots(self, device: Allocator) -> FlatBuffers:
        """The first replica's slots. Like the parameters, all engines on this home share them."""
        if self._home_slots is None:
            self._home_slots = FlatBuffers(self.slots, device)
            for view, value in zip(self._home_slots.views, self._initial_slots.values(), strict=True):
                device.copy(view, value)
        return self._home_slots

    def changed_outside(self) -> bool:
        """Whether `set_parameters` was called."""
        return self._changed

    def committed(self) -> None:
        """All replicas are up to date."""
        self._changed = False

    def bind(self, memory: Memory, device: QueueDevice, rank: int) -> _State:
        """Named views of a replica's memory."""
        return _State(_named(memory.variables), _named(memory.slots), _named(memory.gradients))

    def train(self, state: _State, batch: list[np.ndarray], context: Context) -> Result:
        """The replica's share of the mean loss and of its gradient."""
        loss, gradients, outputs = self._train(state.parameters, batch)
        _check_names(gradients, state.gradients, "train", "gradients")
        share = context.rows.share
        for name, view in state.gradients.items():
            np.multiply(gradients[name], share, out=view, casting="same_kind")
        return Result([_array(o) for o in outputs], np.array([float(loss) * share]))

    def update(self, state: _State, totals: Totals) -> None:
        """Write new parameters and slots in place. Does nothing before the gradients are reduced."""
        if not totals.reduced:
            return
        parameters, slots = self._update(state.parameters, state.slots, state.gradients)
        for views, values in ((state.parameters, parameters), (state.slots, slots)):
            for name, value in values.items():
                views[name][...] = value

    def predict(self, state: _State, batch: list[np.ndarray], context: Context) -> Result:
        """Outputs only."""
        return Result([_array(o) for o in self._predict(state.parameters, batch)])


def _on_host(value: Any) -> np.ndarray:
    """A value as a host array. CuPy's arrays turn into NumPy's only when they are asked to."""
    on_gpu = hasattr(value, "__cuda_array_interface__") and hasattr(value, "get")
    return np.asarray(value.get() if on_gpu else value)


def _specs(values: Mapping[str, np.ndarray]) -> list[ArraySpec]:
    """Name, shape and dtype of each array."""
    return [ArraySpec(name, value.shape, value.dtype.name) for name, value in values.items()]


def _array(output: Any) -> Any:
    """An output as an array. Arrays on a GPU stay there."""
    return output if hasattr(output, "__cuda_array_interface__") else np.asarray(output)


def _named(flat: FlatBuffers) -> Arrays:
    """The views of a flat buffer by name."""
    return {spec.name: view for spec, view in zip(flat.specs, flat.views, strict=True)}


def _check_names(values: Mapping[str, Any], expected: Mapping[str, Any], function: str, what: str) -> None:
    """Check that `values` has exactly the expected names."""
    if set(values) != set(expected):
        raise KeyError(f"`{function}` must return {what} for exactly {sorted(expected)}. Received: {sorted(values)}")
