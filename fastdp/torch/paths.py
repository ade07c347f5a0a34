"""Autograd's graph between the merged outputs of a pass: from each output to those that it is computed from."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import get_gradient_edge

from fastdp.tensors.compiled import not_compiled

if TYPE_CHECKING:
    from fastdp.torch.autograd import OpenPass


@dataclass(slots=True)
class Watched:
    """Which outputs of a pass somebody wants gradients of, among those from which others are computed.

    Attributes:
        probe: a tensor that backward reaches unless it is to find the gradients of some tensors alone.
        hooks: of the merged outputs, by number. The graph keeps them, also without the outputs.
        nodes: of the merged outputs, by number.
        cut: those whose gradients have come through the module in a backward pass, and its number.
        repeated: outputs that were computed again in such a pass, and its number.
    """

    probe: torch.Tensor = field(default_factory=lambda: torch.zeros((), requires_grad=True))
    hooks: dict[int, weakref.ref[Any]] = field(default_factory=dict)
    nodes: dict[int, weakref.ref[Any]] = field(default_factory=dict)
    cut: tuple[int, set[int]] = (-1, set())
    repeated: tuple[int, list[torch.Tensor]] = (-1, [])

    def begin(self, at: int, merged: torch.Tensor) -> None:
        """Notice hooks on an output, by the way that torch itself notices them."""
        hooks: Any = OrderedDict()
        merged._backward_hooks = hooks
        assert merged.grad_fn is not None
        merged.grad_fn._register_hook_dict(merged)
        self.hooks[at], self.nodes[at] = weakref.ref(hooks), weakref.ref(merged.grad_fn)

    def among(self, opened: OpenPass, starts: Sequence[int]) -> list[int]:
        """Those of some outputs whose gradients are wanted in the present backward pass."""
        partly = not _executes(get_gradient_edge(self.probe).node)
        found = []
        for at in starts:
            hooks, node = self.hooks[at](), self.nodes[at]()
            # Torch does not tell whether it wants the gradient itself or what comes after it.
            asked = partly and node is not None and opened.work.merged[at]() is not None and _executes(node)
            if hooks or (asked and not self._only_passed(opened, at)):
                found.append(at)
        return found

    def _only_passed(self, opened: OpenPass, at: int) -> bool:
        """Whether a gradient of a gradient goes on through an attribute of the module, which nobody asked for."""
        further = (node for node, _ in opened.node().next_functions if node is not None)
        goes_on = any(map(_executes, further))
        return torch.is_grad_enabled() and goes_on and at >= opened.returned

    def note(self, starts: Sequence[int]) -> None:
        """Note that the gradients of these have come through the module in the present backward pass."""
        task = torch._C._current_graph_task_id()
        if self.cut[0] != task:
            self.cut = task, set()
        self.cut[1].update(starts)

    def present_cut(self) -> set[int]:
        """What was noted in the present backward pass."""
        task, starts = self.cut
        return starts if task == torch._C._current_graph_task_id() else set()


def _executes(node: Any) -> bool:
    """Whether the present backward pass comes to a node of autograd's graph."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf whose gradient torch.autograd.grad is to find
        return True


def with_paths(opened: OpenPass, outputs: Sequence[torch.Tensor], merged: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The merged outputs, with the graph between them.

    Args:
        outputs: their values.
        merged: tensors of their shapes, which the node of the pass has given; the outputs themselves where they are
            computed from no other.
    """
    inner, found, watched = opened.work.inner, list(merged), opened.watched
    wants = opened.work.requires_grad
    starts = sorted(inner.starts, key=lambda at: len(inner.sources.get(at, ())))
    last = [at for at in inner.sources if at not in inner.starts and wants[at]]
    groups = [[at] for at in starts if at in inner.sources] + ([last] if last else [])
    for at in starts:
        if at not in inner.sources:
            watched.begin(at, found[at])
    for ends in groups:
        sources = sorted(frozenset().union(*(inner.sources[at] for at in ends)))
        path = Path(opened, ends, sources)
        given = [*(found[at] for at in sources), *(merged[at] for at in ends)]
        values = _Path.apply(path, [outputs[at] for at in ends], watched.probe, *given)
        for at, value in zip(ends, values, strict=True):
            found[at] = value
            if at in inner.starts:
                watched.begin(at, value)
    for at, first in inner.same.items():
        found[at] = found[first]
    return found


@dataclass(slots=True)
class Path:
    """From some outputs of a pass, the ends, to those that they are computed from, the starts; both by number."""

    opened: OpenPass
    ends: Sequence[int]
    starts: Sequence[int]


class _Path(torch.autograd.Function):
    """A path as a node of autograd's graph.

    Its inputs are the starts, and what the node of the pass has given in the place of the ends, whose gradients go
    there as they are.
    """

    @staticmethod
    def forward(
        ctx: Any, path: Path, outputs: Sequence[torch.Tensor], probe: torch.Tensor, *given: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.path = path
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @not_compiled
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        path: Path = ctx.path
        opened, found = path.opened, dict[int, "torch.Tensor | None"]()
        wanted = opened.watched.among(opened, path.starts) if any(g is not None for g in gradients) else []
        if wanted:
            opened.work.note_watched()
            found = dict(zip(wanted, opened.calls.path(opened, path.ends, gradients, wanted), strict=True))
            opened.watched.note(wanted)
        return None, None, None, *(found.get(at) for at in path.starts), *gradients


def in_place_of(outputs: Sequence[torch.Tensor], ends: Sequence[int]) -> list[torch.Tensor]:
    """The outputs, with tensors of the same shapes that take no memory in place of the ends."""
    return [one.new_empty(()).expand(one.shape) if at in ends else one for at, one in enumerate(outputs)]
