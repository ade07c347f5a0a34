"""Runs the hooks of the user's parameters on gradients of the global batch, once for all replicas.

A replica's backward finds a part of each gradient. So in steps that several replicas share, hooks are taken aside while
replicas run, and the first replica runs them on the reduced gradients, in the order in which torch would: parameters in
the order of the first replica's backward, for each `register_hook` before `register_post_accumulate_grad_hook`.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from fastdp.errors import DeviceTimeoutError, StepAborted

Hooks = OrderedDict[int, Callable[..., Any]]


class HookedGradients:
    """The hooks that run in one step, and what they make of gradients and parameters.

    Args:
        users: the user's own parameters that can have a gradient.
        timeout: seconds that a replica waits for the first one's hooks.
    """

    def __init__(self, users: Sequence[torch.Tensor], timeout: float) -> None:
        self._users = users
        self._hooks = {i: (user._backward_hooks, user._post_accumulate_grad_hooks) for i, user in enumerate(users)}
        self._hooks = {i: hooks for i, hooks in self._hooks.items() if any(hooks)}
        self._timeout = timeout
        self._arrived: list[int] = []
        self._gradients: dict[int, torch.Tensor | None] = {}
        self._parameters: dict[int, torch.Tensor] = {}
        self._over = threading.Event()

    def __bool__(self) -> bool:
        return bool(self._hooks)

    def __contains__(self, number: int) -> bool:
        return number in self._hooks

    @contextmanager
    def aside(self, arrived: Callable[[int, torch.Tensor], object] | None) -> Iterator[None]:
        """Hold this while the first replica's passes run on the user's parameters: it takes their hooks aside.

        Args:
            arrived: called with the number of a parameter and the parameter when its gradient is accumulated.
        """
        ours: list[Hooks] = []
        after = [user._post_accumulate_grad_hooks for user in self._users]
        for i, user in enumerate(self._users):
            if i in self and self._hooks[i][0]:
                user._backward_hooks = None
            if i in self or (arrived is not None and user.requires_grad):
                ours.append(OrderedDict({0: partial(self._arrive, i, arrived)}))
                user._post_accumulate_grad_hooks = ours[-1]
        try:
            yield
        finally:
            for i, user in enumerate(self._users):
                if i in self and self._hooks[i][0]:
                    user._backward_hooks = self._hooks[i][0]
                if user._post_accumulate_grad_hooks is not after[i]:
                    user._post_accumulate_grad_hooks = after[i]
            for hooks in ours:  # torch goes on to call these where None has replaced them
                hooks.clear()

    def _arrive(
        self, number: int, arrived: Callable[[int, torch.Tensor], object] | None, parameter: torch.Tensor
    ) -> None:
        if number in self:
            self._arrived.append(number)
        if arrived is not None:
            arrived(number, parameter)

    def ran(self) -> None:
        """Note that torch itself has run the hooks, in a step of one replica."""
        self._parameters = {i: self._users[i].detach().clone() for i, (_, after) in self._hooks.items() if after}
        self._hooks = {}
        self._over.set()

    def run(self, gradients: list[torch.Tensor | None]) -> None:
        """Run the hooks on the first replica's thread, on reduced gradients. Replaces those by what hooks return.

        Args:
            gradients: by number; None where no replica has one.
        """
        try:
            rest = (i for i in reversed(self._hooks) if i not in self._arrived)  # only other replicas have a part
            for i in dict.fromkeys([*self._arrived, *rest]):
                gradient = gradients[i]
                if gradient is not None:
                    gradients[i] = self._gradients[i] = self._run(i, gradient.clone())
            for device in {user.device for user in self._users if user.is_cuda}:
                torch.cuda.current_stream(device).synchronize()
            self._over.set()
        finally:
            self._failed = not self._over.is_set()
            self._over.set()

    _failed = False

    def _run(self, number: int, gradient: torch.Tensor) -> torch.Tensor | None:
        """Run one parameter's hooks; the gradient that they leave."""
        before, after = self._hooks[number]
        for hook in list((before or {}).values()):
            changed = hook(gradient)
            gradient = gradient if changed is None else changed
        if not after:
            return gradient
        user = self._users[number]
        user.grad = gradient
        for hook in list(after.values()):
            hook(user)
        self._parameters[number] = user.detach().clone()
        return user.grad

    def take(self, gradients: list[torch.Tensor | None], parameters: Sequence[torch.Tensor]) -> None:
        """Take what the first replica's hooks have made of gradients and parameters. On another replica's thread.

        Raises:
            StepAborted: a hook has failed.
            DeviceTimeoutError: the hooks have not ended in time.
        """
        if not self._over.wait(self._timeout):
            raise DeviceTimeoutError(f"Hooks on parameters took longer than {self._timeout} seconds.")
        if self._failed:
            raise StepAborted("A hook on a parameter failed on the first replica.")
        for i, gradient in self._gradients.items():
            gradients[i] = None if gradient is None else gradient.to(parameters[i].device, copy=True)
        for i, value in self._parameters.items():
            parameters[i].detach().copy_(value)
