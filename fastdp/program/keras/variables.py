"""Where the values of Keras variables live: in flat buffers, or in the scope of a replica."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import keras
import torch
from keras.src.backend import in_stateless_scope
from keras.src.backend.common import global_state
from keras.src.backend.common.variables import initialize_all_variables

from fastdp.buffers import Allocator, FlatBuffers, Memory
from fastdp.program.keras.optimizer.flat import FlatUpdate
from fastdp.runtime.queue import QueueDevice
from fastdp.tensors.adopted import Adopted, Homes
from fastdp.tensors.arrays import spec_of, tensors_of
from fastdp.tensors.gradient_buckets import GradientBuckets
from fastdp.tensors.row_effects import NotByRowsError

_VALUE, _VERSION = attrgetter("_value"), attrgetter("_version")
Mapping = list[tuple[keras.Variable, torch.Tensor]]
Foreign = dict[int, keras.Variable]


def variables_of(model: keras.Model) -> list[keras.Variable]:
    """All variables of a model, metrics of its layers included.

    The trainable ones come first, so that their memory has the layout of their gradients.
    """
    own_metrics = [metric for layer in model._flatten_layers() for metric in layer._metrics]
    every = [*model.trainable_variables, *model.variables, *(v for m in own_metrics for v in m.variables)]
    return list({id(v): v for v in every}.values())


class AdoptedVariables(Adopted):
    """Keras variables whose values live in flat buffers.

    Args:
        variables: the variables, in the order of the buffers' views.
        device: the device that allocates the buffers.
    """

    def __init__(self, variables: Sequence[keras.Variable], device: Allocator) -> None:
        self.variables = list(variables)
        super().__init__([spec_of(v.path, v.value) for v in self.variables], device)

    def present(self) -> list[torch.Tensor]:
        """The variables' values. Not through `.value`, which looks for scopes first: there are none between steps."""
        return list(map(_VALUE, self.variables))

    def marks(self, present: list[torch.Tensor]) -> list[int]:
        """The version counters of the values."""
        return list(map(_VERSION, present))

    def check(self, value: torch.Tensor, kept: torch.Tensor) -> None:
        """Refuse another dtype.

        Raises:
            NotByRowsError: `value` has another dtype than `kept`.
        """
        if value.dtype != kept.dtype:
            path = next(variable.path for variable in self.variables if variable._value is value)
            raise NotByRowsError(
                f"The variable {path!r} has become {value.dtype}; the replicas hold it as "
                f"{kept.dtype}. Choose the dtype before the model is made (keras.config.set_dtype_policy)"
            )


_homes: Homes[AdoptedVariables] = Homes()


def adopted(owner: Any, variables: Sequence[keras.Variable], device: Allocator) -> AdoptedVariables:
    """The adopted variables of a model or an optimizer."""
    return _homes.of(owner, [id(v) for v in variables], lambda: AdoptedVariables(variables, device))


@dataclass(eq=False)
class ReplicaState:
    """A replica's tensors, on its device. `leaves` are the trainable variables as leaves of autograd, with hooks to
    `arrivals`. `flat_update` is None if the optimizer acts on each variable, or another replica updates."""

    device: QueueDevice
    variables: list[torch.Tensor]
    slots: list[torch.Tensor]
    gradients: list[torch.Tensor]
    leaves: list[torch.Tensor]
    mapping: Mapping
    flat_update: FlatUpdate | None
    arrivals: GradientBuckets

    @classmethod
    def over(
        cls,
        memory: Memory,
        device: QueueDevice,
        variables: Sequence[keras.Variable],
        trained: Sequence[int],
        flat_update: FlatUpdate | None,
    ) -> ReplicaState:
        """The state of a replica over its memory.

        Args:
            variables: all variables of the model, in the order of the memory.
            trained: the numbers of those that have a gradient.
        """
        tensors, gradients = tensors_of(memory.variables), tensors_of(memory.gradients)
        leaves = [tensors[i].detach().requires_grad_() for i in trained]
        mapping = list(zip(variables, tensors, strict=True))
        for i, leaf in zip(trained, leaves, strict=True):
            mapping[i] = (variables[i], leaf)
        arrivals = GradientBuckets(memory.gradients, gradients)
        arrivals.hook(leaves)
        return cls(device, tensors, tensors_of(memory.slots), gradients, leaves, mapping, flat_update, arrivals)

    @property
    def gradient_buffers(self) -> FlatBuffers:
        """The flat buffers that `gradients` are views of."""
        return self.arrivals.flat


