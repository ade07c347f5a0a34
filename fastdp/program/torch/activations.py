"""Gradients of activations: what `retain_grad` and hooks on merged outputs see on several devices."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

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


@dataclass(frozen=True, slots=True)
class Inner:
    """Which outputs are computed from which others, by their numbers.

    Attributes:
        sources: of each output that is computed from others: these.
        same: of each output that is the same as one before it: that one.
    """

    sources: Mapping[int, frozenset[int]] = field(default_factory=dict)
    same: Mapping[int, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.sources or self.same)

    @property
    def starts(self) -> frozenset[int]:
        """The outputs from which others are computed."""
        return frozenset().union(*self.sources.values())


def inner_of(parts: Sequence[torch.Tensor]) -> Inner:
    """Which of a replica's outputs are computed from others, found in its graph."""
    edges = [(part.grad_fn, part.output_nr) for part in parts]
    places: dict[Any, int] = {}
    same = {i: places[edge] for i, edge in enumerate(edges) if edge[0] and places.setdefault(edge, i) != i}
    sources = {}
    for at, edge in enumerate(edges):
        if edge[0] is not None and at not in same:
            reached = _edges_below(edge[0])
            found = frozenset(place for other, place in places.items() if place != at and other in reached)
            if found:
                sources[at] = found
    return Inner(sources, same)


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


def retained(
    merged: Mapping[int, torch.Tensor], starts: Collection[int], gradients: Sequence[torch.Tensor | None]
) -> list[int]:
    """The merged outputs that retain their gradients, which are not only those that torch finds, by their numbers.

    Args:
        merged: the outputs that the user still has, by number.
        starts: those from which others are computed, unless torch gets their gradients through the module.
        gradients: of the loss by the merged outputs, as far as torch finds them.
    """
    return [
        at
        for at, one in merged.items()
        if at in starts and one.retains_grad and any(one is not None for i, one in enumerate(gradients) if i != at)
    ]


def merged_gradient(parts: Sequence[torch.Tensor | None], layout: Layout) -> torch.Tensor | None:
    """The gradient by a merged output, from the replicas' gradients by their parts of it; None if there is none."""
    found = [part for part in parts if part is not None]
    if not found:
        return None
    if layout.effect is Effect.ROWS:
        if len(found) < len(parts):
            raise RuntimeError("Backward has reached an output of the module on some devices only.")
        return torch.cat(found, layout.axis or 0)
    return found[0] if layout.effect is Effect.SUM else sum(found[1:], found[0])


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
    total = merged_gradient(parts, layout)
    if total is None:
        return
    before = merged.grad
    if before is None or (external is not None and torch.equal(before, external)):
        merged.grad = total.to(merged)
    else:
        merged.grad = before + total.to(merged) - (0 if external is None else external)
