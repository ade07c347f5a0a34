"""Torch tensors over the engine's arrays, without copies, both ways."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from fastdp.buckets import ArraySpec


def dtype_name(tensor: torch.Tensor) -> str:
    """The dtype's name as the engine spells it, such as "float32" or "bfloat16"."""
    return str(tensor.dtype).removeprefix("torch.")


def spec_of(name: str, tensor: torch.Tensor) -> ArraySpec:
    """Name, shape and dtype of a tensor."""
    return ArraySpec(name, tuple(tensor.shape), dtype_name(tensor))


def as_tensor(array: np.ndarray, dtype: str | None = None) -> torch.Tensor:
    """A tensor that shares the array's memory; `dtype` names one that NumPy lacks (bfloat16, float8)."""
    tensor = torch.from_numpy(array)
    if dtype is not None and dtype_name(tensor) != dtype:
        tensor = tensor.view(getattr(torch, dtype))
    return tensor


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """A host array that shares the tensor's memory where it can; dtypes that NumPy lacks become integers."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    if tensor.dtype.itemsize == 1 and tensor.dtype.is_floating_point:
        return tensor.view(torch.uint8).numpy()
    return tensor.resolve_conj().resolve_neg().numpy()


@contextmanager
def intra_op_threads(threads: int) -> Iterator[None]:
    """Let each operation use `threads` cores while replicas run side by side.

    Torch's setting is partly per thread (OpenMP) and partly global (MKL): workers set theirs once, the
    host thread holds the global one for the time of a step.
    """
    before = torch.get_num_threads()
    if before == threads:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
