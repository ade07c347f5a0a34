"""Views of parameters that a module holds move with these; those of buffers, which would go stale, are refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim import Optimizer

from fastdp.program.torch.following.contents import Contents
from fastdp.program.torch.rows.plain import is_torchs_hook

if TYPE_CHECKING:
    from fastdp.program.torch.module import Slot


@dataclass(slots=True)
class View:
    """A tensor in the memory of a parameter, by the `number` of that one among the slots."""

    tensor: torch.Tensor
    number: int
    offset: int

    def of(self, home: torch.Tensor) -> torch.Tensor:
        """The same elements of another parameter. Its version counts no writes to that."""
        start = home.storage_offset() + self.offset
        return home.detach().data.as_strided(self.tensor.shape, self.tensor.stride(), start)


def views_in(tensors: Sequence[torch.Tensor], slots: Sequence[Slot]) -> list[View]:
    """The tensors that are views of a parameter and can follow it to other memory.

    Those of buffers cannot: forward writes to buffers, and a view that torch knows as one would count that as its own.
    """
    if not tensors:
        return []
    homes = [(*_span(slot.tensor), at) for at, slot in enumerate(slots) if slot.is_parameter and slot.tensor.numel()]
    found = []
    for tensor in tensors:
        if tensor.layout is not torch.strided or not tensor.numel() or tensor.is_meta or tensor.requires_grad:
            continue
        start, stop = _span(tensor)
        for begin, end, number in homes:
            home = slots[number].tensor
            if begin <= start and stop <= end and home.dtype == tensor.dtype and home.is_contiguous():
                found.append(View(tensor, number, (start - begin) // tensor.itemsize))
    return found


def movable_views(module: nn.Module, slots: Sequence[Slot]) -> list[View]:
    """The views of its tensors that a module holds, before these move.

    Args:
        slots: the module's parameters and buffers.

    Raises:
        ValueError: there is one that cannot follow. It would keep today's values for good, without a word.
    """
    contents = Contents(module, [slot.tensor for slot in slots])
    views = views_in([tensor for _, tensor in contents.tensors], slots)
    follow = {id(view.tensor) for view in views}
    homes = [(*_span(slot.tensor), slot) for slot in slots if slot.tensor.numel()]
    for name, start, stop in _held(contents, follow):
        for begin, end, slot in homes:
            if start < end and begin < stop:
                kind = "parameter" if slot.is_parameter else "buffer"
                raise ValueError(
                    f"`{name}` shares memory with the {kind} `{slot.name}`, which moves into memory of the devices: "
                    "it would not follow its changes any more. Make the view in forward, or keep a copy (.clone()) if "
                    "its value is to stay."
                )
    return views


def _held(contents: Contents, follow: set[int]) -> Iterator[tuple[str, int, int]]:
    """What a module holds besides its parameters and buffers, and does not `follow` these: names, and where they begin
    and end in memory."""
    # An optimizer may have parameters from before the module was changed: whoever steps it says so.
    optimizers = [holder.owner for holder in contents.holders if isinstance(holder.owner, Optimizer)]
    known = {id(one) for optimizer in optimizers for group in optimizer.param_groups for one in group["params"]}
    # `torch.nn.utils.spectral_norm` leaves one where its hook puts another weight before each forward.
    for part in contents.parts:
        hooks = [hook for hook in part._forward_pre_hooks.values() if is_torchs_hook(hook)]
        known.update(id(getattr(part, hook.name, None)) for hook in hooks if hasattr(hook, "name"))
    known |= follow
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
