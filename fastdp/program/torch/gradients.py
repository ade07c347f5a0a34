"""Brings the gradients of a replica's module from backward into its flat buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge

from fastdp.buffers import FlatBuffers
from fastdp.program.torch.parameter_hooks import HookedGradients
from fastdp.program.torch.replica import ReplicaContext
from fastdp.tensors.arrays import settle
from fastdp.tensors.forward_mode import WHY_REFUSED
from fastdp.tensors.function_mode import Handler, keeps_mode, plain
from fastdp.tensors.gradient_buckets import GradientBuckets, dense


@dataclass(frozen=True, slots=True)
class Found:
    """Which parameters have a gradient, by position, and the parts of those gradients whose parts are all sparse.

    In the flat buffers all gradients are dense. Plain torch adds sparse gradients up by putting their rows behind each
    other, and optimizers ask which rows there are.
    """

    used: frozenset[int] = frozenset()
    sparse: dict[int, list[torch.Tensor]] = field(default_factory=dict)

    def with_all(self, others: Iterable[Found]) -> Found:
        """What is found here or in one of the others, which come from other replicas or from later passes."""
        every = [self, *others]
        used = frozenset().union(*(one.used for one in every))
        dense = frozenset().union(*(one.used - one.sparse.keys() if one.sparse else one.used for one in every))
        sparse = {i: [part for one in every for part in one.sparse.get(i, ())] for i in sorted(used - dense)}
        return Found(used, sparse)

    def gradients(self, reduced: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """The gradients of the global batch, by position.

        Args:
            reduced: the dense ones, by position, on the device where all shall be.
        """
        found = [gradient if i in self.used else None for i, gradient in enumerate(reduced)]
        for i, parts in self.sparse.items():
            target = reduced[i]
            assert target is not None
            found[i] = _with_all_rows([part.to(target.device) for part in parts])
        return found


def _with_all_rows(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of sparse tensors: the rows of all, also where a row is in several. Torch's own sum may merge them."""
    indices, values = torch.cat([p._indices() for p in parts], 1), torch.cat([p._values() for p in parts])
    return torch.sparse_coo_tensor(indices, values, parts[0].shape, check_invariants=False)