class ReplicaScope(keras.StatelessScope):
    """A stateless scope over a replica's tensors.

    As in plain Keras on torch, no gradient flows through an assignment. A trainable variable that the forward pass
    assigns (spectral normalization) becomes a new leaf, whose gradient is that of the assigned value.

    `foreign` are variables that were assigned although the replicas do not hold them, by id.
    """

    def __init__(self, mapping: Sequence[tuple[keras.Variable, torch.Tensor]], leaves: set[int]) -> None:
        super().__init__(state_mapping=None, collect_losses=True, initialize_variables=False)
        self.state_mapping = {id(variable): tensor for variable, tensor in mapping}
        self._leaves = leaves
        self.foreign: Foreign = {}

    def __exit__(self, *args: Any, **kwargs: Any) -> None:
        """Leave the scope. Variables created in it are initialized, as by the first call of their layer.

        Raises:
            NotByRowsError: there were such variables. No replica has them, so the results are void.
        """
        super().__exit__(*args, **kwargs)
        # Inside another scope nothing can be initialized: variables wait for its end.
        if not in_stateless_scope() and global_state.get_global_attribute("uninitialized_variables"):
            _refuse_new_variables()

    @property
    def leaves(self) -> set[int]:
        """Ids of the trainable variables."""
        return self._leaves

    def twin(self) -> ReplicaScope:
        """A copy of the scope with the present values. This scope does not see its assignments."""
        twin = ReplicaScope([], self._leaves)
        twin.state_mapping = dict(self.state_mapping)
        return twin

    def assigned(self, mapping: Mapping) -> list[tuple[int, torch.Tensor]]:
        """The variables that were assigned within the scope: their places in `mapping` and their values."""
        values = ((i, self.get_current_value(v), before) for i, (v, before) in enumerate(mapping))
        return [(i, value) for i, value, before in values if value is not before]

    def assigned_foreign(self, by: frozenset[int], *, alone: bool) -> list[tuple[keras.Variable, torch.Tensor]]:
        """The variables that replicas do not hold and that were assigned, with their values.

        Args:
            by: ids of the variables that the loss of the merged outputs has assigned, for all rows.
            alone: whether this replica has all rows itself.

        Raises:
            NotByRowsError: another part of the model has assigned one, from the replica's rows.
        """
        for number, variable in self.foreign.items():
            if not alone and number not in by:
                raise NotByRowsError(
                    f"The model assigns the variable {variable.path!r} in its forward pass, which belongs to no layer "
                    "of it, so devices do not hold it. Let the layer that assigns it make it by self.add_weight(), or "
                    "assign it to an attribute of that layer, before the model is built; or use gpus=[0]."
                )
        return [(variable, self.state_mapping[number].detach()) for number, variable in self.foreign.items()]

    def add_update(self, update: tuple[keras.Variable, torch.Tensor]) -> None:
        """Note an assignment. No gradient flows through it: in plain Keras it copies into the variable's memory."""
        variable, value = update
        if id(variable) in self.foreign or (id(variable) not in self.state_mapping and _has_state(variable)):
            self.foreign[id(variable)] = variable
        value = value.detach().requires_grad_() if id(variable) in self._leaves else value.detach()
        super().add_update((variable, value))


def _has_state(variable: keras.Variable) -> bool:
    """Whether an assignment to a variable outside of the model is more than a draw: replicas know how to draw."""
    return variable._value is not None and variable.name != "seed_generator_state"


def _refuse_new_variables() -> None:
    """Initialize the variables that a replica's thread has created, and raise an error if replicas lack them."""
    made = list(global_state.get_global_attribute("uninitialized_variables"))
    initialize_all_variables()
    # Seed generators that a call creates are fine: replicas know how to draw from them.
    made = [variable for variable in made if variable.name != "seed_generator_state"]
    if not made:
        return
    raise NotByRowsError(
        f"A layer that was called for the first time made the variable {made[0].path!r} while devices ran the model, "
        "so no replica has it. It exists now. Let the model call all its layers once, on a batch and with "
        "training=True, before it is trained on several devices, or before fastdp.wrap."
    )
