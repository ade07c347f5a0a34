"""Checks whether a call is bound to its thread, and whether its error says that it cannot be split by rows."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import keras
import torch

from fastdp.errors import ReplicaError
from fastdp.tensors.row_effects import NotByRowsError, UndecidedError


def is_hooked(layer: keras.Layer) -> bool:
    """Whether a script has put a torch hook on a layer."""
    own = vars(layer)
    return any(own.get(name) for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"))


def why_not_here() -> str | None:
    """Why other threads cannot run parts of this thread's calls (a torch mode set per thread); None if they can."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return "torch.autocast applies to this thread only; use keras.config.set_dtype_policy('mixed_bfloat16') instead"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func and torch.vmap see operations on this thread only"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode gradients are computed on this thread only"
    if torch._C._len_torch_dispatch_stack():
        return "a torch dispatch mode sees operations on this thread only"
    return None


def check_is_undecided(error: BaseException) -> None:
    """Re-raise an error unless it says that the rows tried before the step did not decide how to merge."""
    if not isinstance(error, UndecidedError) and not isinstance(error.__cause__, UndecidedError):
        raise error


class CauseOfRowErrors:
    """A context that raises a replica's `NotByRowsError` itself instead of the `ReplicaError` around it."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, ReplicaError) and isinstance(error.__cause__, NotByRowsError):
            raise error.__cause__ from None
