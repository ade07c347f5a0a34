"""Backward from some outputs of a module to others that they are computed from: gradients by returned activations.

For torch a pass of all devices is one node, through which it sees no path from one output to another. Where somebody
wants the gradient by an output that others are computed from, the replicas go back that way alone. Then backward goes
on from there by the whole gradient, which hooks may have changed: it takes the place of what arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.autograd.graph import get_gradient_edge

from fastdp.comm.context import Context
from fastdp.program.base import Result
from fastdp.program.torch.activations import merged_gradient
from fastdp.program.torch.following.merged import WriteNotes, write_notes
from fastdp.program.torch.loop_passes import ForwardPass
from fastdp.program.torch.passes import State, together_with
from fastdp.program.torch.rows.merging import own_gradient
from fastdp.tensors.collectives import StepPeers, peers_scope
from fastdp.tensors.function_mode import plain

Hook = Callable[[Any], "torch.Tensor | None"]


@dataclass(slots=True)
class PathPass:
    """A backward pass between outputs of a forward pass.

    Args:
        ends: the outputs that it begins at, by number.
        gradients: of the loss by these.
        starts: the outputs whose gradients are wanted, by number.
    """

    forward: ForwardPass
    ends: Sequence[int]
    gradients: Sequence[torch.Tensor | None]
    starts: Sequence[int]


@dataclass(slots=True)
class PathNotes:
    """What a replica tells of such a pass: its gradients by its parts of the `starts`, and what hooks have written."""

    found: list[torch.Tensor | None]
    writes: WriteNotes


def go_back(work: PathPass, state: State, context: Context) -> Result:
    """Run a backward pass between outputs on a replica."""
    kept, layouts = work.forward.kept[context.index], work.forward.layouts
    running = kept.running
    running.context.rendezvous, running.context.ready = context.rendezvous, context.ready
    roots, seeds = [], []
    for at, gradient in zip(work.ends, work.gradients, strict=True):
        own = own_gradient(gradient, kept.outputs[at], layouts[at], context.rows)
        if own is not None and kept.outputs[at].requires_grad:
            roots.append(kept.outputs[at])
            seeds.append(own.to(kept.outputs[at].device))
    with ExitStack() as together:
        if context.size > 1:
            together.enter_context(peers_scope(StepPeers(running.context)))  # for hooks
            together.enter_context(together_with(running))
        running.backward = True
        try:
            found = between(roots, seeds, [kept.outputs[at] for at in work.starts])
        finally:
            running.backward = False
    writes = write_notes(state.replica.guard, work.forward.batch.structure.roles, context.rows)
    return Result([], np.zeros(0), PathNotes([None if one is None else one.cpu() for one in found], writes))


def between(
    roots: Sequence[torch.Tensor],
    seeds: Sequence[torch.Tensor],
    starts: Sequence[torch.Tensor],
    *,
    create_graph: bool = False,
) -> list[torch.Tensor | None]:
    """The gradients by some tensors of a graph, each without what comes through another one of them.

    Raises:
        NotImplementedError: forward has registered a hook on one, which must run on the whole gradient.
    """
    found: dict[int, torch.Tensor] = {}

    def stop(at: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        if gradient is None:
            return None
        found[at] = gradient
        return torch.zeros_like(gradient)

    for start in starts:
        if start._backward_hooks:
            raise NotImplementedError(
                f"There is a hook on a tensor of shape {tuple(start.shape)} that forward has registered, and the "
                "gradient by the same tensor is wanted outside of the module, which returns it: several devices do "
                "not run one after the other. Register both outside or both inside forward, or use gpus=[0]."
            )
    if roots:
        with plain():
            edges = [get_gradient_edge(start) for start in starts]
            ends = [get_gradient_edge(root) for root in roots]
        with hooked({start: partial(stop, at) for at, start in enumerate(starts)}):  # not plain: checkpoints draw again
            torch.autograd.grad(
                ends, edges, list(seeds), retain_graph=True, create_graph=create_graph, allow_unused=True
            )
    return [found.get(at) for at in range(len(starts))]


@contextmanager
def hooked(hooks: Mapping[torch.Tensor, Hook]) -> Iterator[None]:
    """While the block runs, there are hooks on tensors that run before those that there are."""
    with plain():
        handles = [tensor.register_hook(hook) for tensor, hook in hooks.items()]
        for tensor, handle in zip(hooks, handles, strict=True):
            tensor._backward_hooks.move_to_end(handle.id, last=False)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def arriving(totals: Mapping[torch.Tensor, torch.Tensor]) -> dict[torch.Tensor, Hook]:
    """Hooks for `hooked` that put the whole gradient in the place of what arrives at a tensor."""

    def whole(total: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
        return total

    return {tensor: partial(whole, total) for tensor, total in totals.items()}


def merged_path(work: PathPass, every: Sequence[PathNotes]) -> list[torch.Tensor | None]:
    """The gradients by the merged `starts`.

    Raises:
        NotImplementedError: a hook inside the module has written something, and would do so twice.
    """
    written = sorted({place.name for notes in every for place in notes.writes.written})
    if written:
        raise NotImplementedError(
            f"A hook inside the module writes {', '.join(written)} in backward, and a gradient by a tensor that the "
            "module returns is wanted too: several devices would run the hook twice. Use gpus=[0], or register the "
            "hook on what the module returns."
        )
    found = []
    for at, parts in zip(work.starts, zip(*(notes.found for notes in every), strict=True), strict=True):
        outputs = [kept.outputs[at] for _, kept in sorted(work.forward.kept.items())]
        reached = any(part is not None for part in parts)
        whole = [
            torch.zeros_like(own, device="cpu") if part is None and reached else part
            for part, own in zip(parts, outputs, strict=True)
        ]
        found.append(merged_gradient(whole, work.forward.layouts[at]))
    return found
