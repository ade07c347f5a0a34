"""The values of one step of a replica that spans devices: where each was made, and its copies elsewhere.

A variable's value lives on the replica's first device. A call placed on another device reads a copy, made once per step
and device, and the gradient of the copy is moved back. A value that a placed call assigns stays on its device until
another call reads it.
"""

from __future__ import annotations

from typing import Any

import keras
import torch

from fastdp.program.keras.variables import ReplicaScope
from fastdp.runtime.queue import QueueDevice
from fastdp.tensors.device_copies import arrived


class PlacedValues:
    """A value of one step, made on one device of the replica.

    Args:
        value: a tensor, detached from autograd's graph; anything else is the same on all devices.
        device: the device whose worker made the value.

    If the value is differentiable, each device's tensor is a separate leaf, unless two share memory. Calls return
    gradients per leaf, and the owner of the value sums them.
    """

    def __init__(self, value: Any, device: QueueDevice) -> None:
        self._by_device = {device: value}
        self._value = value

    def on(self, device: QueueDevice) -> Any:
        """The value for a call on `device`. Runs on that device's worker; its stream waits for the value."""
        if device not in self._by_device:
            self._by_device[device] = self._brought(device)
        return self._by_device[device]

    def seen(self, device: QueueDevice) -> Any:
        """The value that calls on `device` got; None if no call there read it."""
        return self._by_device.get(device)

    def _brought(self, device: QueueDevice) -> Any:
        value = self._value
        if not isinstance(value, torch.Tensor):
            return value
        moved, mask = arrived(value, device), getattr(value, "_keras_mask", None)
        mask = None if mask is None else arrived(mask, device)
        if moved is value:  # both devices share the leaf
            return value
        if mask is not None:
            moved._keras_mask = mask
        return moved.requires_grad_(value.requires_grad)


class PlacedScope(ReplicaScope):
    """A replica's scope for one call: it copies variables to the call's device when they are read.

    Args:
        variables: the replica's values by id of the variable, shared by the calls of a step. Later calls see the
            assignments of this one.
        leaves: ids of the trainable variables.
        device: the device of the call.

    Attributes:
        read: the differentiable values that the call has read, by id of the tensor that it got.
    """

    def __init__(self, variables: dict[int, PlacedValues], leaves: set[int], device: QueueDevice) -> None:
        super().__init__([], leaves)
        self._variables = variables
        self._device = device
        self.read: dict[int, tuple[PlacedValues, torch.Tensor]] = {}

    def twin(self) -> PlacedScope:
        """A scope with the current values. This scope does not see its assignments."""
        return PlacedScope(dict(self._variables), self._leaves, self._device)

    def get_current_value(self, variable: keras.Variable) -> torch.Tensor | None:
        """The value on the call's device."""
        spread = self._variables.get(id(variable))
        if spread is None:
            return None
        value: torch.Tensor = spread.on(self._device)
        if value.requires_grad:
            self.read[id(value)] = spread, value
        return value

    def add_update(self, update: tuple[keras.Variable, torch.Tensor]) -> None:
        """Record an assignment, with its value on the call's device."""
        super().add_update(update)
        key = id(update[0])
        self._variables[key] = PlacedValues(self.state_mapping[key], self._device)
