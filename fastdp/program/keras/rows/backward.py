"""Runs backward on some rows and on two parts of them, and checks that the gradients add up.

They do where each row's gradient depends on that row alone. A hook on a tensor, or a backward of an autograd.Function
or of `keras.ops.custom_gradient`, may combine rows: `g / ops.norm(g)`. Each device would see its own rows.
Models without such code are not tried: torch's own derivatives are linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction

from fastdp.patching import Patch
from fastdp.tensors.row_effects import Effect, Layout

# Runs forward on some rows. Within its context there are: values, leaves that all rows share, leaves that have rows.
Forward = tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]
Run = Callable[[int, int], AbstractContextManager[Forward]]
_SIZES = (1e-2, 1e3)  # of the gradients that backward begins with: a hook may clip large ones only
_MOST, _LEAST = 0.03, 1e-5  # of a gradient's norm, and of the largest one: rounding may switch single units on or off
# Functions of libraries that run code of the user's in backward.
_RUN_OTHERS = ("CustomGradientFunction", "CheckpointFunction", "BackwardHookFunction")
_LIBRARIES = ("torch", "keras", "fastdp")


@dataclass(slots=True)
class Differentiated:
    """Gradients of one pass.

    Attributes:
        by_size: for each size of the first gradients, those of the leaves.
        is_plain: whether no code of the user's runs in backward.
    """

    by_size: list[list[torch.Tensor | None]]
    is_plain: bool


@dataclass(slots=True)
class Seeds:
    """The gradients with which backward begins, chosen by the values for all rows.

    Args:
        layouts: how the values depend on the rows.
    """

    layouts: Sequence[Layout]
    every: Sequence[torch.Tensor] = ()

    def begin(self, values: Sequence[torch.Tensor]) -> None:
        """Choose them for the values of all rows."""
        generator = torch.Generator().manual_seed(4)
        self.every = [torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v.device) for v in values]

    def of(
        self, values: Sequence[torch.Tensor], start: int, stop: int, total: int, *, padded: bool = False
    ) -> list[torch.Tensor | None]:
        """Those of some rows; None where nothing is known of a value, or its gradient is not asked for.

        `padded`: the values are those of all rows, and the gradients of other rows are zero.
        """
        found: list[torch.Tensor | None] = []
        for value, seed, layout in zip(values, self.every, self.layouts, strict=True):
            share = (stop - start) / total
            if not value.requires_grad or layout.effect not in _COMBINED:
                found.append(None)
            elif layout.axis is not None:
                found.append(_of_rows(seed, layout, start, stop, padded=padded))
            else:
                found.append(seed if layout.effect is Effect.SUM else seed * share)
        return found


def _of_rows(seed: torch.Tensor, layout: Layout, start: int, stop: int, *, padded: bool) -> torch.Tensor:
    """The part of a gradient that belongs to some rows."""
    at = layout.axis or 0, layout.per_row * start, layout.per_row * (stop - start)
    if not padded:
        return seed.narrow(*at)
    whole = torch.zeros_like(seed)
    whole.narrow(*at).copy_(seed.narrow(*at))
    return whole


_COMBINED = (Effect.ROWS, Effect.SAME, Effect.MEAN, Effect.SUM)


def differentiate(
    values: Sequence[torch.Tensor],
    seeds: Sequence[torch.Tensor | None],
    leaves: Sequence[torch.Tensor],
    *,
    hooked: bool,
    always: bool,
) -> Differentiated:
    """Run backward from some values, unless nothing of the user's would run in it.

    Args:
        values: outputs and losses.
        seeds: their gradients; None for those that are left out.
        leaves: tensors whose gradients are asked for.
        hooked: whether the pass has put hooks on tensors.
        always: run it in any case.
    """
    pairs = [(value, seed) for value, seed in zip(values, seeds, strict=True) if seed is not None]
    is_plain = not (hooked or _runs_own_code([value for value, _ in pairs]))
    if not pairs or not leaves or (is_plain and not always):
        return Differentiated([], is_plain)
    found = []
    for size in _SIZES:
        sized = [(seed * size).to(value.dtype) for value, seed in pairs]
        roots = [value for value, _ in pairs]
        found.append(list(torch.autograd.grad(roots, leaves, sized, allow_unused=True, retain_graph=True)))
    return Differentiated(found, is_plain)


def add_up(whole: Differentiated, parts: Sequence[Differentiated]) -> bool:
    """Whether the gradients of the parts add up to those of all rows."""
    for expected, *every in zip(whole.by_size, *(part.by_size for part in parts), strict=True):
        largest = max((float(g.norm()) for g in expected if g is not None), default=0.0)
        for gradient, *found in zip(expected, *every, strict=True):
            there = [g for g in found if g is not None]
            if gradient is None or not there:
                if gradient is not None and float(gradient.norm()) > _LEAST * largest:
                    return False
                continue
            total = sum(there[1:], there[0])
            if total.shape != gradient.shape or not bool(torch.isfinite(gradient).all()):
                continue
            size = max(float(g.norm()) for g in (gradient, *there))
            if float((total - gradient).norm()) > _MOST * size + _LEAST * largest:
                return False
    return True


def _runs_own_code(roots: Sequence[torch.Tensor]) -> bool:
    """Whether a node of the graph runs code of the user's in backward."""
    seen: set[Any] = set()
    left = [root.grad_fn for root in roots if root.grad_fn is not None]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        kind = getattr(node, "_forward_cls", None) if isinstance(node, BackwardCFunction) else None
        if kind is not None and (kind.__module__.split(".")[0] not in _LIBRARIES or kind.__name__ in _RUN_OTHERS):
            return True
        left += [after for after, _ in node.next_functions]
    return False


