"""Checks whether a torch module can be wrapped, and says what to do if not."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from fastdp.capture.cuda_graphs.recorder import warn_of_graphs
from fastdp.options import Options
from fastdp.program.torch.module import Slot, slots_of
from fastdp.runtime.queue import QueueDevice
from fastdp.runtime.select import warn_of_relocation
from fastdp.tensors.deterministic import check_deterministic


def check_module(module: object) -> None:
    """Check that a module can be replicated: its structure can be copied, and its tensors lie in host memory.

    Raises:
        TypeError: it is not a torch.nn.Module.
        ValueError: it cannot be replicated; the message says what to do.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module. Received: {module!r} (of type {type(module).__name__})")
    for name, part in module.named_modules():
        _check_kind(name or "model", part)
    slots = slots_of(module)
    for slot in slots:
        _check_tensor(slot)
    _check_overlap(slots)


def check_options(options: Options, devices: Sequence[QueueDevice]) -> None:
    """Check the options of a torch module, and warn of those without an effect.

    Raises:
        ValueError: one is set; the message says what to leave out.
        RuntimeError: `deterministic` is set, and torch has used a GPU already.
    """
    if options.rows is not None and not isinstance(options.rows, dict):
        instead = {
            "merge": " Rows that meet in a torch module are collected in its forward: fastdp.replica.all_gather(x) has "
            "those of all devices, fastdp.replica.all_reduce(x.mean(0), 'mean') their mean.",
            "replica": " A torch module in which rows meet would have other numbers if each device used its own rows. "
            "Collect those of all devices in forward by fastdp.replica.all_gather or all_reduce.",
        }.get(options.rows, "")
        raise ValueError(
            '`rows` of a torch.nn.Module must be a dict that says where rows are, such as {"mask": "same", "hx": 1}. '
            f"Received: rows={options.rows!r}, which is for Keras models.{instead}"
        )
    if options.deterministic:
        check_deterministic(devices)
    warn_of_graphs(options, devices)
    warn_of_relocation(options.cpu_relocation, devices)


def _check_kind(name: str, part: nn.Module) -> None:
    """Refuse a part that does its own parallelism or cannot be copied."""
    kind = type(part).__name__
    if isinstance(part, torch.jit.ScriptModule):
        raise ValueError(
            f"`model` must be a plain torch.nn.Module, but {name!r} is a {kind}, whose random ops and batch "
            "normalization cannot be split over devices. Wrap the module that it was scripted or traced from."
        )
    if isinstance(part, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ValueError(
            f"`model` must not be parallel already, but {name!r} is a {kind}. Wrap the module inside it: .module"
        )
    if isinstance(part, nn.SyncBatchNorm):
        raise ValueError(
            f"`model` must not have layers that synchronize processes, but {name!r} is a SyncBatchNorm. Use "
            "BatchNorm1d to BatchNorm3d, and fastdp.wrap(model, sync_batch_norm=True)."
        )


def _check_tensor(slot: Slot) -> None:
    """Check that a tensor is dense, initialized, and in host memory."""
    tensor, what = slot.tensor, "parameter" if slot.is_parameter else "buffer"
    if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
        raise ValueError(
            f"`model` must have all parameters initialized, but the {what} {slot.name!r} is lazy and has no shape "
            "yet. Call the model on one batch, and wrap it then."
        )
    if tensor.is_quantized:
        raise ValueError(
            f"`model` must have parameters and buffers of plain dtypes, but the {what} {slot.name!r} is quantized "
            f"({tensor.dtype}). Train the module before it is quantized; a quantized one runs without fastdp."
        )
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise ValueError(
            f"`model` must have dense parameters and buffers in host memory, from where each device gets its copy, "
            f"but the {what} {slot.name!r} is {tensor.layout} on {tensor.device}. Call model.to('cpu') first."
        )


def _check_overlap(slots: list[Slot]) -> None:
    """Refuse distinct tensors that share memory: replicas would separate them."""
    spans = sorted(
        (slot.tensor.data_ptr(), slot.tensor.data_ptr() + slot.tensor.numel() * slot.tensor.itemsize, slot.name)
        for slot in slots
        if slot.tensor.numel()
    )
    for (_, stop, name), (start, _, other) in itertools.pairwise(spans):
        if start < stop:
            parameters = all(slot.is_parameter for slot in slots if slot.name in (name, other))
            remedy = "assign the same nn.Parameter to both." if parameters else _TIE_BUFFERS
            raise ValueError(
                f"`model` has {name!r} and {other!r}, which share memory but are two tensors. To tie them, {remedy}"
            )


_TIE_BUFFERS = (
    "register the same tensor under both names. Where one is a part of the other, make it in forward (self.table[0]), "
    "or register a copy (.clone()), which does not change with it."
)
