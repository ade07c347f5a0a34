"""Brings the gradients of a replica's module from backward into its flat buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from fastdp.buffers import FlatBuffers
from fastdp.program.torch.replica import ReplicaContext
from fastdp.tensors.function_mode import Handler
from fastdp.tensors.gradient_buckets import GradientBuckets, dense


class Gradients:
    """The gradients of a replica's parameters, by position.

    Args:
        parameters: the replica's own.
        buffers: the replica's gradient buffers, which the engine reduces.
        flat: their arrays as tensors.

    From the second step on, buckets are announced as ready during backward, if backward runs once per step. A
    checkpoint that runs it again inside (`torch.utils.checkpoint` with `use_reentrant=True`) computes a gradient in
    parts, and nothing marks the last part: then no bucket is announced.
    """

    def __init__(self, parameters: list[torch.Tensor], buffers: FlatBuffers, flat: list[torch.Tensor]) -> None:
        self.parameters = parameters
        self.flat = flat
        self._arrivals = _Accumulated(buffers, flat)
        self._hooked: set[int] = set()
        self._runs_once: bool | None = None

    def begin(self, users: Sequence[torch.Tensor]) -> None:
        """Clear the gradients and copy `requires_grad` from the user's parameters."""
        self._arrivals.stored = set()
        for i, (own, user) in enumerate(zip(self.parameters, users, strict=True)):
            own.grad = None
            if own.requires_grad is not user.requires_grad:
                own.requires_grad_(user.requires_grad)
            if self._arrivals.useful and own.requires_grad and i not in self._hooked:
                self._hooked.add(i)
                own.register_post_accumulate_grad_hook(partial(self._arrivals.accumulated, i))

    @contextmanager
    def announcing(self, running: ReplicaContext, direct: dict[int, torch.Tensor]) -> Iterator[None]:
        """Hold this during backward: it announces buckets that become complete.

        `direct` are the gradients that the loss function has by parameters directly, by position. They are added.
        """
        if self._arrivals.useful and self._runs_once:
            self._arrivals.running, self._arrivals.direct = running, direct
            self._arrivals.begin(running.context.ready)
        try:
            yield
        finally:
            self._arrivals.end()
            self._arrivals.running, self._arrivals.direct = None, {}
            self._runs_once = self._runs_once is not False and not running.nested

    def store(self, direct: dict[int, torch.Tensor]) -> frozenset[int]:
        """Write the gradients of backward and the `direct` ones to the flat buffer, zeros where there is none.

        Announced gradients are in the buffer already. Returns the positions of the parameters that have a gradient.
        """
        stored, self._arrivals.stored = self._arrivals.stored, set()
        used = set(stored)
        with torch.no_grad():
            for i, (parameter, view) in enumerate(zip(self.parameters, self.flat, strict=True)):
                found = [g for g in (parameter.grad, direct.get(i)) if g is not None]
                parameter.grad = None
                if i in stored:
                    continue
                if found:
                    used.add(i)
                    view.copy_(dense(found[0]))
                else:
                    view.zero_()
                for more in found[1:]:
                    view.add_(more)
        return frozenset(used)


class _Accumulated(GradientBuckets):
    """Gradients that torch accumulates on parameters. Hooks refer to it; it refers to no parameter."""

    running: ReplicaContext | None = None
    direct: dict[int, torch.Tensor]

    def accumulated(self, number: int, parameter: torch.Tensor) -> None:
        """Called by torch when backward has added to a parameter's gradient.

        Raises:
            RuntimeError: the gradient was changed after it was announced.
        """
        if number in self.stored:
            raise RuntimeError(
                "A parameter received another part of its gradient after fastdp took the first part for all of it: a "
                "part of the module runs backward inside backward, which it did not in the step before "
                "(torch.utils.checkpoint with use_reentrant=True). This step is lost; the next ones take it into "
                "account. Preferably pass use_reentrant=False."
            )
        if self.running is None or self.running.nested:
            return
        assert parameter.grad is not None
        extra = self.direct.get(number)
        self.arrived(number, parameter.grad if extra is None else dense(parameter.grad) + extra)


def _backward_again(running: ReplicaContext, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Run `backward` of the user's code; inside the backward of a step, mark the replica as nested."""
    running.nested = running.nested or running.backward
    return function(*args, **kwargs)


HANDLERS: dict[Any, Handler] = {torch.autograd.backward: _backward_again, torch.Tensor.backward: _backward_again}