class Hooks:
    """Whether a hook was put on a tensor or a node of a graph."""

    def __init__(self) -> None:
        self.found = False

    def noting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function that puts hooks on tensors."""

        def register(*args: Any, **kwargs: Any) -> Any:
            self.found = True
            return original(*args, **kwargs)

        return register


@contextmanager
def hooks_noted() -> Iterator[Hooks]:
    """Note whether the pass in this context puts hooks on tensors."""
    hooks = Hooks()
    names = ("register_hook", "register_post_accumulate_grad_hook")
    places = [(torch.Tensor, name, hooks.noting) for name in names]
    with Patch([*places, (torch.autograd.graph, "register_multi_grad_hook", hooks.noting)]):
        yield hooks


class BackwardTrial:
    """The gradients of a model or a layer for some rows and for two parts of them.

    Args:
        run: runs forward on some rows, by the first and the last, with a graph; backward runs within its context.
        layouts: how the values depend on the rows.
        cut, total: the first row of the second part, and the number of rows.
        together: only all rows can be run. The parts are then those of the first gradients.
    """

    def __init__(self, run: Run, layouts: Sequence[Layout], cut: int, total: int, *, together: bool = False) -> None:
        self._run, self._seeds = run, Seeds(layouts)
        self._cut, self._total, self._together = cut, total, together

    def differs(self) -> bool:
        """Whether the gradients of the parts do not add up. What cannot be run is left to the step."""
        whole = self._of(0, self._total, always=False)
        if whole is None or whole.is_plain:
            return False
        parts = [self._of(*part, always=True) for part in ((0, self._cut), (self._cut, self._total))]
        return not any(part is None for part in parts) and not add_up(whole, [part for part in parts if part])

    def _of(self, start: int, stop: int, *, always: bool) -> Differentiated | None:
        """The gradients of some rows; None where the values are not those that the layouts describe."""
        first, last = (0, self._total) if self._together else (start, stop)
        with torch.enable_grad(), hooks_noted() as hooks, self._run(first, last) as (values, shared, rows):
            if len(values) != len(self._seeds.layouts):
                return None
            if not self._seeds.every:
                self._seeds.begin(values)
            seeds = self._seeds.of(values, start, stop, self._total, padded=self._together)
            leaves = [*shared, *rows]
            found = differentiate(values, seeds, leaves, hooked=hooks.found, always=always)
        for gradients in found.by_size:
            for i in range(len(shared), len(leaves)):
                gradients[i] = _padded(gradients[i], first, self._total, last)
        return found


def _padded(gradient: torch.Tensor | None, start: int, total: int, stop: int) -> torch.Tensor | None:
    """The gradient of some rows among zeros for the others."""
    if gradient is None or stop - start == total:
        return gradient
    whole = gradient.new_zeros((total, *gradient.shape[1:]))
    whole[start:stop] = gradient
    return whole
