"""Runs the hooks of the user's parameters on gradients of the global batch, once for all replicas.

A replica's backward finds a part of each gradient. So in steps that several replicas share, hooks are taken aside while
replicas run, and the first replica runs them on the reduced gradients, in the order in which torch would: parameters in
the order of the first replica's backward, for each `register_hook` before `register_post_accumulate_grad_hook`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

Hooks = OrderedDict[int, Callable[..., Any]]


class HookedGradients:
    """The hooks that run in one step.

    Args:
        users: the user's own parameters that can have a gradient.
    """

    def __init__(self, users: Sequence[torch.Tensor]) -> None:
        self._users = users
        self._hooks = {i: (user._backward_hooks, user._post_accumulate_grad_hooks) for i, user in enumerate(users)}
        self._hooks = {i: hooks for i, hooks in self._hooks.items() if any(hooks)}
        self._arrived: list[int] = []

    def check(self) -> None:
        """Refuse hooks that only run inside a backward pass of all gradients.

        Raises:
            NotImplementedError: there is one.
        """
        every = [hook for before, _ in self._hooks.values() for hook in (before or {}).values()]
        if any(getattr(hook, "__module__", "") == "torch.autograd.graph" for hook in every):
            raise NotImplementedError(
                "register_multi_grad_hook on parameters runs inside one backward pass, and in a train step on several "
                "devices each has its own. Write the loop (loss = loss_fn(model(x), y); loss.backward()), where it "
                "runs once with the gradients of the whole batch, or use register_post_accumulate_grad_hook."
            )

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

    def run(self, gradients: list[torch.Tensor | None]) -> None:
        """Run the hooks on reduced gradients. Replaces those by what hooks leave. Changes the parameters' `grad`.

        Args:
            gradients: by number; None where no replica has one.
        """
        rest = (i for i in reversed(self._hooks) if i not in self._arrived)  # only other replicas have a part
        for i in dict.fromkeys([*self._arrived, *rest]):
            gradient = gradients[i]
            if gradient is not None:
                gradients[i] = self._run(i, gradient.clone())

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
        return user.grad
