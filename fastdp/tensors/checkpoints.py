"""Torch in checkpoints: tensors as arrays, a module's state as a plain file, and the states of torch's generators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

# What NumPy has no numbers for is stored by its bits.
_FREE_NBYTES, _MOST_REPEATED = 1 << 20, 1100  # strides repeat numbers; as for HDF5 files (`fastdp.data`)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def pack(value: Any) -> tuple[str, list[np.ndarray]] | None:
    """A tensor as its kind and copies of its arrays in host memory; None where the value is no tensor.

    Raises:
        TypeError: a tensor that is neither dense nor of coordinates.
    """
    if not isinstance(value, torch.Tensor):
        return None
    value = value.detach()
    dtype = str(value.dtype).removeprefix("torch.")
    if value.layout == torch.sparse_coo:
        parts = (value._indices(), value._values(), torch.tensor(value.shape))
        kind = f"coo {dtype} {'coalesced' if value.is_coalesced() else 'loose'}"
        return kind, [_array(part) for part in parts]
    if value.layout != torch.strided:
        raise TypeError(f"A checkpoint stores dense tensors and sparse ones of coordinates. Received: {value.layout}.")
    return dtype, [_array(value)]


def unpack(kind: str, arrays: Sequence[np.ndarray]) -> torch.Tensor:
    """The tensor that `pack` has packed, in host memory."""
    if not kind.startswith("coo "):
        return _tensor(arrays[0], kind)
    _, dtype, order = kind.split(" ")
    indices, values, shape = arrays
    return torch.sparse_coo_tensor(
        torch.from_numpy(indices),
        _tensor(values, dtype),
        tuple(shape.tolist()),
        is_coalesced=order == "coalesced",
        check_invariants=True,
    )


def _array(tensor: torch.Tensor) -> np.ndarray:
    """A copy in host memory."""
    own = tensor.to("cpu", copy=True).contiguous()
    try:
        return own.numpy()
    except TypeError:  # bfloat16, float8
        return own.reshape(own.shape).view(_BITS[own.element_size()]).numpy()


def _tensor(array: np.ndarray, dtype: str) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    wanted = getattr(torch, dtype)
    return tensor if tensor.dtype == wanted else tensor.view(wanted)


def split_state(state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A state_dict as copies of its tensors in host memory, and the rest of it."""
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    rest = {name: value for name, value in state.items() if name not in tensors}
    return {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}, rest


def write_state(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write tensors by name as `torch.save` does: `module.load_state_dict(torch.load(path))` reads it.

    Raises:
        OSError: it cannot be written. By a path torch would say no reason of the system.
    """
    with path.open("wb") as file:
        torch.save(dict(tensors), file)


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of `write_state`, in host memory. Runs no code of the file.

    Raises:
        ValueError: one of them is much larger than what is stored of it, so a copy would fill the memory.
    """
    state = dict(torch.load(path, map_location="cpu", weights_only=True))
    _check_declared(state, path)
    return state


def _check_declared(value: Any, path: Path) -> None:
    """Look at the tensors in a nest."""
    if isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            _check_declared(part, path)
    elif isinstance(value, torch.Tensor) and value.layout == torch.strided:
        declared, stored = value.numel() * value.element_size(), value.untyped_storage().nbytes()
        if declared > max(_FREE_NBYTES, _MOST_REPEATED * stored):
            raise ValueError(f"{path} declares a tensor of {declared:,} bytes and stores {stored:,} of it.")


def read_generators() -> dict[str, Any]:
    """The states of torch's generators, of the CPU and of the GPUs that are in use."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": gpus}


def write_generators(states: Mapping[str, Any]) -> None:
    """Set them. States of GPUs that are not there are left out."""
    torch.set_rng_state(states["cpu"])
    for gpu, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, gpu)
