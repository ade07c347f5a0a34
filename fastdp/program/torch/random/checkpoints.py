"""Parts of a module that `torch.utils.checkpoint` runs again in backward repeat the draws of forward there.

Plain torch restores its generator for that. On replicas the draws of forward are shared, and their numbers say which
they were: a part that runs again counts from where it began. Torch's own saving and restoring, by several threads at
once, would leave the generator anywhere, so it is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils import checkpoint

from fastdp.patching import Patch
from fastdp.program.torch.replica import ReplicaContext
from fastdp.tensors.checkpoint_place import checkpoint_place
from fastdp.tensors.function_mode import ReplicaMode


class _Part:
    """A function that runs in forward, and again in backward.

    Args:
        running: the replica.
        function: the part.
        preserve: repeat the draws; False: draws in backward are errors.
    """

    def __init__(self, running: ReplicaContext, function: Callable[..., Any], preserve: bool) -> None:
        self._running, self._function, self._preserve = running, function, preserve
        self._first, self._tried = running.draws, running.tried
        self._device = torch.device(running.context.torch_device)
        self._drawn = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Hold this while the part runs in forward."""
        self._running.repeatable += self._preserve
        try:
            yield
        finally:
            self._running.repeatable -= self._preserve

    def again(self, *args: Any, **kwargs: Any) -> Any:
        """Run the part in backward."""
        if not self._preserve:
            return self._function(*args, **kwargs)
        running, drawn = self._running, None
        before = running.draws, running.repeats, running.tried
        running.draws, running.repeats, running.tried = self._first, True, self._tried
        if self._drawn is not None:  # what kernels draw there
            drawn = torch.cuda.get_rng_state(self._device)
            torch.cuda.set_rng_state(self._drawn, self._device)
        try:
            return self._function(*args, **kwargs)
        finally:
            running.draws, running.repeats, running.tried = before
            if drawn is not None:
                torch.cuda.set_rng_state(drawn, self._device)


def _running() -> ReplicaContext | None:
    """The replica that this thread runs; None outside of a step that replicas share."""
    for mode in reversed(_get_current_function_mode_stack()):
        if isinstance(mode, ReplicaMode) and isinstance(mode.running, ReplicaContext):
            return mode.running
    return None


class _Reentrant:
    """Torch's function for `use_reentrant=True`.

    Args:
        original: `torch.utils.checkpoint.CheckpointFunction`.
    """

    def __init__(self, original: Any) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def apply(self, function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        """Run a part in forward, and keep what it needs to run again."""
        running = _running()
        if running is None:
            return self._original.apply(function, preserve, *args)
        part, begun = _Part(running, function, preserve), False

        def run(*inputs: Any) -> Any:
            nonlocal begun
            if begun:
                return part.again(*inputs)
            begun = True
            with part.forward():
                return function(*inputs)

        return self._original.apply(run, False, *args)


def _not_reentrant(original: Any) -> Any:
    """Torch's function for `use_reentrant=False`: a generator that is advanced before and after the part runs."""

    def generator(function: Callable[..., Any], preserve: bool = True, *args: Any, **kwargs: Any) -> Iterator[None]:
        running = _running()
        if running is None:
            yield from original(function, preserve, *args, **kwargs)
            return
        part = _Part(running, function, preserve)
        with part.forward():
            yield from original(part.again, False, *args, **kwargs)

    return generator


# Held while replicas that share a step run their passes.
REPEATED_DRAWS = Patch([(checkpoint, "CheckpointFunction", _Reentrant), checkpoint_place(_not_reentrant)])
