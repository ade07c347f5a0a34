"""What torch keeps for each thread and data may depend on: a thread that reads ahead gets it from the caller's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any


class ThreadSettings:
    """Torch's settings of the present thread: gradients, inference mode, the default device.

    Args:
        scope: makes a further context, for the thread that reads ahead.
    """

    def __init__(self, scope: Callable[[], AbstractContextManager[Any]]) -> None:
        self._scope = scope
        torch = self._torch = sys.modules.get("torch")
        if torch is not None:
            self._gradients, self._inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            self._device = torch.get_default_device()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give them to another thread."""
        torch = self._torch
        with ExitStack() as stack:
            if torch is not None:
                if self._inference:
                    stack.enter_context(torch.inference_mode())
                stack.enter_context(torch.set_grad_enabled(self._gradients))
                if self._device.type != "cpu":
                    stack.enter_context(self._device)
            stack.enter_context(self._scope())
            yield


def modes_of_caller() -> str | None:
    """What the calling thread has around it that another thread would not: autocast or modes of torch; else None."""
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    if torch.is_autocast_enabled() or torch.is_autocast_enabled("cpu"):
        return "the loop asks for batches inside torch.autocast"
    device = "torch.utils._device"
    modes = sys.modules["torch.overrides"]._get_current_function_mode_stack()
    if any(type(mode).__module__ != device for mode in modes) or torch._C._len_torch_dispatch_stack():
        return "the loop asks for batches inside a mode of torch"
    return None
