"""Gradients of activations: what `retain_grad` and hooks on merged outputs see on several devices."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from fastdp.program.torch.replica import ReplicaContext
from fastdp.tensors.function_mode import Handler
from fastdp.tensors.row_effects import Effect, Layout


def _retain_grad(running: ReplicaContext, function: Any, args: Any, kwargs: Any) -> None:
    """Tensor.retain_grad inside forward."""
    if not running.keeps_graph and not args[0].is_leaf:
        raise NotImplementedError(
            "forward calls retain_grad, and a train step on several devices does not merge the gradients of "
            "activations. Write the loop (loss = loss_fn(model(x), y); loss.backward()), which does, or use gpus=[0]."
        )
    function(*args, **kwargs)


HANDLERS: dict[Any, Handler] = {torch.Tensor.retain_grad: _retain_grad}


def inner_of(parts: Sequence[torch.Tensor]) -> frozenset[int]:
    """The outputs from which other outputs are computed, by their numbers, found in a replica's graph."""
    edges = [(part.grad_fn, part.output_nr) for part in parts]
    found: set[int] = set()
    for at, edge in enumerate(edges):
        if edge[0] is not None:
            reached = _edges_below(edge[0])
            found.update(i for i, other in enumerate(edges) if i != at and (other in reached or other == edge))
    return frozenset(found)


def _edges_below(root: Any) -> set[tuple[Any, int]]:
    """The edges of autograd's graph that backward from a node comes through."""
    left, seen, edges = [root], {root}, set()
    while left:
        for edge in left.pop().next_functions:
            if edge[0] is not None:
                edges.add(edge)
                if edge[0] not in seen:
                    seen.add(edge[0])
                    left.append(edge[0])
    return edges


class OnlyThrough:
    """A hook on a merged output from which others are computed: it refuses gradients that end there.

    Torch, for which the module is one node, sees no path from the other outputs to it.

    Args:
        node: of autograd's graph, that of the module.
    """

    def __init__(self, node: Any) -> None:
        self._node = node

    def __call__(self, gradient: Any) -> None:
        """Called by torch in backward."""
        further = [node for node, _ in self._node.next_functions if node is not None]
        if gradient is not None and not any(map(torch._C._will_engine_execute_node, further)):
            raise NotImplementedError(
                "torch.autograd.grad by a tensor that the module has returned or kept, and from which it has computed "
                "another output: on several devices the gradient that comes through the module would be left out. Call "
                "retain_grad() on the tensor and read `grad` after backward, or use gpus=[0]."
            )


def refuse_ends(merged: torch.Tensor) -> None:
    """Hook `OnlyThrough` to an output. Torch's count of hooks, by which others notice new ones, stays."""
    count, RemovableHandle.next_id = RemovableHandle.next_id, -1
    try:
        merged.register_hook(OnlyThrough(merged.grad_fn))
    finally:
        RemovableHandle.next_id = count


def retained(
    merged: Mapping[int, torch.Tensor], inner: Collection[int], gradients: Sequence[torch.Tensor | None]
) -> list[int]:
    """The merged outputs whose gradients are wanted and are not only those that torch finds, by their numbers.

    Args:
        merged: the outputs that the user still has, by number.
        inner: the outputs from which others are computed.
        gradients: of the loss by the merged outputs, as far as torch finds them.

    Raises:
        NotImplementedError: there is a hook on one.
    """
    found = []
    for at, one in merged.items():
        if at not in inner or not any(one is not None for i, one in enumerate(gradients) if i != at):
            continue
        if any(not isinstance(hook, OnlyThrough) for hook in (one._backward_hooks or {}).values()):
            raise NotImplementedError(
                f"There is a hook on a tensor of shape {tuple(one.shape)} that the module has returned or kept, and "
                "from which it has computed another output. On several devices the hook would not see the gradient "
                "that comes through the module. Call retain_grad() on the tensor and read `grad` after backward, "
                "register the hook inside forward, or use gpus=[0]."
            )
        if one.retains_grad:
            found.append(at)
    return found


def keep(
    merged: torch.Tensor, parts: Sequence[torch.Tensor | None], layout: Layout, external: torch.Tensor | None
) -> None:
    """Add a gradient to the `grad` that a merged output retains.

    Args:
        merged: the output.
        parts: the replicas' gradients by their parts of it.
        layout: how it depends on the rows.
        external: what torch itself has just added.
    """
    found = [part for part in parts if part is not None]
    if not found:
        return
    if layout.effect is Effect.ROWS:
        if len(found) < len(parts):
            raise RuntimeError("Backward has reached a retained tensor on some devices only.")
        total = torch.cat(found, layout.axis or 0)
    else:
        total = found[0] if layout.effect is Effect.SUM else sum(found[1:], found[0])
    before = merged.grad
    if before is None or (external is not None and torch.equal(before, external)):
        merged.grad = total.to(merged)
    else:
        merged.grad = before + total.to(merged) - (0 if external is None else external)
