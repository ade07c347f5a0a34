"""Runs the hooks of the user's parameters on gradients of the global batch, once for all replicas.

A replica's backward finds a part of each gradient. So in steps that several replicas share, hooks are taken aside while
replicas run, and the first replica runs them on the reduced gradients, in the order in which torch would: parameters in
the order of the first replica's backward, for each `register_hook` before `register_post_accumulate_grad_hook`. Hooks
on the nodes of autograd's graph that accumulate gradients (`grad_fn.next_functions`) run before and after that.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

Hooks = OrderedDict[int, Callable[..., Any]]


class NodeHooks:
    """The hooks on the nodes that accumulate gradients: torch keeps them where only adding another one shows them."""

    def __init__(self) -> None:
        self._looked = -1
        self._found: dict[int, tuple[Hooks, Hooks]] = {}

    def of(self, users: Sequence[torch.Tensor]) -> dict[int, tuple[Hooks, Hooks]]:
        """The tables of hooks that run before and after a gradient is accumulated, by the parameter's number.

        Looks at all parameters only after something was hooked anywhere.
        """
        if RemovableHandle.next_id != self._looked:
            self._found = {i: _hooks_on_node(user) for i, user in enumerate(users) if user.requires_grad}
        elif self._found:
            self._found = {i: _hooks_on_node(users[i]) for i in self._found if users[i].requires_grad}
        self._found = {i: tables for i, tables in self._found.items() if any(tables)}
        self._looked = RemovableHandle.next_id
        return self._found


def _hooks_on_node(parameter: torch.Tensor) -> tuple[Hooks, Hooks]:
    """The hooks before and after the node that accumulates a parameter's gradient."""
    looked = RemovableHandle.next_id
    node = get_gradient_edge(parameter).node
    handles = node.register_prehook(_nothing), node.register_hook(_nothing)
    tables = [handle.hooks_dict_ref() for handle in handles]
    for handle in handles:
        handle.remove()
    RemovableHandle.next_id = looked  # by which others notice new hooks
    return tables[0], tables[1]


def has_node_hooks(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether there are hooks on the nodes that accumulate the gradients of these parameters."""
    return any(any(_hooks_on_node(parameter)) for parameter in parameters if parameter.requires_grad)


def _nothing(*_: Any) -> None:
    """A hook that does nothing."""


class HookedGradients:
    """The hooks that run in one step.

    Args:
        users: the user's own parameters that can have a gradient.
        nodes: finds hooks on autograd's nodes, and knows what it has found; None: look now.
    """

    stays_in_process = True

    def __init__(self, users: Sequence[torch.Tensor], nodes: NodeHooks | None = None) -> None:
        self._users = users
        self._tables = (nodes or NodeHooks()).of(users)
        self._on_nodes = {i: (dict(before), dict(after)) for i, (before, after) in self._tables.items()}
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
        return bool(self._hooks or self._on_nodes)

    def __contains__(self, number: int) -> bool:
        return number in self._hooks or number in self._on_nodes

    @contextmanager
    def aside(self, arrived: Callable[[int, torch.Tensor], object] | None) -> Iterator[None]:
        """Hold this while the first replica's passes run on the user's parameters: it takes their hooks aside.

        Args:
            arrived: called with the number of a parameter and the parameter when its gradient is accumulated.
        """
        ours: list[Hooks] = []
        after = [user._post_accumulate_grad_hooks for user in self._users]
        for i, user in enumerate(self._users):
            if i in self._hooks and self._hooks[i][0]:
                user._backward_hooks = None
            if i in self or (arrived is not None and user.requires_grad):
                ours.append(OrderedDict({0: partial(self._arrive, i, arrived)}))
                user._post_accumulate_grad_hooks = ours[-1]
        for tables in self._tables.values():
            for table in tables:
                table.clear()
        try:
            yield
        finally:
            for i, tables in self._tables.items():
                for table, hooks in zip(tables, self._on_nodes[i], strict=True):
                    table.update(hooks)
            for i, user in enumerate(self._users):
                if i in self._hooks and self._hooks[i][0]:
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
        hooked = sorted({*self._hooks, *self._on_nodes}, reverse=True)
        rest = (i for i in hooked if i not in self._arrived)  # only other replicas have a part
        for i in dict.fromkeys([*self._arrived, *rest]):
            gradient = gradients[i]
            if gradient is not None:
                gradients[i] = self._run(i, gradient.clone())

    def _run(self, number: int, gradient: torch.Tensor) -> torch.Tensor | None:
        """Run one parameter's hooks; the gradient that they leave."""
        before, after = self._hooks.get(number, (None, None))
        node_before, node_after = self._on_nodes.get(number, ({}, {}))
        for hook in list((before or {}).values()):
            changed = hook(gradient)
            gradient = gradient if changed is None else changed
        for hook in node_before.values():
            changed = hook((gradient,))
            gradient = gradient if changed is None else changed[0] if isinstance(changed, tuple) else changed
        if not after and not node_after:
            return gradient
        user = self._users[number]
        user.grad = gradient
        for hook in list((after or {}).values()):
            hook(user)
        for hook in node_after.values():
            hook((), (gradient,))
        return user.grad
