"""Torch tensors over the engine's arrays, and arrays over tensors, without copies."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from fastdp.buffers import ArraySpec, FlatBuffers, storage_dtype
from fastdp.runtime.queue import QueueDevice


def dtype_name(tensor: torch.Tensor) -> str:
    """The dtype's name as the engine spells it, such as "float32" or "bfloat16"."""
    return str(tensor.dtype).removeprefix("torch.")


def spec_of(name: str, tensor: torch.Tensor) -> ArraySpec:
    """Name, shape and dtype of a tensor."""
    return ArraySpec(name, tuple(tensor.shape), dtype_name(tensor))


def as_tensor(array: Any, dtype: str | None = None) -> torch.Tensor:
    """A tensor that shares the memory of an array, on the host or on a GPU.

    `dtype` is the name of a dtype that NumPy lacks (bfloat16, float8).
    """
    tensor = torch.from_numpy(array) if isinstance(array, np.ndarray) else torch.from_dlpack(array)
    if dtype is not None and dtype_name(tensor) != dtype:
        tensor = tensor.view(getattr(torch, dtype))
    return tensor


def to_tensor(value: Any) -> Any:
    """NumPy arrays and numbers as tensors; other values unchanged."""
    if isinstance(value, np.generic):
        return torch.tensor(value.item())
    if not isinstance(value, np.ndarray):
        return value
    if not value.flags.writeable or any(stride < 0 for stride in value.strides):
        value = value.copy()
    return torch.from_numpy(value)


def tensors_of(flat: FlatBuffers) -> list[torch.Tensor]:
    """Tensors over the views of flat buffers."""
    return [as_tensor(view, spec.dtype) for view, spec in zip(flat.views, flat.specs, strict=True)]


def accumulate(total: FlatBuffers, part: FlatBuffers) -> None:
    """Add the flat buffers `part` to `total`, which has the same specs, in place."""
    with torch.no_grad():
        for dtype, buffer in total.buffers.items():
            as_tensor(buffer, dtype).add_(as_tensor(part.buffers[dtype], dtype))


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """A host array that shares the tensor's memory if possible. Dtypes that NumPy lacks become integers."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    if tensor.dtype.itemsize == 1 and tensor.dtype.is_floating_point:
        return tensor.view(torch.uint8).numpy()
    return tensor.resolve_conj().resolve_neg().numpy()


def output_array(tensor: torch.Tensor, device: Any) -> Any:
    """A replica's tensor as an array on its device, for the merge. On a GPU it shares the tensor's memory."""
    if device is None or not device.on_gpu:
        return as_array(tensor)
    tensor = tensor.detach().contiguous().resolve_conj().resolve_neg()
    return device.wrap(tensor.data_ptr(), tuple(tensor.shape), storage_dtype(dtype_name(tensor)), tensor)


def peak_nbytes(device: QueueDevice) -> int:
    """The peak memory use of torch's allocator on a device's card: activations and temporaries."""
    on_cuda = device.on_gpu and device.torch_device.startswith("cuda")
    return int(torch.cuda.max_memory_allocated(device.torch_device)) if on_cuda else 0


def settle(tensors: Iterable[torch.Tensor]) -> None:
    """Wait for the calling thread's work on these tensors' GPUs, which the engine's streams do not wait for."""
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
