"""Copies a module for a replica, over the parameters and buffers that the replica has."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from fastdp.program.torch.following.contents import Contents
from fastdp.program.torch.following.functions import copy_functions, fill_functions
from fastdp.program.torch.following.guard import Guard
from fastdp.program.torch.module import Buffer, ReplicaModule, Slot, slots_of
from fastdp.program.torch.views import views_in
from fastdp.tensors.compiled import compile_alike


class Copied:
    """A copy of a module.

    Attributes:
        module: the copy.
        guard: of what the copy holds, in the order of the module's contents.
    """

    def __init__(self, module: nn.Module, contents: Contents, memo: dict[int, Any]) -> None:
        own = dict(memo)
        for _, tensor in contents.tensors:
            own.setdefault(id(tensor), _copy_of(tensor))
        for value in contents.shared:
            own.setdefault(id(value), value)
        for part in contents.parts:  # most of their tables are empty, and `deepcopy` is slow
            own.update((id(one), type(one)()) for one in vars(part).values() if type(one) in _TABLES and not one)
        copy_functions(contents, own)
        try:
            self.module: nn.Module = copy.deepcopy(module, own)
            fill_functions(contents, own)
            for value in contents.own_attributes:  # deepcopy leaves the copy without any
                own[id(value)].__dict__ = own[id(value)]
        except (
            TypeError,
            RuntimeError,
            LookupError,
        ) as error:  # LookupError: __getattr__ = dict.__getitem__
            raise ValueError(
                f"The module {type(module).__name__} cannot be copied, and each device needs a copy of it: {error}. "
                "Keep what cannot be copied (locks, open files) out of its attributes, or define "
                "__deepcopy__ on its class."
            ) from error
        compile_alike(module, self.module)
        self.guard = Guard(contents.copied(own))


def replicate(
    module: nn.Module, slots: list[Slot], variables: list[torch.Tensor], contents: Contents
) -> tuple[ReplicaModule, Copied]:
    """A copy of the module over `variables`, one for each slot. Copies the structure and the buffers.

    Args:
        module, slots: the user's module, and its parameters and buffers.
        variables: the replica's.
        contents: what the module holds besides.

    Raises:
        ValueError: something in the module cannot be copied.
    """
    memo: dict[int, Any] = {}
    parameters = []
    for slot, variable in zip(slots, variables, strict=True):
        if slot.is_parameter:
            memo[id(slot.tensor)] = nn.Parameter(variable, requires_grad=slot.tensor.requires_grad)
            parameters.append(memo[id(slot.tensor)])
        else:
            memo[id(slot.tensor)] = variable.clone()
    memo.update(_views(slots, contents, memo))
    copied = Copied(module, contents, memo)
    buffers = [
        Buffer(index, own, own.tensor, variables[index])
        for index, own in enumerate(slots_of(copied.module))
        if not own.is_parameter
    ]
    return ReplicaModule(copied.module, parameters, buffers), copied


def remake(replica: ReplicaModule, module: nn.Module, slots: list[Slot], contents: Contents) -> Copied:
    """Give a replica a new copy of the module over the parameters and buffers that it has.

    Arguments and errors as of `replicate`.
    """
    memo: dict[int, Any] = {}
    parameters, buffers = iter(replica.parameters), iter(replica.buffers)
    for slot in slots:
        if slot.is_parameter:
            memo[id(slot.tensor)] = next(parameters)
            continue
        buffer = next(buffers)
        user = slot.table.get(slot.key)
        if user is not None:
            kept = buffer.slot.table.get(buffer.slot.key) if buffer.own else buffer.work
            memo[id(user)] = user.clone() if kept is None else kept
    memo.update(_views(slots, contents, memo))
    copied = Copied(module, contents, memo)
    own = {slot.name: slot for slot in slots_of(copied.module)}
    for buffer in replica.buffers:
        buffer.slot = own.get(buffer.slot.name, buffer.slot)
    replica.module = copied.module
    return copied


def _views(slots: list[Slot], contents: Contents, memo: dict[int, Any]) -> dict[int, torch.Tensor]:
    """What the copy has for tensors in the memory of parameters and buffers, by identity: views of the copies."""
    present = [slot for slot in slots if slot.table.get(slot.key) is not None]
    views = views_in([tensor for _, tensor in contents.tensors], present)
    return {id(view.tensor): view.of(memo[id(present[view.number].tensor)]) for view in views}


_TABLES = (OrderedDict, dict, set)


def _copy_of(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor; of one that a forward pass has left, without its graph."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)
    own = tensor.detach().clone()
    return own.requires_grad_() if tensor.is_leaf and tensor.requires_grad else own
