"""Refuses values of a module that share memory with its parameters and buffers, which get other memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim import Optimizer

from fastdp.program.torch.following.contents import Contents
from fastdp.program.torch.rows.plain import is_torchs_hook

if TYPE_CHECKING:
    from fastdp.program.torch.module import Slot


def refuse_views(module: nn.Module, slots: Sequence[Slot]) -> None:
    """Check, before they move, that nothing which the module holds is a view of its tensors.

    Args:
        slots: the module's parameters and buffers.

    Raises:
        ValueError: something is. It would keep today's values for good, without a word.
    """
    homes = [(*_span(slot.tensor), slot) for slot in slots if slot.tensor.numel()]
    for name, start, stop in _held(Contents(module, [slot.tensor for slot in slots])):
        for begin, end, slot in homes:
            if start < end and begin < stop:
                kind = "parameter" if slot.is_parameter else "buffer"
                raise ValueError(
                    f"`{name}` shares memory with the {kind} `{slot.name}`, which moves into memory of the devices: "
                    "it would not follow its changes any more. Make the view in forward, or keep a copy (.clone()) if "
                    "its value is to stay."
                )


def _held(contents: Contents) -> Iterator[tuple[str, int, int]]:
    """What a module holds besides its parameters and buffers: names, and where they begin and end in memory."""
    # An optimizer may have parameters from before the module was changed: whoever steps it says so.
    optimizers = [holder.owner for holder in contents.holders if isinstance(holder.owner, Optimizer)]
    known = {id(one) for optimizer in optimizers for group in optimizer.param_groups for one in group["params"]}
    # `torch.nn.utils.spectral_norm` leaves one where its hook puts another weight before each forward.
    for part in contents.parts:
        hooks = [hook for hook in part._forward_pre_hooks.values() if is_torchs_hook(hook)]
        known.update(id(getattr(part, hook.name, None)) for hook in hooks if hasattr(hook, "name"))
    tensors = ((n, one) for n, one in contents.tensors if one.layout is torch.strided and id(one) not in known)
    yield from ((name, *_span(tensor)) for name, tensor in tensors if tensor.numel() and not tensor.is_meta)
    for name, array in contents.arrays:
        if array.size and not array.dtype.hasobject:
            begin = int(array.__array_interface__["data"][0])
            yield name, begin, begin + array.nbytes


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Where a tensor's elements begin and end in memory."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return begin, begin + (last + 1) * tensor.itemsize
