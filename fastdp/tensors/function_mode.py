"""Runs some of torch's functions in another version, in the thread of a replica and in no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fastdp.tensors.compiled import not_compiled, skipped

Handler = Callable[..., Any]
# Hold `plain()` for fastdp's own work on tensors in a replica's thread: torch then calls no mode, which costs a
# microsecond for each function and each attribute of a tensor.
plain = torch._C.DisableTorchFunction


class ReplicaMode(TorchFunctionMode):
    """Runs some torch functions in a replica-aware version. No module is changed, and nothing is patched.

    Args:
        running: the state of the replica's thread in this step.
        handlers: by torch function: `handler(running, function, args, kwargs)`. The mode is off in a handler, but for
            those that `keeps_mode` has marked.
    """

    def __init__(self, running: object, handlers: dict[Any, Handler]) -> None:
        super().__init__()
        self.running = running
        self._handlers = handlers

    @skipped
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for every function that a replica's thread calls."""
        handler = self._handlers.get(func)
        if handler is None:
            return func(*args, **(kwargs or {}))
        if getattr(handler, _KEEPS_MODE, False):
            with self:
                return _handled(handler, self.running, func, args, kwargs or {})
        return _handled(handler, self.running, func, args, kwargs or {})


@not_compiled
def _handled(handler: Handler, running: object, function: Any, args: Any, kwargs: Any) -> Any:
    """Call a handler: replicas draw and meet there, which compiled code cannot."""
    return handler(running, function, args, kwargs)


_KEEPS_MODE = "keeps_mode"


def keeps_mode(handler: Handler) -> Handler:
    """Mark a handler that runs the user's code, for which the mode is on."""
    setattr(handler, _KEEPS_MODE, True)
    return handler
