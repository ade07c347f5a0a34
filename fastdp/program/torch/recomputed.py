"""Rows of a torch loop that backward runs again since a device has no memory for the graphs of all its rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastdp.comm.context import Context
from fastdp.errors import CannotSplitError
from fastdp.program.torch.following.merged import WriteNotes
from fastdp.program.torch.loop_passes import ForwardPass
from fastdp.program.torch.module import ReplicaModule
from fastdp.tensors.function_mode import plain

_AGAIN = (
    "Backward runs the parts of a device's rows again, and forward would find another value there: return it, or keep "
    "it in a registered buffer."
)


def check_parts(work: ForwardPass, context: Context, writes: WriteNotes | None) -> None:
    """Refuse to run parts again by a forward that writes to what it may read."""
    if context.is_cut and work.keeps and writes is not None and writes.written:
        raise CannotSplitError(f"`forward` sets `{next(iter(writes.written)).name}`. {_AGAIN}")


class Recomputed:
    """A module that backward runs again with the buffers that it had.

    Args:
        replica: the module.
    """

    def __init__(self, replica: ReplicaModule) -> None:
        self._replica = replica
        self._before: dict[int, torch.Tensor] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's outputs."""
        module: Callable[..., Any] = self._replica.module
        if self._before is None:
            outputs = module(*args, **kwargs)
            with plain():
                self._before = {at: before.clone() for at, _, before in self._replica.changed_buffers()}
            return outputs
        with self._replica.with_buffers(self._before):
            return module(*args, **kwargs)