class Gradients:
    """The gradients of a replica's parameters, by position.

    Args:
        parameters: the replica's own copies; None for the user's own parameters.
        buffers: the replica's gradient buffers, which the engine reduces.
        flat: their arrays as tensors.

    Attributes:
        present: the gradients of the step: in `flat`, or where backward has left them.

    While passes run, the user's parameters lose what they had as `grad`.

    From the second step on, buckets are announced as ready during backward, if backward runs once per step. A
    checkpoint that runs it again inside (`torch.utils.checkpoint` with `use_reentrant=True`) computes a gradient in
    parts, and nothing marks the last part: then no bucket is announced.
    """

    def __init__(self, parameters: list[torch.Tensor] | None, buffers: FlatBuffers, flat: list[torch.Tensor]) -> None:
        self.flat = flat
        self.present: list[torch.Tensor | None] = list(flat)
        self._copies = parameters
        self._own: Sequence[torch.Tensor] = parameters or ()
        self._arrivals = _Accumulated(buffers, flat)
        self._hooked: set[int] = set()
        self._runs_once: bool | None = None

    @contextmanager
    def passes(
        self, users: Sequence[torch.Tensor], hooked: HookedGradients | None, *, announces: bool
    ) -> Iterator[None]:
        """Hold this while passes run.

        Args:
            users: the user's own parameters at present.
            hooked: takes the hooks of the user's parameters aside; None in a step of one replica.
            announces: somebody wants to know of complete buckets.
        """
        self._arrivals.stored = set()
        announces = announces and self._arrivals.useful
        if self._copies is not None:
            self.follow(users, announces=announces)
            yield
            return
        self._own = users
        before = [user.grad for user in users]
        for user in users:
            user.grad = None
        try:
            with self._hooks_aside(hooked, announces):
                yield
        finally:
            for user, gradient in zip(users, before, strict=True):
                user.grad = gradient

    def replayed(self) -> None:
        """A captured step has written all gradients to the flat buffer."""
        self.present = list(self.flat)

    def _hooks_aside(self, hooked: HookedGradients | None, announces: bool) -> AbstractContextManager[None]:
        """Take the user's hooks aside, and hook the parameters to hear of their gradients."""
        if hooked is None or not (hooked or announces):
            return nullcontext()
        return hooked.aside(self._arrivals.accumulated if announces else None)

    def follow(self, users: Sequence[torch.Tensor], *, announces: bool = False) -> None:
        """Clear the gradients of copies, and copy `requires_grad` from the user's parameters."""
        for i, (own, user) in enumerate(zip(self._copies or (), users, strict=self._copies is not None)):
            own.grad = None
            if own.requires_grad is not user.requires_grad:
                own.requires_grad_(user.requires_grad)
            if announces and own.requires_grad and i not in self._hooked:
                self._hooked.add(i)
                own.register_post_accumulate_grad_hook(partial(self._arrivals.accumulated, i))

    @contextmanager
    def announcing(self, running: ReplicaContext, direct: dict[int, torch.Tensor]) -> Iterator[None]:
        """Hold this during backward: it announces buckets that become complete.

        `direct` are the gradients that the loss function has by parameters directly, by position. They are added.
        """
        if self._arrivals.useful and self._runs_once and running.context.listens:
            self._arrivals.running, self._arrivals.direct = running, direct
            self._arrivals.begin(running.context.ready)
        try:
            yield
        finally:
            self._arrivals.end()
            self._arrivals.running, self._arrivals.direct = None, {}
            self._runs_once = self._runs_once is not False and not running.nested

    def store(self, direct: dict[int, torch.Tensor], *, keep: bool = False) -> Found:
        """Write the gradients of backward and the `direct` ones to the flat buffer, zeros where there is none.

        Announced gradients are in the buffer already. Returns what there is; sparse parts can be read on any device.

        Args:
            direct: the gradients that the loss function has by parameters directly, by position.
            keep: leave the gradients of backward where they are: nobody reduces them.
        """
        if keep:
            self.present = [parameter.grad for parameter in self._own]
            return Found(frozenset(i for i, gradient in enumerate(self.present) if gradient is not None))
        self.present = list(self.flat)
        stored, self._arrivals.stored = self._arrivals.stored, set()
        used, sparse = set(stored), {}
        views: list[torch.Tensor] = []
        firsts: list[torch.Tensor] = []
        others: list[tuple[torch.Tensor, torch.Tensor]] = []
        with plain(), torch.no_grad():
            for i, (parameter, view) in enumerate(zip(self._own, self.flat, strict=True)):
                found = [g for g in (parameter.grad, direct.get(i)) if g is not None]
                parameter.grad = None
                if found and all(gradient.is_sparse for gradient in found):
                    sparse[i] = found
                if i in stored:
                    continue
                if not found:
                    view.zero_()
                    continue
                used.add(i)
                views.append(view)
                firsts.append(dense(found[0]))
                others += [(view, more) for more in found[1:]]
            if views:
                torch._foreach_copy_(views, firsts)
            for view, more in others:
                view.add_(more)
        settle(part for parts in sparse.values() for part in parts)
        return Found(frozenset(used), sparse)


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
        with plain():
            assert parameter.grad is not None
            extra = self.direct.get(number)
            self.arrived(number, parameter.grad if extra is None else dense(parameter.grad) + extra)


@keeps_mode
def _backward_again(running: ReplicaContext, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Run `backward` of the user's code; inside the backward of a step, mark the replica as nested.

    Torch gets edges of the graph: given tensors, it would switch the mode off for what runs in backward.
    """
    running.nested = running.nested or running.backward
    names = ["tensors", "grad_tensors", "retain_graph", "create_graph", "inputs"]
    if function is torch.autograd.backward:
        names.insert(4, "grad_variables")
    given = dict(zip(names, args, strict=False)) | kwargs
    given["grad_tensors"] = given.pop("gradient", given.get("grad_tensors"))
    with plain():
        tensors, seeds = given.pop("tensors"), given.pop("grad_tensors")
        roots = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        weights = [None] * len(roots) if seeds is None else [seeds] if isinstance(seeds, torch.Tensor) else list(seeds)
        if all(isinstance(root, torch.Tensor) and root.requires_grad for root in roots):
            weights = [_seed(root, weight) for root, weight in zip(roots, weights, strict=True)]
            roots = [get_gradient_edge(root) for root in roots]
    return torch.autograd.backward(roots, weights, **given)


def _seed(root: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor | None:
    """The gradient by a root: one for a number, if none is given."""
    return torch.ones_like(root) if weight is None and root.numel() == 1 else weight


def _forward_mode(running: ReplicaContext, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Refuse derivatives in forward mode, whose levels torch counts for the whole process.

    Raises:
        NotImplementedError: always. Replicas at the same time would take or end each other's levels.
    """
    raise NotImplementedError(
        f"{WHY_REFUSED}, inside of forward; or compute them outside of it, by model.module; or use gpus=[0]."
    )


HANDLERS: dict[Any, Handler] = {
    torch.autograd.backward: _backward_again,
    torch.Tensor.backward: _backward_again,
    torch._make_dual: _forward_mode,
}
